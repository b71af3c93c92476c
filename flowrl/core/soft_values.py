"""Losses around the soft value of a KL-regularised problem: at the optimum R - V = beta log(policy / reference) on every suffix of every answer.

Letters: B samples, T decisions (tokens or steps), P groups; c_t the sum of log_prob - ref_log_prob over t and all later decisions.

AC-Flow, the third of these in the literature, is a critic with generalised advantages on flow steps; flowrl/critic.py has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.core.gates import unmasked
from flowrl.core.ratio_levels import masked_mean
from flowrl.types import Decisions, Objective

__all__ = ["a_star_po", "oreo", "oreo_actor", "oreo_critic", "soft_value"]


def soft_value(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, temperature: float) -> tuple[Tensor, Tensor]:
    """temperature log mean exp(R / temperature) over the valid samples of each group, [P], and whether it has any, [P] bool.

    Over samples of the reference it is A*-PO's V*, drawn once before training. It lies between the mean of the rewards (temperature -> infinity) and the
    largest one (temperature -> 0). 0 for a group without a valid sample.

    Args:
        rewards: [B] float. group: [B] int64 in 0..P-1. valid: [B] bool. temperature: > 0, beta_1 of A*-PO; 0.5 with 8 samples.
    Source:
        A*-PO, arXiv:2505.20686, from TRL's documentation; the same mean is verl's baseline for SPPO.
    """
    scaled = rewards / temperature
    count = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device).index_add_(0, group, valid.to(rewards))
    highest = torch.full_like(count, -torch.inf).scatter_reduce_(0, group, torch.where(valid, scaled, -torch.inf), "amax")
    # expm1 and log1p: at a high temperature mean exp is 1 plus next to nothing
    less = torch.expm1(torch.where(valid, scaled - highest[group], torch.zeros_like(scaled)))
    mean = torch.zeros_like(count).index_add_(0, group, less) / count.clamp_min(1)
    value = temperature * (highest + torch.log1p(mean))
    return torch.where(count > 0, value, torch.zeros_like(value)), count > 0


def a_star_po(decisions: Decisions, *, group: Tensor, num_groups: int, ref_log_prob: Tensor, beta: float = 1e-3) -> Objective:
    """A*-PO: (beta u - A)^2, A = R - V*, u the sum over a sequence of log_prob - ref_log_prob: least squares on optimal advantages, one sample a prompt.

    Args:
        decisions: advantages are R - V*, V* from `soft_value`, equal within a sequence; their mean is taken. old_log_prob is only reported.
        group, num_groups: have no effect; called like `list_losses.LIST_OBJECTIVES`.
        ref_log_prob: [B, T], a constant. beta: > 0, beta_2 of the paper; 0.001.
    Returns:
        loss [B, T], a sequence's at each of its decisions (reduce with seq_mean), and the metrics of `objectives.clipped_surrogate`.
    Source:
        arXiv:2505.20686, from TRL's documentation.
    """
    log_ratio = _log_ratio(decisions.log_prob, ref_log_prob, decisions.mask).sum(1, keepdim=True)
    _, advantages = unmasked(decisions)
    loss = (beta * log_ratio - masked_mean(advantages, decisions.mask).detach()).square()
    return _objective(decisions, loss)


def oreo(decisions: Decisions, *, value: Tensor, ref_log_prob: Tensor, beta: float = 0.03) -> Objective:
    """`oreo_actor` with a state at every decision, as an objective.

    Args:
        decisions: advantages are the rewards of whole answers, equal within a sequence; their mean is taken. old_log_prob is only reported.
        value, ref_log_prob: [B, T], constants. beta: > 0; 0.03.
    Returns:
        loss [B, T] (reduce with mean), and the metrics of `objectives.clipped_surrogate`.
    Source:
        As `oreo_critic`.
    """
    rewards = masked_mean(unmasked(decisions)[1], decisions.mask)[:, 0]
    return _objective(decisions, oreo_actor(value, decisions.log_prob, ref_log_prob, decisions.mask, decisions.mask, rewards, beta=beta))


def oreo_critic(value: Tensor, log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor, state: Tensor, rewards: Tensor, *, beta: float = 0.03) -> Tensor:
    """OREO's critic loss (V_t + beta sg[c_t] - R)^2 at the states, [B, T], 0 elsewhere; its mean is over states (reduction ``mean`` with ``state``).

    Args:
        value: [B, T], V of the state before decision t, carries the gradient. log_prob, ref_log_prob: [B, T], constants here.
        mask: [B, T] bool. state: [B, T] bool, True where a state is: at every decision, at the first of every step, or at the first of all. Only those
            that are in ``mask`` count; no state is loss 0 and no gradient.
        rewards: [B], of the whole answer; a sample without one must be masked.
        beta: > 0; 0.03.
    Source:
        arXiv:2412.16145; formula from the released code (jwhj/OREO openrlhf/trainer/pcl_trainer.py). An average of the critic's weights (0.995) is optional.
    """
    suffix = _suffix(_log_ratio(log_prob.detach(), ref_log_prob, mask))
    value, rewards, state = _at_states(value, rewards, state & mask)
    return torch.where(state, (value + beta * suffix - rewards).square(), torch.zeros_like(value))


def oreo_actor(value: Tensor, log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor, state: Tensor, rewards: Tensor, *, beta: float = 0.03) -> Tensor:
    """OREO's policy loss (sg[V_t] + beta (own + sg[rest]) - R)^2 at the states, [B, T], 0 elsewhere.

    own is the sum of log_prob - ref_log_prob from a state to the next one and carries the gradient, rest that after it: c_t = own + rest. With a state at
    every decision that is the token form, with one at the first decision alone the response form, A*-PO's square when V is `soft_value`. The released run
    adds an exact KL to the reference with weight 0.01.

    Args:
        As `oreo_critic`; here log_prob carries the gradient and value is a constant. Decisions before the first state have none.
    Source:
        As `oreo_critic`, its form "dro". Sums over steps between states: our reading.
    """
    log_ratio = _log_ratio(log_prob, ref_log_prob, mask)
    value, rewards, state = _at_states(value.detach(), rewards, state & mask)
    stretch = state.long().cumsum(1)  # 0 before the first state
    sums = log_ratio.new_zeros(log_ratio.shape[0], log_ratio.shape[1] + 1).scatter_add(1, stretch, log_ratio)
    own = sums.gather(1, stretch)
    rest = _suffix(log_ratio.detach()) - own.detach()
    residual = value + beta * (own + rest) - rewards
    return torch.where(state, residual.square(), torch.zeros_like(residual))


def _objective(decisions: Decisions, loss: Tensor) -> Objective:
    delta = unmasked(decisions)[0].detach()
    never = torch.zeros_like(delta)
    metrics = {"ratio": delta.exp(), "log_ratio": delta, "clipped_low": never, "clipped_high": never.clone()}
    return Objective(torch.where(decisions.mask, loss, never), metrics)


def _log_ratio(log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_prob - ref_log_prob.detach(), torch.zeros_like(log_prob))


def _at_states(value: Tensor, rewards: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both [B, T] and 0 where no state is: what stands there, NaN too, must not reach a gradient."""
    zero = torch.zeros_like(value)
    return torch.where(state, value, zero), torch.where(state, rewards.detach()[:, None], zero), state


def _suffix(value: Tensor) -> Tensor:
    return value.flip(1).cumsum(1).flip(1)
