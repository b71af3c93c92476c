"""Preference losses of whole groups: every sample against the others of its prompt, and what games between policies need.

Letters: B sequences, S decisions, P groups, k sequences with decisions in a group, R the reward of a sequence, u the sum over its decisions of
log_prob - ref_log_prob, a that of log_prob - old_log_prob, both as a mean per decision with a bar.

Called like `group_gates.GROUP_OBJECTIVES`, and the same holds: a call has whole groups; a sample without a reward, an empty or a doubled one must be masked;
the loss of a sequence stands at each of its decisions, to be reduced with ``seq_mean``; `group_gates.gradient_weights` trains in micro-batches. For images
a sequence is a sample's SDE steps, or S = 1 and a group for each noise level. Where a loss runs over pairs or prompts, its sequences hold parts of it,
scaled so that ``seq_mean`` over this call's sequences is the mean over its pairs or prompts. Pairs are [B, B] tables, without a loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowrl.core.gates import unmasked
from flowrl.core.ratio_levels import masked_mean
from flowrl.core.regularizers import KlKind, categorical_kl_estimate
from flowrl.types import Decisions, Objective

__all__ = ["LIST_OBJECTIVES", "copg_group", "lipo", "nash_mp_penalty", "sppo_group", "trpa", "win_rates"]


def copg_group(decisions: Decisions, *, group: Tensor, num_groups: int, ref_log_prob: Tensor, beta: float = 0.1) -> Objective:
    """Contrastive policy gradient, k samples: 1 / (k - 1) times the sum over pairs of (R'_i - R'_j)^2, R' = R - beta u. Any policy may have sampled.

    It is k^2 / (k - 1) times the group's variance of R', that is 2 k times GVPO's loss. At the reference its gradient is -2 beta times the sum of
    leave-one-out advantages times grad log_prob. Its minimum over a prompt is R' equal for all.

    The loss of a sequence is k^2 / (k - 1) (R' - mean)^2, whose mean over a group is the formula; the mean over the call weighs prompts by k. A group of one
    is 0.

    Args:
        decisions: advantages are the rewards (advantage ``reward``), equal within a sequence; their mean is taken. old_log_prob is only reported.
        group: [B] int64 in 0..P-1. ref_log_prob: [B, S], a constant. beta: > 0; 0.1, tuned over 0.01 .. 0.5.
    Source:
        arXiv:2406.19185; the group form from a public note on a production report.
    """
    rewards, members = _rewards(decisions)
    value = rewards - beta * _log_ratio(decisions, ref_log_prob)
    count = _sum(members.to(value), group, num_groups)
    mean = _sum(value, group, num_groups) / count.clamp_min(1)  # 0 without decisions
    factor = torch.where(count > 1, count.square() / (count - 1).clamp_min(1), torch.zeros_like(count))
    return _objective(decisions, factor[group] * (value - mean[group]).square())


def sppo_group(decisions: Decisions, *, group: Tensor, num_groups: int, beta: float) -> Objective:
    """SPPO, soft: (a - A / beta)^2, A the mean win rate against the group minus 1/2.

    At the start of an iteration the gradient is -2 A / beta grad log_prob: REINFORCE with baseline 1/2. With win rates 1 and 0 the two of a pair have
    `pair_losses.sppo`'s hard form. verl's variant has A = R - V, V = `soft_values.soft_value` of the group's rewards with temperature 1 / beta.

    Args:
        decisions: advantages are A, equal within a sequence (`shaping.win_rate` minus 1/2); their mean is taken.
        group, num_groups: have no effect; here so that every list loss is called alike.
        beta: > 0, 1 / eta of the paper; 0.001, verl 1.
    Source:
        arXiv:2405.00675; verified in verl-recipe (sppo/dp_actor.py).
    """
    target, _ = _rewards(decisions)
    return _objective(decisions, (unmasked(decisions)[0].sum(1) - target / beta).square())


def trpa(decisions: Decisions, *, group: Tensor, num_groups: int, level: Tensor, beta: float = 0.1, top_strength: float = 2.5, top_level: int = 1) -> Objective:
    """TRPA: mean over all pairs of a group on different levels of -log sigmoid(c beta (mean a of the better - mean a of the worse)).

    c is ``top_strength`` where the better one is on the top level, else 1. Before the first update of an iteration every pair's loss is ln 2. One pair and
    c = 1 is `pair_losses.length_normalised_dpo`. Where no group of the call has a pair, the loss is the mean over sequences of -log sigmoid(mean a) on the
    top level and of -log sigmoid(-mean a) elsewhere.

    A pair's loss is halved between its two sequences.

    Args:
        decisions: old_log_prob is the old or the reference policy's; advantages have no effect.
        group: [B] int64 in 0..P-1. level: [B] int64, lower is better: 1 format and answer right, 2 answer wrong, 3 answer incomplete, 4 format wrong.
        beta: > 0. top_strength: > 0.
    Source:
        arXiv:2504.04524; verified in the released code (XueruiSu/Trust-Region-Preference-Approximation, core_algos.py).
    """
    value, members = masked_mean(unmasked(decisions)[0], decisions.mask)[:, 0], decisions.mask.any(1)
    better = _together(group, members) & (level[:, None] < level[None, :])
    top = level == top_level
    strength = torch.where(top, torch.full_like(value, top_strength), torch.ones_like(value))
    losses = -logsigmoid(strength[:, None] * beta * (value[:, None] - value[None, :]))
    losses = torch.where(better, losses, torch.zeros_like(losses))
    pairs, sequences = better.sum().to(value), members.sum().to(value)
    of_pairs = 0.5 * (losses.sum(1) + losses.sum(0)) * sequences / pairs.clamp_min(1)
    unpaired = -logsigmoid(torch.where(top, value, -value))
    return _objective(decisions, torch.where(pairs > 0, of_pairs, unpaired))


def lipo(decisions: Decisions, *, group: Tensor, num_groups: int, ref_log_prob: Tensor, beta: float = 0.05, tie: float = 1e-3) -> Objective:
    """LiPO-lambda: sum over pairs of a list with R_i > R_j of w_ij -log sigmoid(beta (u_i - u_j)), w = |G_i - G_j| |1 / D_i - 1 / D_j|.

    Gain G = 2^R - 1, discount D = log(1 + rank), the rank 1 for the list's largest u: mistakes at the top of the list cost most. The weights are
    constants. A list of two is DPO times |G_w - G_l| |1 / log 2 - 1 / log 3|. Equal labels are no pair. Of equal scores beta u the first ranks higher; so at
    the reference, where all are equal, the weights depend on the order of the samples, and a mean rank would stop all learning there. Scores are ranked in
    steps of ``tie``: rounding, which differs between two passes of a network, decides nothing at the reference.

    A pair's loss is halved between its two sequences; scaled so that ``seq_mean`` gives the mean over lists.

    Args:
        decisions: advantages are the labels (advantage ``reward``, of a scale such that 2^R is), equal within a sequence; their mean is taken. old_log_prob
            is only reported.
        group: [B] int64 in 0..P-1. ref_log_prob: [B, S], a constant. beta: > 0; 0.05. Lists of 8 (from memory).
        tie: > 0, in nats times beta: scores within tie / 2 of 0, and of each of its multiples, are equal in rank (ours).
    Source:
        arXiv:2402.01878; the LambdaLoss form from secondary sources.
    """
    label, members = _rewards(decisions)
    score = beta * _log_ratio(decisions, ref_log_prob)
    together = _together(group, members)
    with torch.no_grad():
        number, step = torch.arange(len(score), device=score.device), (score / tie).round()
        ahead = (step[None, :] > step[:, None]) | ((step[None, :] == step[:, None]) & (number[None, :] < number[:, None]))
        rank = 1 + (together & ahead).sum(1).to(score)
        discount, gain = 1 / torch.log1p(rank), torch.exp2(label) - 1
        weight = (gain[:, None] - gain[None, :]).abs() * (discount[:, None] - discount[None, :]).abs()
        better = together & (label[:, None] > label[None, :])
        weight = torch.where(better, weight, torch.zeros_like(weight))
    losses = -weight * logsigmoid(score[:, None] - score[None, :])
    lists = (_sum(members.to(score), group, num_groups) > 0).sum().to(score)
    scale = members.sum().to(score) / lists.clamp_min(1)
    return _objective(decisions, 0.5 * (losses.sum(1) + losses.sum(0)) * scale)


LIST_OBJECTIVES: dict[str, Callable[..., Objective]] = {"copg_group": copg_group, "sppo_group": sppo_group, "trpa": trpa, "lipo": lipo}


def win_rates(preference: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Mean preference of each sample over answers of an opponent policy, Nash-MP's reward: the rewards [B], and whether there was an opponent, [B] bool.

    The first half of a step plays against the policy of the iteration, the second against the result of the first; for a language model the opponent is a
    lagged copy, renewed every few steps. Rewards without an opponent are 0 and not valid. A tie is 1/2. Where the opponents are the other samples of the
    group (SPPO, Nash-MD-style self-play): `shaping.win_rate`.

    Args:
        preference: [B, K] in [0, 1], the chance that sample i beats opponent j; anything where not known. known: [B, K] bool.
    Source:
        arXiv:2505.19731. Unverified: our reading of the updates.
    """
    return masked_mean(preference, known)[:, 0], known.any(1)


def nash_mp_penalty(log_prob: Tensor, ref_log_prob: Tensor, previous_log_prob: Tensor, *, beta: float, eta: float, kind: KlKind = "k2") -> Tensor:
    """Nash-MP's two anchors: beta KL(policy || reference) + (beta / eta) KL(policy || policy of the iteration), estimated per decision, [B, S].

    Added to a policy gradient on `win_rates`. Both halves of a step are anchored to the policy that the step began with. On samples of the policy itself
    k2 has the exact gradient; then the half step's optimum is pi ~ exp(P / (beta + beta / eta)) ref^(eta / (1 + eta)) previous^(1 / (1 + eta)): a large
    beta leads to the reference.

    Args:
        log_prob: [B, S], carries the gradient. ref_log_prob, previous_log_prob: [B, S], constants.
        beta: > 0. eta: > 0, the step size; large lets go of the policy of the iteration.
        kind: see `regularizers.categorical_kl_estimate`; k2 or k3.
    Source:
        arXiv:2505.19731. Unverified: our reading of the updates.
    """
    estimate = (categorical_kl_estimate(kind, log_prob, anchor) for anchor in (ref_log_prob, previous_log_prob))
    return beta * next(estimate) + beta / eta * next(estimate)


def _rewards(decisions: Decisions) -> tuple[Tensor, Tensor]:
    """What the advantages hold, of each sequence, a constant, and whether it has a decision: [B] each."""
    return masked_mean(unmasked(decisions)[1], decisions.mask)[:, 0].detach(), decisions.mask.any(1)


def _log_ratio(decisions: Decisions, anchor: Tensor) -> Tensor:
    """[B], 0 without decisions."""
    return torch.where(decisions.mask, decisions.log_prob - anchor.detach(), torch.zeros_like(decisions.log_prob)).sum(1)


def _sum(value: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return value.new_zeros(num_groups).index_add(0, group, value)


def _together(group: Tensor, members: Tensor) -> Tensor:
    """[B, B], two that have decisions and share a group."""
    return (group[:, None] == group[None, :]) & members[:, None] & members[None, :]


def _objective(decisions: Decisions, value: Tensor) -> Objective:
    delta = unmasked(decisions)[0].detach()
    never = torch.zeros_like(delta)
    metrics = {"ratio": delta.exp(), "log_ratio": delta, "clipped_low": never, "clipped_high": never.clone()}
    return Objective(torch.where(decisions.mask, value[:, None], never), metrics)
