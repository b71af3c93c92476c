"""Objectives for answers of several origins: the policy's own, an expert's, and those of earlier iterations; and PF-PPO's drawing of answers by reward.

Letters: B answers of the iteration, n of a micro-batch, T tokens.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.gates import mixed_origin, rl_plus_off_policy
from flowrl.core.objectives import clipped_surrogate
from flowrl.core.ratio_levels import clip_centre
from flowrl.core.regularizers import kl_convex, kl_convex_share, sft_loss, sft_share
from flowrl.core.replay import resample, resample_weights
from flowrl.core.token_weights import chord_weights
from flowrl.seeds import generator
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.text.parts import Stateless
from flowrl.text.samples import EXPERT
from flowrl.types import Decisions, Objective

__all__ = ["Chord", "KlConvexTerm", "Remix", "Resampled", "RlPlus", "chord", "remix"]


def chord(
    decisions: Decisions,
    *,
    is_expert: Tensor,
    iteration: int,
    own_scale: float,
    expert_scale: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    phi: bool = True,
    warmup: int = 0,
    peak: float = 0.9,
    decay: int = 200,
    valley: float = 0.05,
) -> Objective:
    """CHORD: (1 - mu) clipped surrogate of the policy's own answers + mu supervised loss of an expert's, [B, S].

    Args:
        is_expert: [B, S] bool. iteration: >= 1, of mu's schedule; see `sft_share`, with warmup, peak, decay and valley.
        own_scale, expert_scale: what makes the reduction's mean over all answers one over those of an origin; 0 = there are none of it.
        phi: the expert's tokens are weighed by p (1 - p), see `chord_weights`.
    Source:
        arXiv:2508.11408, from ms-swift's documentation.
    """
    share = sft_share(iteration - 1, warmup=warmup, peak=peak, decay=decay, valley=valley) if expert_scale else 0.0
    if not own_scale:
        share = 1.0
    own = clipped_surrogate(decisions, clip_low=clip_low, clip_high=clip_high)
    weight = chord_weights(decisions.log_prob) if phi else None
    taught = share * expert_scale * sft_loss(decisions.log_prob, decisions.mask, weight)
    own = Objective((1 - share) * own_scale * own.loss, own.metrics)
    return mixed_origin(own, Objective(taught, own.metrics), is_expert)


def remix(decisions: Decisions, *, proximal_log_prob: Tensor, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> Objective:
    """ReMix's Mix-PPG: the clipped surrogate, whose bounds lie around the ratio that an earlier policy's decision has at the start of the iteration.

    Args:
        proximal_log_prob: [B, S] under the policy at the start of the iteration; decisions.old_log_prob is of the policy that sampled.
    Source:
        arXiv:2507.06892, from a note on the paper.
    """
    centre = clip_centre(proximal_log_prob, decisions.old_log_prob, decisions.mask)
    return clipped_surrogate(decisions, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, centre=centre)


def _is_expert(answers: Answers) -> Tensor:
    """[B] bool."""
    return torch.zeros(len(answers), dtype=torch.bool) if answers.origin is None else answers.origin == EXPERT


class RlPlus(ObjectiveBase):
    """RL-PLUS (arXiv:2508.00222): `rl_plus_off_policy` for answers from the source `expert`, the clipped surrogate for the others."""

    def __call__(self, batch: Batch) -> Objective:
        foreign = batch.of(_is_expert(batch.answers))[:, None].expand_as(batch.decisions.mask)
        own = clipped_surrogate(self.leveled(batch.decisions), **self.bounds())
        return mixed_origin(own, rl_plus_off_policy(batch.decisions, **self.args(rl_plus_off_policy)), foreign)


class Chord(ObjectiveBase):
    """CHORD, see `chord`, with answers from the source `expert`."""

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        expert = _is_expert(answers)
        counted = answers.mask & (answers.valid & answers.train)[:, None]
        size = (counted if self.config.objective.reduction == "mean" else counted.any(1)[:, None]).double().sum(1)
        own, taught = answers.add(float(size[~expert].sum())), answers.add(float(size[expert].sum()))
        self._scales = ((own + taught) / own if own else 0.0, (own + taught) / taught if taught else 0.0)

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        return chord(
            self.leveled(batch.decisions),
            is_expert=batch.of(_is_expert(batch.answers))[:, None].expand_as(batch.decisions.mask),
            iteration=batch.answers.iteration,
            own_scale=self._scales[0],
            expert_scale=self._scales[1],
            clip_low=o.clip_low,
            clip_high=o.clip_high,
            **self.args(chord),
        )


class Remix(ObjectiveBase):
    """ReMix, see `remix`, with earlier groups of the allocator `past`."""

    needs = frozenset({"log_prob"})

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        return remix(batch.decisions, proximal_log_prob=batch.token("log_prob"), clip_low=o.clip_low, clip_high=o.clip_high, dual_clip=o.dual_clip)


class KlConvexTerm(Stateless):
    """ReMix's divergence, see `kl_convex`: from the model before training, and from the policy at the start of the iteration."""

    columns: ClassVar[frozenset[str]] = frozenset()
    name: ClassVar[str] = "kl/mean"
    needs = frozenset({"reference", "log_prob"})

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        share = kl_convex_share(batch.answers.iteration)
        kl = kl_convex(self.config.kl.form, batch.decisions.log_prob, batch.token("reference"), batch.token("log_prob"), share=share)  # type: ignore[arg-type]
        return self.config.kl.weight * kl, kl.detach()

    def finish(self, answers: Answers) -> None:
        pass


class Resampled(Stateless):
    """PF-PPO (arXiv:2409.06957): as many answers as there are, drawn from those of all processes with chances by reward; one that is drawn twice counts twice.

    Args:
        kind, power: see `resample_weights`; ``group``: best and worst are those of the group instead of the iteration.
    """

    def __init__(self, kind: Literal["power", "extremes", "best_or_any", "best"] = "power", power: float = 2.0, group: bool = False) -> None:
        resample_weights(torch.zeros(1), torch.ones(1, dtype=torch.bool), kind=kind, power=power)
        self.kind: Literal["power", "extremes", "best_or_any", "best"] = kind
        self.power, self.group = power, group

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        numbers = torch.tensor(list(answers.numbers), dtype=torch.int64)[answers.group]
        lengths = answers.lengths.double()
        number, rewards, valid, length = (
            torch.cat(column) for column in zip(*answers.gather((numbers, answers.rewards, answers.valid & answers.train, lengths)), strict=True)
        )
        order = number.argsort(stable=True)
        weights = torch.zeros_like(rewards)
        for rows in [number == one for one in number.unique()] if self.group else [torch.ones_like(valid)]:
            weights[rows] = resample_weights(rewards[rows], valid[rows], kind=self.kind, power=self.power)
        drawn = resample(weights[order], valid[order], int(valid.sum()), generator(answers.config.seed, "resample", answers.iteration))
        times = torch.bincount(order[drawn], minlength=len(order)).double()
        if answers.config.objective.reduction == "mean" and float((times * length).sum()):
            times = times * (length * valid).sum() / (times * length).sum()
        here = torch.isin(number, torch.tensor(list(answers.numbers), dtype=torch.int64))  # a group is whole on one process
        return times[here].float()[:, None].expand(answers.mask.shape)
