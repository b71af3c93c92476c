"""The distance to the reference as a price of the whole answer, taken off its reward before answers are compared (RLOO).

Letters: B answers.
"""

from __future__ import annotations

from torch import Tensor

from flowrl.core.regularizers import kl_in_reward
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless

__all__ = ["KlPrice"]


class KlPrice(Stateless):
    """A shaper: each reward less `kl.weight` times the sum over the answer of log_prob - reference, with `kl.place: reward` (arXiv:2402.14740)."""

    needs = frozenset({"log_prob", "reference"})

    def rewards(self, answers: Answers) -> None:
        old, reference, mask = answers.token("log_prob").double(), answers.token("reference").double(), answers.mask
        price = kl_in_reward(0.0 * old, old, reference, mask, beta=answers.config.kl.weight)
        answers.rewards = answers.rewards + price.sum(1)

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        return advantages
