"""Log-probabilities and what else is known of a token from its distribution, without the logits of all tokens at once.

A batch of 8 texts of 1024 tokens over a vocabulary of 128,000 has 4.2 GB of logits in float32, and their softmax and both gradients are as large. Here the
output head runs on a few positions at a time, and again on them in the backward pass; benchmarks/log_prob_memory.md has the peaks.

Letters: N positions, H hidden size, V vocabulary, n samples, T tokens of the longest answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["COLUMNS", "OutputHead", "TokenOutput", "positions_at_once", "token_statistics"]

COLUMNS: dict[str, str] = {
    "entropy": "of the distribution, in nats; with gradient",
    "square_sum": "sum over the vocabulary of p^2; with gradient",
    "mean_log_prob": "mean over the vocabulary of the log-probabilities; with gradient",
    "min_p": "log-probability of the token after those below kappa times the likeliest are gone; -10000 if it is gone itself; a constant",
    "distribution": "[n, T, V] log-softmax, for small vocabularies; with gradient",
    "hidden": "[n, T, H], the output head's input; with gradient",
}
"""What can be asked for beside log-probabilities, each [n, T] but for the last two."""
_SCALARS = ("log_prob", "entropy", "square_sum", "mean_log_prob")
_CHUNK_ELEMENTS = 2**24


class TokenOutput(NamedTuple):
    """What the network says of the tokens of n answers.

    Attributes:
        log_prob: [n, T] float32, 0 where there is no token; with gradient where it is enabled.
        columns: name -> [n, T] float32 (``distribution``: [n, T, V], ``hidden``: [n, T, H]), 0 where there is no token; see `COLUMNS`.
    """

    log_prob: Tensor
    columns: dict[str, Tensor]

    def column(self, name: str) -> Tensor:
        """``log_prob`` or one of the columns."""
        return self.log_prob if name == "log_prob" else self.columns[name]


@dataclass(frozen=True, slots=True)
class OutputHead:
    """From hidden states [..., H] to logits [..., V], as the model's own forward makes them.

    Attributes:
        project: the head module.
        scale: a factor of the logits. softcap: logits are softcap tanh(logits / softcap), None = as they are.
    """

    project: Callable[[Tensor], Tensor]
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.project(hidden)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def positions_at_once(vocabulary: int) -> int:
    """Positions whose logits, in float32, take 64 MiB; at least 1."""
    return max(1, _CHUNK_ELEMENTS // vocabulary)


def token_statistics(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    columns: Collection[str] = (),
    temperature: float = 1.0,
    kappa: float = 0.02,
    at_once: int,
) -> dict[str, Tensor]:
    """``log_prob`` and other columns of tokens, under softmax(head(hidden) / temperature).

    With gradient, nothing of the head's work is kept: the backward pass computes the logits of ``at_once`` positions again, then their gradient.

    Args:
        head: [N, H] -> logits [N, V]. hidden: [N, H]. targets: [N] int64.
        columns: of `COLUMNS`, but for ``hidden``.
        temperature: > 0. kappa: of ``min_p``, in [0, 1].
        at_once: positions whose logits exist at a time; it changes no number by more than rounding.
    Returns:
        name -> [N] (``distribution``: [N, V]), float32, or float64 where the head's logits are.
    Raises:
        ValueError: unknown column.
    """
    if unknown := sorted(set(columns) - set(COLUMNS) - {"log_prob"}):
        raise ValueError(f"unknown column {unknown[0]!r}; known: {', '.join(COLUMNS)}")
    names = ["log_prob", *(name for name in COLUMNS if name in columns and name != "hidden")]

    def work(part: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        logits = head(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        with torch.autocast(logits.device.type, enabled=False):
            return _statistics(logits if temperature == 1.0 else logits / temperature, target, names, kappa)

    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(work, part, target, use_reentrant=False, preserve_rng_state=False) if recompute else work(part, target)
        for part, target in zip(hidden.split(at_once), targets.split(at_once), strict=True)
    ]
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def _statistics(logits: Tensor, target: Tensor, names: Sequence[str], kappa: float) -> tuple[Tensor, ...]:
    scalars = tuple(name for name in names if name in _SCALARS)
    found = dict(zip(scalars, _Scalars.apply(logits, target, scalars), strict=True))
    if "min_p" in names:
        found["min_p"] = _min_p(logits.detach(), target, kappa)
    if "distribution" in names:
        found["distribution"] = logits.log_softmax(-1)
    return tuple(found[name] for name in names)


class _Scalars(torch.autograd.Function):
    """Columns [n] of `_SCALARS` and their gradient by the logits [n, V], which is made in three tensors of their size; autograd would fill a dozen.

    With l the log-softmax and p = e^l, the gradients of log_prob, entropy E, square_sum S and mean_log_prob by a logit are
    1{target} - p, -p (l + E), 2 p (p - S) and 1/V - p.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        total = logits.logsumexp(-1)
        found = {"log_prob": _at(logits, target) - total}
        if "mean_log_prob" in names:
            found["mean_log_prob"] = logits.mean(-1) - total
        if "entropy" in names or "square_sum" in names:
            log_p = logits - total[:, None]
            p = log_p.exp()
            found |= {"entropy": -torch.linalg.vecdot(p, log_p), "square_sum": torch.linalg.vecdot(p, p)}
        ctx.names = names
        ctx.save_for_backward(logits, target, total, *(found[name] for name in names))
        return tuple(found[name] for name in names)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, target, total, *values = ctx.saved_tensors
        by = {name: gradient[:, None] for name, gradient in zip(ctx.names, gradients, strict=True)}
        value = {name: one[:, None] for name, one in zip(ctx.names, values, strict=True)}
        log_p = logits - total[:, None]
        p = log_p.exp()
        row = by["log_prob"] + by.get("mean_log_prob", 0.0)
        factor = None  # of p, in the place of log_p
        if "entropy" in by:
            factor = log_p.add_(value["entropy"]).mul_(-by["entropy"])
        if "square_sum" in by:
            factor = (log_p.zero_() if factor is None else factor).addcmul_(p - value["square_sum"], by["square_sum"], value=2)
        found = p.mul_(-row if factor is None else factor.sub_(row)).scatter_add_(1, target[:, None], by["log_prob"])
        if "mean_log_prob" in by:
            found += by["mean_log_prob"] / logits.shape[-1]
        return found, None, None


def _min_p(logits: Tensor, target: Tensor, kappa: float) -> Tensor:
    """flowrl.core.token_weights.min_p_log_prob of logits: policies and core do not import each other."""
    kept = logits >= logits.amax(-1, keepdim=True) + (math.log(kappa) if kappa > 0 else -math.inf)
    rest = _at(logits, target) - torch.where(kept, logits, -torch.inf).logsumexp(-1)
    return torch.where(_at(kept, target), rest, -1e4)


def _at(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(-1, target[:, None])[:, 0]
