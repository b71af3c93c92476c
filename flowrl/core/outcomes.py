"""What is known of the prompts of a data set: sums over an iteration that add up over processes, and the tables that allocators read.

On the host, in float64. Each process tallies its own samples; `Tally.merge` of all processes' tallies (or one all-reduce of ``rows``) goes into the tables, so
that all processes hold the same tables and, with equal generators, draw the same prompts.

Letters: B samples, N prompts of the data set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SuccessRates", "Tally", "draw"]


@dataclass(frozen=True, slots=True)
class Tally:
    """Rewards by prompt.

    Attributes:
        rows: [3, N] float64: number of rewards, their sum, the sum of their squares.
    """

    rows: Tensor

    @classmethod
    def empty(cls, num_prompts: int) -> Tally:
        """No sample yet."""
        return cls(torch.zeros(3, num_prompts, dtype=torch.float64))

    @classmethod
    def of(cls, prompt: Tensor, rewards: Tensor, valid: Tensor, num_prompts: int) -> Tally:
        """Of samples. prompt: [B] int64 in 0..N-1. rewards: [B]; anything where not valid. valid: [B] bool."""
        value = rewards[valid].double()
        rows = torch.stack([torch.ones_like(value), value, value.square()])
        return cls(torch.zeros(3, num_prompts, dtype=torch.float64).index_add_(1, prompt[valid], rows))

    @staticmethod
    def merge(*parts: Tally) -> Tally:
        """The tally of all samples of the parts."""
        return Tally(torch.stack([part.rows for part in parts]).sum(0))

    @property
    def count(self) -> Tensor:
        """Rewards of each prompt, [N]."""
        return self.rows[0]

    @property
    def mean(self) -> Tensor:
        """Mean reward of each prompt, [N]; NaN where there is none."""
        return self.rows[1] / self.rows[0]

    def std(self, prior: float) -> Tensor:
        """Standard deviation (ddof 1) of each prompt's rewards, [N]; ``prior`` where there are fewer than two."""
        count, total, square = self.rows
        variance = (square - total.square() / count.clamp_min(1)) / (count - 1).clamp_min(1)
        variance = torch.where(variance > 1e-12 * square, variance, torch.zeros_like(variance))  # equal rewards, up to rounding
        return torch.where(count >= 2, variance.sqrt(), torch.full_like(variance, prior))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON."""
        return {"rows": self.rows.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """The tally that `state_dict` described."""
        return cls(torch.tensor(state["rows"], dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class SuccessRates:
    """A running mean reward of each prompt: the cheap stand-in for a model that predicts it.

    Attributes:
        rates: [N] float64, NaN for a prompt without a sample so far.
    """

    rates: Tensor

    @classmethod
    def empty(cls, num_prompts: int) -> SuccessRates:
        """Nothing known."""
        return cls(torch.full((num_prompts,), torch.nan, dtype=torch.float64))

    def updated(self, tally: Tally, *, momentum: float) -> SuccessRates:
        """momentum * old + (1 - momentum) * mean of the iteration, for prompts with a sample in it; its mean where nothing was known.

        Args:
            tally: of all processes. momentum: in [0, 1); 0 = the last iteration only.
        """
        mixed = torch.where(self.rates.isnan(), tally.mean, momentum * self.rates + (1 - momentum) * tally.mean)
        return SuccessRates(torch.where(tally.count > 0, mixed, self.rates))

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON: only the prompts of which something is known."""
        known = torch.nonzero(~self.rates.isnan()).squeeze(1)
        return {"num_prompts": len(self.rates), "prompt": known.tolist(), "rate": self.rates[known].tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SuccessRates:
        """The table that `state_dict` described."""
        rates = cls.empty(state["num_prompts"]).rates
        rates[torch.tensor(state["prompt"], dtype=torch.int64)] = torch.tensor(state["rate"], dtype=torch.float64)
        return cls(rates)


def draw(weights: Tensor, count: int, generator: torch.Generator, *, replacement: bool = False) -> Tensor:
    """``count`` indices drawn with probabilities in proportion to weights [N] >= 0; all equally if all are 0. [count] int64

    Without replacement the first has these probabilities, each further one those among what is left (indices of weight 0 come last, in random order).

    Raises:
        ValueError: a weight is negative or not finite; there are fewer than count to draw from.
    """
    weights = weights.double()
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("weights to draw with must be finite and not negative")
    if count > len(weights) and (not replacement or len(weights) == 0):
        raise ValueError(f"{count} cannot be drawn from {len(weights)}" + ("" if replacement else " without replacement"))
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    if not bool((weights > 0).any()):
        weights = torch.ones_like(weights)
    if replacement:
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    shuffled = torch.randperm(len(weights), generator=generator)
    waiting = -torch.log1p(-torch.rand(len(weights), generator=generator, dtype=torch.float64)) / weights[shuffled]  # a race of exponential clocks
    return shuffled[torch.where(weights[shuffled] > 0, waiting, torch.inf).argsort(stable=True)[:count]]
