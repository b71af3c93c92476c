"""Objectives on tokens: what the loss of a micro-batch of answers is, and what it asks of policies beside log-probabilities.

`OBJECTIVES` of flowrl/core needs nothing but decisions. An objective that needs more is a class here, or in a file of its own, and a line in the table.

Letters: n answers of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.group_gates import GROUP_OBJECTIVES
from flowrl.core.objectives import OBJECTIVES
from flowrl.core.ratio_levels import at_level
from flowrl.text.answers import Answers
from flowrl.text.parts import Part, Stateless
from flowrl.types import Decisions, Objective

if TYPE_CHECKING:
    from flowrl.policies.token_statistics import TokenOutput

__all__ = ["TOKEN_OBJECTIVES", "Batch", "TokenObjective", "make_objective"]


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of answers.

    Attributes:
        answers: all of the iteration; ``rows`` [n] int64: those of the micro-batch.
        out: what the policy says of them now, with gradient.
        decisions: [n, T]: log-probabilities, old ones, advantages, mask.
        group: [n] int64 in 0..num_groups-1, renumbered; whole groups where the objective asks for them.
        first: within the first update of the iteration.
    """

    answers: Answers
    rows: Tensor
    out: TokenOutput
    decisions: Decisions
    group: Tensor
    num_groups: int
    first: bool

    def of(self, values: Tensor) -> Tensor:
        """Rows of a tensor over all answers, on the decisions' device."""
        return values[self.rows.to(values.device)].to(self.decisions.log_prob.device)

    def token(self, name: str) -> Tensor:
        """[n, T] float32, what `Answers.token` says of these answers: a constant."""
        return self.of(self.answers.token(name))


class TokenObjective(Part, Protocol):
    """The loss of every token.

    Attributes:
        columns: what is asked of `CausalLmPolicy.token_output` with gradient, beside log_prob.
        whole_groups: a micro-batch must hold the answers of a group together.
        is_ratio: it compares with the policy that sampled; without, old log-probabilities are only reported.
    """

    columns: ClassVar[frozenset[str]]
    whole_groups: ClassVar[bool]
    is_ratio: ClassVar[bool]

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        """Look at the whole iteration before its first update. advantages: [B, T] float32."""

    def __call__(self, batch: Batch) -> Objective: ...


class _Base(Stateless):
    columns: ClassVar[frozenset[str]] = frozenset()
    whole_groups: ClassVar[bool] = False
    is_ratio: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        pass

    def leveled(self, decisions: Decisions) -> Decisions:
        """The decisions at the run's ratio level."""
        ratio = self.config.objective.ratio
        return decisions if ratio == "plain" else at_level(decisions, "none" if ratio == "none" else ratio)  # type: ignore[arg-type]


class GateObjective(_Base):
    """An objective of flowrl/core/objectives.py, at the run's ratio level."""

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        args: dict[str, Any] = {"clip_low": o.clip_low, "clip_high": o.clip_high, **o.args}
        if o.name == "clipped_surrogate":
            args |= {"dual_clip": o.dual_clip, "ratio_max": o.ratio_max}
        return OBJECTIVES[o.name](self.leveled(batch.decisions), **args)


class GroupObjective(_Base):
    """An objective of flowrl/core/group_gates.py, which couples the answers of a group."""

    whole_groups: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = frozenset({"reference"} if config.objective.name == "gvpo" else ())

    def __call__(self, batch: Batch) -> Objective:
        o = self.config.objective
        args: dict[str, Any] = {"group": batch.group, "num_groups": batch.num_groups, **o.args}
        if o.name == "gvpo":
            args["ref_log_prob"] = batch.token("reference")
        return GROUP_OBJECTIVES[o.name](batch.decisions, **args)


TOKEN_OBJECTIVES: dict[str, Callable[[Config], TokenObjective]] = {
    **dict.fromkeys(OBJECTIVES, GateObjective),
    **dict.fromkeys(GROUP_OBJECTIVES, GroupObjective),
}
"""Name -> class, made with the config."""


def make_objective(config: Config) -> TokenObjective:
    """The objective of a run on tokens; the config's check has seen its name."""
    return TOKEN_OBJECTIVES[config.objective.name](config)


def renumbered(group: Tensor) -> tuple[Tensor, int]:
    """Group numbers [n] as 0..k-1, and k."""
    numbers, place = torch.unique(group, return_inverse=True)
    return place, len(numbers)
