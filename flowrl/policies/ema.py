"""Exponential moving average of trainable parameters, in fused multi-tensor operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """average <- decay average + (1 - decay) parameters, every ``every`` optimiser updates.

    Args:
        warmup: use min((1 + n) / (10 + n), decay) after n optimiser updates, as Flow-GRPO's released code does.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float, every: int, warmup: bool) -> None:
        self.parameters = list(parameters)
        self.decay, self.every, self.warmup = decay, every, warmup
        self.average: list[Tensor] = [p.detach().clone() for p in self.parameters]
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Count one optimiser update, and average when its turn has come."""
        self.num_updates += 1
        if self.num_updates % self.every:
            return
        n = self.num_updates
        decay = min((1 + n) / (10 + n), self.decay) if self.warmup else self.decay
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the parameters hold the average."""
        live = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.data for p in self.parameters], self.average)
        try:
            yield
        finally:
            torch._foreach_copy_([p.data for p in self.parameters], live)

    def state_dict(self) -> dict[str, object]:
        return {"average": self.average, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        average, count = state["average"], state["num_updates"]
        assert isinstance(average, list) and isinstance(count, int)
        torch._foreach_copy_(self.average, average)
        self.num_updates = count
