"""Pictures on their way into a reward: checked, made 8-bit, resized and normalised as the published model wants them.

Letters: B samples, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowrl.types import SampleBatch, UserError

__all__ = ["CLIP_MEAN", "CLIP_STD", "IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "not_finite", "pictures_of", "to_pil", "to_uint8"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pictures_of(reward: str, batch: SampleBatch) -> tuple[Tensor, Tensor]:
    """The pictures of a batch [B, 3, H, W] float32 in [0, 1], and valid [B] bool on the CPU; a picture with NaN or infinite pixels is black and not valid.

    Raises:
        UserError: the batch has no RGB pictures in floating point.
        ValueError: B = 0.
    """
    images = batch.images
    if images is None or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = "none" if images is None else f"{list(images.shape)} {images.dtype}"
        raise UserError(f"reward {reward}: needs pictures [B, 3, H, W] float in [0, 1], got {got}; choose another reward")
    if len(images) == 0:
        raise ValueError(f"reward {reward}: cannot score an empty batch")
    valid = images.detach().isfinite().flatten(1).all(1)
    whole = torch.where(valid[:, None, None, None], images, torch.zeros_like(images))
    return whole.float().clamp(0, 1), valid.cpu()


def not_finite(valid: Tensor) -> dict[int, str]:
    """The `Scores.problems` of pictures that are not valid [B] bool because of their pixels."""
    return dict.fromkeys(torch.nonzero(~valid).flatten().tolist(), "the picture has NaN or infinite pixels")


def to_uint8(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] float in [0, 1] as uint8 [B, 3, H, W] on their device, rounded to the nearest level."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures [B, 3, H, W] float in [0, 1] as 8-bit RGB."""
    return [Image.fromarray(picture) for picture in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From pictures of any size to what a vision tower was trained on: 8-bit, resized by bicubic or bilinear interpolation with antialiasing, normalised.

    Attributes:
        size: height and width that the tower takes.
        fit: "shortest" = the shorter side becomes ``resize`` and the middle is cut out as torchvision does (of an odd rest, transformers may cut the other
            side more); "longest" = the longer side becomes ``size`` and the rest is black; "squash" = both sides become ``size``, whatever the shape.
        mean, std: of the channels, in [0, 1].
        resize: shorter side before the cut, ``size`` or more; None = ``size``.
        backend: "pil" = resized by Pillow and rounded to 8 bit, as in the published scripts; "tensor" = the same filter on the pictures' device, without
            rounding, for speed. They differ by about 1/255 in a pixel.
    """

    size: int
    fit: Literal["shortest", "longest", "squash"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None
    backend: Literal["pil", "tensor"] = "tensor"
    filter: Literal["bicubic", "bilinear"] = "bicubic"

    def __post_init__(self) -> None:
        if self.resize is not None and (self.fit != "shortest" or self.resize < self.size):
            raise ValueError(f"resize {self.resize} must be {self.size} or more, and is for fit 'shortest', not {self.fit!r}")

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float in [0, 1] -> [B, 3, size, size] float32 on their device."""
        height, width = images.shape[2:]
        target = self._target(height, width)
        resized = self._by_pillow(images, target) if self.backend == "pil" else self._by_torch(images, target)
        placed = self._place(resized)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (placed - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing; the longer side is truncated, as torchvision does."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "longest":
            scale = self.size / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        side, short = self.resize or self.size, min(height, width)
        return (side, side * width // short) if height <= width else (side * height // short, side)

    def _by_pillow(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        kind = Image.Resampling.BICUBIC if self.filter == "bicubic" else Image.Resampling.BILINEAR
        arrays = [np.asarray(picture.resize((target[1], target[0]), kind)) for picture in to_pil(images)]
        return torch.from_numpy(np.stack(arrays)).to(images.device).permute(0, 3, 1, 2).float() / 255

    def _by_torch(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        grid = to_uint8(images).float() / 255  # the same 8 bits as the other backend sees
        if tuple(images.shape[2:]) == target:
            return grid
        return F.interpolate(grid, size=target, mode=self.filter, antialias=True, align_corners=False).clamp(0, 1)

    def _place(self, resized: Tensor) -> Tensor:
        height, width = resized.shape[2:]
        down, right = self.size - height, self.size - width
        if self.fit == "longest":
            return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))
        top, left = round(-down / 2), round(-right / 2)
        return resized[:, :, top : top + self.size, left : left + self.size]
