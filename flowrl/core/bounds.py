"""BAPO: clip bounds that are searched so that samples with positive advantages have their share of the loss.

Letters: B sequences, S decisions, K candidates.

The three steps are apart, so that the sums of all processes meet between the second and the third and every process chooses the same bounds. None of
them waits for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["bound_candidates", "bound_statistics", "choose_bounds"]


def bound_candidates(
    *, low_start: float = 0.6, low_end: float = 0.9, high_start: float = 1.2, high_end: float = 3.0, low_step: float = 0.05, high_step: float = 0.05
) -> Tensor:
    """The bounds that the search tries, in its order, [K, 2] float64: the lower one rises to its end, then the upper one.

    Args:
        low_start, low_end, high_start, high_end: bounds of the ratio itself (0.9, not 1 - 0.9), low_start <= low_end <= 1 <= high_start <= high_end.
        low_step, high_step: > 0; the last step stops at the end.
    Raises:
        ValueError: bounds that are not in this order, or a step that is not above 0.
    """
    if not 0 <= low_start <= low_end <= 1 <= high_start <= high_end:
        raise ValueError(f"bounds of the ratio must satisfy 0 <= {low_start} <= {low_end} <= 1 <= {high_start} <= {high_end}")
    if low_step <= 0 or high_step <= 0:
        raise ValueError(f"the steps of the search must be above 0, not {low_step} and {high_step}")
    lows, highs = _rising(low_start, low_end, low_step), _rising(high_start, high_end, high_step)
    return torch.tensor([(low, high_start) for low in lows] + [(low_end, high) for high in highs[1:]], dtype=torch.float64)


def bound_statistics(log_ratio: Tensor, advantages: Tensor, mask: Tensor, candidates: Tensor, *, stat: Literal["grad", "value"] = "grad") -> Tensor:
    """Positive and negative part of the clipped loss under each candidate, [K, 2] without gradient; add them over micro-batches and processes.

    | stat | P | N |
    | --- | --- | --- |
    | grad | sum of r A over A > 0 and r <= high | sum of r abs(A) over A < 0 and r >= low |
    | value | sum of min(r, high) A over A > 0 | sum of max(r, low) abs(A) over A < 0 |

    value is what the release computes. There, raising ``low`` cannot lower N; what it takes away is gradient. grad counts that, and then both moves can
    only raise P / N: our reading, and the default.

    Args:
        log_ratio, advantages: [B, S]. mask: [B, S] bool. candidates: [K, 2]; one pass over [B, S] for each.
    Raises:
        ValueError: unknown stat.
    Source:
        BAPO, arXiv:2510.18927, recipe/bapo/policy_loss.py, verified in code (value).
    """
    if stat not in ("grad", "value"):
        raise ValueError(f"unknown statistic {stat!r} of the search for clip bounds; known: grad, value")
    zero = torch.zeros_like(advantages)
    ratio, advantages = torch.where(mask, log_ratio.detach(), zero).exp(), torch.where(mask, advantages, zero)
    up, down = advantages.clamp_min(0), (-advantages).clamp_min(0)
    rows = []
    for low, high in candidates.to(ratio):
        if stat == "value":
            positive, negative = ratio.minimum(high) * up, ratio.maximum(low) * down
        else:
            positive, negative = torch.where(ratio <= high, ratio * up, zero), torch.where(ratio >= low, ratio * down, zero)
        rows.append(torch.stack((positive.sum(), negative.sum())))
    return torch.stack(rows)


def choose_bounds(candidates: Tensor, statistics: Tensor, *, target: float = 1.0) -> tuple[Tensor, Tensor]:
    """The first candidate with P / N >= target, or the last of all, as two numbers [] float64: low and high, bounds of the ratio itself.

    For `objectives.clipped_surrogate`: clip_low = 1 - low, clip_high = high - 1, dual_clip = 3 as released. Without negative decisions (N = 0) the first
    candidate stands; without positive ones the last. Target 0 is PPO with the first candidate.

    Args:
        candidates: [K, 2]. statistics: [K, 2], summed over all processes. target: P / N; 1 is an equal share, rho_0 = 1/2 of the paper.
    """
    enough = statistics[:, 0] >= target * statistics[:, 1]
    last = torch.full((), len(candidates) - 1, dtype=torch.int64, device=enough.device)
    first = torch.where(enough.any(), enough.to(torch.int64).argmax(), last)
    low, high = candidates.to(enough.device).index_select(0, first[None])[0].unbind()
    return low, high


def _rising(start: float, end: float, step: float) -> list[float]:
    count = math.ceil((end - start) / step - 1e-9)  # 0.3 / 0.05 is 6 steps, whatever its last bit
    return [start + step * i for i in range(count)] + [end]
