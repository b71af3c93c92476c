"""Which prompts to ask next: Thompson sampling, variance-aware sampling, predicted difficulty, priorities, and a ramp of difficulty.

On the host; every draw comes from a torch.Generator that is passed in; state in frozen dataclasses. Rates and tables: `outcomes`.

Letters: B samples, P groups, N prompts of the data set, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.outcomes import Tally, draw

__all__ = [
    "BetaTable",
    "ShuffledCycle",
    "difficulty_ramp",
    "distinct_ngrams",
    "failure_priority",
    "mixed_batch",
    "nearest_to_target",
    "value_error",
    "variance_score",
]


@dataclass(frozen=True, slots=True)
class BetaTable:
    """VADE: what is believed of each prompt's success rate: Beta(1 + successes, 1 + failures).

    Attributes:
        successes, failures: [N] float64, fractional counts after decay.
    Source:
        arXiv:2511.18902, from a secondary write-up; both decays, and that a sampled prompt has both, are our reading.
    """

    successes: Tensor
    failures: Tensor

    @classmethod
    def empty(cls, num_prompts: int) -> BetaTable:
        """Uniform beliefs."""
        zero = torch.zeros(num_prompts, dtype=torch.float64)
        return cls(zero, zero.clone())

    def updated(self, tally: Tally, *, global_decay: float = 0.999, sample_decay: float = 0.9) -> BetaTable:
        """After an iteration: all counts decay, since the policy moved; those of sampled prompts once more, then the new outcomes are added.

        Args:
            tally: of all processes, rewards in [0, 1]; fractions count as fractions. global_decay, sample_decay: in [0, 1]; 1 and 1 is the exact posterior.
        Raises:
            ValueError: rewards of a prompt were not in [0, 1].
        """
        total = tally.rows[1]
        if not bool(((total >= 0) & (total <= tally.count)).all()):
            raise ValueError("a Beta distribution is fitted to rewards in [0, 1]; scale them")
        decay = torch.where(tally.count > 0, global_decay * sample_decay, global_decay)
        return BetaTable(decay * self.successes + total, decay * self.failures + tally.count - total)

    def sample(self, candidates: Tensor, count: int, generator: torch.Generator, *, power: int = 2) -> Tensor:
        """Thompson sampling: a rate p is drawn for each candidate; the ``count`` with the largest p (1-p)^power, best first. [count] int64 of candidates.

        Args:
            candidates: [C] int64, prompts. power: 2 favours hard prompts (peak at p = 1/3), 1 is the variance (peak at 1/2).
        Raises:
            ValueError: there are fewer than count candidates.
        """
        if count > len(candidates):
            raise ValueError(f"{count} prompts cannot be chosen from {len(candidates)} candidates")
        p = self.draw_rates(candidates, generator)
        return candidates[(-p * (1 - p) ** power).argsort(stable=True)[:count]]

    def draw_rates(self, candidates: Tensor, generator: torch.Generator) -> Tensor:
        """One success rate for each candidate, drawn from its Beta, [C] float64."""
        x, y = (torch._standard_gamma(1 + column[candidates], generator=generator) for column in (self.successes, self.failures))
        return x / (x + y)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON."""
        return {"successes": self.successes.tolist(), "failures": self.failures.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> BetaTable:
        """The table that `state_dict` described."""
        return cls(*(torch.tensor(state[name], dtype=torch.float64) for name in ("successes", "failures")))


def variance_score(rates: Tensor, diversity: Tensor | None = None, *, variance_weight: float = 1.0, diversity_weight: float = 0.0) -> Tensor:
    """MMR1's score: variance_weight p (1-p) + diversity_weight d, [N] float64; a prompt of unknown rate (NaN) scores as p = 1/2.

    Mix with earlier scores as momentum * old + (1 - momentum) * new; released: momentum 0, no diversity, 8 rollouts a prompt.

    Args:
        rates: [N] in [0, 1]. diversity: [N] >= 0 of each prompt's answers, see `distinct_ngrams`; None = 0.
    Source:
        arXiv:2509.21268; verified in the released code (verl/curriculum, examples/mmr1.yaml). Unknown rates: ours, the release samples all prompts first.
    """
    p = torch.where(rates.isnan(), 0.5, rates.double())
    score = variance_weight * p * (1 - p)
    return score if diversity is None else score + diversity_weight * diversity.double()


def distinct_ngrams(sequences: Sequence[Sequence[Hashable]], n: int = 3) -> float:
    """Share of different n-grams in the answers to one prompt, in [0, 1]; 0 without any n-gram. Source: as `variance_score`."""
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, slots=True)
class ShuffledCycle:
    """All prompts in one random order, again and again: uniform sampling in which none is drawn twice before all were drawn once.

    Attributes:
        order: a permutation of 0..N-1. position: of the next one.
    """

    order: tuple[int, ...]
    position: int = 0

    @classmethod
    def shuffled(cls, num_prompts: int, generator: torch.Generator) -> ShuffledCycle:
        """A new order."""
        return cls(tuple(torch.randperm(num_prompts, generator=generator).tolist()))

    def taken(self, count: int) -> tuple[list[int], ShuffledCycle]:
        """The next ``count`` prompts, around the end if need be, and the cycle after them."""
        size = len(self.order)
        found = [self.order[(self.position + i) % size] for i in range(count)]
        return found, ShuffledCycle(self.order, (self.position + count) % size)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON."""
        return {"order": list(self.order), "position": self.position}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ShuffledCycle:
        """The cycle that `state_dict` described."""
        return cls(tuple(state["order"]), state["position"])


def mixed_batch(scores: Tensor, cycle: ShuffledCycle, size: int, generator: torch.Generator, *, share: float = 0.5) -> tuple[Tensor, ShuffledCycle]:
    """Variance-aware sampling: int(share size) prompts drawn in proportion to scores, with replacement, the rest from the cycle. [size] int64, cycle.

    Args:
        scores: [N] >= 0; all 0 = uniform. share: in [0, 1]; 0 is uniform sampling.
    Source:
        arXiv:2509.21268; verified in the released code (samplers.py), which starts its cycle anew when the rest of it is too short; ours goes around.
    """
    weighted = draw(scores, int(share * size), generator, replacement=True)
    uniform, cycle = cycle.taken(size - len(weighted))
    return torch.cat([weighted, torch.tensor(uniform, dtype=torch.int64)]), cycle


def nearest_to_target(values: Tensor, count: int, generator: torch.Generator, *, target: float = 0.5) -> Tensor:
    """PCL: of C candidates the ``count`` whose predicted success rate is nearest to the target; equals at random. Indices [count] int64, nearest first.

    Args:
        values: [C], predictions of a value model, or `SuccessRates`; NaN = unknown, taken for the target: it is worth a look. Published: C = 4 count.
    Raises:
        ValueError: there are fewer than count candidates.
    Source:
        arXiv:2510.01135, pool, target and concurrent updates of the model from a secondary write-up; C / count = 4 is our reading.
    """
    if count > len(values):
        raise ValueError(f"{count} prompts cannot be chosen from {len(values)} candidates")
    shuffled = torch.randperm(len(values), generator=generator)
    away = torch.where(values.isnan(), torch.zeros_like(values), (values - target).abs())
    return shuffled[away[shuffled].argsort(stable=True)[:count]]


def value_error(predicted: Tensor, rewards: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """PCL's loss of the value model: (V - mean reward of the group)^2, [P], with gradient to V; 0 for a group without a valid sample.

    Args:
        predicted: [P]. rewards: [B]. group: [B] int64 in 0..P-1. valid: [B] bool.
    """
    mean, _, count = group_statistics(rewards.to(predicted.dtype), group, valid, len(predicted), 0)
    return torch.where(count > 0, (predicted - mean).square(), torch.zeros_like(predicted))


def failure_priority(rates: Tensor) -> Tensor:
    """Kimi k1.5: weights 1 - p to `draw` prompts with, [N] float64; a prompt of unknown rate (NaN) has weight 1.

    Source: arXiv:2501.12599, from secondary write-ups. Equal rates are uniform sampling.
    """
    return torch.where(rates.isnan(), 1.0, 1 - rates.double())


def difficulty_ramp(step: int, num_steps: int, *, start: float, end: float, base: float = 4.0) -> float:
    """ZeroSearch: start + (base^(i / m) - 1) / (base - 1) (end - start) at step i of m; ``end`` from m on: any difficulty that rises slowly, then fast.

    Args:
        step: i >= 0. num_steps: m >= 0. base: > 0; above 1 late, below 1 early, 1 linear.
    Raises:
        ValueError: base is not above 0.
    Source:
        arXiv:2505.04588; verified in the released code (generation.py), where it is the probability of a degraded context.
    """
    if base <= 0:
        raise ValueError(f"difficulty_ramp: base must be above 0, not {base}")
    if step >= num_steps:
        return end
    share = step / num_steps
    growth = math.log(base)
    return start + (math.expm1(share * growth) / math.expm1(growth) if growth else share) * (end - start)
