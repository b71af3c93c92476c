"""Shaping of advantages, after they were estimated, and TempSamp-R1's ways to live with an inserted sample. No gradient, no state.

Letters: B samples, P groups, A advantages. A sample that is not valid keeps its advantage (0) and is in no statistic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics

__all__ = ["anchor_inserted", "compress", "downscale_inserted", "novelty", "position_bonus"]


def novelty(
    advantages: Tensor, likelihood: Tensor, correct: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, scale: float = 1.0, cap: float = 1.0
) -> Tensor:
    """XRPO's sharpening: A + min(max(scale (1 - eta), 0), cap A) for right answers with A > 0; others keep A. [B]

    eta = exp(s - mean of s over the group), s the likelihood. Right answers that are less likely than their group gain, at most by the factor 1 + cap.

    Args:
        advantages: [B]. likelihood: [B] float, mean log-probability per decision under the policy that sampled. correct, valid: [B] bool. group: [B] int64.
        scale, cap: >= 0; scale 0 or cap 0 changes nothing.
    Source:
        arXiv:2510.06672, from two secondary notes that agree; scale and cap are a third party's.
    """
    mean, _, _ = group_statistics(likelihood, group, valid, num_groups, 0)
    chosen = valid & correct & (advantages > 0)
    eta = torch.where(chosen, likelihood - mean[group], torch.zeros_like(likelihood)).exp()
    return torch.where(chosen, advantages + (scale * (1 - eta)).clamp_min(0).minimum(cap * advantages), advantages)


def position_bonus(
    advantages: Tensor,
    position: Tensor,
    length: Tensor,
    eligible: Tensor,
    group: Tensor,
    valid: Tensor,
    num_groups: int,
    *,
    strength: float = -2.0,
    cap: float = 0.7,
) -> Tensor:
    """ASPO: A + strength (p - mean p) / mean n, clipped to +-cap abs(A), for right answers that used the tool; others keep A. [B]

    p is where the tool was first called, n the length; means over the group's eligible samples. A negative strength favours early calls. cap < 1 keeps the
    sign of A.

    Args:
        advantages, position, length: [B] float. eligible, valid: [B] bool, eligible = right and with a call. group: [B] int64.
    Source:
        arXiv:2508.19201, from a secondary write-up with a recipe's code.
    """
    chosen = eligible & valid
    mean_position, _, _ = group_statistics(position, group, chosen, num_groups, 0)
    mean_length, _, _ = group_statistics(length, group, chosen, num_groups, 0)
    chosen = chosen & (mean_length > 0)[group]
    away = torch.where(chosen, position - mean_position[group], torch.zeros_like(position))
    bound = cap * advantages.abs()
    bonus = (strength * away / torch.where(chosen, mean_length[group], torch.ones_like(length))).to(advantages.dtype)
    return torch.where(chosen, advantages + bonus.clamp(-bound, bound), advantages)


def downscale_inserted(rewards: Tensor, inserted: Tensor, *, factor: float = 0.8, highest: float = 1.0) -> Tensor:
    """TempSamp-R1, downscaling: an inserted sample has the reward factor * highest, [B].

    Args:
        rewards: [B]. inserted: [B] bool, True = not sampled by the policy (a ground truth). highest: the highest reward there can be.
    Source:
        arXiv:2509.18056, from the paper's text; that its R_max is what can be had, not what the group has, is our reading. The paper's first treatment
        changes no reward ("mixed"): the group's statistics just include the inserted sample.
    """
    return torch.where(inserted, torch.full_like(rewards, factor * highest), rewards)


def compress(rewards: Tensor, *, threshold: float = 0.8, above: float = 0.01, below: float = 1.0) -> Tensor:
    """TempSamp-R1, non-linear shaping of all rewards; continuous, equal to the threshold kappa there, increasing for above > 0; the shape of ``rewards``.

    kappa + above log(1 + R - kappa)                                  where R >= kappa
    kappa - (exp(below (kappa - R)) - 1) / (exp(below) - 1)           where R < kappa

    Args:
        rewards: made for [0, 1]; 0 becomes kappa - (e^(below kappa) - 1) / (e^below - 1), 0.0867 by default. above: >= 0; 0 makes all of R >= kappa equal.
        below: > 0; towards 0 it leaves R < kappa as it is.
    Raises:
        ValueError: below is not above 0.
    Source:
        arXiv:2509.18056, from the paper's text; the treatment it reports as the best.
    """
    if below <= 0:
        raise ValueError(f"compress: below must be above 0, not {below}")
    distance = rewards - threshold
    high = threshold + above * torch.log1p(distance.clamp_min(0))
    return torch.where(distance >= 0, high, threshold - torch.expm1(below * (-distance).clamp_min(0)) / math.expm1(below))


def anchor_inserted(advantages: Tensor, inserted: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, scale: float = 1.2) -> Tensor:
    """TempSamp-R1, anchoring: an inserted sample has ``scale`` times the best advantage of its group's own samples, [B]; 0 where that is not above 0.

    Estimate the advantages with ``valid & ~inserted``, so that the inserted sample is in no statistic.

    Args:
        advantages: [B]. inserted, valid: [B] bool. group: [B] int64.
    Source:
        arXiv:2509.18056, from the paper's text. 1 gives the best sample's own advantage.
    """
    own = torch.where(valid & ~inserted, advantages, torch.zeros_like(advantages))
    best = torch.zeros(num_groups, dtype=own.dtype, device=own.device).scatter_reduce_(0, group, own, "amax")
    return torch.where(inserted & valid, scale * best[group], advantages)
