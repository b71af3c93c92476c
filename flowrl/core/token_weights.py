"""Which decisions count, and how much: weights and masks that multiply per-decision losses before their reduction. None carries a gradient.

Letters: B sequences, S decisions (positions), V vocabulary, P groups; p = exp(log_prob).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "chord_weights",
    "curvature_mask",
    "divergence_weights",
    "low_probability_selection",
    "masked_quantile",
    "min_p_log_prob",
    "overlong_filter",
    "position_divergence",
    "top_entropy_mask",
    "uncertain_mask",
]


def position_divergence(log_distribution: Tensor, mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """TW-GRPO: how much the sequences of a group disagree at each position, [P, S] >= 0.

    D = mean over the group's sequences i of sum over v of exp(m - q_i) - (m - q_i) - 1, m the mean of the log-distributions q_i (not renormalised), m - q_i
    clamped to +-11. A sequence that is over counts as the uniform distribution. On SDE steps the variance of the predicted means within a group stands in.

    Args:
        log_distribution: [B, S, V], log-softmax; several times its memory is used: call it on slices of positions. mask: [B, S] bool.
        group: [B] int64 in 0..P-1, whole groups.
    Source:
        TW-GRPO, arXiv:2505.24718; verified in the released code (grpo_trainer.py).
    """
    q = torch.where(mask[..., None], log_distribution.detach(), -math.log(log_distribution.shape[-1]))
    count = torch.zeros(num_groups, dtype=q.dtype, device=q.device).index_add_(0, group, torch.ones_like(q[:, 0, 0])).clamp_min(1)
    mean = q.new_zeros(num_groups, *q.shape[1:]).index_add_(0, group, q) / count[:, None, None]
    distance = (mean[group] - q).clamp(-11, 11)
    each = (torch.expm1(distance) - distance).sum(-1)
    return q.new_zeros(num_groups, q.shape[1]).index_add_(0, group, each) / count[:, None]


def divergence_weights(divergence: Tensor, mask: Tensor, group: Tensor, *, alpha: float = 1.4) -> Tensor:
    """TW-GRPO's weights 1 + (alpha - 1) D', D' the divergence scaled to 0 .. 1 within each group, [B, S] in [1, alpha]; 1 where D is constant or masked.

    Args:
        divergence: [P, S], see `position_divergence`. mask: [B, S] bool. group: [B] int64. alpha: >= 1; 1 is GRPO.
    Source:
        As `position_divergence`. The range is taken over positions at which any sequence of the group counts, so that padding cannot move it: our reading.
    """
    used = torch.zeros_like(divergence).index_add_(0, group, mask.to(divergence)) > 0
    low = torch.where(used, divergence, torch.inf).amin(1, keepdim=True)
    high = torch.where(used, divergence, -torch.inf).amax(1, keepdim=True)
    varies = high > low
    share = torch.where(varies, (divergence - low) / torch.where(varies, high - low, 1.0), 0.0)
    return torch.where(mask, 1 + (alpha - 1) * share[group], 1.0)


def uncertain_mask(old_log_prob: Tensor, mask: Tensor, *, threshold: float = 0.9) -> Tensor:
    """SPO's probability mask: decisions that the sampling policy was not sure of, p_old < threshold; [B, S] bool, a subset of ``mask``.

    Source: SPO (segments), arXiv:2505.23564; verified in the released code.
    """
    return mask & (old_log_prob.detach() < math.log(threshold))


def masked_quantile(value: Tensor, mask: Tensor, share: float) -> Tensor:
    """The quantile ``share`` in [0, 1] of the values that count, linear between two of them, []; +inf if there is none. Sorts all values; no wait."""
    ordered = torch.where(mask, value.detach(), torch.inf).flatten().sort().values
    place = share * (mask.sum() - 1).clamp_min(0).to(torch.float64)
    low, high = place.floor().to(torch.int64), place.ceil().to(torch.int64)
    below, above = ordered.gather(0, torch.stack((low, high))).unbind()  # an index of no dimensions would wait for the device
    return torch.where(low == high, below, below + (place - low).to(value.dtype) * (above - below))


def top_entropy_mask(entropy: Tensor, mask: Tensor, *, share: float = 0.2, threshold: Tensor | None = None) -> Tensor:
    """Keep the decisions with the highest entropy: at least the quantile 1 - share; [B, S] bool, a subset of ``mask``. share 1 keeps all.

    Args:
        entropy: [B, S]. threshold: [], the quantile over all micro-batches and processes; None = of these decisions.
    Source:
        arXiv:2506.01939; verified in TRL 1.16, get_high_entropy_mask. Of tokens: on Gaussian steps the entropy is fixed and this selects nothing useful.
    """
    bound = masked_quantile(entropy, mask, 1 - share) if threshold is None else threshold
    return mask & (entropy.detach() >= bound)


def min_p_log_prob(log_distribution: Tensor, action: Tensor, *, kappa: float = 0.02) -> Tensor:
    """Lp-Reg's proxy: log-probability of the sampled tokens after tokens below kappa times the likeliest are gone and the rest is renormalised, [B, S].

    A sampled token that is itself gone has -10000: it is taken for noise, and nothing will hold it.

    Args:
        log_distribution: [B, S, V], of the old policy or of the current one, used as a constant. action: [B, S] int64. kappa: in [0, 1].
    Source:
        arXiv:2510.03222; verified in the released code (apply_min_p). The renormalised log-probability of a kept token is never below its own.
    """
    log_p = log_distribution.detach()
    kept = log_p >= log_p.amax(-1, keepdim=True) + (math.log(kappa) if kappa > 0 else -math.inf)
    total = torch.where(kept, log_p, -torch.inf).logsumexp(-1)
    place = action[..., None]
    return torch.where(kept.gather(-1, place)[..., 0], log_p.gather(-1, place)[..., 0] - total, -1e4)


def low_probability_selection(log_prob: Tensor, proxy_log_prob: Tensor, advantages: Tensor, mask: Tensor, *, share: float = 0.01) -> Tensor:
    """Lp-Reg's rare tokens: A < 0, of the lowest floor(share n) log-probabilities of the n with A < 0, and less likely than the proxy says; [B, S] bool.

    Where floor(share n) is below 2 there is none. share 0 selects nothing.

    Args:
        log_prob, proxy_log_prob, advantages: [B, S]; see `min_p_log_prob`. mask: [B, S] bool. n counts the decisions given: a micro-batch, as released.
    Source:
        arXiv:2510.03222; verified in the released code (core_algos.py).
    """
    log_prob = log_prob.detach()
    negative = mask & (advantages < 0)
    order = torch.where(negative, log_prob, torch.inf).flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(negative)
    count = (share * negative.sum().to(torch.float64)).floor()
    return negative & (rank < count) & (count >= 2) & (log_prob < proxy_log_prob)


def curvature_mask(advantages: Tensor, log_prob: Tensor, old_log_prob: Tensor, square_sum: Tensor, mask: Tensor, *, step: float, threshold: float) -> Tensor:
    """Keep the decisions whose own step in the logits is small, step^2 c^2 / 2 <= threshold; [B, S] bool, a subset of ``mask``.

    c = abs(A) r sqrt(1 - 2 p + sum over v of p_v^2) is the norm of the decision's gradient in the logits, r = exp(log_prob - old_log_prob).

    Args:
        advantages, log_prob, old_log_prob: [B, S]. square_sum: [B, S], sum over the vocabulary of p_v^2. step: > 0, of the optimiser.
        threshold: > 0; inf keeps all.
    Source:
        A cheap stand-in for CAPO, arXiv:2510.00819, whose released code predicts the step of Adam on the output head: our reading, not verified.
    """
    p = log_prob.detach().exp()
    log_ratio = torch.where(mask, log_prob.detach() - old_log_prob, 0.0)
    norm = advantages.square() * (2 * log_ratio).clamp_max(40.0).exp() * (1 - 2 * p + square_sum).clamp_min(0)
    return mask & (step**2 * norm / 2 <= threshold)


def chord_weights(log_prob: Tensor) -> Tensor:
    """CHORD's phi = p (1 - p) for the expert's tokens, the shape of ``log_prob``, in [0, 1/4]: neither what is known nor what is out of reach.

    Source: arXiv:2508.11408, from ms-swift's documentation. With `regularizers.sft_loss` and `regularizers.sft_share`.
    """
    p = log_prob.detach().exp()
    return p * (1 - p)


def overlong_filter(mask: Tensor, truncated: Tensor) -> Tensor:
    """DAPO: a sequence that was cut at the length limit teaches nothing; [B, S] bool. truncated: [B] bool.

    Source: arXiv:2503.14476, from TRL's paper index and verl-recipe.
    """
    return mask & ~truncated[:, None]
