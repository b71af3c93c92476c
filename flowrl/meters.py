"""Diagnostics of an iteration's updates, kept on the device as sums and fetched once. Letters: E decisions, K distinct steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

__all__ = ["Meters"]


class Meters:
    """Ratio (all, and per step of the sigma grid), clip shares, KL, loss and gradient norm.

    Args:
        steps: the distinct step numbers of the trained decisions, the same on every process.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in ("ratio", "log_ratio", "clipped_low", "clipped_high", "loss", "kl")}
        self._steps: list[Tensor] = []
        self._first: list[Tensor] = []
        self._grad_norms: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], loss: Tensor, kl: Tensor | None, step: Tensor, *, first: bool) -> None:
        """One micro-batch: the objective's per-decision metrics [E, 1], loss [E], KL [E] and step numbers [E]; ``first``: of the first update."""
        for name in ("ratio", "log_ratio", "clipped_low", "clipped_high"):
            self._chunks[name].append(metrics[name][:, 0])
        self._chunks["loss"].append(loss)
        if kl is not None:
            self._chunks["kl"].append(kl.detach())
        self._steps.append(step)
        if first:
            self._first.append(metrics["log_ratio"].abs().max())

    def add_grad_norm(self, norm: Tensor) -> None:
        """The gradient norm of one update, before clipping."""
        self._grad_norms.append(norm.detach())

    def result(self, accelerator: Accelerator) -> dict[str, Any]:
        """The iteration's numbers over all processes, under the names of metrics.jsonl."""
        columns = {name: torch.cat(chunks).double() for name, chunks in self._chunks.items() if chunks}
        ratio = columns["ratio"]
        place = torch.searchsorted(torch.tensor(self.steps), torch.cat(self._steps)).to(ratio.device)

        def per_step(values: Tensor) -> Tensor:
            return torch.zeros(len(self.steps), dtype=torch.float64, device=ratio.device).index_add_(0, place, values)

        names = list(columns)
        sums = [columns[name].sum() for name in names] + [(ratio - 1).square().sum(), torch.tensor(float(len(ratio)), device=ratio.device)]
        packed = torch.cat([torch.stack([s.double() for s in sums]), per_step(torch.ones_like(ratio)), per_step(ratio - 1), per_step((ratio - 1).square())])
        first = torch.stack(self._first).max()
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
            first = accelerator.gather(first[None]).max()
        numbers = packed.tolist()
        count = numbers[len(names) + 1]
        mean = {name: numbers[i] / count for i, name in enumerate(names)}
        k, base = len(self.steps), len(names) + 2
        out: dict[str, Any] = {
            "ratio/mean": mean["ratio"],
            "ratio/std": _std(numbers[len(names)], (mean["ratio"] - 1) * count, count),
            "ratio/max_abs_log_first": float(first),
        }
        for j, step in enumerate(self.steps):
            n, off, square = numbers[base + j], numbers[base + k + j], numbers[base + 2 * k + j]
            out[f"ratio/step_{step}/mean"] = 1 + off / n
            out[f"ratio/step_{step}/std"] = _std(square, off, n)
        out["clip/low"], out["clip/high"], out["loss"] = mean["clipped_low"], mean["clipped_high"], mean["loss"]
        if "kl" in mean:
            out["kl/mean"] = mean["kl"]
        out["grad_norm"] = float(torch.stack(self._grad_norms).mean())
        return out


def _std(square_sum: float, total: float, count: float) -> float:
    return float(max(0.0, square_sum / count - (total / count) ** 2) ** 0.5)
