"""The log-ratio that a gate sees: of each decision, of the whole sequence, of a mixture; and the weights that correct for another sampling policy.

Letters: B sequences, S decisions, n_i decisions that count in sequence i, delta = log_prob - old_log_prob of a decision.

A gate of `objectives.OBJECTIVES` works at every level: `at_level` puts the level's log-ratio where the log-probability was, with 0 as the old one.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowrl.types import Decisions

__all__ = [
    "RATIO_LEVELS",
    "RatioLevel",
    "at_level",
    "clip_centre",
    "importance_weights",
    "log_ratio",
    "masked_mean",
    "multiple_importance_log_ratio",
    "off_policy_sequence_mask",
]

RatioLevel: TypeAlias = Literal["token", "seq_mean", "seq_mean_token", "seq_sum", "none"]
RATIO_LEVELS: tuple[RatioLevel, ...] = ("token", "seq_mean", "seq_mean_token", "seq_sum", "none")


def log_ratio(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    level: RatioLevel,
    *,
    low: float = -20.0,
    high: float = 20.0,
    bias: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """The log-ratio of a level at every decision, [B, S], with the gradient of ``log_prob``; 0 where masked.

    | level | value | gradient | use |
    | --- | --- | --- | --- |
    | token | delta | of the decision | PPO, GRPO |
    | seq_mean | sum of delta / n_i | of the whole sequence, 1 / n_i each | GSPO; reduce with seq_mean |
    | seq_mean_token | the same value | of the decision alone | GSPO-token: advantages may differ within a sequence |
    | seq_sum | sum of delta | of the whole sequence | VESPO, Kimi, Reg-GRPO |
    | none | 0 | of the decision | on-policy: no importance weight |

    Args:
        log_prob, old_log_prob: [B, S]. mask: [B, S] bool.
        low, high: the level's log-ratio is clamped to them; beyond, it has no gradient. verl: -20 and 20 on tokens; GSPO: no lower one, 10 above.
        bias, scale: delta becomes (delta - bias) / scale before anything else; broadcast to [B, S]. The hook for steps whose ratio has another centre and
            spread than a token's; `ratios.ratio_norm` is that with both done.
    Raises:
        ValueError: unknown level.
    Source:
        text.md 0 and 13. Clamp: verl, core_algos.py. GSPO, arXiv:2507.18071, both forms: verl compute_policy_loss_gspo. Verified in code.
    """
    zero = torch.zeros_like(log_prob)
    delta = torch.where(mask, (log_prob - old_log_prob - bias) / scale, zero)
    match level:
        case "token":
            return delta.clamp(low, high)
        case "none":
            return delta - delta.detach()
        case "seq_mean" | "seq_sum":
            total = masked_mean(delta, mask) if level == "seq_mean" else delta.sum(1, keepdim=True)
            return torch.where(mask, total.clamp(low, high), zero)
        case "seq_mean_token":
            # the clamp acts on the sum of both terms, as released: beyond it there is no gradient
            return torch.where(mask, (masked_mean(delta, mask).detach() + delta - delta.detach()).clamp(low, high), zero)
        case _:
            raise ValueError(f"unknown ratio level {level!r}; known: {', '.join(RATIO_LEVELS)}")


def at_level(decisions: Decisions, level: RatioLevel, *, low: float = -20.0, high: float = 20.0) -> Decisions:
    """The same decisions with the log-ratio of a level as their log-probability and 0 as the old one, see `log_ratio`.

    With the levels seq_mean and seq_sum the advantages must not differ within a sequence; seq_mean_token is made for those that do.
    """
    ratio = log_ratio(decisions.log_prob, decisions.old_log_prob, decisions.mask, level, low=low, high=high)
    return Decisions(log_prob=ratio, old_log_prob=torch.zeros_like(ratio), advantages=decisions.advantages, mask=decisions.mask)


def multiple_importance_log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """RL-PLUS's log-ratio of a decision that another policy sampled, elementwise: log(2 p / (p_old + (p_old + 1) / 2)), at most log 4.

    Who sampled it is not known: the mean of the old policy and a policy that is always sure, (p_old + 1) / 2, stands in.

    Args:
        log_prob: any shape, <= 0, carries the gradient. old_log_prob: the same shape, the old policy's of the same decision, a constant.
    Source:
        RL-PLUS, arXiv:2508.00222, recipe/rlplus_core_alg.py, verified in code. Of tokens: a density may exceed 1, so an SDE step has no such ratio.
    """
    mixture = 1.5 * old_log_prob.detach().exp() + 0.5
    return log_prob + (2 / mixture).log()


def clip_centre(proximal_log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, *, limit: float = 20.0) -> Tensor:
    """ReMix's centre of the clip for decisions that an earlier policy sampled, kappa = pi_now / pi_sampled, [B, S] without gradient; 1 where masked.

    For `objectives.clipped_surrogate`, whose bounds become kappa - clip_low and kappa + clip_high. On-policy decisions have kappa = 1: PPO.

    Args:
        proximal_log_prob: [B, S], under the policy at the start of this update. old_log_prob: [B, S], under the one that sampled.
        limit: > 0, the log of kappa is clamped to +-limit, against overflow.
    Source:
        ReMix, arXiv:2507.06892, Mix-PPG; from a public note on the paper, not verified in code.
    """
    return log_ratio(proximal_log_prob.detach(), old_log_prob.detach(), mask, "token", low=-limit, high=limit).exp()


def importance_weights(
    old_log_prob: Tensor,
    rollout_log_prob: Tensor,
    mask: Tensor,
    kind: Literal["truncated", "masked"],
    level: Literal["token", "sequence"],
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """Weights that correct for an engine that samples with other numerics than training, exp(old - rollout), [B, S] without gradient; 1 where masked.

    | kind | outside of low .. high |
    | --- | --- |
    | truncated | the nearest bound (TIS) |
    | masked | 0: the decision is dropped (MIS); usual bounds 0.5 and 2 |

    Args:
        old_log_prob: [B, S], the training model's. rollout_log_prob: [B, S], the engine's; a NaN, which the engine could not score, counts as no difference.
        level: "token", or "sequence" for exp of the sum over the decisions that count.
        low, high: bounds of the weight.
    Raises:
        ValueError: unknown kind or level.
    Source:
        TRL's paper index, verified in TRL 1.16 (token_truncate, sequence_truncate, token_mask, sequence_mask).
    """
    if kind not in ("truncated", "masked") or level not in ("token", "sequence"):
        raise ValueError(f"unknown importance weights {kind!r} of level {level!r}; known: truncated, masked; token, sequence")
    difference = _difference(old_log_prob, rollout_log_prob, mask)
    weight = (difference if level == "token" else difference.sum(1, keepdim=True).expand_as(difference)).exp()
    weight = weight.clamp(low, high) if kind == "truncated" else torch.where((weight < low) | (weight > high), torch.zeros_like(weight), weight)
    return torch.where(mask, weight, torch.ones_like(weight))


def off_policy_sequence_mask(advantages: Tensor, log_prob: Tensor, rollout_log_prob: Tensor, mask: Tensor, *, threshold: float = 0.5) -> Tensor:
    """True where a decision stays: not where its advantage is negative and its sequence has left the policy, mean(rollout - log_prob) > threshold.

    Args:
        advantages, log_prob, rollout_log_prob: [B, S]; a rollout log-probability that is NaN counts as no difference. mask: [B, S] bool.
        threshold: nats per decision; 0.5 in DeepSeek-V3.2's form.
    Returns:
        [B, S] bool, a subset of ``mask``.
    Source:
        DeepSeek-V3.2, through TRL's paper index; verified in TRL 1.16, get_off_policy_mask.
    """
    drift = masked_mean(_difference(rollout_log_prob, log_prob, mask), mask)
    return mask & ((advantages >= 0) | (drift <= threshold))


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's decisions, [B, 1]; 0 for a sequence without any. Whatever stands where masked, there is no gradient."""
    return torch.where(mask, value, torch.zeros_like(value)).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


def _difference(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    difference = one.detach() - other.detach()
    return torch.where(mask & ~difference.isnan(), difference, torch.zeros_like(difference))
