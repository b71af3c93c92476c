"""A word problem with a calculator: calls of the tool, then the final answer."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Self

from flowrl.environments.base import Step
from flowrl.environments.checks import check_whole
from flowrl.types import Prompt, UserError

__all__ = ["Calculator", "evaluate"]

_MARKER, _CALL, _ERROR = "#", "calc", "error"
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(?:\.[0-9]{1,18})?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_LONGEST = 64  # characters of an expression
_LARGEST = 10**12
_LEXEME = re.compile(r"\s*([0-9]+|[-+*/()])")


class Calculator:
    """A problem whose prompt has the metadata ``answer``, a number. The agent may ask for values, and ends with ``#36``; reward 1 if that is right, else 0.

    | action | answered with |
    | --- | --- |
    | ``... calc 12*3``, with or without ``=`` behind | the value: ``36`` |
    | ``... 12*3=`` (no white space in it) | the value: ``36``, so that a model whose turn ends at ``=`` calls the tool by writing its working |
    | ``... #36`` (what stands after the last ``#``; this goes first) | nothing: the episode is over |
    | anything else, or no expression | ``error`` |

    Expressions have whole numbers, + - * /, and parentheses, at most 64 characters. A division that leaves a rest, or a value from 10^12 on, is an ``error``.
    Every action costs a turn. The state is the list of values that were answered so far.

    Args:
        turns: at least 1.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, turns: int = 6) -> None:
        self.turns = check_whole("calculator", "turns", turns, 1)
        self.success = False
        self.answer = ""
        self._gold = Fraction(0)
        self._values: tuple[int, ...] = ()
        self._left = 0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt without a number as its answer."""
        for prompt in prompts:
            _gold_of(prompt)

    def reset(self, prompt: Prompt, seed: int) -> str:
        """Begin; there is nothing to say beyond the prompt, and nothing is random.

        Raises:
            UserError: the prompt's metadata has no number as ``answer``.
        """
        self._gold = _gold_of(prompt)
        self.answer = _MARKER + str(prompt.metadata["answer"]).rpartition(_MARKER)[2].strip()
        self._values, self._left, self.success = (), self.turns, False
        return ""

    def step(self, action: str) -> Step:
        """Judge the final answer, or calculate.

        Raises:
            RuntimeError: no episode is under way.
        """
        if not self._left:
            raise RuntimeError("no episode is under way; call reset")
        before = self._values
        self._left -= 1
        _, marker, answer = action.rpartition(_MARKER)
        if marker:
            self._left, self.success = 0, _number(answer) == self._gold
            return Step("", float(self.success), True, before)
        value = evaluate(_expression(action))
        if value is not None:
            self._values = (*before, value)
        return Step(_ERROR if value is None else str(value), 0.0, self._left == 0, before, tool=value is not None)

    def copy(self) -> Self:
        """An independent copy."""
        return copy.copy(self)


def _gold_of(prompt: Prompt) -> Fraction:
    """The right answer, which may be a worked solution with the number after the last ``#``."""
    answer = prompt.metadata.get("answer")
    gold = None
    if isinstance(answer, int | float | str) and not isinstance(answer, bool):
        gold = _number(str(answer).rpartition(_MARKER)[2])
    if gold is None:
        shown = " ".join(prompt.text.split())
        raise UserError(
            f"environment calculator: the prompt {shown[:80]!r} has the metadata answer {answer!r}; a number is needed, or a text that ends with #number"
        )
    return gold


def _number(text: str) -> Fraction | None:
    """The number at the beginning of a text; what follows its first word does not matter."""
    words = text[:200].split(maxsplit=1)
    word = _THOUSANDS.sub("", words[0]).removesuffix(".") if words else ""
    return Fraction(word) if _NUMBER.fullmatch(word) else None


def _expression(action: str) -> str:
    """What an action asks to be calculated; "" = nothing."""
    text = action.rstrip().removesuffix("=")
    _, call, asked = text.rpartition(_CALL)
    if call:
        return asked.strip()
    if len(text) == len(action.rstrip()):
        return ""
    end = text[-_LONGEST - 1 :]
    start = next((i for i in range(len(end), 0, -1) if end[i - 1] not in "0123456789+-*/()"), 0)
    return end[start:]


def evaluate(expression: str) -> int | None:
    """The value of an expression of whole numbers, + - * / and parentheses, with at least one sign in it; None = it has none, or is no such expression."""
    if len(expression) > _LONGEST or not any(sign in expression for sign in "+-*/"):
        return None
    parts: list[str] = []
    place = 0
    while place < len(expression.rstrip()):
        match = _LEXEME.match(expression, place)
        if match is None:
            return None
        parts.append(match[1])
        place = match.end()
    parts.append("")
    try:
        value, after = _sum(parts, 0)
    except ArithmeticError:
        return None
    return value if parts[after] == "" and after == len(parts) - 1 and abs(value) < _LARGEST else None


def _sum(parts: list[str], at: int) -> tuple[int, int]:
    """(value, place after it) of terms with + and - between them. Raises ArithmeticError where there is none."""
    value, at = _product(parts, at)
    while parts[at] in ("+", "-"):
        term, after = _product(parts, at + 1)
        value, at = (value + term if parts[at] == "+" else value - term), after
    return value, at


def _product(parts: list[str], at: int) -> tuple[int, int]:
    value, at = _factor(parts, at)
    while parts[at] in ("*", "/"):
        factor, after = _factor(parts, at + 1)
        if parts[at] == "/" and (not factor or value % factor):
            raise ArithmeticError("a division that leaves a rest")
        value, at = (value * factor if parts[at] == "*" else value // factor), after
    return value, at


def _factor(parts: list[str], at: int) -> tuple[int, int]:
    part = parts[at]
    if part.isdecimal():
        return int(part), at + 1
    if part == "-":
        value, at = _factor(parts, at + 1)
        return -value, at
    if part == "(":
        value, at = _sum(parts, at + 1)
        if parts[at] == ")":
            return value, at + 1
    raise ArithmeticError("a number is missing")
