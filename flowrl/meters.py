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
        self._tuning: list[Tensor] = []

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

    def add_tuning(self, loss: Tensor, objective: Tensor, tuning: Tensor, velocity: Tensor) -> None:
        """One micro-batch of LayerTuning-RL: its loss [R] per row, and both scalar losses, whose gradient norms at the velocity [R, L...] are compared.

        ``tuning/grad_share`` is the supervised term's share of the two norms, in 0..1, taken where the two meet, at the network's output, so that it costs
        no second backward pass through the network.
        """
        parts = [torch.autograd.grad(part, velocity, retain_graph=True)[0].square().sum().double() for part in (objective, tuning)]
        self._tuning.append(torch.stack([loss.sum().double(), torch.tensor(float(len(loss)), dtype=torch.float64, device=loss.device), *parts]))

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
        of_step = {
            "ratio": ratio - 1,
            "ratio_square": (ratio - 1).square(),
            "log_ratio": columns["log_ratio"],
            "log_square": columns["log_ratio"].square(),
            "low": columns["clipped_low"],
            "high": columns["clipped_high"],
        }
        sums = [columns[name].sum() for name in names] + [(ratio - 1).square().sum(), torch.tensor(float(len(ratio)), device=ratio.device)]
        packed = torch.cat([torch.stack([s.double() for s in sums]), per_step(torch.ones_like(ratio)), *(per_step(v) for v in of_step.values())])
        tuning = torch.stack(self._tuning).sum(0) if self._tuning else None
        first = torch.stack(self._first).max()
        if accelerator.num_processes > 1:
            packed = accelerator.reduce(packed, "sum")
            tuning = accelerator.reduce(tuning, "sum") if tuning is not None else None
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
            n, *totals = numbers[base + j :: k][: 1 + len(of_step)]
            if n == 0:  # the selection left no decision of this step
                continue
            off, square, log, log_square, low, high = totals
            out[f"ratio/step_{step}/mean"] = 1 + off / n
            out[f"ratio/step_{step}/std"] = _std(square, off, n)
            out[f"ratio/step_{step}/log_mean"] = log / n
            out[f"ratio/step_{step}/log_std"] = _std(log_square, log, n)
            out[f"ratio/step_{step}/clip_low"], out[f"ratio/step_{step}/clip_high"] = low / n, high / n
        out["clip/low"], out["clip/high"], out["loss"] = mean["clipped_low"], mean["clipped_high"], mean["loss"]
        if "kl" in mean:
            out["kl/mean"] = mean["kl"]
        if tuning is not None:
            loss, rows, objective, tuned = tuning.tolist()
            out["tuning/loss"] = loss / rows
            norms = objective**0.5 + tuned**0.5
            out["tuning/grad_share"] = tuned**0.5 / norms if norms else 0.0
        out["grad_norm"] = float(torch.stack(self._grad_norms).mean())
        return out


def _std(square_sum: float, total: float, count: float) -> float:
    return float(max(0.0, square_sum / count - (total / count) ** 2) ** 0.5)
