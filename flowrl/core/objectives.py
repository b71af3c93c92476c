"""Objectives: per-decision losses from log-probabilities and advantages. Minimise them; reduce them with core/reductions.py.

Letters: B sequences, S decisions, E edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowrl.core.gates import LOG_RATIO_LIMIT, bgpo, cispo, gmpo, kimi, mdpo, sapo, unmasked, vespo
from flowrl.types import Decisions, Objective

__all__ = ["OBJECTIVES", "clipped_surrogate", "dynamic_clip_bounds", "nft", "reinforce"]


def clipped_surrogate(
    decisions: Decisions,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    centre: float | Tensor = 1.0,
    dual_clip: float | None = None,
    ratio_max: float | None = None,
) -> Objective:
    """PPO's clipped surrogate with separate bounds: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(log_prob - old_log_prob).

    At r = 1 its gradient is REINFORCE's, -A grad log_prob. A masked decision has loss 0 and no gradient.

    With ``dual_clip`` c, the loss of a decision with A < 0 is at most -A c. With ``ratio_max``, r is cut there before the maximum (not inside the clip).

    Args:
        decisions: see `Decisions`.
        clip_low, clip_high: > 0; on SDE steps with mean log-probabilities 1e-5 .. 1e-3, on tokens about 0.2. A tensor that broadcasts to [B, S] gives
            each decision its own bound, see `dynamic_clip_bounds`.
        centre: replaces the 1 in both bounds; broadcasts to [B, S]. ReMix: `ratio_levels.clip_centre`.
        dual_clip: > 1, usually 3, 10 in BNPO; None = none. ratio_max: > 0, 4 in INTELLECT-2, TRL's ``delta``; None = none.
    Returns:
        loss [B, S] and metrics, each [B, S]: ``ratio``, ``clipped_low``, ``clipped_high`` (1.0 where a bound stops the gradient), ``log_ratio``.
        Where A < 0 nothing of PPO stops a growing ratio: beyond a log ratio of 20 the loss stays as it is there, without gradient (verl).
    Source:
        PPO, arXiv:1707.06347 eq. 7; separate bounds: DAPO, arXiv:2503.14476 eq. 10; on SDE steps: Flow-GRPO, arXiv:2505.05470. dual_clip: arXiv:1912.09729,
        verified in verl; ratio_max: verified in TRL; centre: ReMix, arXiv:2507.06892, from a note on the paper.
    """
    log_ratio, advantages = unmasked(decisions)
    with torch.no_grad():
        ratio = log_ratio.exp()
        lower, upper = (_double(centre) - _double(clip_low)).to(ratio), (_double(centre) + _double(clip_high)).to(ratio)
        if dual_clip is not None or ratio_max is not None:  # the bound above depends on the sign; without them only A > 0 has one
            most = torch.full_like(ratio, math.inf if ratio_max is None else ratio_max)
            below_zero = most.maximum(upper) if dual_clip is None else most.maximum(upper).clamp_max(dual_clip)
            upper = torch.where(advantages < 0, below_zero, most.minimum(upper))
            low, high = (ratio < lower) & (advantages < 0), (ratio > upper) & (advantages != 0)
        else:
            low, high = (ratio < lower) & (advantages < 0), (ratio > upper) & (advantages > 0)
        free = ~(low | high) & (advantages != 0)
        high = high | (free & (log_ratio > LOG_RATIO_LIMIT))
    # the maximum of the docstring, written so that a stopped decision never touches exp: a ratio that overflows there would turn gradient 0 into NaN
    moving = torch.where(free, log_ratio, torch.zeros_like(log_ratio)).clamp_max(LOG_RATIO_LIMIT).exp()
    loss = -advantages * torch.where(free, moving, ratio.clamp(lower, upper))
    return Objective(loss, {"ratio": ratio, "log_ratio": log_ratio.detach(), "clipped_low": low.to(ratio), "clipped_high": high.to(ratio)})


def reinforce(decisions: Decisions, *, clip_low: float | Tensor, clip_high: float | Tensor) -> Objective:
    """REINFORCE, -A (log_prob - old_log_prob): gradient -A grad log_prob at every update, the clipped surrogate's at ratio 1.

    The constant old log-probability only makes the loss 0 before the first update. There is no clip and no importance weight: with several updates per
    iteration the later ones are off-policy, and nothing holds them. A masked decision has loss 0 and no gradient.

    Args:
        decisions: see `Decisions`.
        clip_low, clip_high: have no effect; here so that every objective is called alike.
    Returns:
        loss [B, S] and the metrics of `clipped_surrogate`; ``clipped_low`` and ``clipped_high`` are 0.
    Source:
        DDPO-SF, arXiv:2305.13301 (score-function variant).
    """
    log_ratio, advantages = unmasked(decisions)
    detached = log_ratio.detach()
    never = torch.zeros_like(detached)
    return Objective(-advantages * log_ratio, {"ratio": detached.exp(), "log_ratio": detached, "clipped_low": never, "clipped_high": never.clone()})


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "clipped_surrogate": clipped_surrogate,
    "reinforce": reinforce,
    "sapo": sapo,
    "cispo": cispo,
    "gmpo": gmpo,
    "vespo": vespo,
    "mdpo": mdpo,
    "kimi": kimi,
    "bgpo": bgpo,
}
"""Objectives that need nothing but `Decisions`; those that need more are in `gates` and `group_gates`."""


def nft(decisions: Decisions, *, beta: float, scale: float = 5.0) -> Objective:
    """DiffusionNFT: scale (r (-log_prob) + (1 - r) (-negative_log_prob)) / beta, with the advantages as r.

    With probability r a sample is good and the implicit positive policy should fit it, otherwise the implicit negative one, which mirrors the policy about
    the one that sampled (`likelihoods.matching.implicit_velocities`, same beta). On-policy the gradient is scale (1 - 2 r) grad log_prob of the policy
    itself, whatever beta: r = 1/2 gives none. A masked decision has loss 0 and no gradient.

    Args:
        decisions: ``log_prob`` under the implicit positive policy, ``negative_log_prob`` under the negative one; ``advantages`` in [0, 1], see
            `transforms.transform`, kind ``unit_interval``. ``old_log_prob`` is only reported.
        beta: > 0; 1 or 0.1 (released configurations).
        scale: 5 in the released code.
    Returns:
        loss [B, S] and the metrics of `clipped_surrogate`; ``ratio`` is 1, ``clipped_low`` and ``clipped_high`` are 0: there is no importance weight.
    Raises:
        ValueError: no negative_log_prob; or an advantage that counts is not in [0, 1].
    Source:
        arXiv:2509.16117, verified in the released code (NVlabs/DiffusionNFT, train_nft_sd3.py).
    """
    if decisions.negative_log_prob is None:
        raise ValueError("nft needs log-probabilities under the implicit negative policy; Decisions.negative_log_prob is None")
    log_ratio, r = unmasked(decisions)
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError("nft takes advantages in [0, 1] as probabilities that a sample is good; use advantage.transform=unit_interval")
    zero = torch.zeros_like(r)
    positive, negative = (torch.where(decisions.mask, x, zero) for x in (decisions.log_prob, decisions.negative_log_prob))
    loss = -scale / beta * (r * positive + (1 - r) * negative)
    return Objective(loss, {"ratio": torch.ones_like(zero), "log_ratio": log_ratio.detach(), "clipped_low": zero, "clipped_high": zero.clone()})


def dynamic_clip_bounds(position: Tensor, *, clip_low: float, clip_high: float, sensitivity: float) -> tuple[Tensor, Tensor]:
    """Clip bounds of each decision: a good node may be pushed up further, a bad one pushed down further.

    low = clip_low max(1 - sensitivity (2 position - 1), 0.1), high = clip_high max(1 + sensitivity (2 position - 1), 0.1)

    Args:
        position: [E] in [0, 1], the node's normalised reward in its layer, see `credit.layer_position`.
        clip_low, clip_high: > 0, the bounds of a node in the middle. sensitivity: in [0, 1]; 0 is the fixed clip, default 0.5.
    Returns:
        low [E], high [E], the dtype of ``position``.
    Source:
        Dynamic-TreeRPO, arXiv:2509.23352, eq. 11 has these three parameters; the formula and the floor are our reading.
    """
    tilt = sensitivity * (2 * position - 1)
    return clip_low * (1 - tilt).clamp_min(0.1), clip_high * (1 + tilt).clamp_min(0.1)


def _double(bound: float | Tensor) -> Tensor:
    """1 - 1e-6 is rounded once, to the ratio's dtype, whether the bound is a number or a tensor."""
    return torch.as_tensor(bound, dtype=torch.float64)
