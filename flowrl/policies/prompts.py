"""Embeddings of prompts: every distinct text is encoded once, and a prompt is a row number from then on.

Letters: n prompts, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["PromptCache"]


class PromptCache:
    """Columns of embeddings, [n, ...] each.

    Args:
        embed: texts -> columns [len(texts), ...], always the same names.
    """

    def __init__(self, embed: Callable[[Sequence[str]], Mapping[str, Tensor]]) -> None:
        self._embed = embed
        self._row_of: dict[str, int] = {}
        self.columns: dict[str, Tensor] = {}

    def rows(self, texts: Sequence[str], *, batch: int) -> Tensor:
        """Row numbers [len(texts)] int64; new texts are encoded, ``batch`` at a time."""
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        found = [dict(self._embed(new[start : start + batch])) for start in range(0, len(new), batch)]
        if new:
            parts = [self.columns, *found] if self.columns else found
            self.columns = {name: torch.cat([part[name] for part in parts]) for name in found[0]}
            self._row_of |= {text: len(self._row_of) + offset for offset, text in enumerate(new)}
        return torch.tensor([self._row_of[text] for text in texts], dtype=torch.int64)

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """The columns at rows [R]: [R, ...] each."""
        return {name: column[rows] for name, column in self.columns.items()}
