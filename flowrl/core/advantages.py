"""Statistics of groups, and from advantages of samples to those of the decisions that made them. The advantages are in `estimators`.

Letters: B samples, P groups, E decisions (edges of the rollout forest), M (edge, leaf) pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["edge_advantages", "group_statistics"]


def group_statistics(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and number of valid samples of each group, [P] each; a group with fewer than 2 valid samples has std 0."""
    weight = valid.to(rewards.dtype)
    value = torch.where(valid, rewards, torch.zeros_like(rewards))
    count = torch.zeros(num_groups, dtype=rewards.dtype).index_add_(0, group, weight)
    mean = torch.zeros_like(count).index_add_(0, group, value) / count.clamp_min(1)
    low = torch.full_like(count, torch.inf).scatter_reduce_(0, group, torch.where(valid, rewards, torch.inf), "amin")
    high = torch.full_like(count, -torch.inf).scatter_reduce_(0, group, torch.where(valid, rewards, -torch.inf), "amax")
    mean = torch.where(low == high, low, mean)  # equal rewards are exactly their mean, whatever the rounding of the sum
    square = torch.where(valid, (rewards - mean[group]).square(), torch.zeros_like(rewards))
    variance = torch.zeros_like(count).index_add_(0, group, square) / (count - ddof).clamp_min(1)
    return mean, torch.where(count >= 2, variance, torch.zeros_like(variance)).sqrt(), count


def edge_advantages(leaf_advantages: Tensor, leaf_edge: Tensor, num_edges: int) -> Tensor:
    """Advantage of a decision: the mean advantage of the samples below it. On a chain, its own sample's.

    Args:
        leaf_advantages: [B]. leaf_edge: [M, 2] int64, (edge, leaf below it).
    Returns:
        [E]; every edge has at least one leaf.
    """
    edge, leaf = leaf_edge.unbind(1)
    total = torch.zeros(num_edges, dtype=leaf_advantages.dtype).index_add_(0, edge, leaf_advantages[leaf])
    return total / torch.bincount(edge, minlength=num_edges).to(total)
