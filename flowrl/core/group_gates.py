"""Objectives that couple the sequences of a group: squared losses on centred log-ratios, and the contrast of right and wrong answers.

Letters: B sequences, S decisions, P groups, n_i decisions that count in sequence i, G sequences with decisions in a group, D = sum of log_prob - old_log_prob.

A call holds whole groups. A sequence without decisions is in no statistic; a sample without a reward must be masked so, because advantage 0 is a target here,
not a silence. `gradient_weights` is the way to train them in micro-batches that split a group. The loss of a sequence stands at each of its decisions;
reduce it with ``seq_mean``. Squared losses have no clip: bounds beside them are a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowrl.core.gates import unmasked
from flowrl.core.ratio_levels import masked_mean
from flowrl.types import Decisions, Objective

__all__ = ["GROUP_OBJECTIVES", "drpo", "gradient_weights", "gvpo", "reg_grpo"]


def reg_grpo(
    decisions: Decisions,
    *,
    group: Tensor,
    num_groups: int,
    form: Literal["centre", "std", "std_sg"] = "centre",
    scale: float = 1.0,
    level: Literal["sum", "mean"] = "sum",
    min_std: float = 1e-4,
    ddof: int = 0,
) -> Objective:
    """Reg-GRPO: the square of A minus the advantage that the policy's own log-ratios predict.

    | form | predicted advantage |
    | --- | --- |
    | centre | scale (D - mean of the group) |
    | std | (D - mean) / max(std of the group, min_std), as published |
    | std_sg | the same, no gradient through the std |

    Under the old policy all D are 0 and the published form is 0 / 0; centre has the gradient -2 scale A there, REINFORCE's with GRPO's advantages when these
    sum to 0 in a group. std does not change under D -> a D + b, a > 0: it fixes the direction of an update, not its size.

    Args:
        decisions: advantages equal within a sequence (centre group, scale group_std); their mean is taken.
        group: [B] int64 in 0..P-1.
        scale: > 0. level: D as a sum, or its mean over the sequence's decisions.
    Raises:
        ValueError: unknown form.
    Source:
        DeepVideo-R1, arXiv:2506.07464, from the paper's text; the default ``centre`` and ``std_sg`` are ours.
    """
    log_ratio, advantages, members = _sequences(decisions)
    if level == "mean":
        log_ratio = log_ratio / decisions.mask.sum(1).clamp_min(1)
    centred, count = _centred(log_ratio, members, group, num_groups)
    if form == "centre":
        predicted = scale * centred
    elif form in ("std", "std_sg"):
        square = torch.where(members, centred.square(), torch.zeros_like(centred))
        variance = square.new_zeros(num_groups).index_add(0, group, square) / (count - ddof).clamp_min(1)
        # the maximum is taken below the root: the gradient of sqrt(0) is infinite, and 0 times it is NaN
        std = variance.clamp_min(min_std**2).sqrt()[group]
        predicted = centred / (std.detach() if form == "std_sg" else std)
    else:
        raise ValueError(f"unknown form {form!r} of Reg-GRPO; known: centre, std, std_sg")
    return Objective(_at_decisions((advantages - predicted).square(), decisions.mask), _metrics(decisions))


def gvpo(decisions: Decisions, *, group: Tensor, num_groups: int, ref_log_prob: Tensor, beta: float = 0.1) -> Objective:
    """GVPO: half the squared difference of implicit reward and reward, both minus their group means, times G / (G - 1).

    The implicit reward is beta times the sum of log_prob - ref_log_prob. The gradient is 0 iff the implicit rewards match the rewards up to a constant per
    group, whoever sampled. With G = 2 it is REBEL with the reference in place of the old policy. The mean over a group is the published sum / (G - 1); a
    group of one is 0.

    Args:
        decisions: advantages are rewards minus the mean of the group (scale none), equal within a sequence; their mean is taken. old_log_prob is only reported.
        group: [B] int64 in 0..P-1. ref_log_prob: [B, S], a constant. beta: > 0.
    Source:
        verl-recipe, gvpo_core_algos.py, verified in code.
    """
    implicit = beta * torch.where(decisions.mask, decisions.log_prob - ref_log_prob.detach(), torch.zeros_like(decisions.log_prob)).sum(1)
    _, advantages, members = _sequences(decisions)
    centred, count = _centred(implicit, members, group, num_groups)
    factor = torch.where(count > 1, count / (count - 1).clamp_min(1), torch.zeros_like(count))
    return Objective(_at_decisions(0.5 * factor[group] * (centred - advantages).square(), decisions.mask), _metrics(decisions))


def drpo(
    decisions: Decisions, *, group: Tensor, num_groups: int, temperature: float = 10.0, length_scale: float = 0.1, max_length: float | None = None
) -> Objective:
    """DRPO: pull the length-normalised log-probability s of right answers up against the soft maximum of the wrong ones' of the same prompt.

    loss of a prompt = -sum over right of w s / sum of w + temperature (logsumexp over wrong of s / temperature - log of their number)

    w = exp((1 - n_i / max_length) / length_scale): short right answers count more, and none is ever pushed down. Constant w is DisCO. With one right and one
    wrong answer the gradient is grad (s_wrong - s_right) at every temperature. A prompt without both kinds has loss 0 and stays in the mean over prompts.

    The prompt's loss is written as parts of its sequences: a right one has its own term, a wrong one its softmax share of the second, value and gradient.
    They are scaled so that ``seq_mean`` gives the mean over the prompts that have sequences.

    Args:
        decisions: the sign of the advantages says right or wrong (centre group of a verifier's score; all equal is 0: neither). old_log_prob is only reported.
        group: [B] int64 in 0..P-1.
        temperature: tau > 0. length_scale: Lambda > 0. max_length: L_max > 0; None = constant w.
    Source:
        DRPO, arXiv:2510.04474; verified in the released code (core_algos.py, compute_policy_loss_drpo), whose logsumexp has the value 1; its KL barrier is
        `regularizers.kl_barrier`.
    """
    _, advantages, members = _sequences(decisions)
    score = masked_mean(decisions.log_prob, decisions.mask)[:, 0]
    zero, lengths = torch.zeros_like(score), decisions.mask.sum(1).to(score)
    right, wrong = members & (advantages > 0), members & (advantages < 0)
    both = (_count(right, group, num_groups, score.dtype) * _count(wrong, group, num_groups, score.dtype) > 0)[group]
    right, wrong = right & both, wrong & both
    weight = torch.ones_like(score) if max_length is None else ((1 - lengths / max_length) / length_scale).exp()
    weight = torch.where(right, weight, zero)
    weight = weight / score.new_zeros(num_groups).index_add_(0, group, weight)[group].where(right, torch.ones_like(score))
    with torch.no_grad():
        scaled = score / temperature
        highest = score.new_full((num_groups,), -torch.inf).scatter_reduce_(0, group, torch.where(wrong, scaled, -torch.inf), "amax")[group]
        share = torch.where(wrong, torch.where(wrong, scaled - highest, zero).exp(), zero)
        sums = score.new_zeros(num_groups).index_add_(0, group, share)[group].where(wrong, torch.ones_like(score))
        share = share / sums
        number = _count(wrong, group, num_groups, score.dtype).clamp_min(1)[group]
        soft_maximum = temperature * torch.where(wrong, highest + sums.log() - number.log(), zero)
    loss = share * (score - score.detach() + soft_maximum) - weight * torch.where(right, score, zero)
    sequences = _count(members, group, num_groups, score.dtype)
    scale = sequences.sum() / (sequences > 0).to(score).sum().clamp_min(1)
    return Objective(_at_decisions(scale * loss, decisions.mask), _metrics(decisions))


GROUP_OBJECTIVES: dict[str, Callable[..., Objective]] = {"reg_grpo": reg_grpo, "gvpo": gvpo, "drpo": drpo}


def gradient_weights(objective: Callable[[Decisions], Objective], decisions: Decisions, weight: Tensor) -> Tensor:
    """c = d (sum of weight times loss) / d log_prob, [B, S]: the sum of c log_prob over any micro-batches has the objective's gradient at this point.

    One pass without gradient over the network gives all log-probabilities; this the coefficients; a second pass trains, however it is cut. Exact for one
    step: the coefficients belong to these log-probabilities.

    Args:
        objective: of `GROUP_OBJECTIVES` with its arguments filled in, or any other. weight: [B, S] of a reduction, already divided by its total.
    """
    with torch.enable_grad():
        log_prob = decisions.log_prob.detach().requires_grad_()
        here = Decisions(log_prob, decisions.old_log_prob, decisions.advantages, decisions.mask, decisions.negative_log_prob)
        (gradient,) = torch.autograd.grad((weight * objective(here).loss).sum(), log_prob)
    return gradient


def _sequences(decisions: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the log-ratios, advantage, and whether there is a decision: [B] each."""
    log_ratio, advantages = unmasked(decisions)
    return log_ratio.sum(1), masked_mean(advantages, decisions.mask)[:, 0], decisions.mask.any(1)


def _centred(value: Tensor, members: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Value minus the mean of the group's members [B], with gradient, and their number [P]."""
    count = _count(members, group, num_groups, value.dtype)
    mean = value.new_zeros(num_groups).index_add(0, group, torch.where(members, value, torch.zeros_like(value))) / count.clamp_min(1)
    return value - mean[group], count


def _count(members: Tensor, group: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(num_groups, dtype=dtype, device=members.device).index_add_(0, group, members.to(dtype))


def _at_decisions(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value[:, None], torch.zeros_like(value)[:, None])


def _metrics(decisions: Decisions) -> dict[str, Tensor]:
    delta = unmasked(decisions)[0].detach()
    never = torch.zeros_like(delta)
    return {"ratio": delta.exp(), "log_ratio": delta, "clipped_low": never, "clipped_high": never.clone()}
