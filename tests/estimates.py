"""Two estimators of core/estimators.py that tests of other parts use, by name."""

from __future__ import annotations

from torch import Tensor

from flowrl.core.estimators import centre, scale


def group_mean(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, eps: float = 0.0, ddof: int = 0) -> Tensor:
    """Dr.GRPO: R - mean of the group."""
    return centre("group", rewards, group, valid, num_groups)


def group_zscore(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, eps: float = 0.0, ddof: int = 0) -> Tensor:
    """GRPO: (R - mean of the group) / (std of the group + eps)."""
    return scale("group_std", group_mean(rewards, group, valid, num_groups), rewards, group, valid, num_groups, eps=eps, ddof=ddof)
