"""Which prompts an iteration asks, how many samples each gets, and what is trained: all allocators by name, and those that look at whole groups.

An allocator that `gathers` is asked round after round and then chooses among all groups that were sampled, on all processes; the others are asked once. What
they remember follows from the outcomes of all processes, so that all processes hold the same, and is in checkpoints. A new one is a class in a file of its
own, and a line in `ALLOCATORS`.

Letters: P groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flowrl.core.allocation import useful_groups, xrpo_round
from flowrl.core.outcomes import Tally
from flowrl.data import GroupSampler
from flowrl.prompt_groups import Allocator, Budget, Choice, Group, Order, Outcomes, Uniform
from flowrl.prompt_rates import Curriculum, Knapsack, Priority, Ramp, Thompson, Variance
from flowrl.seeds import generator
from flowrl.types import UserError

__all__ = ["ALLOCATORS", "Allocator", "Budget", "Choice", "Drop", "Group", "Order", "Outcomes"]

DropKind = Literal["equal", "all_best"]


class Drop(Uniform):
    """Groups that teach nothing are not trained, and nothing takes their place: what losses are divided by counts the rest.

    Args:
        drop: see `useful_groups`: equal rewards (DAPO's filter without its refill), or all_best (NGRPO).
    """

    def __init__(self, drop: DropKind = "equal") -> None:
        if drop not in ("equal", "all_best"):
            raise ValueError(f"drop is {drop}; known: equal, all_best")
        self.drop = drop

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        if self.drop == "all_best" and not math.isfinite(budget.high):
            raise UserError("allocation.args.drop: all_best leaves out groups with the highest reward throughout, and these rewards have no highest value")

    def keeps(self, rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
        return useful_groups(rewards.double(), group, valid, num_groups, drop=self.drop, highest=self.budget.high)


class Dynamic(Drop):
    """DAPO's dynamic sampling: rounds of groups until enough are useful. After ``max_rounds`` the iteration trains fewer, which ``groups/short`` counts.

    Args:
        drop: as of `Drop`. max_rounds: of sampling in an iteration. factor: groups of a round, times rollout.groups_per_iteration.
        carry: useful groups beyond those needed are trained in the next iteration, with the log-probabilities that they were sampled with; false = they are
            thrown away, as the released code does.
    """

    gathers: ClassVar[bool] = True

    def __init__(self, drop: DropKind = "equal", max_rounds: int = 10, factor: int = 1, carry: bool = False) -> None:
        super().__init__(drop)
        if max_rounds < 1 or factor < 1:
            raise ValueError("max_rounds and factor must be at least 1")
        self.max_rounds, self.factor, self.carry = max_rounds, factor, carry
        self.drawn = self.short = self.rounds = 0

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        self.sampler = GroupSampler(budget.num_prompts, self.factor * budget.groups, budget.seed)

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        if len(self._useful(groups)) >= self.budget.groups or number >= self.max_rounds:
            return Order()
        self.drawn, self.rounds = self.drawn + 1, number + 1
        return self.even(self.sampler.groups(self.drawn - 1))

    def choose(self, iteration: int, groups: Sequence[Group], least: int) -> Choice:
        useful = self._useful(groups)
        train, left = useful[: self.budget.groups], useful[self.budget.groups :]
        self.short += len(train) < self.budget.groups
        others = [number for number in range(len(groups)) if number not in set(useful)]
        return Choice(train, others[: max(0, least - len(train))], left if self.carry else ())

    def _useful(self, groups: Sequence[Group]) -> list[int]:
        return [n for n, g in enumerate(groups) if bool(super(Dynamic, self).keeps(g.rewards, torch.zeros(len(g.rewards), dtype=torch.int64), g.valid, 1)[0])]

    def keeps(self, rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
        return torch.ones(num_groups, dtype=torch.bool)  # `choose` has seen to it

    def metrics(self) -> dict[str, float]:
        return {"groups/rounds": float(self.rounds), "groups/short": float(self.short)}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "short": self.short}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn, self.short = state["drawn"], state["short"]


class Past(Uniform):
    """ReMix: part of the groups are those of earlier iterations, trained again with the log-probabilities that they were sampled with.

    Args:
        share: chance that a group is an earlier one. window: iterations that a group is kept for. until: last iteration with earlier groups; null = all.
    """

    gathers: ClassVar[bool] = True

    def __init__(self, share: float = 0.4, window: int = 2, until: int | None = None) -> None:
        if not 0 <= share < 1 or window < 1:
            raise ValueError("share must be in [0, 1), window at least 1")
        self.share, self.window, self.until = share, window, until
        self.drawn = 0

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        self.sampler = GroupSampler(budget.num_prompts, 1, budget.seed)

    def _past(self, iteration: int, stored: int) -> Tensor:
        """Which of the stored groups are trained; the same before and after sampling."""
        if self.until is not None and iteration > self.until:
            return torch.zeros(0, dtype=torch.int64)
        source = generator(self.budget.seed, "past", iteration)
        wanted = int((torch.rand(self.budget.groups, generator=source) < self.share).sum())
        return torch.randperm(stored, generator=source)[: min(wanted, self.budget.groups - 1)]

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        if number:
            return Order()
        count = self.budget.groups - len(self._past(iteration, len(groups)))
        self.drawn += count
        return self.even([prompt for place in range(self.drawn - count, self.drawn) for prompt in self.sampler.groups(place)])

    def choose(self, iteration: int, groups: Sequence[Group], least: int) -> Choice:
        stored = [number for number, group in enumerate(groups) if group.age > 0]
        fresh = [number for number, group in enumerate(groups) if group.age == 0]
        past = sorted(stored[n] for n in self._past(iteration, len(stored)).tolist())
        kept = [number for number in stored if groups[number].age < self.window]
        return Choice([*fresh, *past], (), [*kept, *fresh])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class Xrpo(Uniform):
    """XRPO: a few samples of every prompt, then the rest of the budget, round by round, where they narrow the interval of the prompt's mean most.

    Args:
        first: samples of each prompt in the first round, at least 2; null = half of rollout.group_size. rounds: of sampling, the first included.
        exploration, level: see `xrpo_priority`.
    """

    gathers: ClassVar[bool] = True

    def __init__(self, first: int | None = None, rounds: int = 4, exploration: float = 1.0, level: float = 0.05) -> None:
        if rounds < 1 or (first is not None and first < 1):
            raise ValueError("first and rounds must be at least 1")
        if not 0 < level < 1 or exploration < 0:
            raise ValueError("level must be in (0, 1), exploration not negative")
        self.first, self.rounds, self.exploration, self.level = first, rounds, exploration, level

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        b = self.budget
        first = min(b.group_size, self.first or max(2, b.group_size // 2)) if self.rounds > 1 else b.group_size
        if number == 0:
            prompts = self.sampler.groups(iteration - 1)
            return Order(prompts, [first] * len(prompts))
        left = b.groups * b.group_size - sum(len(group.rewards) for group in groups)
        if number >= self.rounds or left <= 0:
            return Order()
        size = math.ceil(left / (self.rounds - number))
        member = torch.cat([torch.full((len(group.rewards),), n, dtype=torch.int64) for n, group in enumerate(groups)])
        rewards, valid = (torch.cat([getattr(group, name) for group in groups]) for name in ("rewards", "valid"))
        more = xrpo_round(_tally_of_all(member, rewards, valid, len(groups)), size, exploration=self.exploration, level=self.level)
        extended = [n for n, count in enumerate(more) if count]
        return Order([groups[n].prompt for n in extended], [more[n] for n in extended], extended)


def _tally_of_all(member: Tensor, rewards: Tensor, valid: Tensor, num_groups: int) -> Tally:
    """A sample without a reward counts as one that was worth the mean of its group's others; 0 where there is none."""
    known = Tally.of(member, rewards, valid, num_groups)
    mean = torch.where(known.count > 0, known.mean, torch.zeros_like(known.mean))
    return Tally.of(member, torch.where(valid, rewards.double(), mean[member]), torch.ones_like(valid), num_groups)


ALLOCATORS: dict[str, Callable[..., Allocator]] = {
    "uniform": Uniform,
    "drop": Drop,
    "dynamic": Dynamic,
    "past": Past,
    "knapsack": Knapsack,
    "xrpo": Xrpo,
    "thompson": Thompson,
    "variance": Variance,
    "curriculum": Curriculum,
    "priority": Priority,
    "ramp": Ramp,
}
