"""Weights of several rewards over the course of a run: fixed, or learnt from evaluations or from gradients (config section `reward_weights`).

Source: dynamic reward weighting, arXiv:2509.11452; formulas in flowrl/core/aggregation.py, verified in the released code. Our reading: the hypervolume's
factor scales advantages instead of rewards; gradients are measured once every few iterations over all trained parameters, not averaged over a window of a
chosen layer set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.aggregation import hypervolume_gain, influences, meta_reward, mirror_descent, pareto_front

__all__ = ["RewardWeights"]


class RewardWeights:
    """The current weights, and the factor of all advantages.

    Attributes:
        weights: reward -> its weight in the total; those of weight 0 stay there.
        factor: of advantages, 1 unless `kind` is hypervolume.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.reward_weights
        self.weights = {reward.key: reward.weight for reward in config.rewards}
        self.factor = 1.0
        self.split = self.config.split or next(iter(config.data.eval))
        self._reference = dict(self.config.reference) if self.config.reference is not None else None
        self._front: list[list[float]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Rewards that have a weight."""
        return tuple(name for name, weight in self.weights.items() if weight)

    def evaluated(self, split: str, means: Mapping[str, float]) -> None:
        """Take in an evaluation: reward -> mean; one that lacks a reward says nothing. Without a configured reference the first one is the reference.

        Higher is better for every reward; one with a negative weight is to be low, so its sign is changed.
        """
        if self.config.kind != "hypervolume" or split != self.split or not all(name in means for name in self.names):
            return
        if self._reference is None:
            self._reference = {name: means[name] for name in self.names}
            return
        sign = torch.tensor([1.0 if self.weights[name] > 0 else -1.0 for name in self.names], dtype=torch.float64)
        reference = sign * torch.tensor([self._reference[name] for name in self.names], dtype=torch.float64)
        point = sign * torch.tensor([means[name] for name in self.names], dtype=torch.float64)
        front = torch.tensor(self._front, dtype=torch.float64).reshape(-1, len(self.names))
        gain = hypervolume_gain(front, point, reference)
        self.factor = meta_reward(gain)
        if gain > 0:
            self._front = pareto_front(torch.cat([front, point[None]])).tolist()

    def due(self, iteration: int) -> bool:
        """Whether this iteration's gradients are to be measured."""
        return self.config.kind == "gradient" and iteration % self.config.every == 0

    def learn(self, gradients: Tensor) -> None:
        """Mirror descent on policy gradients [K, P] of the rewards in ``names``; the sum of the weights stays what it was."""
        total = sum(self.weights[name] for name in self.names)
        before = torch.tensor([self.weights[name] for name in self.names], dtype=torch.float64) / total
        after = mirror_descent(before, influences(gradients).double().cpu(), self.config.rate)
        self.weights |= {name: total * weight for name, weight in zip(self.names, after.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Plain and JSON-ready."""
        return {"weights": dict(self.weights), "factor": self.factor, "reference": self._reference, "front": self._front}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what ``state_dict`` gave."""
        self.weights, self.factor = dict(state["weights"]), float(state["factor"])
        self._reference, self._front = state["reference"], [list(point) for point in state["front"]]
