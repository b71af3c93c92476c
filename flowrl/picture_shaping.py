"""Shaping of rewards of pictures whose SDE steps are trained. The formulas are in core/shaping.py. A new one is a class here, and a line in the table.

Letters: B samples, E decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flowrl.core.shaping import rank_unlikely
from flowrl.text.parts import Part, Stateless
from flowrl.types import Rollout, Scores

__all__ = ["PICTURE_SHAPERS", "PictureShaper", "RankUnlikely", "sampled_likelihood", "shape_rewards"]


def sampled_likelihood(rollout: Rollout) -> Tensor:
    """[B] float64, mean log-probability of each sample's trained decisions under the policy that sampled; 0 for a sample without one."""
    edge, leaf = rollout.leaf_edge.unbind(1)
    total, count = torch.zeros(2, len(rollout.leaf_group), dtype=torch.float64)
    log_prob = rollout.edge_old_log_prob.cpu().double()
    return total.index_add(0, leaf, log_prob[edge]) / count.index_add(0, leaf, torch.ones(len(leaf), dtype=torch.float64)).clamp_min(1)


class PictureShaper(Part, Protocol):
    """Changes the total reward before the estimator."""

    def rewards(self, rollout: Rollout, total: Scores) -> Scores:
        """Those of this process's samples [B]; groups are whole."""
        ...


class RankUnlikely(Stateless):
    """Unlikeliness reward (arXiv:2506.02355), see `rank_unlikely`. The likelihood of a picture is `sampled_likelihood`.

    Args:
        strength: in [0, 1].
    """

    def __init__(self, strength: float = 0.25) -> None:
        if not 0 <= strength <= 1:
            raise ValueError("strength must be in [0, 1]")
        self.strength = strength

    def rewards(self, rollout: Rollout, total: Scores) -> Scores:
        group, values = rollout.leaf_group, torch.where(total.valid, total.values.double(), 0.0)
        shaped = rank_unlikely(values, sampled_likelihood(rollout), group, total.valid, int(group.max()) + 1, strength=self.strength)
        return Scores(shaped.float(), total.valid)


def shape_rewards(
    shapers: Sequence[PictureShaper],
    rollout: Rollout,
    scores: dict[str, Scores],
    everywhere: dict[str, Scores],
    join: Callable[[Scores], Scores],
) -> tuple[dict[str, Scores], dict[str, Scores]]:
    """Scores of this process's samples and of all, with the total as the shapers leave it.

    Args:
        join: what all processes have, one after the other, as in ``everywhere``; every process must call this function.
    """
    if not shapers:
        return scores, everywhere
    total = scores["total"]
    for shaper in shapers:
        total = shaper.rewards(rollout, total)
    return {**scores, "total": total}, {**everywhere, "total": join(total)}


PICTURE_SHAPERS: dict[str, Callable[..., PictureShaper]] = {"rank_unlikely": RankUnlikely}
