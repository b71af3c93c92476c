"""Guess a hidden number; the environment says whether it is higher or lower."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Self

from flowrl.environments.base import Step
from flowrl.environments.checks import check_whole
from flowrl.seeds import derive_seed
from flowrl.types import Prompt, UserError

__all__ = ["Guess"]

_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,9}(?![0-9])")


class Guess:
    """A number from low to high is to be found within some turns; reward 1 for the right one, 0 otherwise.

    The last number of an action counts. An action without a number (of at most 9 digits) costs a turn too and is answered with ``unreadable``. The state is
    what is known: the smallest and the largest number that are still possible. A prompt's metadata may give ``low`` and ``high``.

    Args:
        low, high: 0 <= low < high < 10^9. turns: at least 1.
        higher, lower, unreadable: what is said: the hidden number is higher than the guess, lower, or there was no guess. They are words that the model knows.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, low: int = 1, high: int = 9, turns: int = 4, higher: str = "higher", lower: str = "lower", unreadable: str = "no number") -> None:
        self.low, self.high, self.turns = low, high, check_whole("guess", "turns", turns, 1)
        self.words = (higher, lower, unreadable)
        self.success = False
        self.answer = ""
        self._known: tuple[int, int] = self._range(low, high)
        self._hidden, self._left = -1, 0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt whose metadata has a wrong range."""
        for prompt in prompts:
            self._range(prompt.metadata.get("low", self.low), prompt.metadata.get("high", self.high))

    def reset(self, prompt: Prompt, seed: int) -> str:
        """Hide a number.

        Raises:
            UserError: the prompt's metadata has a wrong range.
        """
        low, high = self._known = self._range(prompt.metadata.get("low", self.low), prompt.metadata.get("high", self.high))
        self._hidden = low + derive_seed("guess", seed) % (high - low + 1)
        self._left, self.success, self.answer = self.turns, False, str(self._hidden)
        return f"{low} to {high}"

    def step(self, action: str) -> Step:
        """Judge a guess.

        Raises:
            RuntimeError: no episode is under way.
        """
        if not self._left:
            raise RuntimeError("no episode is under way; call reset")
        before = self._known
        self._left -= 1
        higher, lower, observation = self.words
        found = _NUMBER.findall(action)
        if found:
            (low, high), guess = before, int(found[-1])
            if guess == self._hidden:
                self._left, self.success = 0, True
                return Step("", 1.0, True, before)
            observation = higher if guess < self._hidden else lower
            self._known = (max(low, guess + 1), high) if guess < self._hidden else (low, min(high, guess - 1))
        return Step(observation, 0.0, self._left == 0, before)

    def copy(self) -> Self:
        """An independent copy."""
        return copy.copy(self)

    def _range(self, low: object, high: object) -> tuple[int, int]:
        first, last = check_whole("guess", "low", low, 0), check_whole("guess", "high", high, 0)
        if not first < last < 10**9:
            raise UserError(f"environment guess: low is {first} and high {last}; low must be smaller, and high below 10^9")
        return first, last
