"""What credits share: the protocol, the run's advantages of answers, rewards of tokens, and whitening over the iteration.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowrl.comparison import compared
from flowrl.core.regularizers import kl_in_reward
from flowrl.core.token_advantages import masked_moments, outcome_rewards, whiten
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.parts import Part

__all__ = ["Credit", "sample_advantages", "summed_moments", "token_rewards", "whitened"]


class Credit(Part, Protocol):
    """Advantages of an iteration, before the clamp. One whose class says ``takes_price = True`` reads `token_rewards`; the others refuse `kl.place: reward`."""

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        """[B] or [B, T] float64; 0 where not valid."""
        ...


def sample_advantages(answers: Answers, estimator: Estimator) -> Tensor:
    """[B] float64: the run's centre and scale of the shaped rewards, or of each reward by itself where `advantage.aggregate` says so."""
    return compared(
        answers.config,
        answers.reward_weights,
        estimator,
        {**answers.scores, "total": answers.shaped()},
        {**answers.everywhere, "total": answers.shaped_everywhere()},
        answers.group,
        answers.num_groups,
        prompts=answers.prompt_key,
        lengths=answers.lengths,
        stats_mask=answers.batch,
        added=answers.extra.get("added"),
    )


def summed_moments(answers: Answers) -> Callable[[Tensor], Tensor]:
    """For `masked_moments`: a tensor summed over processes."""
    return lambda value: torch.tensor([answers.add(float(v)) for v in value.flatten()], dtype=value.dtype).view_as(value)


def token_rewards(answers: Answers, outcome: Tensor) -> Tensor:
    """[B, T] float64: the outcome [B] at the last token, less the price of each token's distance to the reference where `kl.place` is reward."""
    rewards = outcome_rewards(outcome, answers.mask)
    kl = answers.config.kl
    if kl.weight > 0 and kl.place == "reward":
        old, reference = answers.token("log_prob"), answers.token("reference")
        rewards = kl_in_reward(rewards, old.double(), reference.double(), answers.mask, beta=kl.weight)
    return rewards


def whitened(answers: Answers, advantages: Tensor) -> Tensor:
    """[B, T]: `whiten` by the mean and the spread of all tokens of the iteration that statistics are of; groups that are dropped are no part of it (DAPO)."""
    counted = answers.mask & answers.in_batch[:, None]
    moments = masked_moments(advantages, counted, add=summed_moments(answers))
    return whiten(advantages, answers.mask & answers.valid[:, None], moments=moments)
