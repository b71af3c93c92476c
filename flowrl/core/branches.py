"""Advantages of the branches of a tree: what going on this way is worth beside the other ways from the same place.

Letters: B leaves, D depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["branch_advantages"]

_EQUAL = 1e-8


def branch_advantages(rewards: Tensor, ancestors: Tensor, valid: Tensor, *, normalize: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """SPO-tree: a branch's value less the mean of its siblings' and its own, over their spread, [B, D]; and the leaves that share the branch, [B, D].

    Column d is the branch that a leaf takes from its node at depth d: to its node at depth d + 1, or, where its path has none, to itself. A leaf's value is its
    reward, a node's the mean of its children's, whatever they have below them; so each child counts once. 0 for an only child, for siblings of equal value,
    where a path has ended, and for a leaf that is not valid, which is no one's child either.

    Args:
        rewards: [B] float. valid: [B] bool. ancestors: [B, D] int64, the node of each leaf at each depth, numbered over all trees; -1 after the end of a path.
        normalize: divide by the siblings' population std + eps.
    Returns:
        advantages in the dtype of the rewards; counts of valid leaves, at least 1.
    Source:
        SPO, arXiv:2505.23564, the tree of the released code (AIFrameResearch/SPO). Unbalanced trees, and which std: our reading.
    """
    size, depths = ancestors.shape
    own = int(ancestors.max()) + 1 + torch.arange(size) if size else torch.zeros(0, dtype=torch.int64)
    known = (ancestors >= 0) & valid[:, None]
    value, zero = rewards.clone(), torch.zeros_like(rewards)
    advantages, sharing = torch.zeros(size, depths, dtype=rewards.dtype), torch.ones(size, depths, dtype=torch.int64)
    for depth in reversed(range(depths)):
        below = ancestors[:, depth + 1] if depth + 1 < depths else torch.full_like(own, -1)
        child, node, here = torch.where(below >= 0, below, own), ancestors[:, depth].clamp_min(0), known[:, depth]
        leaves = _sum(here.to(rewards), child)
        sharing[:, depth] = torch.where(here, leaves, 1.0).long()
        weight = torch.where(here, 1 / leaves.clamp_min(1), zero)  # a child's leaves share one vote
        total = _sum(weight, node).clamp_min(1)
        mean = _sum(torch.where(here, weight * value, zero), node) / total
        spread = (_sum(torch.where(here, weight * (value - mean).square(), zero), node) / total).sqrt()
        differs = here & (spread > _EQUAL)
        difference = torch.where(differs, value - mean, zero)
        advantages[:, depth] = difference / torch.where(differs, spread + eps, 1.0) if normalize else difference
        value = torch.where(here, mean, value)
    return advantages, sharing


def _sum(values: Tensor, place: Tensor) -> Tensor:
    """[B], of all that stand at the same place."""
    return values.new_zeros(int(place.max()) + 1 if len(place) else 0).index_add(0, place, values)[place]
