"""Where to spend rollouts: which groups are worth training, and how many samples each prompt gets.

On the host: pure functions of small tensors and Python numbers, state in frozen dataclasses. Which prompts to ask is `curriculum`, what to put into a group
that failed is `replay` and `hints`.

Letters: B samples, P groups, Q prompts of a round.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.core.outcomes import Tally
from flowrl.types import UserError

__all__ = ["Surplus", "even_split", "knapsack", "rollout_value", "t_quantile", "useful_groups", "xrpo_priority", "xrpo_round"]


def useful_groups(
    rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, drop: Literal["equal", "all_best"] = "equal", highest: float = 1.0
) -> Tensor:
    """The groups worth training, [P] bool; never one without a valid sample.

    | drop | leaves out groups whose valid rewards are |
    | --- | --- |
    | equal | all equal (DAPO: 0 < p < 1; a lone sample goes too) |
    | all_best | all ``highest`` (NGRPO, which learns from failure) |

    Args:
        rewards: [B] float; before shaping. group: [B] int64 in 0..P-1. valid: [B] bool.
    Raises:
        ValueError: unknown kind.
    Source:
        DAPO, arXiv:2503.14476, verl-recipe; NGRPO, arXiv:2509.18851, its training script: both verified in code.
    """
    low = torch.full((num_groups,), torch.inf, dtype=rewards.dtype).scatter_reduce_(0, group, torch.where(valid, rewards, torch.inf), "amin")
    high = torch.full((num_groups,), -torch.inf, dtype=rewards.dtype).scatter_reduce_(0, group, torch.where(valid, rewards, -torch.inf), "amax")
    if drop == "equal":
        return high > low
    if drop == "all_best":
        return low < highest  # inf of nobody
    raise ValueError(f"unknown kind {drop!r} of groups to drop; known: equal, all_best")


@dataclass(frozen=True, slots=True)
class Surplus:
    """DAPO's dynamic sampling: batches are generated until enough groups are useful; what is too much serves the next step.

    Attributes:
        waiting: handles of useful groups that no step has used, oldest first: whatever the caller finds their samples by, JSON-able. Groups that wait over a
            step were sampled by an older policy; keep its log-probabilities with them.
        batches: generated for the step at hand. short: steps so far that had to do with fewer groups.
    Source:
        arXiv:2503.14476, verl-recipe, verified in code. Carrying the surplus over is ours.
    """

    waiting: tuple[Any, ...] = ()
    batches: int = 0
    short: int = 0

    def collected(self, handles: Sequence[Any], useful: Sequence[bool]) -> Surplus:
        """With one more batch of groups, of which the useful ones are kept."""
        kept = tuple(handle for handle, keep in zip(handles, useful, strict=True) if keep)
        return Surplus((*self.waiting, *kept), self.batches + 1, self.short)

    def is_enough(self, size: int, max_batches: int) -> bool:
        """Whether to stop generating: ``size`` groups wait, or max_batches were generated."""
        return len(self.waiting) >= size or self.batches >= max_batches

    def taken(self, size: int, *, on_short: Literal["fewer", "raise"] = "fewer") -> tuple[tuple[Any, ...], Surplus]:
        """The oldest ``size`` groups, or the fewer there are (none at all is possible), and what remains for the next step.

        Raises:
            UserError: there are fewer, and on_short is "raise".
        """
        missing = max(size - len(self.waiting), 0)
        if missing and on_short == "raise":
            raise UserError(
                f"only {len(self.waiting)} of {size} groups have rewards that differ after {self.batches} batches; "
                "allow more batches, take prompts that the model sometimes solves, or train with fewer"
            )
        return self.waiting[:size], Surplus(self.waiting[size:], 0, self.short + (missing > 0))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python; the samples behind the handles are the caller's to save."""
        return {"waiting": list(self.waiting), "batches": self.batches, "short": self.short}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Surplus:
        """What `state_dict` described."""
        return cls(tuple(state["waiting"]), state["batches"], state["short"])


def rollout_value(count: int, rate: float) -> float:
    """Knapsack-RL: v(N, p) = (1 - p^N - (1-p)^N) p (1-p)^2: chance that N rollouts have both outcomes, times what a step then gains; 0 for N = 0.

    Rises with N to p (1-p)^2. Source: arXiv:2509.25849, from two notes and a third-party implementation.
    """
    return (1 - rate**count - (1 - rate) ** count) * rate * (1 - rate) ** 2 if count > 0 else 0.0


def even_split(budget: int, num: int) -> list[int]:
    """``budget`` in ``num`` parts that differ by at most 1, the larger ones first."""
    return [budget // num + (i < budget % num) for i in range(num)]


def knapsack(rates: Sequence[float], budget: int, *, least: int = 2, most: int = 128, unsolved_share: float = 0.0) -> list[int]:
    """Knapsack-RL: numbers of rollouts N_q, least <= N_q <= most, with the largest sum of `rollout_value`, that use up the budget. Length Q.

    The value of one more rollout falls with N >= 1, so the best next rollout is always part of the best whole: a greedy choice is exact. Prompts of equal
    rate get equal numbers up to 1. What no prompt gains from (all rates 0, 1, or at their limit) is spread evenly.

    Args:
        rates: success rates in [0, 1], of an earlier epoch, say; NaN = unknown, which gets the even share budget // Q. All NaN (the first iterations: the
            paper takes 5) is the even split.
        budget: rollouts of the round, Q least to Q most. least: >= 1.
        unsolved_share: part of the budget that is first spread over the prompts with rate 0, which have no value, to keep exploring.
    Raises:
        ValueError: the budget cannot be met; a rate is outside [0, 1]; least < 1.
    Source:
        arXiv:2509.25849, which uses dynamic programming; from two notes and a third-party implementation. Greedy, unsolved_share's form: ours.
    """
    num = len(rates)
    if not 1 <= least <= most or not num * least <= budget <= num * most:
        raise ValueError(f"{budget} rollouts cannot be shared by {num} prompts with {least} to {most} each (at least 1)")
    if any(rate < 0 or rate > 1 for rate in rates):
        raise ValueError("success rates must be in [0, 1], or NaN where unknown")
    counts = [least] * num
    left = budget - num * least

    def spread(members: list[int], amount: int, limit: int) -> int:
        """One each in turn up to the limit; what is left of the amount."""
        while amount > 0 and (open_members := [q for q in members if counts[q] < limit]):
            for q in open_members[:amount]:
                counts[q] += 1
            amount -= min(amount, len(open_members))
        return amount

    left = spread([q for q in range(num) if math.isnan(rates[q])], left, min(max(budget // num, least), most))
    reserved = min(int(unsolved_share * budget), left)
    left += spread([q for q in range(num) if rates[q] == 0], reserved, most) - reserved

    def gain(q: int) -> float:
        p, n = rates[q], counts[q]
        return p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p)

    heap = [(-gain(q), counts[q], q) for q in range(num) if 0 < rates[q] < 1 and counts[q] < most]
    heapq.heapify(heap)
    while left > 0 and heap:
        negative, _, q = heapq.heappop(heap)
        if negative == 0:
            break
        counts[q] += 1
        left -= 1
        if counts[q] < most:
            heapq.heappush(heap, (-gain(q), counts[q], q))
    spread(list(range(num)), left, most)
    return counts


@cache
def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t distribution, level in [0.5, 1), freedom >= 1 degrees: the finite sums of Abramowitz and Stegun 26.7.3-4, by bisection."""
    odd = freedom % 2

    def inside(angle: float) -> float:
        """P(abs(t) < sqrt(freedom) tan(angle))."""
        cosine = math.cos(angle)
        term, total = (cosine, 0.0) if odd else (1.0, 0.0)
        for k in range((freedom - odd) // 2):
            total += term
            term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * level - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def xrpo_priority(count: Sequence[int], std: Sequence[float], drawn: int, *, exploration: float, level: float = 0.05) -> list[float]:
    """XRPO: how much one more rollout narrows the confidence interval of each prompt's mean, plus a bonus for prompts seldom tried. Length Q.

    h(n) = t(1 - level / 2, n - 1) std / sqrt(n),   priority = h(n) - h(n + 1) + exploration sqrt(log(1 + drawn) / n)

    Args:
        count: rollouts so far, n >= 1. std: of their rewards, >= 0; 0.5 where n is 1. drawn: rollouts of all prompts so far in the round.
        exploration: lambda >= 0. level: alpha.
    Raises:
        ValueError: a prompt has no rollout.
    Source:
        arXiv:2510.06672, from two third-party notes that agree. With one rollout t has 0 degrees of freedom; we take 1. ``drawn``: our choice.
    """
    if min(count, default=1) < 1:
        raise ValueError("every prompt needs a first rollout before priorities exist")
    return [_narrowing(n, s, level) + exploration * math.sqrt(math.log1p(drawn) / n) for n, s in zip(count, std, strict=True)]


def xrpo_round(tally: Tally, size: int, *, exploration: float, level: float = 0.05, prior_std: float = 0.5) -> list[int]:
    """The next ``size`` rollouts, one after another to the prompt of the highest priority (the first of equals); how many each prompt gets, length Q.

    Within the round counts rise while standard deviations stay; then `Tally.merge` its outcomes and call again until the budget is spent. Without
    exploration and with equal standard deviations all prompts end with equal counts, up to 1.

    Args:
        tally: of the Q prompts so far. size: 1 = a decision per rollout. prior_std: for prompts with one rollout.
    Source:
        As `xrpo_priority`. Prompts whose mean is 0 may be asked again under solved examples, trained like `hints` with ``trains_hinted`` False.
    """
    start = [round(n) for n in tally.count.tolist()]
    count, std, drawn = list(start), tally.std(prior_std).tolist(), sum(start)
    xrpo_priority(count, std, drawn, exploration=exploration, level=level)  # refuses prompts without a rollout
    narrowing = [_narrowing(n, s, level) for n, s in zip(count, std, strict=True)]
    for _ in range(size):
        bonus = exploration * math.sqrt(math.log1p(drawn))
        best = max(range(len(count)), key=lambda q: narrowing[q] + bonus / math.sqrt(count[q]))
        count[best] += 1
        drawn += 1
        narrowing[best] = _narrowing(count[best], std[best], level)
    return [after - before for after, before in zip(count, start, strict=True)]


def _narrowing(count: int, std: float, level: float) -> float:
    now = t_quantile(1 - level / 2, max(count - 1, 1)) / math.sqrt(count)
    return std * (now - t_quantile(1 - level / 2, count) / math.sqrt(count + 1))
