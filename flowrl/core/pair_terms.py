"""What pair losses are made of. Letters as in `preference`: B pairs, S places, h the difference of two log-ratios."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.types import Objective, Pairs

__all__ = ["log_ratios", "measured", "pair_fields", "per_token", "smoothed", "soft_cross_entropy"]

_ANCHORS = {"reference": "compares with a reference policy, and Pairs has no reference log-probabilities; simpo needs none"}
_ANCHORS["previous"] = "compares with the policy before the iteration, and Pairs has no previous log-probabilities"


def log_ratios(name: str, pairs: Pairs, anchor: Literal["reference", "previous"] = "reference") -> tuple[Tensor, Tensor]:
    """Log-probability minus the anchor's, of the chosen and of the rejected, [B, S] each, both 0 where masked. The anchor is a constant.

    Args:
        name: the loss that asks, for the message.
    Raises:
        ValueError: the anchor is missing.
    """
    chosen, rejected = (getattr(pairs, f"{anchor}_{side}") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        raise ValueError(f"{name} {_ANCHORS[anchor]}")
    return _where(pairs, pairs.chosen - chosen.detach()), _where(pairs, pairs.rejected - rejected.detach())


def pair_fields(name: str, pairs: Pairs, *fields: str) -> tuple[Tensor, ...]:
    """Fields of the pairs that a loss cannot do without, 0 where masked.

    Raises:
        ValueError: one is missing.
    """
    for field in fields:
        if getattr(pairs, field) is None:
            raise ValueError(f"{name} needs Pairs.{field}, and it is None")
    return tuple(_where(pairs, getattr(pairs, field)) for field in fields)


def per_token(pairs: Pairs, value: Tensor, length: Tensor | None) -> Tensor:
    """An empty sequence has value 0 and stays 0."""
    return value if length is None else value / torch.where(pairs.mask, length, torch.ones_like(length)).clamp_min(1)


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(z), for labels that are wrong with probability ``label_smoothing``."""
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def soft_cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """-target log sigmoid(z) - (1 - target) log sigmoid(-z), its minimum at z = logit(target); target a constant in [0, 1]."""
    target = target.detach()
    return -target * logsigmoid(z) - (1 - target) * logsigmoid(-z)


def measured(pairs: Pairs, loss: Tensor, beta: float, chosen: Tensor, rejected: Tensor) -> Objective:
    """The loss, 0 where masked, and the metrics of `preference.dpo` from the two terms of h."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = beta * (chosen - rejected)
    metrics = {"margin": margin, "accuracy": (margin.sign() + 1) / 2, "chosen_log_ratio": chosen, "rejected_log_ratio": rejected}
    return Objective(_where(pairs, loss), metrics)


def _where(pairs: Pairs, value: Tensor) -> Tensor:
    return torch.where(pairs.mask, value, torch.zeros_like(value))
