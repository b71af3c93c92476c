"""Hints for prompts that no sample solves: which to ask again, with how much help, and where the new samples go. No text is made here.

One ladder for three published rules, `SCAF`, `GHPO` and `GUIDE`: `start` from the groups without a success, then, as long as `requests` asks for samples,
generate and score them and give the result to `advance`. State in frozen dataclasses.

Letters: B samples, P groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["GHPO", "GUIDE", "SCAF", "HintLadder", "HintRequest", "HintRule", "Replacement", "unsolved_groups"]


def unsolved_groups(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, threshold: float = 0.0) -> Tensor:
    """Groups with a valid sample, none of which has a reward above the threshold, [P] bool.

    Args:
        rewards: [B], of the verifier, before shaping. group: [B] int64 in 0..P-1. valid: [B] bool.
    """
    high = torch.full((num_groups,), -torch.inf, dtype=rewards.dtype).scatter_reduce_(0, group, torch.where(valid, rewards, -torch.inf), "amax")
    return high.isfinite() & (high <= threshold)


@dataclass(frozen=True, slots=True)
class HintRule:
    """How help grows and what becomes of helped samples.

    Attributes:
        levels: from little help to much; what a level means (a number of hints, a share of the solution) is for who writes the prompt.
        climb: "all" = every level is asked at once, "step" = one after another until one helps.
        tries: samples at each level; None = as many as the group has.
        place: "one" = one success at the lowest level takes a failed sample's place; "group" = the samples of the level take the whole group's; "append" =
            all new samples join the group, solved or not.
        trains_hinted: True = old and new log-probabilities are both taken under the prompt with the hint, so the ratio starts at 1; False = the new ones
            under the original prompt, so that the ratio corrects for the hint.
        warmup: steps without hints.
    Raises:
        ValueError: place is "group" and tries is not None.
    """

    levels: tuple[float, ...]
    climb: Literal["all", "step"]
    tries: int | None
    place: Literal["one", "group", "append"]
    trains_hinted: bool
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.place == "group" and self.tries is not None:
            raise ValueError("a rule that replaces whole groups samples as many as the group has; leave tries away")


SCAF = HintRule(levels=tuple(range(1, 13)), climb="all", tries=1, place="one", trains_hinted=True, warmup=50)
"""Scaf-GRPO, arXiv:2510.19807; verified in the released code: levels 1-4 knowledge, 5-8 planning, 9-12 solution, each in 4 parts, that add up.
``trains_hinted`` False is its option to swap the response only."""

GHPO = HintRule(levels=(0.25, 0.5, 0.75), climb="step", tries=None, place="group", trains_hinted=True)
"""GHPO, arXiv:2507.10628; verified in the released code: shares of the reference solution."""

GUIDE = HintRule(levels=(1.0,), climb="step", tries=1, place="append", trains_hinted=False)
"""Guide-GRPO, arXiv:2506.13923, from a secondary write-up; how many guided samples is for the config (``tries``)."""


class HintRequest(NamedTuple):
    """Sample ``tries`` answers to a group's prompt with the help of a level (an index into the rule's levels)."""

    group: int
    level: int
    tries: int


class Replacement(NamedTuple):
    """New sample number ``candidate`` (counted through all requests, in order) joins a group, in place of sample ``sample`` of the batch, None = beside it."""

    group: int
    level: int
    candidate: int
    sample: int | None


@dataclass(frozen=True, slots=True)
class HintLadder:
    """Groups that wait for help.

    Attributes:
        waiting: (group, index of the level to ask next), in the order of groups.
    """

    waiting: tuple[tuple[int, int], ...] = ()

    @classmethod
    def start(cls, rule: HintRule, unsolved: Tensor, step: int) -> HintLadder:
        """All unsolved groups wait at the lowest level; none while step <= warmup. unsolved: [P] bool. step: from 1."""
        return cls(tuple((number, 0) for number in torch.nonzero(unsolved).squeeze(1).tolist()) if step > rule.warmup else ())

    def requests(self, rule: HintRule, sizes: Sequence[int]) -> list[HintRequest]:
        """What to sample now; nothing once all are done. sizes: samples of each group."""
        return [
            HintRequest(number, level, sizes[number] if rule.tries is None else rule.tries)
            for number, first in self.waiting
            for level in (range(first, len(rule.levels)) if rule.climb == "all" else (first,))
        ]

    def advance(self, rule: HintRule, solved: Sequence[bool], members: Sequence[Sequence[int]]) -> tuple[list[Replacement], HintLadder]:
        """What to do with the samples that were asked for, and who waits on.

        A group that no level helps is left as it was. Of several successes at the lowest level the first counts.

        Args:
            solved: for each new sample, in the order of `requests`, whether its reward is above the threshold. members: the samples of each group (numbers in
                the batch), failed ones first in line to be replaced.
        Raises:
            ValueError: another number of samples than was asked for.
        """
        asked = self.requests(rule, [len(row) for row in members])
        if len(solved) != sum(request.tries for request in asked):
            raise ValueError(f"{len(solved)} new samples, but {sum(request.tries for request in asked)} were asked for")
        results: dict[int, list[tuple[int, int]]] = {number: [] for number, _ in self.waiting}  # group -> (level, candidate)
        candidate = 0
        for request in asked:
            results[request.group] += [(request.level, candidate + i) for i in range(request.tries)]
            candidate += request.tries
        replacements: list[Replacement] = []
        waiting = []
        for number, first in self.waiting:
            row = results[number]
            success = next(((level, new) for level, new in row if solved[new]), None)
            if rule.place == "append":
                replacements += [Replacement(number, level, new, None) for level, new in row]
            elif success is not None and rule.place == "one":
                replacements.append(Replacement(number, *success, members[number][0]))
            elif success is not None:
                level_row = [(level, new) for level, new in row if level == success[0]]
                replacements += [Replacement(number, level, new, old) for (level, new), old in zip(level_row, members[number], strict=True)]
            if success is None and rule.climb == "step" and first + 1 < len(rule.levels):
                waiting.append((number, first + 1))
        return replacements, HintLadder(tuple(waiting))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON."""
        return {"waiting": [list(entry) for entry in self.waiting]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> HintLadder:
        """The ladder that `state_dict` described."""
        return cls(tuple((number, level) for number, level in state["waiting"]))
