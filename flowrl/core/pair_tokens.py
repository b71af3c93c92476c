"""From log-probabilities of tokens to the [B, 1] columns of `Pairs`: weighted sums, the part that two responses share, pairs that cannot be compared.

Letters: B pairs, T tokens (or denoising steps) of one side; mask [B, T] bool is True where a token counts. Both sides of a pair are padded to one T and
start at the same place.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["after_shared_prefix", "comparable", "guide_weights", "sum_tokens"]


def sum_tokens(log_prob: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum over the tokens that count, times their constant weights, [B, 1] in the dtype of ``log_prob``; 0 for an empty response.

    ``mask.sum(1, keepdim=True)`` is the length that belongs to it.

    Args:
        log_prob: [B, T], may carry a gradient; anything where masked. weight: [B, T] or None.
    """
    value = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    if weight is not None:
        value = value * torch.where(mask, weight.detach(), torch.zeros_like(weight))
    return value.sum(1, keepdim=True)


def guide_weights(
    guide_log_prob: Tensor,
    ref_log_prob: Tensor,
    *,
    alpha: float,
    beta: float,
    side: Literal["chosen", "rejected"],
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """TGDPO's token weights: 1 + alpha beta q for the chosen, 1 - alpha beta q for the rejected, q = log pi_guide - log ref of a token; constants, [B, T].

    TGDPO is `preference.dpo` on the sums of policy and reference with these weights: a guide that has been trained with DPO says which tokens made the
    difference. alpha = 0 is DPO.

    Args:
        guide_log_prob, ref_log_prob: [B, T].
        alpha: >= 0; tuned, 0.5 (from memory). beta: that of DPO, > 0; 0.1.
        limits: weights can be negative, which turns a token's preference round; (0, 2) forbids it. None = as released.
    Raises:
        ValueError: unknown side.
    Source:
        arXiv:2506.14574; verified in the released code (dvlab-research/TGDPO, train/tgdpo/trainer.py). The limits are ours.
    """
    if side not in ("chosen", "rejected"):
        raise ValueError(f"unknown side {side!r} of a pair; known: chosen, rejected")
    tilt = alpha * beta * (guide_log_prob - ref_log_prob).detach()
    weight = 1 + tilt if side == "chosen" else 1 - tilt
    return weight if limits is None else weight.clamp(*limits)


def after_shared_prefix(chosen_tokens: Tensor, rejected_tokens: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masks without the tokens that both responses begin with: pairs of steps that branch off one history (MCTS-DPO, Agent Q, iTool, REFUEL).

    A shared prefix has the same log-probability on both sides, so h does not change; lengths, means and token weights do, and its tokens need no forward
    pass with gradient. Positions that count on neither side (turns of an environment) belong to the prefix where their tokens agree. Identical responses
    lose all; where one response begins the other, the shorter side is empty: `comparable` leaves both out.

    Args:
        chosen_tokens, rejected_tokens: [B, T] int64. chosen_mask, rejected_mask: [B, T] bool.
    Returns:
        The two masks, [B, T] bool each.
    """
    same = (chosen_tokens == rejected_tokens) & (chosen_mask == rejected_mask)
    shared = same.long().cumprod(1).bool()
    return chosen_mask & ~shared, rejected_mask & ~shared


def comparable(chosen_tokens: Tensor, rejected_tokens: Tensor, chosen_mask: Tensor, rejected_mask: Tensor) -> Tensor:
    """Pairs that can teach anything: neither response is empty and they are not the same, [B, 1] bool, the mask of `Pairs`.

    Shapes as in `after_shared_prefix`; what stands where masked does not matter.
    """
    differ = (chosen_mask != rejected_mask) | (chosen_mask & (chosen_tokens != rejected_tokens))
    return (chosen_mask.any(1) & rejected_mask.any(1) & differ.any(1))[:, None]
