"""Log-probabilities and what else is known of a token from its distribution, without the logits of all tokens at once.

A batch of 8 texts of 1024 tokens over a vocabulary of 128,000 has 4.2 GB of logits in float32, and their softmax and both gradients are as large. Here the
output head runs on a few positions at a time, and again on them in the backward pass; benchmarks/log_prob_memory.md has the peaks.

Letters: N positions, H hidden size, V vocabulary, n samples, T tokens of the longest answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

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
        return _statistics(logits if temperature == 1.0 else logits / temperature, target, names, kappa)

    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(work, part, target, use_reentrant=False, preserve_rng_state=False) if recompute else work(part, target)
        for part, target in zip(hidden.split(at_once), targets.split(at_once), strict=True)
    ]
    return {name: torch.cat(values) for name, values in zip(names, zip(*parts, strict=True), strict=True)}


def _statistics(logits: Tensor, target: Tensor, names: Collection[str], kappa: float) -> tuple[Tensor, ...]:
    total = logits.logsumexp(-1)
    centred = logits - total[:, None] if {"entropy", "distribution"} & set(names) else logits

    def column(name: str) -> Tensor:
        match name:
            case "log_prob":
                return _at(logits, target) - total
            case "entropy":
                return -(centred.exp() * centred).sum(-1)
            case "square_sum":
                return ((2 * logits).logsumexp(-1) - 2 * total).exp()
            case "mean_log_prob":
                return logits.mean(-1) - total
            case "min_p":
                return _min_p(logits.detach(), target, kappa)
            case _:
                return centred

    return tuple(column(name) for name in names)


def _min_p(logits: Tensor, target: Tensor, kappa: float) -> Tensor:
    """flowrl.core.token_weights.min_p_log_prob of logits: policies and core do not import each other."""
    kept = logits >= logits.amax(-1, keepdim=True) + (math.log(kappa) if kappa > 0 else -math.inf)
    rest = _at(logits, target) - torch.where(kept, logits, -torch.inf).logsumexp(-1)
    return torch.where(_at(kept, target), rest, -1e4)


def _at(values: Tensor, target: Tensor) -> Tensor:
    return values.gather(-1, target[:, None])[:, 0]
