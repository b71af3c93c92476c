"""Diagnostics of an iteration's updates, kept on the device as sums and fetched once. Letters: E decisions, K distinct steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Meters"]


class Meters:
    """Ratio (all, and per step of the sigma grid), clip shares, KL, loss and gradient norm.

    Args:
        steps: the distinct step numbers of the trained decisions, the same on every process.
        kl, tuning, normalised: whether there is a KL, a supervised term, a ratio other than the plain one.
        ratio: whether the objective looks at ratios at all; without, `add` takes no metrics of them.
        at: what the numbers of ``steps`` count: steps of the grid, or strata of noise levels.
        extra: further numbers of each decision, of which the mean is logged under these names.
    """

    def __init__(
        self,
        steps: Sequence[int],
        *,
        kl: bool = False,
        tuning: bool = False,
        normalised: bool = False,
        ratio: bool = True,
        at: Literal["step", "time"] = "step",
        extra: Sequence[str] = (),
    ) -> None:
        self.steps, self.at, self.extra, self.has_ratio = list(steps), at, tuple(extra), ratio
        names = ["loss"] + ["log_ratio", "clipped_low", "clipped_high"] * ratio + ["kl"] * kl + ["normalised"] * normalised
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in [*names, *extra]}
        self._has_tuning = tuning
        self._steps: list[Tensor] = []
        self._first: list[Tensor] = []
        self._grad_norms: list[Tensor] = []
        self._tuning: list[Tensor] = []

    def mark(self) -> list[int]:
        """How much has been measured so far, for `rewind`."""
        return [len(chunks) for chunks in self._lists()]

    def rewind(self, mark: list[int]) -> None:
        """Forget what was measured since a mark."""
        for chunks, length in zip(self._lists(), mark, strict=True):
            del chunks[length:]

    def _lists(self) -> list[list[Tensor]]:
        return [*self._chunks.values(), self._steps, self._first, self._grad_norms, self._tuning]

    def add(
        self,
        metrics: Mapping[str, Tensor],
        loss: Tensor,
        step: Tensor,
        *,
        first: bool,
        plain: Tensor | None = None,
        kl: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One micro-batch: the objective's per-decision metrics [B, S] with B S = E, loss [E], KL [E] and step numbers [E].

        Args:
            first: of the first update, whose ratios must be 1.
            plain: [E], the plain log-ratio where the objective was given another one; its own is then kept as ``normalised``.
            extra: [E] each.
        """
        columns: dict[str, Tensor] = {"loss": loss, **(extra or {})}
        if self.has_ratio:
            own = metrics["log_ratio"].flatten()
            columns |= {"log_ratio": own if plain is None else plain, "normalised": own}
            columns |= {name: metrics[name].flatten() for name in ("clipped_low", "clipped_high")}
            if first:
                self._first.append(torch.stack([own.abs().max(), columns["log_ratio"].abs().max()]).max())
        if kl is not None:
            columns["kl"] = kl
        for name, chunks in self._chunks.items():
            chunks.append(columns[name].detach())
        self._steps.append(step)

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
        device, empty = accelerator.device, torch.zeros(0, dtype=torch.float64)
        columns = {name: torch.cat([empty.to(device), *(chunk.double() for chunk in chunks)]) for name, chunks in self._chunks.items()}
        place = torch.searchsorted(torch.tensor(self.steps), torch.cat([torch.zeros(0, dtype=torch.int64), *self._steps])).to(device)

        def per_step(values: Tensor) -> Tensor:
            if not self.steps:
                return values[:0]
            return torch.zeros(len(self.steps), dtype=torch.float64, device=device).index_add_(0, place, values)

        columns["count"] = torch.ones_like(columns["loss"])
        if self.has_ratio:
            off = columns["log_ratio"].exp() - 1
            columns |= {"off": off, "off_square": off.square(), "log_square": columns["log_ratio"].square()}
        if "normalised" in columns:
            columns["normalised_square"] = columns["normalised"].square()
        packed = torch.cat([part for values in columns.values() for part in (values.sum()[None], per_step(values))])
        tuning = torch.stack([torch.zeros(4, dtype=torch.float64, device=device), *self._tuning]).sum(0)
        first = torch.stack([torch.zeros((), device=device), *self._first]).max()
        sums = torch.cat([tuning, packed])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
            first = accelerator.gather(first[None]).max()
        table = dict(zip(columns, sums[4:].view(len(columns), -1).tolist(), strict=True))  # name -> [over all steps, then each step]
        of_all = {name: values[0] for name, values in table.items()}
        count = of_all["count"]
        mean = {name: value / count if count else 0.0 for name, value in of_all.items()}
        out: dict[str, Any] = {}
        if self.has_ratio:
            out |= {"ratio/mean": 1 + mean["off"], "ratio/std": _std(of_all["off_square"], of_all["off"], count), "ratio/max_abs_log_first": float(first)}
        for j, step in enumerate(self.steps if self.has_ratio else [], start=1):
            at = {name: values[j] for name, values in table.items()}
            n = at["count"]
            if n == 0:  # the selection left no decision of this step
                continue
            key = f"ratio/{self.at}_{step}"
            out |= {f"{key}/mean": 1 + at["off"] / n, f"{key}/std": _std(at["off_square"], at["off"], n)}
            out |= {f"{key}/log_mean": at["log_ratio"] / n, f"{key}/log_std": _std(at["log_square"], at["log_ratio"], n)}
            if "normalised" in at:
                out |= {f"{key}/norm_mean": at["normalised"] / n, f"{key}/norm_std": _std(at["normalised_square"], at["normalised"], n)}
            out |= {f"{key}/clip_low": at["clipped_low"] / n, f"{key}/clip_high": at["clipped_high"] / n}
        if self.has_ratio:
            out["clip/low"], out["clip/high"] = mean["clipped_low"], mean["clipped_high"]
        out["loss"] = mean["loss"]
        out |= {name: mean[name] for name in self.extra}
        if "kl" in mean:
            out["kl/mean"] = mean["kl"]
        if self._has_tuning:
            loss, rows, objective, tuned = sums[:4].tolist()
            out["tuning/loss"] = loss / rows if rows else 0.0
            norms = objective**0.5 + tuned**0.5
            out["tuning/grad_share"] = tuned**0.5 / norms if norms else 0.0
        out["updates"] = len(self._grad_norms)
        out["grad_norm"] = float(torch.stack(self._grad_norms).mean()) if self._grad_norms else 0.0
        return out


def _std(square_sum: float, total: float, count: float) -> float:
    return float(max(0.0, square_sum / count - (total / count) ** 2) ** 0.5) if count else 0.0
