"""Objectives of single tokens that need more than log-probabilities: what the distribution says, what the group achieved, how far training has come.

Letters: B answers of the iteration, n of a micro-batch, T tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.advantages import group_statistics
from flowrl.core.gates import lp_reg, mdpo, mirror_penalty, rover, token_nft
from flowrl.core.group_gates import drpo
from flowrl.core.objectives import clipped_surrogate
from flowrl.core.regularizers import kl_barrier
from flowrl.core.token_weights import curvature_mask, low_probability_selection
from flowrl.objective_names import arguments
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase, trains_later
from flowrl.text.ranks import smallest
from flowrl.types import Decisions, Objective, UserError

__all__ = ["AnnealedMdpo", "Capo", "Drpo", "LpReg", "Rover", "TokenNft", "capo", "next_decisions"]


class AnnealedMdpo(ObjectiveBase):
    """`flowrl.core.gates.mdpo` whose penalty grows with 1 / (1 - k / K) in iteration k of K (arXiv:2005.09814)."""

    def __call__(self, batch: Batch) -> Objective:
        total = self.config.training.iterations
        growth = mirror_penalty(min(batch.answers.iteration, total) - 1, total)
        penalty: float = arguments(self.config.objective).get("penalty", 1.0)
        return mdpo(self.leveled(batch.decisions), penalty=penalty * growth)


class Rover(ObjectiveBase):
    """`flowrl.core.gates.rover`. The old policy's mean log-probabilities take a pass over all answers, which is not made with one update per iteration."""

    columns: ClassVar[frozenset[str]] = frozenset({"mean_log_prob"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = frozenset({"mean_log_prob"} if trains_later(config) else ())

    def __call__(self, batch: Batch) -> Objective:
        now = batch.out.column("mean_log_prob").detach()
        old = batch.token("mean_log_prob") if self.needs else now  # in the first update the policy is still the one that sampled
        return rover(batch.decisions, next_value=next_decisions(now - old, batch.decisions.mask), **self.args(rover))


def next_decisions(value: Tensor, mask: Tensor) -> Tensor:
    """What ``value`` [n, T] is at the next decision of the sequence, [n, T]; 0 after the last. Tokens of the environment, which are masked, are passed over."""
    length = mask.shape[1]
    place = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = place.flip(1).cummin(1).values.flip(1)  # the first decision at or behind each position
    after = torch.cat([following[:, 1:], torch.full_like(following[:, :1], length)], dim=1)
    return torch.cat([value, torch.zeros_like(value[:, :1])], dim=1).gather(1, after)


class TokenNft(ObjectiveBase):
    """`flowrl.core.gates.token_nft`, with the share of right answers in each group; rewards are 0 and 1."""

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        """
        Raises:
            UserError: a reward is neither 0 nor 1.
        """
        binary = (answers.rewards == 0) | (answers.rewards == 1)
        others = int(answers.add(float((answers.valid & ~binary).sum())))
        if others:
            count = int(answers.add(float(answers.valid.sum())))
            raise UserError(
                f"objective.name: token_nft takes rewards that are 0 or 1, and {others} of {count} are not; use one verifier of weight 1 and no shaping, or "
                "another objective"
            )
        rate, _, _ = group_statistics(answers.rewards, answers.group, answers.valid, answers.num_groups, 0)
        answers.extra["success_rate"] = rate[answers.group]

    def __call__(self, batch: Batch) -> Objective:
        return token_nft(batch.decisions, success_rate=batch.of(batch.answers.extra["success_rate"]), **self.args(token_nft))


class LpReg(ObjectiveBase):
    """`flowrl.core.gates.lp_reg`: the rarest tokens of the iteration with A < 0 are held where the min-p filter of the policy's own distribution keeps them.

    Which tokens are rare is known before the first update: by their log-probabilities as they were sampled, among those with A < 0 of all processes, by the
    rule of `flowrl.core.token_weights.low_probability_selection`; those equal to the last of them belong too.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"min_p"})

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        negative = answers.mask & (advantages < 0)
        share = self.args(low_probability_selection).get("share", 0.01)
        count = math.floor(share * answers.add(float(negative.sum())))
        answers.extra["rare"] = smallest(answers.completions.log_prob, negative, count if count > 1 else 0, answers.add)  # the proxy is asked in each update

    def __call__(self, batch: Batch) -> Objective:
        decisions, proxy = batch.decisions, batch.out.column("min_p")
        selected = batch.of(batch.answers.extra["rare"]) & (decisions.log_prob.detach() < proxy)
        base = clipped_surrogate(decisions, **self.bounds())
        return lp_reg(decisions, base, selected=selected, proxy_log_prob=proxy, **self.args(lp_reg))


def capo(
    decisions: Decisions,
    *,
    square_sum: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    ratio_max: float | None = None,
    step: float = 0.0125,
    threshold: float = 1e-4,
) -> Objective:
    """The clipped surrogate without the tokens whose own step in the logits would be large, see `flowrl.core.token_weights.curvature_mask`.

    A token that is left out has loss 0 and stays in what the loss is divided by; threshold inf is the clipped surrogate.

    Args:
        square_sum: [n, T], sum over the vocabulary of p^2 of the policy now. step: > 0, our stand-in for the optimiser's step in the logits: with 0.0125 and
            1e-4 tokens go whose gradient's norm is above sqrt(1.28), the most surprising ones. threshold: > 0.
        The rest: of `flowrl.core.objectives.clipped_surrogate`.
    Source:
        CAPO, arXiv:2510.00819; the proxy and its step are our reading.
    """
    d = decisions
    base = clipped_surrogate(d, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, ratio_max=ratio_max)
    keep = curvature_mask(d.advantages, d.log_prob, d.old_log_prob, square_sum.detach(), d.mask, step=step, threshold=threshold)
    return Objective(torch.where(keep, base.loss, 0.0), base.metrics)


class Capo(ObjectiveBase):
    """`capo`, which asks the forward pass of the update for the sum of squared probabilities, and for no pass of its own."""

    columns: ClassVar[frozenset[str]] = frozenset({"square_sum"})

    def __call__(self, batch: Batch) -> Objective:
        return capo(batch.decisions, square_sum=batch.out.column("square_sum"), **self.bounds(), **arguments(self.config.objective))


class Drpo(ObjectiveBase):
    """`flowrl.core.group_gates.drpo` with its KL barrier, whose force follows the mean KL of the micro-batch and whose terms count by token.

    Where ``max_length`` is not given it is generation.max_new_tokens.
    """

    whole_groups: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Objective:
        d = batch.decisions
        args = {"max_length": float(self.config.generation.max_new_tokens), **self.args(drpo)}
        found = drpo(d, group=batch.group, num_groups=batch.num_groups, **args)
        lengths = d.mask.sum(1, keepdim=True)
        count, sequences = lengths.sum().clamp_min(1), (lengths > 0).sum().clamp_min(1)
        mean_kl = torch.where(d.mask, d.old_log_prob - d.log_prob.detach(), 0.0).sum() / count
        barrier = kl_barrier(d.log_prob, d.old_log_prob, d.mask, mean_kl=mean_kl, **self.args(kl_barrier))
        # the reduction divides by the answer's length and by the number of answers; this term is a mean over tokens
        return Objective(found.loss + barrier * lengths * sequences / count, found.metrics)
