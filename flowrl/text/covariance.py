"""Clip-Cov and KL-Cov: the few tokens whose log-probability and advantage are large together make the entropy fall; leave some out, or hold them.

Letters: B answers, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl.core.objectives import clipped_surrogate
from flowrl.seeds import generator
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.text.ranks import smallest
from flowrl.types import Decisions, Objective

__all__ = ["ClipCov", "KlCov", "clip_cov", "kl_cov", "token_covariance"]


def token_covariance(answers: Answers, advantages: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A - mean A) (log_prob - mean log_prob) of each token as it was sampled, [B, T] float32; which tokens are trained, [B, T] bool; and their number.

    Means and number are of all processes.
    """
    chosen = answers.mask & (answers.valid & answers.train)[:, None]
    log_prob, advantages = answers.completions.log_prob.double(), advantages.double()
    count = answers.add(float(chosen.sum()))
    means = [answers.add(float(value[chosen].sum())) / max(count, 1.0) for value in (advantages, log_prob)]
    return ((advantages - means[0]) * (log_prob - means[1])).float(), chosen, count


def clip_cov(
    decisions: Decisions, *, dropped: Tensor, clip_low: float, clip_high: float, share: float = 2e-4, least: float = 1.0, most: float = 5.0
) -> Objective:
    """The clipped surrogate, loss 0 where ``dropped`` [n, T] bool: a random ``share`` of all tokens, at least one, of those with a covariance in least .. most.

    ``share``, ``least`` and ``most`` are read when the tokens are chosen, see `ClipCov`. share 0 is the clipped surrogate.

    Source:
        arXiv:2505.22617, verl compute_policy_loss_clip_cov; see `ClipCov` for where ours differs.
    """
    base = clipped_surrogate(decisions, clip_low=clip_low, clip_high=clip_high)
    return Objective(torch.where(dropped, 0.0, base.loss), base.metrics)


def kl_cov(decisions: Decisions, *, held: Tensor, share: float = 2e-4, coefficient: float = 1.0) -> Objective:
    """-A r, plus coefficient abs(log_prob - old_log_prob) where ``held`` [n, T] bool: the ``share`` of all tokens with the largest covariance, at least one.

    ``share`` is read when the tokens are chosen, see `KlCov`. At ratio 1 the term has no gradient. share 0 is the surrogate without a clip.

    Source:
        arXiv:2505.22617, verl compute_policy_loss_kl_cov; see `KlCov` for where ours differs.
    """
    base = clipped_surrogate(decisions, clip_low=math.inf, clip_high=math.inf)
    away = torch.where(held & decisions.mask, (decisions.log_prob - decisions.old_log_prob).abs(), 0.0)
    return Objective(base.loss + coefficient * away, base.metrics)


class ClipCov(ObjectiveBase):
    """`clip_cov`. The tokens are chosen once an iteration, over all processes, by the log-probabilities that they were sampled with: it does not matter how the
    iteration is cut. Released: within each micro-batch, by the log-probabilities of the policy now."""

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        args = {"share": 2e-4, "least": 1.0, "most": 5.0, **self.args(clip_cov)}
        covariance, chosen, count = token_covariance(answers, advantages)
        near = chosen & (covariance > args["least"]) & (covariance < args["most"])
        draws = torch.ones_like(covariance)
        for g, number in enumerate(answers.numbers):
            rows = torch.nonzero(answers.group == g).squeeze(1)
            draws[rows] = torch.rand(len(rows), draws.shape[1], generator=generator(self.config.seed, "clip_cov", answers.iteration, number))
        answers.extra["dropped"] = smallest(draws, near, wanted(args["share"], count), answers.add)

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        return clip_cov(batch.decisions, dropped=batch.of(batch.answers.extra["dropped"]), clip_low=o.clip_low, clip_high=o.clip_high)


class KlCov(ObjectiveBase):
    """`kl_cov`, its tokens chosen as those of `ClipCov`."""

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        share = self.args(kl_cov).get("share", 2e-4)
        covariance, chosen, count = token_covariance(answers, advantages)
        answers.extra["held"] = smallest(-covariance, chosen, wanted(share, count), answers.add)

    def __call__(self, batch: Batch) -> Objective:
        args = {name: value for name, value in self.args(kl_cov).items() if name != "share"}
        return kl_cov(batch.decisions, held=batch.of(batch.answers.extra["held"]), **args)


def wanted(share: float, count: float) -> int:
    """Tokens of a share: at least one, none where the share is 0."""
    return 0 if share == 0 else max(1, math.floor(share * count))
