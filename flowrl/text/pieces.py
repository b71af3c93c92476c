"""Groups of all processes while an iteration is put together: their rewards are known everywhere, their answers stay where they were sampled.

Letters: n answers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.allocation import Group
from flowrl.dealing import exchanged
from flowrl.text.samples import Pick, Samples, picked
from flowrl.text.sources import Sampler

__all__ = ["Held", "Piece", "fetched", "taken_up", "written_down"]


@dataclass(frozen=True, slots=True)
class Held:
    """Answers of a group that one call has sampled. holder: the number of the process that has them; on the others ``samples`` is None."""

    holder: int
    samples: Samples | None

    def changed(self, change: Callable[[Samples], Samples]) -> Held:
        """With other samples, where they are."""
        return Held(self.holder, None if self.samples is None else change(self.samples))


@dataclass(frozen=True, slots=True)
class Piece:
    """A group: its prompt, the rewards of its answers ([n] float64) and which of them have one ([n] bool), the iteration that sampled it, its answers, and
    whether it is trained. The same on every process, but for the answers.
    """

    prompt: int
    rewards: Tensor
    valid: Tensor
    born: int
    parts: tuple[Held, ...]
    train: bool = True

    def facts(self, iteration: int) -> Group:
        """What an allocator knows of it."""
        return Group(self.prompt, self.rewards, self.valid, iteration - self.born)

    def joined(self, more: Piece) -> Piece:
        """With the answers of another one to the same prompt."""
        rewards, valid = torch.cat([self.rewards, more.rewards]), torch.cat([self.valid, more.valid])
        return Piece(self.prompt, rewards, valid, self.born, (*self.parts, *more.parts))

    def aged(self) -> Piece:
        """As a later policy sees it, see `Samples.aged`."""
        return self._changed(Samples.aged)

    def kept(self, *, is_trained: bool, is_new: bool) -> Piece:
        """For the next iteration. The column ``carried`` is 1 where no iteration has trained the answers yet.

        Args:
            is_trained: in this iteration. is_new: sampled in it.
        """
        if not is_trained and not is_new:
            return self
        return self._changed(lambda samples: samples.with_columns(carried=torch.full((len(samples),), int(not is_trained))))

    def _changed(self, change: Callable[[Samples], Samples]) -> Piece:
        return replace(self, parts=tuple(part.changed(change) for part in self.parts))


def fetched(pieces: Sequence[Piece], numbers: Sequence[int], sampler: Sampler) -> list[Samples]:
    """The answers of some groups; every process must call it, each with the groups that it trains. What another one has sampled is sent from there to here,
    and to nobody else.
    """
    rank = sampler.place[0]
    parcels: list[dict[tuple[int, int], Samples]] = [
        {(n, k): part.samples for n in asked for k, part in enumerate(pieces[n].parts) if part.samples is not None and where != rank}
        for where, asked in enumerate(sampler.gather(list(numbers)))
    ]
    coming = {key: samples for parcel in exchanged(parcels, sampler.policy.device) for key, samples in parcel.items()}
    return [_whole([coming[n, k] if part.samples is None else part.samples for k, part in enumerate(pieces[n].parts)]) for n in numbers]


def written_down(pieces: Sequence[Piece], sampler: Sampler) -> list[dict[str, Any]]:
    """The pieces with all their answers, for a checkpoint; every process must call it."""
    if not pieces:
        return []
    own = {(n, k): part.samples for n, piece in enumerate(pieces) for k, part in enumerate(piece.parts) if part.samples is not None}
    every = {key: samples for found in sampler.gather(own) for key, samples in found.items()}
    groups = [_whole([every[n, k] for k in range(len(piece.parts))]) for n, piece in enumerate(pieces)]
    return [{"prompt": piece.prompt, "born": piece.born, "samples": group.state_dict()} for piece, group in zip(pieces, groups, strict=True)]


def taken_up(state: Sequence[Mapping[str, Any]], place: tuple[int, int]) -> list[Piece]:
    """What `written_down` gave, on any number of processes: the groups are dealt to them in turn. place: (number of this one, number of all)."""
    found = []
    for n, piece in enumerate(state):
        samples, holder = Samples.from_state(piece["samples"]), n % place[1]
        total = samples.scores["total"]
        part = Held(holder, samples if holder == place[0] else None)
        found.append(Piece(piece["prompt"], total.values.double(), total.valid, piece["born"], (part,)))
    return found


def _whole(parts: Sequence[Samples]) -> Samples:
    """A group's answers, in the order of the calls that sampled them."""
    found = parts[0]
    for more in parts[1:]:
        found = picked([found, more], [Pick(p, row, 0) for p, part in enumerate((found, more)) for row in range(len(part))])
    return found
