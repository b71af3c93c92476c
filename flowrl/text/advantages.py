"""What credits share: the protocol, the run's advantages of answers, and rewards of tokens.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowrl.core.regularizers import kl_in_reward
from flowrl.core.token_advantages import outcome_rewards
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.parts import Part

__all__ = ["Credit", "sample_advantages", "summed_moments", "token_rewards"]


class Credit(Part, Protocol):
    """Advantages of an iteration, before the clamp."""

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        """[B] or [B, T] float64; 0 where not valid."""
        ...


def sample_advantages(answers: Answers, estimator: Estimator) -> Tensor:
    """[B] float64: the run's centre and scale of the shaped rewards."""
    return estimator(
        answers.shaped(),
        answers.shaped_everywhere(),
        answers.group,
        answers.num_groups,
        prompts=answers.prompt_key,
        lengths=answers.lengths,
        stats_mask=answers.in_statistics,
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
