"""Ink reward: how much of what is drawn has a colour that the prompt names. Differentiable, for objectives that follow the reward's gradient.

With o a pixel minus the light grey background of the embedded world, and a_c a palette colour minus it:

    drawn  = q^2 / (q^2 + 0.1^2),  q = |o|^2                        0 on the background, 1 on any colour of the palette
    near_c = (s / (s + D_c))^2,  s = 0.05,  D_c = squared distance of o from the ray from 0 through a_c
    right  = 1 - product over the named colours of (1 - near_c)
    ink    = mean(drawn * right) / (mean(drawn) + 1/256)            means over pixels

Distances are taken from a ray because an antialiased or blurred edge lies on it; so pale paint counts as its full colour. All of it has a continuous
gradient, and near_c falls off as a power: paint of another colour still feels which way to go. The 1/256 makes an empty picture worth nothing.
It says nothing of shapes, counts and places, and a picture painted over with one named colour gets nearly all: watch the reward ``scene`` beside it.

Source: ours. Palette and background are those of rewards/scene_world.py. Letters: B images, C = 4 colours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.pictures import not_finite
from rewards.scene_world import BACKGROUND, COLORS, PALETTE

__all__ = ["InkReward", "score_ink"]

_DRAWN = 0.1  # squared RGB distance from the background at which a pixel counts half; the palette's are 0.75 to 1.29
_NEAR = 0.05  # squared RGB distance
_FAINT = 1 / 256  # fraction of the picture: 4 pixels of 32 x 32, where an object covers about 85


def score_ink(images: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Ink and drawn area of pictures.

    Args:
        images: [B, 3, H, W] in floating point, in [0, 1].
        wanted: [B, C] bool, the colours that count as right.
    Returns:
        ink [B] in [0, 1) and the drawn fraction of the picture [B] in [0, 1), both in the dtype of the images and with their gradient.
    """
    background, palette = BACKGROUND.to(images), PALETTE.to(images)
    offset = images - background[:, None, None]
    square = offset.square().sum(1)  # [B, H, W]
    drawn = square.square() / (square.square() + _DRAWN**2)
    axes = palette - background  # [C, 3]
    lengths = axes.square().sum(1).view(-1, 1, 1)
    along = torch.einsum("brhw,cr->bchw", offset, axes) / lengths
    distance = square[:, None] - lengths * along.clamp_min(0).square()
    near = (_NEAR / (_NEAR + distance)).square() * wanted[:, :, None, None]
    right = 1 - (1 - near).prod(1)
    area = drawn.mean((1, 2))
    return (drawn * right).mean((1, 2)) / (area + _FAINT), area


@cache
def _named(text: str) -> tuple[bool, ...]:
    words = set(re.findall(r"[a-z]+", text.lower()))
    return tuple(color in words for color in COLORS)


def _colors(prompt: Prompt) -> tuple[bool, ...]:
    named = _named(prompt.text)
    if not any(named):
        raise UserError(f"reward ink: the prompt '{prompt.text}' names none of the colours {', '.join(COLORS)}; use prompts that do, or another reward")
    return named


class InkReward:
    """The part of the drawn area that has a colour which the prompt names. See the module's text."""

    def __init__(self) -> None:
        self.info = RewardInfo(
            name="ink",
            description="part of the drawn area that has a colour named in the prompt, in the palette of the embedded world; differentiable",
            low=0.0,
            high=1.0,
            source="flowrl, programmatic",
            differentiable=True,
            batch_size=512,
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load: there are no weights."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises a UserError for the first prompt that names no colour."""
        for prompt in prompts:
            _colors(prompt)

    def score(self, batch: SampleBatch) -> Scores:
        """Ink of pictures [B, 3, H, W] float in [0, 1], on their device and with their gradient.

        Returns:
            values [B] float32 in [0, 1); raw["ink_area"] [B] float32, the drawn fraction of the picture, without gradient. A picture with NaN or
            infinite pixels is invalid.
        Raises:
            UserError: the batch has no RGB pictures in floating point, or a prompt names no colour.
        """
        images = batch.images
        if images is None or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = "none" if images is None else f"{list(images.shape)} {images.dtype}"
            raise UserError(f"reward ink: needs pictures [B, 3, H, W] float in [0, 1], got {got}; choose another reward")
        wanted = torch.tensor([_colors(prompt) for prompt in batch.prompts], device=images.device)
        valid = images.detach().isfinite().flatten(1).all(1)
        whole = torch.where(valid[:, None, None, None], images, torch.zeros_like(images))  # no NaN in the gradient of the others either
        values, area = score_ink(whole.float(), wanted)
        nan = torch.full_like(values, float("nan"))
        return Scores(torch.where(valid, values, nan), valid, {"ink_area": torch.where(valid, area, nan).detach()}, not_finite(valid))
