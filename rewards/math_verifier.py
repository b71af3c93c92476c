"""Compares a completion with a gold answer by math-verify; runs in worker processes, and so imports nothing of this package.

math-verify guards itself by alarm signals; here the pool kills the process instead, so its own time limits are off.
"""

from __future__ import annotations

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

__all__ = ["judge"]

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its time limits are off
_LATEX = re.compile(r"\$|\\\(|\\\[|\\f?boxed|\\begin\{")


def judge(gold: str, completion: str) -> str:
    r""" "right", "wrong", "no answer" (nothing in the completion could be read) or "no gold" (the gold answer could not be read).

    A gold answer that is not marked as LaTeX is taken as LaTeX all the same: without the dollars "(1, 2)" would be read as 2. In the completion the answer
    must be
    marked: the last ``\boxed{}`` goes first (boxes side by side are one answer, a set), then formulas that the text calls its answer.
    """
    marked = gold if _LATEX.search(gold) else f"${gold}$"
    wanted = parse(marked, extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=None)
    if all(isinstance(form, str) for form in wanted):  # where it cannot read a formula it falls back to its text
        return "no gold"
    found = parse(completion, extraction_config=[LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)], parsing_timeout=None)
    if not found:
        return "no answer"
    return "right" if verify(wanted, found, timeout_seconds=None) else "wrong"
