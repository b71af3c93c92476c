"""What rewards with a network have in common: lazy loading, device and precision, checks of the pictures, invalid samples.

A reward of this kind gives ``info``, ``build`` and ``measure``; everything else is here.
Letters: B samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.pictures import not_finite, pictures_of

__all__ = ["NetworkReward", "check_choice", "check_count"]


def check_choice(reward: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Check an argument of a constructor.

    Raises:
        UserError: ``value`` is none of the choices.
    """
    if value not in choices:
        raise UserError(f"reward {reward}: {argument} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")


def check_count(reward: str, argument: str, value: object, least: int) -> None:
    """Check an argument of a constructor.

    Raises:
        UserError: ``value`` is no whole number of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"reward {reward}: {argument} must be a whole number of at least {least}, not {value!r}")


class NetworkReward(ABC):
    """A reward of pictures by a network. Constructors take plain config values; they touch no weights and import nothing optional."""

    info: RewardInfo
    network: nn.Module | None = None
    device: torch.device

    @abstractmethod
    def build(self, dtype: torch.dtype) -> nn.Module:
        """The network with its weights on the CPU in ``dtype``. Heads that the paper computes in float32 keep float32."""

    @abstractmethod
    def measure(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] float32 and raw columns [B] of pictures [B, 3, H, W] float32 in [0, 1] on ``self.device``; finite."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the weights, once; a second call only moves them."""
        if self.network is None:
            self.network = self.build(dtype).eval().requires_grad_(False)
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Move the network.

        Raises:
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError(f"reward {self.info.name}: load must be called before to")
        self.network.to(device)
        self.device = device

    def score(self, batch: SampleBatch) -> Scores:
        """Scores of pictures [B, 3, H, W] float in [0, 1] of any size; values [B] float32. A picture with NaN or infinite pixels is invalid.

        Raises:
            UserError: the batch has no RGB pictures in floating point.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self.network is None:
            raise RuntimeError(f"reward {self.info.name}: load must be called before score")
        images, valid = pictures_of(self.info.name, batch)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            values, raw = self.measure(images.to(self.device), batch.prompts)
        values = values.float().cpu().clone()
        values[~valid] = torch.nan
        return Scores(values, valid, {name: torch.where(valid, column.float().cpu(), torch.nan) for name, column in raw.items()}, not_finite(valid))
