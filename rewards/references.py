"""Reference pictures: what the samples of a prompt should look like, named by the key ``reference`` of the prompt's metadata, a path to an image file.

Letters: B samples, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowrl.types import Prompt, UserError

__all__ = ["References"]

_KEPT = 512  # pictures in memory; one of 512 x 512 takes 0.8 MB


class References:
    """Reads the reference picture of each prompt, once a size, and keeps the last 512.

    Args:
        reward: the name for messages.
        folder: where relative paths start.
    """

    def __init__(self, reward: str, folder: str) -> None:
        self.reward = reward
        self.folder = folder

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Look for every file, without reading more than its header.

        Raises:
            UserError: the first prompt without a usable reference.
        """
        for prompt in prompts:
            path = self.path(prompt)
            try:
                with Image.open(path):
                    pass
            except (OSError, Image.DecompressionBombError) as error:
                raise self._unreadable(prompt, path, error) from error

    def path(self, prompt: Prompt) -> Path:
        """The file of a prompt's reference.

        Raises:
            UserError: the prompt has no ``reference``, or it names no file.
        """
        named = prompt.metadata.get("reference")
        if not isinstance(named, str) or not named:
            raise UserError(
                f"reward {self.reward}: the prompt {prompt.text!r} needs the metadata `reference`, the path of a picture, and has {named!r}; "
                "add it to the prompts, or choose another reward"
            )
        path = Path(self.folder).expanduser() / Path(named).expanduser()
        if not path.is_file():
            raise UserError(f"reward {self.reward}: the reference of the prompt {prompt.text!r} is no file: {path}; correct the metadata or the `folder`")
        return path

    def read(self, prompt: Prompt, size: tuple[int, int] | None = None) -> Tensor:
        """The reference [3, H, W] float32 in [0, 1] on the CPU, upright and in RGB.

        Args:
            prompt: whose reference.
            size: H and W: scaled (bicubic, antialiased) until it covers them, and the middle cut out. None = as it is.
        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = self.path(prompt)
        try:
            pixels = _read(path, size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises on damaged files
            raise self._unreadable(prompt, path, error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def _unreadable(self, prompt: Prompt, path: Path, error: Exception) -> UserError:
        return UserError(f"reward {self.reward}: the reference of the prompt {prompt.text!r}, {path}, is no picture that can be read ({error})")


@lru_cache(maxsize=_KEPT)
def _read(path: Path, size: tuple[int, int] | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [H, W, 3]."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file).convert("RGB")
    if size is not None and picture.size != (size[1], size[0]):
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(picture)
