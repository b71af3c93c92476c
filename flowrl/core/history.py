"""Running statistics of rewards per prompt: what a sample is compared with when its prompt has few samples in an iteration.

Letters: B samples of an iteration, over all processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics

__all__ = ["PromptHistory"]


class PromptHistory:
    """The last rewards of every prompt. Each iteration: `update`, then `statistics`.

    Every process must see the rewards of all processes; then all hold the same history. The order of prompts never changes a bit of the result; the
    order of one prompt's samples only decides which of them are remembered when an iteration has more than ``size``.

    Args:
        size: rewards remembered per prompt, >= 1. least: 1..size, below so many remembered rewards the iteration's statistics stand in.
    Raises:
        ValueError: least is not in 1..size (it could never be reached).
    Source:
        DDPO, arXiv:2305.13301, verified in the released code (`PerPromptStatTracker`: size 16, least 16, ddof 0, current rewards included). B2-DiffuRL,
        arXiv:2503.11240, remembers the prompt's rewards of the last 8 stages instead, with ddof 1.
    """

    def __init__(self, size: int, least: int) -> None:
        if not 1 <= least <= size:
            raise ValueError(f"a history of {size} rewards can never hold {least}; least must be in 1..size")
        self.size, self.least = size, least
        self._rewards: dict[int, deque[float]] = {}
        self._iteration = (0.0, 0.0)

    def update(self, prompt: Tensor, rewards: Tensor, valid: Tensor) -> None:
        """Remember the valid rewards of an iteration.

        Args:
            prompt: [B] int64, equal numbers are equal prompts, in every iteration. rewards: [B] float64; anything where not valid. valid: [B] bool.
        """
        prompt, rewards = prompt[valid], rewards[valid].double()
        self._iteration = _statistics(rewards.tolist())
        order = prompt.argsort(stable=True)
        numbers, counts = prompt[order].unique_consecutive(return_counts=True)
        for number, new in zip(numbers.tolist(), rewards[order].split(counts.tolist()), strict=True):
            self._rewards.setdefault(number, deque(maxlen=self.size)).extend(new.tolist())

    def statistics(self, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (ddof 0) to compare each sample with, [B] float64 each; of the last update's rewards where fewer than ``least``."""
        numbers, place = prompt.unique(return_inverse=True)
        known = [self._rewards.get(number, ()) for number in numbers.tolist()]
        rows = [_statistics(rewards) if len(rewards) >= self.least else self._iteration for rewards in known]
        mean, std = torch.tensor(rows, dtype=torch.float64).view(-1, 2).unbind(1)
        return mean[place], std[place]

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON."""
        return {"rewards": {str(number): list(rewards) for number, rewards in self._rewards.items()}, "iteration": list(self._iteration)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the history; of a longer one the newest ``size`` rewards."""
        self._rewards = {int(number): deque(rewards, maxlen=self.size) for number, rewards in state["rewards"].items()}
        self._iteration = (state["iteration"][0], state["iteration"][1])


def _statistics(rewards: Iterable[float]) -> tuple[float, float]:
    """Mean and std of the rewards in ascending order, so that equal sets have equal sums; equal rewards have std 0; (0, 0) of none."""
    values = torch.tensor(sorted(rewards), dtype=torch.float64)
    mean, std, _ = group_statistics(values, torch.zeros(len(values), dtype=torch.int64), torch.ones(len(values), dtype=torch.bool), 1, 0)
    return mean.item(), std.item()
