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
    advantages = torch.where(decisions.mask, decisions.advantages, torch.zeros_like(decisions.advantages))
    with torch.no_grad():
        ratio = log_ratio.exp()
        low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
        free = ~(low | high) & (advantages != 0)
    # the maximum of the docstring, written so that a stopped decision never touches exp: a ratio that overflows there would turn gradient 0 into NaN
    moving = torch.where(free, log_ratio, torch.zeros_like(log_ratio)).exp()
    loss = -advantages * torch.where(free, moving, ratio.clamp(1 - clip_low, 1 + clip_high))
    return Objective(loss, {"ratio": ratio, "log_ratio": log_ratio.detach(), "clipped_low": low.to(ratio), "clipped_high": high.to(ratio)})
