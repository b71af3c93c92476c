"""Which tokens count, and how much: masks and weights of the tokens' losses. A new one is a class here, or in a file of its own, and a line in the table.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flowrl.core.token_weights import overlong_filter, uncertain_mask
from flowrl.text.answers import Answers
from flowrl.text.parts import Part, Stateless

__all__ = ["FACTORS", "Factor"]


class Factor(Part, Protocol):
    """A mask [B, T] bool: a token that is False does not count, also not in what the loss is divided by. Or a weight [B, T] float of its loss."""

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        """advantages: [B, T] float32."""
        ...


class OverlongFilter(Stateless):
    """Answers that the length limit cut teach nothing (DAPO)."""

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        return overlong_filter(answers.mask, ~answers.completions.finished)


class Uncertain(Stateless):
    """Only tokens that the sampling policy was not sure of (SPO's probability mask).

    Args:
        threshold: in (0, 1], probability from which a token is sure.
    """

    needs = frozenset({"log_prob"})

    def __init__(self, threshold: float = 0.9) -> None:
        self.threshold = threshold

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        return uncertain_mask(answers.token("log_prob"), answers.mask, threshold=self.threshold)


FACTORS: dict[str, Callable[..., Factor]] = {"overlong_filter": OverlongFilter, "uncertain": Uncertain}
