"""Allocators that follow what is known of each prompt: its success rate so far, or its place in the data. The formulas are in core/curriculum.py.

Letters: N prompts of the data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flowrl.core.allocation import knapsack
from flowrl.core.curriculum import BetaTable, ShuffledCycle, difficulty_ramp, failure_priority, mixed_batch, nearest_to_target, variance_score
from flowrl.core.outcomes import SuccessRates, Tally, draw
from flowrl.prompt_groups import Budget, Group, Order, Outcomes, Uniform
from flowrl.seeds import generator
from flowrl.types import UserError

__all__ = ["Curriculum", "Knapsack", "Priority", "Ramp", "Thompson", "Variance"]


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
