"""Objectives: per-decision losses from log-probabilities and advantages. Minimise them; reduce them with core/reductions.py.

Letters: B sequences, S decisions.
"""

from __future__ import annotations

import torch

from flowrl.types import Decisions, Objective

__all__ = ["clipped_surrogate"]


def clipped_surrogate(decisions: Decisions, *, clip_low: float, clip_high: float) -> Objective:
    """PPO's clipped surrogate with separate bounds: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(log_prob - old_log_prob).

    At r = 1 its gradient is REINFORCE's, -A grad log_prob. A masked decision has loss 0 and no gradient.

    Args:
        decisions: see `Decisions`.
        clip_low, clip_high: > 0; on SDE steps with mean log-probabilities 1e-5 .. 1e-3, on tokens about 0.2.
    Returns:
        loss [B, S] and metrics, each [B, S]: ``ratio``, ``clipped_low``, ``clipped_high`` (1.0 where the bound stops the gradient), ``log_ratio``.
    Source:
        PPO, arXiv:1707.06347 eq. 7; separate bounds: DAPO, arXiv:2503.14476 eq. 10; on SDE steps: Flow-GRPO, arXiv:2505.05470.
    """
    log_ratio = torch.where(decisions.mask, decisions.log_prob - decisions.old_log_prob, torch.zeros_like(decisions.log_prob))
    ratio = log_ratio.exp()
    advantages = torch.where(decisions.mask, decisions.advantages, torch.zeros_like(decisions.advantages))
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    with torch.no_grad():
        low = ((ratio < 1 - clip_low) & (advantages < 0)).to(ratio)
        high = ((ratio > 1 + clip_high) & (advantages > 0)).to(ratio)
    return Objective(loss, {"ratio": ratio.detach(), "log_ratio": log_ratio.detach(), "clipped_low": low, "clipped_high": high})
