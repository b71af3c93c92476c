"""From rewards of answers to advantages of tokens. A new credit is a class here, or in a file of its own, and a line in the table.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowrl.core.regularizers import kl_in_reward
from flowrl.core.token_advantages import masked_moments, outcome_rewards, token_returns, whiten
from flowrl.estimation import Estimator
from flowrl.text.answers import Answers
from flowrl.text.parts import Part, Stateless

__all__ = ["CREDITS", "Credit", "sample_advantages", "summed_moments"]


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


class AnswerCredit(Stateless):
    """All tokens of an answer share its advantage: GRPO and most others."""

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        return sample_advantages(answers, estimator)


class TokenReturns(Stateless):
    """REINFORCE++: the return of each token, rewards of later tokens times powers of gamma, whitened over all tokens of the iteration (arXiv:2501.03262).

    The answer's advantage by centre and scale stands at its last token, as its reward; with `kl.place: reward` each token pays for its distance to the
    reference. centre none, scale none is REINFORCE++; centre group, scale none its variant with a baseline.

    Args:
        gamma: discount, in (0, 1]. whitened: divide by the spread of all tokens and subtract their mean.
    """

    def __init__(self, gamma: float = 1.0, whitened: bool = True) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma:g}, and a discount is in (0, 1]")
        self.gamma, self.whitened = gamma, whitened

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        rewards = token_rewards(answers, sample_advantages(answers, estimator))
        counted = answers.mask & answers.valid[:, None]
        returns = token_returns(rewards, counted, gamma=self.gamma)
        if not self.whitened:
            return returns
        return whiten(returns, counted, moments=masked_moments(returns, counted, add=summed_moments(answers)))


def token_rewards(answers: Answers, outcome: Tensor) -> Tensor:
    """[B, T] float64: the outcome [B] at the last token, less the price of each token's distance to the reference where `kl.place` is reward."""
    rewards = outcome_rewards(outcome, answers.mask)
    kl = answers.config.kl
    if kl.weight > 0 and kl.place == "reward":
        old, reference = answers.token("log_prob"), answers.token("reference")
        rewards = kl_in_reward(rewards, old.double(), reference.double(), answers.mask, beta=kl.weight)
    return rewards


CREDITS: dict[str, Callable[..., Credit]] = {"answer": AnswerCredit, "token_returns": TokenReturns}
