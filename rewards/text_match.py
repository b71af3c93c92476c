r"""Exact match: is the final answer of a completion the one that the prompt's metadata gives?

    value = 1 if clean(answer found in the completion) == clean(metadata["answer"]), else 0

What the answer of a completion is follows from ``extract``; "auto" takes the last of the following that is there: the last ``\boxed{...}`` with balanced
braces, else what stands after the last ``####`` up to the end of its line (the form of GSM8K, arXiv:2110.14168), else the last number. ``clean`` is Unicode
NFKC, the minus sign U+2212 as "-", lower case, runs of white space as one space, none at the ends, and no commas between groups of three digits. With a
``tolerance`` two numbers are the same when they differ by at most that; "3/4" is a number too.

A completion without an answer is wrong, 0, and not invalid: it was asked for one. The order boxed, ####, number and the cleaning are our reading; papers
differ, and none is canonical.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError

__all__ = ["Correctness", "ExactMatch", "Extract", "check_answers", "clean_answer", "find_answer", "gold_answer", "texts_of"]

Extract = Literal["auto", "boxed", "hashes", "number", "tag", "whole"]
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_NUMERAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def texts_of(reward: str, batch: SampleBatch) -> list[str]:
    """The completions of a batch, one per prompt.

    Raises:
        UserError: the batch has none (it has pictures), or one is no text.
        ValueError: B = 0, or there are not as many as prompts.
    """
    if len(batch) == 0:
        raise ValueError(f"reward {reward}: cannot score an empty batch")
    if batch.texts is None:
        raise UserError(f"reward {reward}: needs texts (completions), got {'none' if batch.images is None else 'only pictures'}; choose another reward")
    if len(batch.texts) != len(batch):
        raise ValueError(f"SampleBatch.texts has {len(batch.texts)} entries for {len(batch)} prompts")
    for prompt, text in zip(batch.prompts, batch.texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"reward {reward}: the completion of the prompt {shorten(prompt.text)} is {type(text).__name__}, not text")
    return list(batch.texts)


def gold_answer(reward: str, prompt: Prompt) -> str:
    """The metadata `answer` of a prompt, a text or a number, as text.

    Raises:
        UserError: it is missing, empty, or something else.
    """
    answer = prompt.metadata.get("answer")
    if answer is None:
        raise UserError(f"reward {reward}: the prompt {shorten(prompt.text)} has no metadata 'answer'; add it to every line of the prompt file")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise UserError(f"reward {reward}: the prompt {shorten(prompt.text)} has the metadata answer {answer!r}; give a text that is not empty, or a number")
    return str(answer)


def check_answers(reward: str, prompts: Sequence[Prompt]) -> None:
    """Raise the UserError of `gold_answer` for the first prompt without an answer."""
    for prompt in prompts:
        gold_answer(reward, prompt)


def shorten(text: str) -> str:
    """A prompt for a message: quoted, on one line, at most 80 characters."""
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else line[:77] + "...")


def find_answer(text: str, extract: Extract = "auto") -> str | None:
    """The final answer of a completion, as it stands there; None if there is none."""
    if extract == "whole":
        return text
    if extract == "tag":
        found = _TAG.findall(text)
        return found[-1] if found else None
    finders = {"boxed": (_last_boxed,), "hashes": (_after_hashes,), "number": (_last_number,), "auto": (_last_boxed, _after_hashes, _last_number)}[extract]
    return next((answer for finder in finders if (answer := finder(text)) is not None), None)


def _last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` whose braces balance; an escaped brace is a character like any other."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth, start = 1, match.end()
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[start : start + brace.start()]
    return None


def _after_hashes(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n")[0] if mark and rest.strip() else None


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-"))
    return found[-1] if found else None


def clean_answer(answer: str) -> str:
    """The form in which answers are compared; see the module's text."""
    plain = unicodedata.normalize("NFKC", answer).replace("\N{MINUS SIGN}", "-")
    return _THOUSANDS.sub("", " ".join(plain.split()).lower())


def _as_number(clean: str) -> float | None:
    top, slash, bottom = clean.partition("/")
    if not all(_NUMERAL.fullmatch(part.strip()) for part in ((top, bottom) if slash else (top,))):
        return None
    divisor = float(bottom) if slash else 1.0
    value = float(top) / divisor if divisor else math.inf
    return value if math.isfinite(value) else None


class Correctness:
    """Whether an answer is the one wanted: the rule behind `ExactMatch`, for other rewards too."""

    def __init__(self, reward: str, extract: Extract = "auto", tolerance: float | None = None) -> None:
        if extract not in get_args(Extract):
            raise UserError(f"reward {reward}: extract must be one of {', '.join(get_args(Extract))}, not {extract!r}")
        if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf):
            raise UserError(f"reward {reward}: tolerance must be a number from 0 on, or null for a comparison of texts, not {tolerance!r}")
        self.extract, self.tolerance = extract, tolerance

    def is_right(self, text: str, gold: str) -> bool | None:
        r"""Whether the completion ends with the gold answer, which may be bare, or a worked solution with ``\boxed{}`` or ``####``; None = it has no answer."""
        found = find_answer(text, self.extract)
        if found is None:
            return None
        wanted = next((answer for finder in (_last_boxed, _after_hashes) if (answer := finder(gold)) is not None), gold)
        left, right = clean_answer(found), clean_answer(wanted)
        if left == right or self.tolerance is None:
            return left == right
        first, second = _as_number(left), _as_number(right)
        return first is not None and second is not None and abs(first - second) <= self.tolerance


class ExactMatch:
    """1 where the final answer of the completion is the prompt's metadata `answer`, else 0. See the module's text.

    Args:
        extract: where the answer stands: "auto", "boxed", "hashes" (after ####), "number" (the last one), "tag" (the last ``<answer>...</answer>``), "whole".
        tolerance: None = answers are compared as texts ("7" is not "7.0"); else two numbers may differ by this much, absolutely.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, extract: Extract = "auto", tolerance: float | None = None) -> None:
        self.info = RewardInfo(
            name="exact_match",
            description="1 if the final answer of the completion is the prompt's metadata `answer`, else 0",
            low=0.0,
            high=1.0,
            source="flowrl, programmatic; the #### form is GSM8K's, arXiv:2110.14168",
            batch_size=1024,
            reads=("texts", "metadata"),
            metadata=("answer",),
            runs_on="cpu",
        )
        self._correctness = Correctness(self.info.name, extract, tolerance)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt without an answer."""
        check_answers(self.info.name, prompts)

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32, 0 or 1; raw["exact_match_answer_found"] [B] float32, 1 where the completion has an answer at all.

        Raises:
            UserError: no texts, or a prompt without metadata `answer`.
            ValueError: B = 0.
        """
        texts = texts_of(self.info.name, batch)
        right: list[Any] = [self._correctness.is_right(text, gold_answer(self.info.name, prompt)) for text, prompt in zip(texts, batch.prompts, strict=True)]
        values = torch.tensor([float(bool(verdict)) for verdict in right])
        return Scores(
            values, torch.ones_like(values, dtype=torch.bool), {"exact_match_answer_found": torch.tensor([float(verdict is not None) for verdict in right])}
        )
