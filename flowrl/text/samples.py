"""Answers with their scores, on their way into an iteration: picked, put together and sent to other processes, whoever gave them and when.

Letters: B answers, T tokens of the longest, P groups, C contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl.types import Completions, Scores

__all__ = ["COLUMNS", "EXPERT", "FRESH", "HINTED", "PAST", "Pick", "Samples", "picked", "sampling_tokens"]

FRESH, EXPERT, PAST, HINTED = range(4)
"""Where an answer comes from: the policy now, the data, the policy earlier, the policy with help."""

COLUMNS: dict[str, tuple[torch.dtype, float]] = {"origin": (torch.int64, FRESH), "compared": (torch.bool, True), "train": (torch.bool, True)}


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers and what is known of them.

    Attributes:
        completions: their ``group`` is the context that an answer is trained in, a number of ``prompt_tokens``: usually its group's prompt.
        group: [B] int64 in 0..P-1, rising: answers of one group are compared.
        scores: of each reward, "total" among them.
        old: [B, T] float32, log-probabilities under the policy that sampled, where they are not those of the policy now. known: [B] bool, where.
        columns: [B] each: ``origin`` (see `FRESH`), ``compared`` (it is in its group's statistics), ``train``, and what sources add.
    """

    completions: Completions
    group: Tensor
    scores: Mapping[str, Scores]
    old: Tensor
    known: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, completions: Completions, scores: Mapping[str, Scores], **columns: Any) -> Samples:
        """Answers as they were sampled; columns: one value for all."""
        count = len(completions)
        found = {name: torch.full((count,), columns.get(name, default), dtype=dtype) for name, (dtype, default) in COLUMNS.items()}
        old, known = torch.zeros(completions.tokens.shape), torch.zeros(count, dtype=torch.bool)
        return cls(completions, completions.group, dict(scores), old, known, found)

    def __len__(self) -> int:
        return len(self.group)

    def column(self, name: str) -> Tensor:
        """[B]; 0 for a column that is not there."""
        return self.columns[name] if name in self.columns else torch.zeros(len(self), dtype=torch.int64)

    def with_columns(self, **columns: Tensor) -> Samples:
        return replace(self, columns={**self.columns, **columns})

    def aged(self) -> Samples:
        """As a later policy sees them: with the log-probabilities that they were sampled with."""
        fresh = ~self.known
        old = torch.where(fresh[:, None], self.completions.log_prob, self.old)
        return replace(self.with_columns(origin=torch.full_like(self.column("origin"), PAST)), old=old, known=torch.ones_like(self.known))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values."""
        c = self.completions
        names = ("prompt_tokens", "tokens", "mask", "length", "group", "finished", "log_prob", "texts", "turn")
        parts = {name: getattr(c, name) for name in names}
        scores = {name: (s.values, s.valid, dict(s.raw), dict(s.problems)) for name, s in self.scores.items()}
        return {"completions": parts, "group": self.group, "scores": scores, "old": self.old, "known": self.known, "columns": dict(self.columns)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Samples:
        """What `state_dict` described."""
        scores = {name: Scores(*parts) for name, parts in state["scores"].items()}
        return cls(Completions(**state["completions"]), state["group"], scores, state["old"], state["known"], state["columns"])


class Pick(NamedTuple):
    """Answer ``row`` of part number ``part``, as a member of ``group``."""

    part: int
    row: int
    group: int


def picked(parts: Sequence[Samples], picks: Sequence[Pick]) -> Samples:
    """The answers of some picks, group by group; within a group in the order of the picks. An answer may be picked several times."""
    order = sorted(picks, key=lambda pick: pick.group)
    longest = max((int(parts[p].completions.length[row]) for p, row, _ in order), default=1)
    contexts: dict[tuple[int, ...], int] = {}
    where = []
    for p, row, _ in order:
        c = parts[p].completions
        key = tuple(c.prompt_tokens[int(c.group[row])].tolist())
        where.append(contexts.setdefault(key, len(contexts)))

    def rows(values: Sequence[Tensor]) -> Tensor:
        """[B, ...] of a tensor of each part."""
        return torch.stack([values[p][row] for p, row, _ in order]) if order else values[0][:0]

    def wide(values: Sequence[Tensor]) -> Tensor:
        """[B, T]; shorter parts are padded with what their first padding would hold: the pad token's place does not matter, it is never read."""
        fitted = [torch.nn.functional.pad(value[:, :longest], (0, max(0, longest - value.shape[1]))) for value in values]
        return rows(fitted)

    every = [part.completions for part in parts]
    turn = None if any(c.turn is None for c in every) else wide([c.turn for c in every if c.turn is not None])
    completions = Completions(
        prompt_tokens=tuple(torch.tensor(key, dtype=torch.int64) for key in contexts),
        tokens=wide([c.tokens for c in every]),
        mask=wide([c.mask for c in every]),
        length=rows([c.length for c in every]),
        group=torch.tensor(where, dtype=torch.int64),
        finished=rows([c.finished for c in every]),
        log_prob=wide([c.log_prob for c in every]),
        texts=tuple(every[p].texts[row] for p, row, _ in order),
        turn=turn,
    )
    group = torch.tensor([number for _, _, number in order], dtype=torch.int64)
    scores = {name: _scores([part.scores[name] for part in parts], order) for name in parts[0].scores}
    names = dict.fromkeys(name for part in parts for name in part.columns)
    columns = {name: rows([part.column(name) for part in parts]) for name in names}
    return Samples(completions, group, scores, wide([part.old for part in parts]), rows([part.known for part in parts]), columns)


def _scores(parts: Sequence[Scores], order: Sequence[Pick]) -> Scores:
    raw = {}
    for name in dict.fromkeys(name for part in parts for name in part.raw):
        found = [part.raw.get(name, torch.full_like(part.values, torch.nan)) for part in parts]
        raw[name] = torch.stack([found[p][row] for p, row, _ in order]) if order else found[0][:0]
    values = torch.stack([parts[p].values[row] for p, row, _ in order]) if order else parts[0].values[:0]
    valid = torch.stack([parts[p].valid[row] for p, row, _ in order]) if order else parts[0].valid[:0]
    problems = {new: parts[p].problems[row] for new, (p, row, _) in enumerate(order) if row in parts[p].problems}
    return Scores(values, valid, raw, problems)


def sampling_tokens(completions: Completions, rows: int) -> int:
    """The least tokens that a network reads to sample these answers in a call, at most ``rows`` at a time: a prompt once for every batch that has answers to
    it, every answer but its last token.
    """
    sizes = torch.tensor([len(tokens) for tokens in completions.prompt_tokens], dtype=torch.int64)
    prompts = sum(int(sizes[part.unique()].sum()) for part in completions.group.split(rows))
    return prompts + int((completions.length - 1).clamp_min(0).sum())
