"""What an objective on tokens is, and what it is given: a micro-batch of answers.

Letters: n answers of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.ratio_levels import at_level
from flowrl.objective_names import arguments
from flowrl.text.answers import Answers
from flowrl.text.parts import Part, Stateless
from flowrl.types import Decisions, Objective

if TYPE_CHECKING:
    from flowrl.policies.token_statistics import TokenOutput

__all__ = ["Batch", "ObjectiveBase", "TokenObjective", "renumbered", "trains_later"]


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
    """

    columns: ClassVar[frozenset[str]]
    whole_groups: ClassVar[bool]

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        """Look at the whole iteration before its first update. advantages: [B, T] float32."""

    def __call__(self, batch: Batch) -> Objective: ...

    def finish(self, answers: Answers) -> None:
        """After the updates of an iteration."""


class ObjectiveBase(Stateless):
    """Asks for nothing but log-probabilities."""

    columns: ClassVar[frozenset[str]] = frozenset()
    whole_groups: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        self.config = config

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        pass

    def finish(self, answers: Answers) -> None:
        pass

    def leveled(self, decisions: Decisions) -> Decisions:
        """The decisions at the run's ratio level."""
        ratio = self.config.objective.ratio
        return decisions if ratio == "plain" else at_level(decisions, "none" if ratio == "none" else ratio)  # type: ignore[arg-type]

    def args(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Those of `objective.args` that a function takes."""
        known = signature(function).parameters
        return {name: value for name, value in arguments(self.config.objective).items() if name in known}

    def bounds(self) -> dict[str, Any]:
        """What `clipped_surrogate` takes beside decisions."""
        o = self.config.objective
        return {"clip_low": o.clip_low, "clip_high": o.clip_high, "dual_clip": o.dual_clip, "ratio_max": o.ratio_max}


def trains_later(config: Config) -> bool:
    """Whether an iteration has an update after its first, so that the policy is no longer the one that sampled."""
    return config.objective.updates_per_iteration * config.objective.inner_epochs > 1


def renumbered(group: Tensor) -> tuple[Tensor, int]:
    """Group numbers [n] as 0..k-1, and k."""
    numbers, place = torch.unique(group, return_inverse=True)
    return place, len(numbers)
