"""Which tokens count, and how much: masks and weights of the tokens' losses. A new one is a class here, or in a file of its own, and a line in the table.

Letters: B answers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flowrl.core.token_weights import overlong_filter, uncertain_mask
from flowrl.text.answers import Answers
from flowrl.text.branches import Once
from flowrl.text.divergence import Divergence
from flowrl.text.mixed import Resampled
from flowrl.text.parts import Part, Stateless
from flowrl.text.ranks import smallest
from flowrl.text.value import Fresh

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


class TopEntropy(Stateless):
    """Only the tokens whose distribution has the highest entropy learn; the others have weight 0 and stay in what the loss is divided by (arXiv:2506.01939).

    The quantile is that of `flowrl.core.token_weights.top_entropy_mask`, over all processes, under the policy that sampled.

    Args:
        share: in (0, 1], of the tokens that are kept; 1 keeps all.
    """

    needs = frozenset({"entropy"})

    def __init__(self, share: float = 0.2) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share:g}, and a share of tokens is in (0, 1]")
        self.share = share

    def __call__(self, answers: Answers, advantages: Tensor) -> Tensor:
        chosen = answers.mask & (answers.valid & answers.train)[:, None]
        count = answers.add(float(chosen.sum()))
        kept = count - math.ceil((1 - self.share) * (count - 1) - 1e-9)  # those above the quantile between two values
        return smallest(-answers.token("entropy"), chosen, kept, answers.add).float()


FACTORS: dict[str, Callable[..., Factor]] = {
    "overlong_filter": OverlongFilter,
    "uncertain": Uncertain,
    "fresh": Fresh,
    "top_entropy": TopEntropy,
    "divergence": Divergence,
    "resampled": Resampled,
    "once": Once,
}
