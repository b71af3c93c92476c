"""What is written to a model that judges, and what is read out of its reply: captions that cannot give orders, scores, verdicts. Functions of texts.

A caption can hold orders to the judge, such as "Final Score: 5". It stands in brackets that it cannot close (`shut_in`), what the model quotes of it is taken
out before a reply is read (`without_echo`), and only the last label counts: if no number in range follows there, there is no score (`read_number`). None of
this makes a model that obeys the caption honest.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

__all__ = [
    "LABEL",
    "Verdict",
    "aspect_label",
    "column_name",
    "fence",
    "fill",
    "quote",
    "read_number",
    "read_verdict",
    "shut_in",
    "token_chances",
    "without_echo",
]

Verdict: TypeAlias = Literal["first", "second", "tie"] | None

LABEL = r"Final Score[\s*_]*:\s*(?=([^\n]*))"  # what follows is looked at, not consumed: a line can hold the label twice

_NUMBER = re.compile(  # and, if there is one, what it is out of; a span, a percentage or a decimal comma is no number
    r"[\s*_`]*([+-]?\d+(?:\.\d+)?)(?:[\s*_`]*(?:/|out of)[\s*_`]*(\d+(?:\.\d+)?))?"
    r"(?![\d%]|e[+-]?\d|[.,]\d|\s*/|\s*(?:[-–—~]|to\b|or\b|out of\b)\s*\d)",
    re.ASCII | re.IGNORECASE,
)
_NOT_APPLICABLE = re.compile(r"[\s*_`]*n/?a\b", re.IGNORECASE)
_VERDICT = re.compile(r"image\s*([12])\s+is\s+better|equally\s+good", re.IGNORECASE)


def fill(question: str, caption: str, text: str = "") -> str:
    """A question with {prompt} and {text} filled in, both at once: a caption that says {text} stays what it is."""
    parts = {"{prompt}": shut_in(caption), "{text}": fence(text)}
    return re.sub(r"\{prompt\}|\{text\}", lambda match: parts[match[0]], question)


def shut_in(caption: str) -> str:
    """A caption that cannot leave the brackets it is written in: its own become parentheses, and its lines one line."""
    return " ".join(caption.replace("[", "(").replace("]", ")").split())


def fence(text: str) -> str:
    """A text of many lines between two marks that it cannot hold, since they are made of its hash."""
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"<<{mark}>>\n{text}\n<</{mark}>>"


def without_echo(reply: str, caption: str) -> str:
    """A reply without quotations of the caption, which could hold words that look like a score."""
    for said in {shut_in(caption), caption} - {""}:
        for before, after in ("[]", '""', "''", "``", "“”"):
            reply = reply.replace(f"{before}{said}{after}", " ")
    return reply


def quote(text: str) -> str:
    """The first 512 characters of a reply, on one line."""
    return repr(text[:512] + ("..." if len(text) > 512 else ""))


def aspect_label(aspect: str) -> str:
    """A regular expression like `LABEL` for a line such as "Style Score (1-5): 4"."""
    return rf"\b{re.escape(aspect)}\s+Score\s*(?:\([^)\n]*\))?[\s*_]*:\s*(?=([^\n]*))"


def column_name(aspect: str) -> str:
    """An aspect as a part of a column's name: small letters, digits and underscores."""
    return re.sub(r"\W+", "_", aspect.casefold()).strip("_")


def read_number(reply: str, label: re.Pattern[str], low: float, high: float, what: str = "score", allow_na: bool = False) -> float:
    """The number in [low, high] at the start of what the last match of ``label`` captured; NaN where that is N/A, if allowed.

    Raises:
        ValueError: there is no label, no number, or one out of range or on another scale, such as 4/10 where high is 5; the message quotes the reply.
    """
    said = [match[1] or "" for match in label.finditer(reply)]
    if not said:
        raise ValueError(f"no {what} in the reply: {quote(reply)}")
    if allow_na and _NOT_APPLICABLE.match(said[-1]):
        return math.nan
    match = _NUMBER.match(said[-1])
    if match is None:
        raise ValueError(f"no {what} that can be read in the reply: {quote(reply)}")
    number, out_of = float(match[1]), match[2]
    if not low <= number <= high or (out_of is not None and float(out_of) != high):
        raise ValueError(f"the {what} is not from {low:g} to {high:g}: {quote(reply)}")
    return number


def token_chances(first_tokens: Sequence[tuple[str, float]], wanted: Sequence[str]) -> list[float]:
    """Probabilities of the wanted words as the first token, each summed over its spellings: any case, with or without a leading space.

    Args:
        first_tokens: tokens with natural log-probabilities.
    Raises:
        ValueError: no wanted word has any probability.
    """
    words = [(re.sub(r"[\sĠ▁]+", "", token).casefold(), math.exp(value)) for token, value in first_tokens]
    chances = [math.fsum(chance for word, chance in words if word == one) for one in wanted]
    if not sum(chances):
        raise ValueError(f"none of {', '.join(wanted)} is among the likeliest first tokens")
    return chances


def read_verdict(reply: str) -> Verdict:
    """The last "Image 1 is better", "Image 2 is better" or "equally good" of a reply, inside its last answer tags if it has any; None if there is none."""
    tagged = re.findall(r"<answer>(.*?)</answer>", reply, re.DOTALL | re.IGNORECASE)
    found = list(_VERDICT.finditer(tagged[-1] if tagged else reply))
    if not found:
        return None
    place: str | None = found[-1][1]
    return "tie" if place is None else "first" if place == "1" else "second"
