"""Arithmetic reward: is the final answer of a worked word problem the right one? Exact, for the problems of the embedded language model and any like them.

    value = 1 if what stands after the last "#" of the text, without white space around it, is a whole number and equals metadata["answer"], else 0

Nothing else may follow the number: of "#12 13" no part is taken. Digits are 0 to 9 of ASCII; leading zeros do not matter. A text without such a number is
wrong, 0, and not invalid: it was asked for one. Numbers are compared as digits and every pattern has a bounded length, so the time is linear in the text.

Raw columns: ``arithmetic_format``, 1 where the text ends with the marker and a whole number; ``arithmetic_work``, the share of true ones among the equations
``a+b=c`` before the last marker, NaN without any (numbers of at most 12 digits, one sign; longer chains are no equations); ``arithmetic_level``, the
metadata's ``level``, NaN without one. Source: ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.arithmetic_world import MARKER, result
from rewards.text_match import gold_answer, shorten, texts_of

__all__ = ["ArithmeticReward", "final_answer", "true_share"]

_WHOLE = re.compile(r"(-?)([0-9]+)")
_EQUATION = re.compile(r"(?<![0-9.+*=-])([0-9]{1,12}) ?([-+*]) ?([0-9]{1,12}) ?= ?(-?[0-9]{1,24})(?!\.?[0-9])(?! ?[-+*=])")


def _normal(number: str) -> str | None:
    """A whole number without leading zeros and without the sign of -0; None for anything else."""
    match = _WHOLE.fullmatch(number)
    if match is None:
        return None
    digits = match[2].lstrip("0")
    return match[1] + digits if digits else "0"


def final_answer(text: str) -> str | None:
    """The whole number after the last marker, without leading zeros; None if there is no marker, or anything else after it."""
    _, mark, rest = text.rpartition(MARKER)
    return _normal(rest.strip()) if mark else None


def true_share(text: str) -> float:
    """The share of true equations before the last marker, in [0, 1]; NaN without equations."""
    working = text.rpartition(MARKER)[0] if MARKER in text else text
    verdicts = [result(int(a), sign, int(b)) == int(c) for a, sign, b, c in _EQUATION.findall(working)]
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


class ArithmeticReward:
    """1 where the final answer is the prompt's metadata `answer`, else 0. See the module's text."""

    def __init__(self) -> None:
        self.info = RewardInfo(
            name="arithmetic",
            description="1 if the number after the last # is the metadata's `answer`, else 0; for the embedded language model",
            low=0.0,
            high=1.0,
            source="flowrl, programmatic",
            batch_size=1024,
            reads=("texts", "metadata"),
            metadata=("answer",),
            runs_on="cpu",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt whose `answer` is missing or no whole number."""
        for prompt in prompts:
            self._gold(prompt)

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32, 0 or 1; the raw columns [B] float32 of the module's text.

        Raises:
            UserError: no texts, or a prompt whose metadata `answer` is missing or no whole number.
            ValueError: B = 0.
        """
        texts = texts_of(self.info.name, batch)
        found = [final_answer(text) for text in texts]
        values = torch.tensor([float(answer == self._gold(prompt)) for answer, prompt in zip(found, batch.prompts, strict=True)])
        raw = {
            "arithmetic_format": torch.tensor([float(answer is not None) for answer in found]),
            "arithmetic_work": torch.tensor([true_share(text) for text in texts]),
            "arithmetic_level": torch.tensor([_level(prompt) for prompt in batch.prompts]),
        }
        return Scores(values, torch.ones_like(values, dtype=torch.bool), raw)

    def _gold(self, prompt: Prompt) -> str:
        answer = _normal(gold_answer(self.info.name, prompt).strip())
        if answer is None:
            given = prompt.metadata["answer"]
            raise UserError(f"reward {self.info.name}: the prompt {shorten(prompt.text)} has the metadata answer {given!r}; give a whole number")
        return answer


def _level(prompt: Prompt) -> float:
    level = prompt.metadata.get("level")
    return float(level) if isinstance(level, int | float) else math.nan
