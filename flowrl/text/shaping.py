"""What is done to rewards and advantages before training. A new one is a class in a file of its own, and a line in the table.

Letters: B answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from flowrl.core.length_shaping import overlong
from flowrl.text.answers import Answers
from flowrl.text.kl_price import KlPrice
from flowrl.text.lists import WinRate
from flowrl.text.parts import Part
from flowrl.text.reference_value import ReferenceValue
from flowrl.text.shapers import (
    ConstraintGate,
    ExitDecay,
    GateProduct,
    HistoryLength,
    Inserted,
    LengthRank,
    Novelty,
    PositionBonus,
    RankUnlikely,
    RelativeLength,
    ShaperBase,
)

__all__ = ["SHAPERS", "Shaper", "ShaperBase"]


class Shaper(Part, Protocol):
    """Changes rewards before the estimator, advantages after it, or both."""

    def rewards(self, answers: Answers) -> None:
        """Change ``answers.rewards`` (and ``train``, ``valid``, ``in_statistics``) in place."""

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        """[B] or [B, T] float64 in, the same shape out."""
        ...


class Overlong(ShaperBase):
    """DAPO's soft punishment of long answers (arXiv:2503.14476), see `flowrl.core.length_shaping.overlong`.

    Args:
        max_length: null = generation.max_new_tokens. cache: tokens before it within which the punishment grows to -1.
    """

    def __init__(self, max_length: float | None = None, cache: float = 4096) -> None:
        self.max_length, self.cache = max_length, cache

    def rewards(self, answers: Answers) -> None:
        limit = answers.config.generation.max_new_tokens if self.max_length is None else self.max_length
        answers.rewards = answers.rewards + overlong(answers.lengths.double(), max_length=limit, cache=self.cache)


SHAPERS: dict[str, Callable[..., Shaper]] = {
    "overlong": Overlong,
    "kl_price": KlPrice,
    "win_rate": WinRate,
    "reference_value": ReferenceValue,
    "length_rank": LengthRank,
    "history_length": HistoryLength,
    "relative_length": RelativeLength,
    "exit_decay": ExitDecay,
    "gate_product": GateProduct,
    "rank_unlikely": RankUnlikely,
    "novelty": Novelty,
    "position_bonus": PositionBonus,
    "inserted": Inserted,
    "constraint_gate": ConstraintGate,
}
