"""Copies of the trainable weights that follow them slowly, in fused multi-tensor operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from flowrl.sharding import local, shard_like

__all__ = ["Ema", "OldPolicy"]


class _SlowCopy:
    """average <- decay average + (1 - decay) parameters. Of sharded parameters it holds this process's part."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.average: list[Tensor] = [part.clone() for part in self._parts()]
        self.num_updates = 0
        self.in_step: Callable[[], AbstractContextManager[None]] = nullcontext
        """What forwards with the average must lie in, see `DiffusionPolicy.in_step`."""

    def _parts(self) -> list[Tensor]:
        """What this process holds of the parameters, in their own memory."""
        return [local(p.detach()) for p in self.parameters]

    @torch.no_grad()
    def _move(self, decay: float) -> None:
        torch._foreach_lerp_(self.average, self._parts(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it, the parameters hold the average."""
        live = [part.clone() for part in self._parts()]
        torch._foreach_copy_(self._parts(), self.average)
        try:
            with self.in_step():
                yield
        finally:
            torch._foreach_copy_(self._parts(), live)

    def state_dict(self) -> dict[str, object]:
        average = [shard_like(part, p.detach()) for part, p in zip(self.average, self.parameters, strict=True)]
        return {"average": average, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        average, count = state["average"], state["num_updates"]
        assert isinstance(average, list) and isinstance(count, int)
        torch._foreach_copy_(self.average, [local(part) for part in average])
        self.num_updates = count


class Ema(_SlowCopy):
    """The average that is evaluated and exported: it moves every ``every`` optimiser updates.

    Args:
        warmup: decay min((1 + n) / (10 + n), decay) after n optimiser updates, as Flow-GRPO's released code does.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, decay: float, every: int, warmup: bool) -> None:
        super().__init__(parameters)
        self.decay, self.every, self.warmup = decay, every, warmup

    def update(self) -> None:
        """Count one optimiser update, and average when its turn has come."""
        self.num_updates += 1
        if self.num_updates % self.every:
            return
        n = self.num_updates
        self._move(min((1 + n) / (10 + n), self.decay) if self.warmup else self.decay)


class OldPolicy(_SlowCopy):
    """The policy that samples, or that the trained one is held to: it moves once every ``every`` iterations.

    decay = min(decay_max, decay_slope max(0, n - decay_start)) after n optimiser updates. DiffusionNFT's three types (arXiv:2509.16117, released code):
    0 is slope 0, 1 is slope 0.001 up to 0.5, 2 is slope 0.0075 up to 0.999 from update 75. AWM (arXiv:2509.25050, released code): slope 0.001 up to 0.3.
    Slope 0 and ``every`` = 40 is the data policy of online DPO in Flow-GRPO's comparison, with 1 ORW-CFM-W2's last policy.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, every: int, decay_slope: float, decay_start: int, decay_max: float) -> None:
        super().__init__(parameters)
        self.every, self.decay_slope, self.decay_start, self.decay_max = every, decay_slope, decay_start, decay_max

    def decay(self, num_updates: int) -> float:
        """Of the next move, after so many optimiser updates."""
        return min(self.decay_max, self.decay_slope * max(0, num_updates - self.decay_start))

    def update(self, iteration: int, num_updates: int) -> None:
        """To be called at the end of an iteration (>= 1)."""
        self.num_updates = num_updates
        if iteration % self.every == 0:
            self._move(self.decay(num_updates))
