"""Objectives of text models, which hold for every random decision: soft gates, caps, weights, mixtures with other policies, squared losses.

Letters: B sequences, S decisions, n_i decisions that count in sequence i, delta = log_prob - old_log_prob, r = exp(delta), p = exp(log_prob).

Each takes `Decisions` and gives losses [B, S] and the metrics of `objectives.clipped_surrogate`. Where a gate belongs to another ratio than the decision's
own, hand it `ratio_levels.at_level` of the decisions. The loss of a whole sequence stands at each of its decisions that count; reduce it with ``seq_mean``,
so that it counts once. The values of different gates are not comparable (SAPO's is -2 A / tau at ratio 1); their gradients at ratio 1 are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl.core.ratio_levels import masked_mean, multiple_importance_log_ratio
from flowrl.types import Decisions, Objective

__all__ = [
    "bgpo",
    "cispo",
    "gmpo",
    "kimi",
    "lp_reg",
    "mdpo",
    "mirror_penalty",
    "mixed_origin",
    "rl_plus_off_policy",
    "rover",
    "sapo",
    "token_nft",
    "unmasked",
    "vespo",
]

LOG_RATIO_LIMIT = 20.0
"""verl's clamp of the log-ratio before exp: e^20 and all weights made of it are finite in float32. Beyond it a decision has no gradient."""


def sapo(
    decisions: Decisions,
    *,
    clip_low: float | Tensor = math.inf,
    clip_high: float | Tensor = math.inf,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Objective:
    """SAPO's soft gate: -A (4 / tau) sigmoid(tau (r - 1)); the gradient decays on both sides of r = 1 and never stops.

    The weight of grad log_prob is -A r 4 s (1 - s), s the sigmoid: -A at r = 1 for every tau; tau -> 0 is the unclipped surrogate.

    Args:
        clip_low, clip_high: have no effect; here so that every objective is called alike.
        temperature_positive, temperature_negative: tau > 0 where A > 0, and elsewhere.
    Source:
        arXiv:2511.20347; verified in verl (compute_policy_loss_sapo) and TRL. Reduce with seq_mean_token_mean.
    """
    delta, advantages = unmasked(decisions)
    ratio = _exp(delta)
    tau = _by_sign(advantages > 0, temperature_positive, temperature_negative, ratio)
    return Objective(-advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau, _metrics(delta))


def cispo(decisions: Decisions, *, clip_low: float | Tensor, clip_high: float | Tensor) -> Objective:
    """CISPO: -sg[clip(r, 1 - clip_low, 1 + clip_high)] A log_prob; the ratio is capped, but no decision loses its gradient.

    Args:
        clip_low, clip_high: distances of the bounds from 1, as for every objective. clip_low >= 1 is no lower bound, as released; the bound 5 of ScaleRL,
            TRL's ``epsilon_high=5``, is clip_high = 4.
    Returns:
        ``clipped_low`` and ``clipped_high`` are 1.0 where the ratio is capped.
    Source:
        arXiv:2506.13585; verified in verl (compute_policy_loss_cispo) and TRL. Reduce with mean.
    """
    delta, advantages = unmasked(decisions)
    with torch.no_grad():
        ratio = _exp(delta)
        lower, upper = (torch.as_tensor(bound, dtype=torch.float64).to(ratio) for bound in (1 - _double(clip_low), 1 + _double(clip_high)))
        low, high = ratio < lower, ratio > upper
        weight = ratio.clamp(lower, upper) * advantages
    log_prob = torch.where(decisions.mask, decisions.log_prob, torch.zeros_like(delta))
    return Objective(-weight * log_prob, _metrics(delta, low & decisions.mask, high & decisions.mask))


def gmpo(decisions: Decisions, *, clip_low: float | Tensor, clip_high: float | Tensor) -> Objective:
    """GMPO: -A times the geometric mean of the sequence's ratios, each clipped on its pessimistic side; the loss of a sequence.

    d = sgn(A) min(sgn(A) delta, sgn(A) clip(delta, -clip_low, clip_high)), loss -A exp(sum of d / n_i)

    Without bounds it is GSPO without bounds. A decision beyond its bound has no gradient of its own.

    Args:
        decisions: advantages equal within a sequence; their mean is taken.
        clip_low, clip_high: > 0, on the scale of log-ratios; 0.4.
    Source:
        arXiv:2507.20673; verified in verl (compute_policy_loss_geo_mean). Reduce with seq_mean.
    """
    delta, advantages = unmasked(decisions)
    advantage = masked_mean(advantages, decisions.mask)
    lower, upper = (-_double(clip_low)).to(delta), _double(clip_high).to(delta)
    low, high = (delta < lower) & (advantage < 0), (delta > upper) & (advantage > 0)
    clipped = torch.where(low, lower, torch.where(high, upper, delta))
    ratio = _exp(masked_mean(clipped, decisions.mask))
    return Objective(_spread(-advantage * ratio, decisions.mask), _metrics(delta, low, high))


def vespo(
    decisions: Decisions,
    *,
    clip_low: float | Tensor = math.inf,
    clip_high: float | Tensor = math.inf,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Objective:
    """VESPO: -sg[W^k exp(lam (1 - W))] A log_prob, W = exp(sum of delta) of the whole sequence: a Gamma-shaped weight that is 1 at W = 1.

    Args:
        decisions: with every decision's own log-probabilities (ratio level token).
        clip_low, clip_high: have no effect; here so that every objective is called alike.
        positive, negative: (k, lam), lam > 0, where A >= 0 and where A < 0.
    Source:
        arXiv:2602.10693; verified in TRL 1.16, whose clamps these are: delta to +-20, log W to log 1e-8 .. 20. Reduce with mean.
    """
    delta, advantages = unmasked(decisions)
    with torch.no_grad():
        log_w = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).sum(1, keepdim=True).clamp(math.log(1e-8), LOG_RATIO_LIMIT)
        k, lam = (_by_sign(advantages >= 0, ours, theirs, delta) for ours, theirs in zip(positive, negative, strict=True))
        weight = (lam + k * log_w - lam * log_w.exp()).exp() * advantages
    log_prob = torch.where(decisions.mask, decisions.log_prob, torch.zeros_like(delta))
    return Objective(-weight * log_prob, _metrics(delta))


def mdpo(decisions: Decisions, *, clip_low: float | Tensor = math.inf, clip_high: float | Tensor = math.inf, penalty: float = 1.0) -> Objective:
    """Mirror descent policy optimisation: -A r + penalty (exp(-delta) - 1 + delta), the surrogate held by an estimate of KL(policy || old).

    At ratio 1 the KL has no gradient: the first step of a batch is plain policy gradient. penalty = 0 is the unclipped surrogate.

    Args:
        clip_low, clip_high: have no effect; here so that every objective is called alike.
        penalty: >= 0, 1 / t_k of the schedule, see `mirror_penalty`.
    Source:
        arXiv:2005.09814; from a note and a third-party implementation. The single-sample KL (k3) is our choice.
    """
    delta, advantages = unmasked(decisions)
    held = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return Objective(-advantages * held.exp() + penalty * (torch.expm1(-held) + held), _metrics(delta))


def mirror_penalty(iteration: int, num_iterations: int) -> float:
    """1 / t_k with t_k = 1 - k / K: `mdpo`'s penalty grows as training goes on. k in 0..K-1. Source: as `mdpo`."""
    if not 0 <= iteration < num_iterations:
        raise ValueError(f"iteration {iteration} is not in 0..{num_iterations - 1}")
    return 1 / (1 - iteration / num_iterations)


def kimi(decisions: Decisions, *, clip_low: float | Tensor = math.inf, clip_high: float | Tensor = math.inf, tau: float = 0.1) -> Objective:
    """Kimi k1.5: -A D + (tau / 2) D^2 with D the log-ratio of the whole sequence; the loss of a sequence.

    With A the reward minus the group's mean it is (A - tau D)^2 / (2 tau) up to a constant. tau = 0 is REINFORCE with a group baseline. On
    decisions as sequences of one (S = 1) it is the token form that verl calls dro, -(A delta - (tau / 2) delta^2).

    Args:
        decisions: advantages equal within a sequence (centre group, scale none); their mean is taken.
        clip_low, clip_high: have no effect; here so that every objective is called alike.
        tau: >= 0; not published, 0.1 is ours.
    Source:
        arXiv:2501.12599; the regularised form with the mean as baseline is from derivation notes, dro from verl. Reduce with seq_mean.
    """
    delta, advantages = unmasked(decisions)
    total, advantage = delta.sum(1, keepdim=True), masked_mean(advantages, decisions.mask)
    return Objective(_spread(-advantage * total + tau / 2 * total.square(), decisions.mask), _metrics(delta))


def bgpo(decisions: Decisions, *, clip_low: float | Tensor = math.inf, clip_high: float | Tensor = math.inf) -> Objective:
    """A bound on -A exp(mean of delta) that is a plain mean over Monte-Carlo samples: -A (1 + delta) where A >= 0, -A exp(delta) where A < 0.

    The likelihood of a diffusion policy is an average of S estimates (noise levels, masks), and exp of an average needs them all at once. Here each sample's
    loss depends on it alone, never lies below the loss that is bounded, and has its value and gradient at delta = 0.

    Args:
        decisions: S estimates of each sample's log-likelihood, the old ones with the same noise; advantages equal within a sample.
        clip_low, clip_high: have no effect; here so that every objective is called alike.
    Source:
        BGPO, arXiv:2510.11683; the abstract alone was read, the bound (1 + x <= e^x, and Jensen) is our reading. Reduce with seq_mean_token_mean.
    """
    delta, advantages = unmasked(decisions)
    zero = torch.zeros_like(delta)
    up, down = torch.where(advantages >= 0, delta, zero), torch.where(advantages < 0, delta, zero)
    return Objective(-advantages * torch.where(advantages >= 0, 1 + up, _exp(down)), _metrics(delta))


def rover(decisions: Decisions, *, next_value: Tensor, kappa: float = 1.0) -> Objective:
    """ROVER: (Q - sg[y])^2, Q = kappa delta, y = A + kappa next_value: Q-values are log-ratios, and a random policy's value of the next state is their mean.

    On-policy (delta and next_value 0) the gradient is -2 kappa A grad log_prob.

    Args:
        decisions: advantages are centred rewards, the same at every decision (centre group; scale none, or group_std as in the released run).
        next_value: [B, S], mean over the vocabulary of log_prob - old_log_prob at the next decision, a constant; 0 after the last decision.
        kappa: > 0.
    Source:
        arXiv:2509.24981; verified in the released code (dp_actor.py), whose optional clip of the log-ratio is left out. Reduce with mean.
    """
    delta, advantages = unmasked(decisions)
    target = advantages + kappa * torch.where(decisions.mask, next_value.detach(), torch.zeros_like(delta))
    return Objective((kappa * delta - target.detach()).square(), _metrics(delta))


def token_nft(
    decisions: Decisions, *, success_rate: Tensor, omega: str = "grpo", negative_weight: float = 1.0, floor_positive: float = 0.0, floor_negative: float = 1.0
) -> Objective:
    """Negative-aware fine-tuning of a text model: fit right answers with the policy, wrong ones with the implicit negative policy (1 - q r) / (1 - q).

    q is the success rate, y the advantage: omega(q) [y (-log f(r, floor_positive)) + negative_weight (1 - y) (-log f((1 - q r) / (1 - q), floor_negative))],
    where f(x, c) has the value max(x, c) and the gradient of x.

    | omega | value | on-policy it has the gradient of |
    | --- | --- | --- |
    | grpo | sqrt((1 - q) / q) | GRPO (ddof 0) |
    | dr_grpo | 1 - q | Dr.GRPO |

    Args:
        decisions: advantages y in {0, 1}, whether the answer is right (centre and scale none on a verifier's score).
        success_rate: [B] or [B, S], the group's share of right answers; clamped to 0.02 .. 0.98. Where it is 0 or 1 the group teaches nothing: loss 0.
        negative_weight: 1; 0 is rejection fine-tuning.
        floor_positive, floor_negative: the floors 0 and 1 of the release.
    Raises:
        ValueError: unknown omega.
    Source:
        NFT, arXiv:2505.18116; verified in the released code (dp_actor.py). Reduce with seq_mean_token_sum_norm, max_length 1000 as released. Not the diffusion
        method `objectives.nft`, which mirrors velocities.
    """
    if omega not in ("grpo", "dr_grpo"):
        raise ValueError(f"unknown omega {omega!r}; known: grpo, dr_grpo")
    delta, right = unmasked(decisions)
    share = success_rate.detach().to(delta)
    share = share[:, None] if share.ndim == 1 else share
    mixed = (share > 0) & (share < 1) & decisions.mask
    q = share.clamp(0.02, 0.98)
    ratio = delta.clamp(-60.0, 10.0).exp()  # above as released; below, so that its logarithm is finite in float32
    fit = -_straight_through(ratio, floor_positive).log()
    repel = -_straight_through((1 - q * ratio) / (1 - q), floor_negative).log()
    weight = (1 - q) if omega == "dr_grpo" else ((1 - q) / q).sqrt()
    loss = weight * (right * fit + negative_weight * (1 - right) * repel)
    return Objective(torch.where(mixed, loss, torch.zeros_like(loss)), _metrics(delta))


def rl_plus_off_policy(decisions: Decisions, *, exponent: float = 0.5) -> Objective:
    """RL-PLUS's loss of decisions that an expert made: -rho A (1 - sg[p])^exponent, rho = 2 p / (p_old + (p_old + 1) / 2) <= 4; no clip.

    The factor favours what the policy would hardly have done; exponent 0 removes it. `mixed_origin` puts it beside the clipped surrogate of the others.

    Args:
        decisions: old_log_prob of the old policy, not of the expert. Log-probabilities of tokens, <= 0.
    Returns:
        ``ratio`` and ``log_ratio`` are rho's.
    Source:
        arXiv:2508.00222; verified in the released code (rlplus_core_alg.py). Group statistics come from the policy's own samples only. Reduce with mean.
    """
    _, advantages = unmasked(decisions)
    zero = torch.zeros_like(decisions.log_prob)
    log_prob, old = torch.where(decisions.mask, decisions.log_prob, zero), torch.where(decisions.mask, decisions.old_log_prob, zero)
    log_rho = multiple_importance_log_ratio(log_prob, old)
    surprise = (-torch.expm1(log_prob.detach())).clamp_min(0).pow(exponent)
    return Objective(-log_rho.exp() * advantages * surprise, _metrics(torch.where(decisions.mask, log_rho, zero)))


def mixed_origin(own: Objective, foreign: Objective, is_foreign: Tensor) -> Objective:
    """Losses and metrics of decisions [B, S], from ``foreign`` where ``is_foreign`` [B, S] bool; the other one's gradient is exactly 0 there."""
    return Objective(
        torch.where(is_foreign, foreign.loss, own.loss), {name: torch.where(is_foreign, foreign.metrics[name], value) for name, value in own.metrics.items()}
    )


def lp_reg(decisions: Decisions, base: Objective, *, selected: Tensor, proxy_log_prob: Tensor, weight: float = 1.0) -> Objective:
    """Lp-Reg: where ``selected``, -A r + weight k3(log_prob, proxy) instead of the clipped loss: rare tokens that are not noise are held, not driven out.

    k3 = exp(d) - 1 - d, d = proxy - log_prob; at most 10, as released: beyond, only -A r has a gradient.

    Args:
        base: the losses of all decisions, of `objectives.clipped_surrogate`; released: clip_low 1, clip_high 9.
        selected: [B, S] bool, see `token_weights.low_probability_selection`. proxy_log_prob: [B, S], see `token_weights.min_p_log_prob`, a constant.
    Source:
        arXiv:2510.03222; verified in the released code (core_algos.py). Reduce with mean.
    """
    delta, advantages = unmasked(decisions)
    chosen = selected & decisions.mask
    zero = torch.zeros_like(delta)
    distance = torch.where(chosen, proxy_log_prob.detach() - decisions.log_prob, zero).clamp(-20, 20)
    held = -advantages * _exp(torch.where(chosen, delta, zero)) + weight * (torch.expm1(distance) - distance).clamp_max(10)
    return mixed_origin(base, Objective(held, _metrics(delta)), chosen)


def unmasked(decisions: Decisions) -> tuple[Tensor, Tensor]:
    """log_prob - old_log_prob and the advantages, both 0 where masked."""
    log_ratio = torch.where(decisions.mask, decisions.log_prob - decisions.old_log_prob, torch.zeros_like(decisions.log_prob))
    return log_ratio, torch.where(decisions.mask, decisions.advantages, torch.zeros_like(decisions.advantages))


def _metrics(delta: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> dict[str, Tensor]:
    detached = delta.detach()
    never = torch.zeros_like(detached)
    return {
        "ratio": _exp(detached),
        "log_ratio": detached,
        "clipped_low": never if low is None else low.to(never),
        "clipped_high": never.clone() if high is None else high.to(never),
    }


def _spread(value: Tensor, mask: Tensor) -> Tensor:
    """[B, 1] to every decision that counts."""
    return torch.where(mask, value, torch.zeros_like(value))


def _exp(delta: Tensor) -> Tensor:
    return delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _by_sign(is_first: Tensor, first: float, second: float, like: Tensor) -> Tensor:
    """torch.where of two numbers would round them to float32."""
    return torch.where(is_first, torch.full_like(like, first), torch.full_like(like, second))


def _straight_through(value: Tensor, floor: float) -> Tensor:
    return value + (value.clamp_min(floor) - value).detach()


def _double(bound: float | Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=torch.float64)
