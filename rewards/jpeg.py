"""JPEG compressibility and incompressibility: how small or how large a picture is as a JPEG file. No weights, only Pillow.

size_kb = bytes of the JPEG of quality 95 / 1000,  compressibility = -size_kb,  incompressibility = +size_kb

Source: DDPO, arXiv:2305.13301. Verified in its authors' code (jannerm/ddpo, and kvablack/ddpo-pytorch at 1958463): the formula, quality 95,
kB of 1000 bytes, both signs. Not verified: the text of the paper. Pixels become bytes by round(255 x), as in ddpo-pytorch; jannerm/ddpo
truncates. Both leave the encoder's settings to Pillow; we write Pillow's defaults down (4:2:0 chroma, standard Huffman tables, baseline),
which gives the same bytes. Flow-GRPO divides compressibility by 500: here that is the weight 0.002.
The size grows with the resolution, so bits per pixel are logged beside it, and it differs a little between releases of Pillow.
"""

from __future__ import annotations

import io
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from flowrl.types import RewardInfo, SampleBatch, Scores, UserError
from rewards.pictures import not_finite, pictures_of, to_uint8

__all__ = ["JpegReward", "jpeg_compressibility", "jpeg_incompressibility"]


class JpegReward:
    """The size of a picture as a JPEG, in kB of 1000 bytes: negative for compressibility, positive for incompressibility.

    Args:
        direction: what is rewarded.
        quality: of the JPEG, 1 to 100.
    Raises:
        UserError: another direction, or a quality out of range.
    """

    def __init__(self, direction: Literal["compressibility", "incompressibility"], quality: int = 95) -> None:
        if direction not in ("compressibility", "incompressibility"):
            raise UserError(f"reward jpeg: direction must be compressibility or incompressibility, not {direction!r}")
        smaller = direction == "compressibility"
        name = f"jpeg_{direction}"
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise UserError(f"reward {name}: quality must be a whole number from 1 to 100, not {quality!r}")
        self.quality = quality
        self._sign = -1.0 if smaller else 1.0
        self.info = RewardInfo(
            name=name,
            description=f"{'minus the' if smaller else 'the'} size in kB of the picture as a JPEG of quality {quality}",
            low=float("-inf") if smaller else 0.0,
            high=0.0 if smaller else float("inf"),
            source="DDPO, arXiv:2305.13301",
            reads=("images",),
            runs_on="cpu",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load: there are no weights."""

    def score(self, batch: SampleBatch) -> Scores:
        """Sizes of pictures [B, 3, H, W] float in [0, 1]; values outside are clamped.

        Returns:
            values [B] float32 in kB; raw["bits_per_pixel"] [B] float32, always positive. A picture with NaN or infinite pixels is invalid.
        Raises:
            UserError: the batch has no RGB pictures in floating point.
            ValueError: B = 0.
        """
        images, valid = pictures_of(self.info.name, batch)
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu()
        num_bytes = torch.tensor([self._num_bytes(picture) for picture in pixels], dtype=torch.float64)
        num_bytes[~valid] = float("nan")
        height, width = images.shape[2:]
        bits_per_pixel = 8 * num_bytes / (height * width)
        return Scores((self._sign * num_bytes / 1000).float(), valid, {"bits_per_pixel": bits_per_pixel.float()}, not_finite(valid))

    def _num_bytes(self, picture: Tensor) -> int:
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, "JPEG", quality=self.quality, subsampling="4:2:0", optimize=False, progressive=False)
        return file.tell()


def jpeg_compressibility(quality: int = 95) -> JpegReward:
    """Reward small JPEG files: -kB, at most 0."""
    return JpegReward("compressibility", quality)


def jpeg_incompressibility(quality: int = 95) -> JpegReward:
    """Reward large JPEG files: +kB, at least 0."""
    return JpegReward("incompressibility", quality)
