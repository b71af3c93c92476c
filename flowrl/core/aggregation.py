"""Several rewards at once: hard constraints, standardisation over a batch, and weights that change during training.

gdpo, arXiv:2601.05242: an advantage of each reward inside its group, their weighted sum, then (A - mean) / (std + eps) over the whole batch.
gate: samples that break a constraint rank below all samples of their group that keep it. The idea is CGPO's (arXiv:2409.20370: a violation has the
calibrated reward 0, below every satisfying sample); its sigmoid calibration against a baseline answer has no counterpart in a group, so the distance is our
reading, see `gate`.
dynamic weights, arXiv:2509.11452: `hypervolume_gain` and `meta_reward` (what an evaluation adds to the Pareto front scales the training signal),
`influences` and `mirror_descent` (weights follow how much each reward's gradient agrees with all). Formulas verified in the released code; where that scales
rewards, flowrl scales advantages, because an advantage that is divided by a standard deviation forgets the scale of its rewards.

Letters: B samples, P groups, K rewards, N points.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batch_standardised", "gate", "hypervolume", "hypervolume_gain", "influences", "meta_reward", "mirror_descent", "pareto_front"]


def gate(values: Tensor, satisfied: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, counted: Tensor | None = None) -> Tensor:
    """Put samples that break a constraint below the samples of their group that keep it.

    In each group with both kinds a violating sample gets  min - spread,  where min is the least value of the satisfying samples and spread = max - min of
    these, or 1 where they are all equal. A constant added to all values, or a positive factor (where spread > 0), does the same to the result.

    Args:
        values: [B] float; rewards or advantages. satisfied, valid: [B] bool. group: [B] int64 in 0..P-1.
        counted: [B] bool, samples that others are compared with; None = all. The others do not say what min and max are.
    Returns:
        [B]; unchanged in groups where no valid sample, or every one, keeps the constraint, so that nothing is learnt about the constraint from those.
    """
    good, bad = valid & satisfied, valid & ~satisfied
    good = good if counted is None else good & counted
    low = torch.full((num_groups,), torch.inf, dtype=values.dtype).scatter_reduce_(0, group, torch.where(good, values, torch.inf), "amin")
    high = torch.full((num_groups,), -torch.inf, dtype=values.dtype).scatter_reduce_(0, group, torch.where(good, values, -torch.inf), "amax")
    spread = torch.where(high > low, high - low, torch.ones_like(low))
    return torch.where(bad & low.isfinite()[group], (low - spread)[group], values)


def batch_standardised(advantages: Tensor, valid: Tensor, *, mean: float, std: float, eps: float) -> Tensor:
    """GDPO's last step: (A - mean) / (std + eps) [B] with the mean and the standard deviation of all valid advantages over all processes; 0 where not valid."""
    return torch.where(valid, (advantages - mean) / (std + eps), torch.zeros_like(advantages))


def pareto_front(points: Tensor) -> Tensor:
    """The rows of points [N, K] (higher is better) that no other row dominates, in their order; of equal rows the first."""
    at_least = (points[None] >= points[:, None]).all(-1)  # [n, m]: m is nowhere worse than n
    better = (points[None] > points[:, None]).any(-1)
    earlier = torch.ones_like(better).tril(-1)
    return points[~(at_least & (better | earlier)).any(1)]


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Volume of what points [N, K] dominate above a reference point [K] (higher is better), by slicing along the last dimension.

    Exact, in float64, for the few rewards and points of a training run; a point that is not above the reference everywhere adds nothing.
    """
    inside = points.double()[(points > reference).all(-1)]
    return _sliced(inside - reference.double()) if len(inside) else 0.0


def _sliced(points: Tensor) -> float:
    if points.shape[1] == 1:
        return points.max().item()
    levels = points[:, -1].unique()
    below = torch.cat([levels.new_zeros(1), levels[:-1]])
    return sum((top - bottom).item() * _sliced(pareto_front(points[points[:, -1] >= top, :-1])) for bottom, top in zip(below, levels, strict=True))


def hypervolume_gain(front: Tensor, point: Tensor, reference: Tensor) -> float:
    """How much a point [K] adds to the hypervolume of a front [N, K]; 0 for a dominated one."""
    return max(0.0, hypervolume(torch.cat([front, point[None]]), reference) - hypervolume(front, reference))


def meta_reward(gain: float) -> float:
    """The multiplier  0.5 + 1.5 tanh(gain)  of the training signal until the next validation, in [0.5, 2)."""
    return 0.5 + 1.5 * float(torch.tanh(torch.tensor(gain, dtype=torch.float64)))


def influences(gradients: Tensor) -> Tensor:
    """Of policy gradients [K, P], one for each reward, each one's agreement with all: row sums [K] of G G'."""
    return gradients @ gradients.sum(0)


def mirror_descent(weights: Tensor, influence: Tensor, rate: float) -> Tensor:
    """softmax(log w + rate influence): weights [K] on the simplex, moved towards rewards of large influence. Equal influences change nothing.

    Args:
        weights: [K] > 0. influence: [K]. rate: learning rate over the regularisation, > 0.
    Returns:
        [K], sum 1.
    """
    return torch.softmax(weights.log() + rate * influence, dim=0)
