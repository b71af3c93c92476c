"""What an allocator is: it says which prompts are asked, how many samples each gets, and which groups are trained, and knows of samples only their rewards.

Letters: B samples, P groups, N prompts of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flowrl.data import GroupSampler
from flowrl.types import UserError

__all__ = ["Allocator", "Budget", "Choice", "Group", "Order", "Outcomes", "Uniform"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What an iteration may use: ``groups`` of ``group_size`` samples from ``num_prompts`` prompts. low, high: of the total reward, may be infinite."""

    num_prompts: int
    groups: int
    group_size: int
    seed: int
    low: float
    high: float

    def rate(self, rewards: Tensor) -> Tensor:
        """Rewards as success rates in [0, 1], float64."""
        return ((rewards.double() - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Order:
    """Groups to be sampled: prompt numbers, and numbers of samples. extends: the earlier group of the iteration that each of them joins; None = new ones."""

    prompts: Sequence[int] = ()
    counts: Sequence[int] = ()
    extends: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A group that was sampled. rewards: [n] float64; valid: [n] bool. age: iterations since; 0 = in this one."""

    prompt: int
    rewards: Tensor
    valid: Tensor
    age: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Numbers of groups: those that are trained, those that only keep a process in step with the others, and those that the next iteration finds again."""

    train: Sequence[int]
    idle: Sequence[int] = ()
    store: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Samples of all processes. prompt: [B] int64 in 0..N-1. rewards: [B], before shaping. valid: [B] bool."""

    prompt: Tensor
    rewards: Tensor
    valid: Tensor


class Allocator(Protocol):
    """Where the samples of an iteration go.

    Attributes:
        gathers: it is asked for several rounds, and `choose` decides what is trained.
        rates: it takes rewards as success rates, which need a lowest and a highest value.
    """

    gathers: ClassVar[bool]
    rates: ClassVar[bool]

    def begin(self, budget: Budget) -> None:
        """
        Raises:
            UserError: it cannot work with this budget.
        """
        ...

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        """What round ``number`` (from 0) of an iteration (from 1) samples; nothing = enough. groups: those stored by the last iteration, then the new ones."""
        ...

    def choose(self, iteration: int, groups: Sequence[Group], least: int) -> Choice:
        """After the last round; at least ``least`` groups in train and idle together, as long as there are so many."""
        ...

    def keeps(self, rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
        """Groups that are trained, [P] bool."""
        ...

    def observe(self, outcomes: Outcomes) -> None: ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Uniform:
    """Every prompt once an epoch, the same number of samples each."""

    gathers: ClassVar[bool] = False
    rates: ClassVar[bool] = False

    def begin(self, budget: Budget) -> None:
        if self.rates and not (math.isfinite(budget.low) and math.isfinite(budget.high) and budget.low < budget.high):
            raise UserError("allocation.name: it takes rewards as success rates, and these rewards have no lowest and highest value; use another one")
        self.budget, self.sampler = budget, GroupSampler(budget.num_prompts, budget.groups, budget.seed)

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        return self.even(self.sampler.groups(iteration - 1))

    def even(self, prompts: Sequence[int]) -> Order:
        """An order of ``group_size`` samples each."""
        return Order(list(prompts), [self.budget.group_size] * len(prompts))

    def choose(self, iteration: int, groups: Sequence[Group], least: int) -> Choice:
        return Choice(range(len(groups)))

    def keeps(self, rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
        return torch.ones(num_groups, dtype=torch.bool)

    def observe(self, outcomes: Outcomes) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
