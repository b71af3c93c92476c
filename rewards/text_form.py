"""The form of a completion: does it keep the format, is it too long, does it repeat itself.

* Format: the rule-based format reward of DeepSeek-R1 (arXiv:2501.12948, section 2.2.2): reasoning between think tags, then the answer between answer tags. The
  paper gives no formula; 1 for a full match and, graded, 0.25 for each tag that stands there once and in order are what open reproductions use, by our reading.
* Length, "overlong": soft overlong punishment of DAPO (arXiv:2503.14476, equation 13), with n the length, L the limit and C the width of the slope:

      0 for n <= L - C,   ((L - C) - n) / C up to n = L,   -1 beyond

* Length, "cosine": after arXiv:2502.03373, where r goes from its value at n = 0 to that at n = L as half a cosine, apart for right and wrong answers:

      r(n) = r_L + (r_0 - r_L) (1 + cos(pi min(n, L) / L)) / 2

  Ours: beyond L the value stays at r_L, so that it is continuous; the paper gives a punishment of its own there, which "overlong" does as well.
* Repetition: share of n-grams that are not the first of their kind, negative: -(1 - distinct / all); 0 for texts shorter than n.

From memory, not checked against the papers' texts: the number of the equation and of the section, and the form of the cosine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.checkpoints import load_pretrained, require
from rewards.text_match import Correctness, Extract, check_answers, gold_answer, texts_of

__all__ = ["AnswerFormat", "LengthPenalty", "RepetitionPenalty"]

Unit = Literal["tokens", "words", "characters"]


class _Units:
    """Cuts a text into tokens, words or characters."""

    def __init__(self, reward: str, unit: Unit | None, tokenizer: str | None) -> None:
        unit = unit or ("words" if tokenizer is None else "tokens")
        if unit not in get_args(Unit):
            raise UserError(f"reward {reward}: unit must be tokens, words or characters, not {unit!r}")
        if (unit == "tokens") != (tokenizer is not None):
            advice = "give `tokenizer`, a folder or a hub id" if tokenizer is None else "leave `tokenizer` away, or count tokens"
            raise UserError(f"reward {reward}: unit {unit} and tokenizer {tokenizer!r} do not go together; {advice}")
        self.unit, self._reward, self._source = unit, reward, tokenizer
        self._tokenizer: Any = None

    def load(self) -> None:
        """Load the tokenizer, once, if there is one."""
        if self._source is not None and self._tokenizer is None:
            transformers = require(self._reward, "transformers", "dev")
            self._tokenizer = load_pretrained(self._reward, transformers.AutoTokenizer.from_pretrained, self._source)

    def __call__(self, text: str) -> list[Any]:
        if self.unit == "characters":
            return list(text)
        if self.unit == "words":
            return text.split()
        if self._tokenizer is None:
            raise RuntimeError(f"reward {self._reward}: load must be called before score")
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens


def _scores(values: Sequence[float], raw: dict[str, list[float]]) -> Scores:
    columns = {name: torch.tensor(column, dtype=torch.float32) for name, column in raw.items()}
    return Scores(torch.tensor(values, dtype=torch.float32), torch.ones(len(values), dtype=torch.bool), columns)


def _whole_number(reward: str, name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"reward {reward}: {name} must be a whole number from {low} on, not {value!r}")
    return value


class AnswerFormat:
    """1 where the completion has the asked form: think block, then answer block, and nothing else. See the module's text.

    Args:
        tags: the blocks, in order; each is ``<tag>...</tag>``, with no tag of the list inside, and only white space between and around.
        graded: True = 1 / (2 len(tags)) for each opening or closing tag that occurs exactly once, after those counted before it, whatever else stands there.
        pattern: a regular expression (Python, dot matches newlines) that must match the whole completion; replaces ``tags``.
    Raises:
        UserError: the pattern is none, or it comes with ``graded``; a tag is not a word.
    """

    def __init__(self, tags: Sequence[str] = ("think", "answer"), graded: bool = False, pattern: str | None = None) -> None:
        self.info = RewardInfo(
            name="format",
            description="1 if the completion is a think block followed by an answer block, or matches a pattern of your own",
            low=0.0,
            high=1.0,
            source="DeepSeek-R1, arXiv:2501.12948",
            batch_size=1024,
            reads=("texts",),
            runs_on="cpu",
        )
        if isinstance(tags, str) or not tags or not all(isinstance(tag, str) and re.fullmatch(r"\w+", tag) for tag in tags):
            raise UserError(f"reward format: tags must be a list of words such as [think, answer], not {tags!r}")
        if pattern is not None and graded:
            raise UserError("reward format: graded counts tags and knows no pattern; leave one of the two away")
        self._marks = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")] if graded else []
        inside = f"(?:(?!</?(?:{'|'.join(tags)})>).)*"
        try:
            self._pattern = re.compile(pattern or r"\s*" + r"\s*".join(f"<{tag}>{inside}</{tag}>" for tag in tags) + r"\s*", re.DOTALL)
        except re.error as error:
            raise UserError(f"reward format: the pattern {pattern!r} is no regular expression ({error})") from error

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing to load."""

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32 in [0, 1].

        Raises:
            UserError: no texts.
            ValueError: B = 0.
        """
        return _scores([self._grade(text) for text in texts_of("format", batch)], {})

    def _grade(self, text: str) -> float:
        if not self._marks:
            return float(self._pattern.fullmatch(text) is not None)
        count, end = 0, 0
        for mark in self._marks:
            if text.count(mark) == 1 and text.index(mark) >= end:
                count, end = count + 1, text.index(mark) + len(mark)
        return count / len(self._marks)


class LengthPenalty:
    """Punishes long completions, or scales the reward of right and wrong answers by length. See the module's text.

    Args:
        mode: "overlong" (-1 to 0), or "cosine", which needs the prompts' metadata `answer` and judges as the reward exact_match does.
        max_length: L. cache: C, of "overlong", 1 to L. Both in the unit.
        unit: "tokens" (needs ``tokenizer``), "words" or "characters"; None = tokens if there is a tokenizer, else words.
        tokenizer: folder or hub id.
        correct, wrong: of "cosine", the values [at length 0, at max_length] of right and of wrong answers.
        extract, tolerance: of "cosine", as for exact_match.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(
        self,
        mode: Literal["overlong", "cosine"] = "overlong",
        max_length: int = 20480,
        cache: int = 4096,
        unit: Unit | None = None,
        tokenizer: str | None = None,
        correct: Sequence[float] = (1.0, 0.5),
        wrong: Sequence[float] = (0.0, 0.0),
        extract: Extract = "auto",
        tolerance: float | None = None,
    ) -> None:
        if mode not in ("overlong", "cosine"):
            raise UserError(f"reward length: mode must be overlong or cosine, not {mode!r}")
        self.mode, self.max_length = mode, _whole_number("length", "max_length", max_length, 1)
        self.cache = _whole_number("length", "cache", cache, 1)
        if mode == "overlong" and self.cache > max_length:
            raise UserError(f"reward length: cache {cache} is beyond max_length {max_length}; make it smaller")
        sides: list[tuple[str, Any]] = [("correct", correct), ("wrong", wrong)]
        for name, ends in sides:
            if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
                raise UserError(f"reward length: {name} must be two finite numbers, at length 0 and at max_length, not {ends!r}")
        self._ends = {True: (float(correct[0]), float(correct[1])), False: (float(wrong[0]), float(wrong[1]))}
        self._units, self._correctness = _Units("length", unit, tokenizer), Correctness("length", extract, tolerance)
        cosine, all_ends = mode == "cosine", (*correct, *wrong)
        self.info = RewardInfo(
            name="length",
            description="a penalty for completions near and beyond a length limit, or a scale of right and wrong answers by their length",
            low=min(all_ends) - (min(all_ends) == max(all_ends)) if cosine else -1.0,
            high=max(all_ends) if cosine else 0.0,
            source="DAPO, arXiv:2503.14476" if not cosine else "cosine length scaling, arXiv:2502.03373",
            batch_size=1024,
            reads=("texts", "metadata") if cosine else ("texts",),
            metadata=("answer",) if cosine else (),
            runs_on="cpu",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the tokenizer, if there is one."""
        self._units.load()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise a UserError for the first prompt without an answer; only "cosine" needs one."""
        if self.mode == "cosine":
            check_answers("length", prompts)

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32; raw["length_units"] [B] float32 in the unit.

        Raises:
            UserError: no texts; with "cosine", a prompt without metadata `answer`.
            ValueError: B = 0.
            RuntimeError: tokens are counted and ``load`` was not called.
        """
        texts = texts_of("length", batch)
        lengths = [len(self._units(text)) for text in texts]
        if self.mode == "overlong":
            values = [min(0.0, max(-1.0, (self.max_length - self.cache - length) / self.cache)) for length in lengths]
        else:
            right = [bool(self._correctness.is_right(text, gold_answer("length", prompt))) for text, prompt in zip(texts, batch.prompts, strict=True)]
            values = [self._cosine(length, is_right) for length, is_right in zip(lengths, right, strict=True)]
        return _scores(values, {"length_units": [float(length) for length in lengths]})

    def _cosine(self, length: int, is_right: bool) -> float:
        short, long = self._ends[is_right]
        return long + (short - long) * (1 + math.cos(math.pi * min(length, self.max_length) / self.max_length)) / 2


class RepetitionPenalty:
    """Punishes completions that repeat themselves: -(1 - distinct / all n-grams), 0 for none repeated, towards -1. See the module's text.

    Args:
        n: words or tokens in a row that count as one.
        unit, tokenizer: as for the length; words are compared without regard to case.
    Raises:
        UserError: an argument is out of its range.
    """

    def __init__(self, n: int = 3, unit: Unit | None = None, tokenizer: str | None = None) -> None:
        self.n = _whole_number("repetition", "n", n, 1)
        self._units = _Units("repetition", unit, tokenizer)
        self.info = RewardInfo(
            name="repetition",
            description=f"minus the share of {n}-grams of the completion that occurred in it before",
            low=-1.0,
            high=0.0,
            source="flowrl, programmatic; n-gram penalties as in arXiv:2502.03373",
            batch_size=1024,
            reads=("texts",),
            runs_on="cpu",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load the tokenizer, if there is one."""
        self._units.load()

    def score(self, batch: SampleBatch) -> Scores:
        """values [B] float32 in (-1, 0]; raw["repetition_ngrams"] [B] float32, how many n-grams there are.

        Raises:
            UserError: no texts.
            ValueError: B = 0.
            RuntimeError: tokens are counted and ``load`` was not called.
        """
        values, counts = [], []
        for text in texts_of("repetition", batch):
            units = self._units(text.lower() if self._units.unit == "words" else text)
            grams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
            values.append(len(set(grams)) / len(grams) - 1 if grams else 0.0)
            counts.append(float(len(grams)))
        return _scores(values, {"repetition_ngrams": counts})
