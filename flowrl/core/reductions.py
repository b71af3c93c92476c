"""How per-decision losses become one number. A reduction is a weight per decision, so that micro-batches and processes never change the result.

Letters: E decisions, P groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "group_mean_weights", "mean_weights"]


def mean_weights(group: Tensor, num_groups: int) -> Tensor:
    """Every decision counts the same: weight 1.

    Args:
        group: [E] int64, the group of each decision of one update on this process; groups are whole on a process.
    Returns:
        [E] float32, not normalised: the loss is sum(weight * loss) / sum(weight) with the sum of weights over all processes.
    """
    return torch.ones(len(group))


def group_mean_weights(group: Tensor, num_groups: int) -> Tensor:
    """Every group counts the same, however many decisions it has: weight 1 / (decisions of the group). Shapes as in `mean_weights`."""
    return 1.0 / torch.bincount(group, minlength=num_groups)[group].float()


REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": mean_weights, "group_mean": group_mean_weights}
