"""Pictures that the user has as files: found in folders, and read as 8-bit RGB whatever their size and mode.

Letters: H and W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from flowrl.types import UserError
from rewards.registry import describe_error

__all__ = ["SUFFIXES", "find_pictures", "picture_size", "read_picture"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The files that are meant, in the order given; a folder stands for the pictures in it (not below it), sorted by name.

    Raises:
        UserError: a place is not there, is a file of another kind, or is a folder without pictures.
    """
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            found = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith("."))
            if not found:
                raise UserError(f"{place}: no pictures in this folder; they end in {', '.join(SUFFIXES)}, and folders inside it must be given by themselves")
            files += found
        elif not place.exists():
            raise UserError(f"{place}: no such file or folder")
        elif place.suffix.lower() not in SUFFIXES:
            raise UserError(f"{place}: is no picture that can be read; give {', '.join(SUFFIXES)}")
        else:
            files.append(place)
    return files


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height as the file's first bytes say, before it is turned upright.

    Raises:
        UserError: it is no picture; the message begins with the file.
    """
    with _opened(file) as image:
        return image.size


def read_picture(file: Path) -> Tensor:
    """A picture as uint8 [3, H, W], turned upright as its EXIF data says. Transparency is laid on white, 16-bit grey is rounded to 8 bit, CMYK is converted.

    Raises:
        UserError: it is damaged, animated, too large, or of a mode that has no RGB; the message begins with the file.
    """
    with _opened(file) as image:
        if getattr(image, "is_animated", False) and image.format != "MPO":  # as many cameras write: a JPEG with a preview behind it
            raise UserError(f"{file}: is an animation of {getattr(image, 'n_frames', 'several')} frames; give still pictures")
        return torch.from_numpy(np.array(_rgb(file, ImageOps.exif_transpose(image)))).permute(2, 0, 1).contiguous()


def _rgb(file: Path, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its kin; older releases of Pillow give 16-bit files as I
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError(f"{file}: has grey levels beyond 16 bit; convert it to 8 bit")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=_FORMATS) as image:
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{file}: is no PNG, JPEG, WebP or BMP picture, or its beginning is damaged") from error
    except Exception as error:
        raise UserError(f"{file}: cannot be read as a picture ({describe_error(error)})") from error
