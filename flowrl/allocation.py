"""Which prompts an iteration asks, how many samples each gets, and what is trained: allocators, which know of samples only their prompts and rewards.

An allocator that `gathers` is asked round after round and then chooses among all groups that were sampled, on all processes; the others are asked once. What
they remember follows from the outcomes of all processes, so that all processes hold the same, and is in checkpoints. The formulas are in core/allocation.py
and core/curriculum.py. A new one is a class here, or in a file of its own, and a line in `ALLOCATORS`.

Letters: B samples, P groups, N prompts of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from flowrl.core.allocation import knapsack, useful_groups, xrpo_round
from flowrl.core.curriculum import BetaTable, ShuffledCycle, difficulty_ramp, failure_priority, mixed_batch, nearest_to_target, variance_score
from flowrl.core.outcomes import SuccessRates, Tally, draw
from flowrl.data import GroupSampler
from flowrl.seeds import generator
from flowrl.types import UserError

__all__ = ["ALLOCATORS", "Allocator", "Budget", "Choice", "Group", "Order", "Outcomes"]

DropKind = Literal["equal", "all_best"]


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


class _Rates(Uniform):
    """With a running success rate of each prompt.

    Args:
        momentum: of the old rate in a prompt's new one, in [0, 1).
    """

    rates: ClassVar[bool] = True

    def __init__(self, momentum: float = 0.0) -> None:
        if not 0 <= momentum < 1:
            raise ValueError("momentum must be in [0, 1)")
        self.momentum = momentum

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        self.table = SuccessRates.empty(budget.num_prompts)

    def observe(self, outcomes: Outcomes) -> None:
        tally = Tally.of(outcomes.prompt, self.budget.rate(outcomes.rewards), outcomes.valid, self.budget.num_prompts)
        self.table = self.table.updated(tally, momentum=self.momentum)

    def metrics(self) -> dict[str, float]:
        known = self.table.rates[~self.table.rates.isnan()]
        return {"prompts/known": float(len(known)), "prompts/rate": float(known.mean()) if len(known) else 0.0}

    def state_dict(self) -> dict[str, Any]:
        return self.table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["num_prompts"] != self.budget.num_prompts:
            raise UserError(f"the checkpoint knows rates of {state['num_prompts']} prompts, and there are {self.budget.num_prompts}; use the same prompts")
        self.table = SuccessRates.from_state(state)


class Knapsack(_Rates):
    """Knapsack-RL: prompts in turn, and more samples for those from which more is to be gained, by their rates so far; see `knapsack`.

    Args:
        least, most: samples of a prompt. warmup: iterations of equal numbers. unsolved_share: see `knapsack`. momentum: as of rates.
    """

    def __init__(self, least: int = 2, most: int = 128, warmup: int = 5, unsolved_share: float = 0.0, momentum: float = 0.0) -> None:
        super().__init__(momentum)
        if not 1 <= least <= most or not 0 <= unsolved_share <= 1 or warmup < 0:
            raise ValueError("1 <= least <= most, unsolved_share in [0, 1] and warmup >= 0 are needed")
        self.least, self.most, self.warmup, self.unsolved_share = least, most, warmup, unsolved_share

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        if not self.least <= budget.group_size <= self.most:
            raise UserError(f"rollout.group_size: {budget.group_size} is not within least {self.least} and most {self.most} of allocation.args; change them")

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        order = super().ask(iteration, number, groups)
        if iteration <= self.warmup:
            return order
        rates = self.table.rates[torch.tensor(list(order.prompts))].tolist()
        total = self.budget.groups * self.budget.group_size
        return Order(order.prompts, knapsack(rates, total, least=self.least, most=self.most, unsolved_share=self.unsolved_share))


class _Chosen(_Rates):
    """Chooses different prompts for the groups of an iteration."""

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        if budget.groups > budget.num_prompts:
            raise UserError(f"allocation.name: it chooses {budget.groups} different prompts (rollout.groups_per_iteration), and there are {budget.num_prompts}")


class Curriculum(_Chosen):
    """PCL: of a pool of prompts those whose predicted success rate is nearest to the target. The prediction is the running rate; see `nearest_to_target`.

    Args:
        target: success rate. pool: candidates for each group. momentum: as of rates.
    """

    def __init__(self, target: float = 0.5, pool: int = 4, momentum: float = 0.5) -> None:
        super().__init__(momentum)
        if not 0 <= target <= 1 or pool < 1:
            raise ValueError("target must be in [0, 1], pool at least 1")
        self.target, self.pool = target, pool

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        b, source = self.budget, generator(self.budget.seed, "allocation", iteration)
        candidates = torch.randperm(b.num_prompts, generator=source)[: min(b.num_prompts, self.pool * b.groups)]
        best = nearest_to_target(self.table.rates[candidates], b.groups, source, target=self.target)
        return self.even(candidates[best].tolist())


class Priority(_Chosen):
    """Kimi k1.5: prompts drawn in proportion to how often they fail; see `failure_priority`."""

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        source = generator(self.budget.seed, "allocation", iteration)
        return self.even(draw(failure_priority(self.table.rates), self.budget.groups, source).tolist())


class Thompson(_Chosen):
    """VADE: Thompson sampling of prompts by what they promise to teach; see `BetaTable`.

    Args:
        power: see `BetaTable.sample`. global_decay, sample_decay: see `BetaTable.updated`.
    """

    def __init__(self, power: int = 2, global_decay: float = 0.999, sample_decay: float = 0.9) -> None:
        super().__init__()
        if power not in (1, 2) or not 0 <= global_decay <= 1 or not 0 <= sample_decay <= 1:
            raise ValueError("power must be 1 or 2, the decays in [0, 1]")
        self.power, self.global_decay, self.sample_decay = power, global_decay, sample_decay

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        self.beta = BetaTable.empty(budget.num_prompts)

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        source = generator(self.budget.seed, "allocation", iteration)
        return self.even(self.beta.sample(torch.arange(self.budget.num_prompts), self.budget.groups, source, power=self.power).tolist())

    def observe(self, outcomes: Outcomes) -> None:
        super().observe(outcomes)
        tally = Tally.of(outcomes.prompt, self.budget.rate(outcomes.rewards), outcomes.valid, self.budget.num_prompts)
        self.beta = self.beta.updated(tally, global_decay=self.global_decay, sample_decay=self.sample_decay)

    def state_dict(self) -> dict[str, Any]:
        return {"rates": super().state_dict(), "beta": self.beta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["rates"])
        self.beta = BetaTable.from_state(state["beta"])


class Variance(_Rates):
    """MMR1's variance-aware sampling: part of the prompts in proportion to the variance of their outcomes, the others in turn; see `mixed_batch`.

    Args:
        share: of the prompts that are drawn by variance. every: iterations between new scores. momentum: of the old score in a new one.
    """

    def __init__(self, share: float = 0.5, every: int = 4, momentum: float = 0.0) -> None:
        super().__init__(momentum)
        if not 0 <= share <= 1 or every < 1:
            raise ValueError("share must be in [0, 1], every at least 1")
        self.share, self.every = share, every

    def begin(self, budget: Budget) -> None:
        super().begin(budget)
        self.cycle = ShuffledCycle.shuffled(budget.num_prompts, generator(budget.seed, "allocation"))
        self.scores, self.tally, self.seen = variance_score(self.table.rates), Tally.empty(budget.num_prompts), 0

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        source = generator(self.budget.seed, "allocation", iteration)
        chosen, self.cycle = mixed_batch(self.scores, self.cycle, self.budget.groups, source, share=self.share)
        return self.even(chosen.tolist())

    def observe(self, outcomes: Outcomes) -> None:
        new = Tally.of(outcomes.prompt, self.budget.rate(outcomes.rewards), outcomes.valid, self.budget.num_prompts)
        self.tally, self.seen = Tally.merge(self.tally, new), self.seen + 1
        if self.seen % self.every == 0:
            known = self.tally.count > 0
            score = variance_score(self.tally.mean)
            mixed = torch.where(self.table.rates.isnan(), score, self.momentum * self.scores + (1 - self.momentum) * score)
            self.scores = torch.where(known, mixed, self.scores)
            self.table = self.table.updated(self.tally, momentum=0.0)
            self.tally = Tally.empty(self.budget.num_prompts)

    def state_dict(self) -> dict[str, Any]:
        parts = {"rates": super().state_dict(), "cycle": self.cycle.state_dict(), "tally": self.tally.state_dict()}
        return {**parts, "scores": self.scores.tolist(), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state["rates"])
        self.cycle, self.tally = ShuffledCycle.from_state(state["cycle"]), Tally.from_state(state["tally"])
        self.scores, self.seen = torch.tensor(state["scores"], dtype=torch.float64), state["seen"]


class Ramp(Uniform):
    """Prompts that stand in the data from easy to hard: a growing share of them, from the start, may be asked (ZeroSearch's ramp, arXiv:2505.04588).

    Args:
        start, end: shares in (0, 1]. iterations: from the first to the last. base: see `difficulty_ramp`.
    """

    def __init__(self, start: float = 0.25, end: float = 1.0, iterations: int = 100, base: float = 4.0) -> None:
        if not 0 < start <= 1 or not 0 < end <= 1 or iterations < 0:
            raise ValueError("start and end must be in (0, 1], iterations not negative")
        difficulty_ramp(0, 1, start=start, end=end, base=base)
        self.start, self.end, self.iterations, self.base = start, end, iterations, base

    def ask(self, iteration: int, number: int, groups: Sequence[Group]) -> Order:
        b = self.budget
        share = difficulty_ramp(iteration - 1, self.iterations, start=self.start, end=self.end, base=self.base)
        open_prompts = min(b.num_prompts, max(1, math.ceil(share * b.num_prompts - 1e-9)))
        whole, part = divmod(b.groups, open_prompts)
        drawn = torch.randperm(open_prompts, generator=generator(b.seed, "allocation", iteration))[:part]
        return self.even([*list(range(open_prompts)) * whole, *drawn.tolist()])


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
