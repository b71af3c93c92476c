"""Advantages that differ within a sample: of tokens, of segments, of the steps of an answer, of the branches of a tree.

| method | of |
| --- | --- |
| REINFORCE++ | `outcome_rewards`, `token_returns`, `whiten` |
| REINFORCE++-baseline | `estimators.centre` (group), `whiten` |
| GDPO | `estimators.centre` and `scale` of each reward, `estimators.combine_heads`, `whiten` |
| PPO | `gae`, `whiten` on tokens; loss of the critic `value_loss` |
| T-PPO | `gae` with ``done``, `truncated_masks` |
| VAPO | `gae` twice: `length_lambda` for the policy, 1 for the critic's returns |
| SPO | `segment_ids`, `segment_advantages`, `token_weights.uncertain_mask`; on trees `estimators.centre` and `scale` with the parent node as the group |
| TreePO | `tree_advantages`, `whiten` |
| EMPG | `step_entropy`, `gate_steps`, `steps_to_decisions` |

Advantages are constants: no function but `value_loss` has a gradient. A sample without a reward has its row of ``mask`` False; whatever stands where the mask
is False, NaN too, has no effect, and 0 comes out there. Nothing waits for the device.

Letters: B samples, T decisions (tokens, or SDE steps) in order, S steps (spans of decisions, e.g. thoughts or turns), C segments, D depths of a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.estimators import Singleton
from flowrl.core.token_weights import uncertain_mask

__all__ = [
    "Gae",
    "Moments",
    "TruncatedMasks",
    "gae",
    "gate_steps",
    "length_lambda",
    "masked_moments",
    "outcome_rewards",
    "segment_advantages",
    "segment_ids",
    "step_entropy",
    "steps_to_decisions",
    "token_returns",
    "tree_advantages",
    "truncated_masks",
    "value_loss",
    "whiten",
]


class Moments(NamedTuple):
    """Mean and standard deviation, [] each; a std that is only rounding of the mean is 0."""

    mean: Tensor
    std: Tensor


def _alone(value: Tensor) -> Tensor:
    return value


def masked_moments(value: Tensor, mask: Tensor, *, ddof: int = 1, add: Callable[[Tensor], Tensor] = _alone) -> Moments:
    """Mean and std of the values that count; (0, 0) of none.

    Args:
        value, mask: any one shape. add: sums a tensor over processes; called twice.
    """
    value = torch.where(mask, value.detach(), torch.zeros_like(value))
    total, count = add(torch.stack([value.sum(), mask.sum().to(value.dtype)])).unbind()
    mean = total / count.clamp_min(1)
    square = add(torch.where(mask, value - mean, torch.zeros_like(value)).square().sum())
    std = (square / (count - ddof).clamp_min(1)).sqrt()
    return Moments(mean, torch.where(std > 32 * torch.finfo(value.dtype).eps * mean.abs(), std, torch.zeros_like(std)))


def whiten(advantages: Tensor, mask: Tensor, *, eps: float = 1e-8, ddof: int = 1, moments: Moments | None = None) -> Tensor:
    """(A - mean) / (std + eps) over all decisions that count, [B, T]; 0 where masked, and everywhere if all are equal.

    Every decision counts the same, so that long samples weigh more. Sums to 0 over the decisions of the batch, not over those of a group.

    Args:
        advantages: [B, T], or [B]: then every decision of a sample has its value. mask: [B, T] bool.
        moments: over all processes, from `masked_moments` with ``add``; None = of these decisions.
    Source:
        REINFORCE++, arXiv:2501.03262, and its baseline variant; verl masked_whiten, verified in code, which divides by sqrt(variance + eps).
    """
    spread = (advantages[:, None].expand_as(mask) if advantages.dim() == 1 else advantages).detach()
    mean, std = masked_moments(spread, mask, ddof=ddof) if moments is None else moments
    zero = torch.zeros_like(spread)
    return torch.where(mask & (std > 0), (spread - mean) / (torch.where(std > 0, std, torch.ones_like(std)) + eps), zero)


def outcome_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards of decisions from rewards of samples: all of it at the last decision that counts, [B, T]. rewards: [B]; lost for a sample without decisions."""
    return torch.where(_is_last(mask), rewards[:, None], torch.zeros_like(rewards[:, None]))


def token_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Rewards from each decision on: y_t = r_t + gamma y_next, next = the next decision that counts, [B, T]; 0 where masked.

    Args:
        rewards: [B, T], e.g. `outcome_rewards` less a KL (`regularizers.kl_in_reward`). mask: [B, T] bool; gaps (tool answers) are passed through.
    Source:
        REINFORCE++, arXiv:2501.03262; verl, verified in code.
    """
    zero, one = torch.zeros_like(rewards), torch.ones_like(rewards)
    returns = _backward(torch.where(mask, rewards, zero), torch.where(mask, gamma * one, one))
    return torch.where(mask, returns, zero)


class Gae(NamedTuple):
    """Advantages of decisions and what their values should have been, [B, T] each."""

    advantages: Tensor
    returns: Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float | Tensor = 0.95, done: Tensor | None = None) -> Gae:
    """Generalised advantages: delta_t = r_t + gamma V_next - V_t, A_t = delta_t + gamma lam A_next; returns = A + V. Not whitened.

    After the last decision V_next = 0. Where a rollout was cut off there (``done`` False; T-PPO's EGAE), V_next = V_t: the value is taken to stay what it is,
    so that with gamma = 1 the last delta is the reward.

    Args:
        rewards, values: [B, T]. mask: [B, T] bool; gaps are passed through: next = the next decision that counts.
        lam: a number, or [B], see `length_lambda`. done: [B] bool, None = all.
    Source:
        arXiv:1506.02438; verl compute_gae_advantage_return, verified in code. EGAE: T-PPO, arXiv:2506.15050, from public reviews that quote
        V(s_l) = V(s_(l-1)), not verified in code.
    """
    rewards, values = rewards.detach(), values.detach()
    zero, one = torch.zeros_like(rewards), torch.ones_like(rewards)
    value = torch.where(mask, values, zero)
    ahead = _backward(value, torch.where(mask, zero, one))  # the value at the first decision from here on
    value_next = torch.cat([ahead[:, 1:], zero[:, :1]], 1)
    if done is not None:
        value_next = torch.where(_is_last(mask) & ~done[:, None], value, value_next)
    delta = torch.where(mask, rewards + gamma * value_next - value, zero)
    factor = gamma * (lam[:, None] if isinstance(lam, Tensor) else lam) * one
    advantages = torch.where(mask, _backward(delta, torch.where(mask, factor, one)), zero)
    return Gae(advantages, torch.where(mask, advantages + value, zero))


def length_lambda(mask: Tensor, *, alpha: float = 0.05, dtype: torch.dtype = torch.float32) -> Tensor:
    """VAPO's lambda of the policy, 1 - 1 / (alpha n) in [0, 1], [B]; n the decisions of the sample. Below alpha n = 1 it is 0; alpha inf gives 1.

    Source: VAPO, arXiv:2504.05118, from three notes that agree. The critic's returns use lambda 1.
    """
    return (1 - 1 / (alpha * mask.sum(1).clamp_min(1).to(dtype))).clamp(0, 1)


class TruncatedMasks(NamedTuple):
    """Which decisions train the policy and which the critic, [B, T] bool each."""

    policy: Tensor
    value: Tensor


def truncated_masks(mask: Tensor, done: Tensor, fresh: Tensor, *, tail: int = 0) -> TruncatedMasks:
    """T-PPO on rollouts that stop at a window: the policy learns from new decisions, the critic from finished samples only.

    Args:
        mask: [B, T] bool. done: [B] bool, finished; one that reached the longest length is, too.
        fresh: [B, T] bool, sampled since the last update. tail: >= 0, the last decisions of an unfinished sample that wait for what follows them.
    Source:
        arXiv:2506.15050, secondary sources.
    """
    from_end = mask.flip(1).cumsum(1).flip(1)  # 1 at the last decision
    return TruncatedMasks(mask & fresh & (done[:, None] | (from_end > tail)), mask & done[:, None])


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2) -> Tensor:
    """PPO's loss of a critic, 0.5 max((V - G)^2, (V' - G)^2) with V' = V clamped to the old value +- clip, [B, T]; 0 where masked.

    Args:
        values: [B, T], carries the gradient. old_values, returns: [B, T], constants, see `gae`. clip: > 0; inf = no clip.
    Source:
        verl compute_value_loss, verified in code.
    """
    zero = torch.zeros_like(values)
    values = torch.where(mask, values, zero)
    old_values, returns = (torch.where(mask, constant.detach(), zero) for constant in (old_values, returns))
    clipped = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def segment_ids(old_log_prob: Tensor, mask: Tensor, *, interval: int = 5, threshold: float = 0.9) -> Tensor:
    """SPO: cut before every ``interval``-th decision that the sampling policy was not sure of, p < threshold; each one's segment, [B, T] int64 from 0.

    Source: arXiv:2505.23564, threshold and interval read in the released code; on which side of the decision the cut falls is our reading.
    """
    return uncertain_mask(old_log_prob, mask, threshold=threshold).cumsum(1) // interval


def segment_advantages(cut_values: Tensor, rewards: Tensor, segment: Tensor, mask: Tensor) -> Tensor:
    """SPO: what each segment adds to the expected reward, V(its end) - V(its start), the last end's value being the reward itself; [B, T].

    Summed over the segments of a sample this is its reward less the value of the prompt. Without a cut: reward - value of the prompt.

    Args:
        cut_values: [B, C], value at the start of each segment, column 0 the prompt's: the mean reward of fresh continuations from there.
        rewards: [B]. segment: [B, T] int64 in 0..C-1, not falling, no number left out, see `segment_ids`. mask: [B, T] bool.
    Source:
        SPO (segments), arXiv:2505.23564, verified in the released code.
    """
    last = torch.where(mask, segment, 0).amax(1, keepdim=True)
    number = torch.arange(cut_values.shape[1], device=mask.device)
    end = torch.where(number == last, rewards[:, None], torch.cat([cut_values[:, 1:], cut_values[:, :1]], 1))
    return torch.where(mask, (end - cut_values).gather(1, torch.where(mask, segment, 0)), torch.zeros_like(rewards[:, None]))


def tree_advantages(
    rewards: Tensor,
    ancestors: Tensor,
    valid: Tensor,
    num_nodes: int,
    *,
    weight: Literal["size", "mean"] = "size",
    skip_constant: bool = False,
    singleton: Singleton = "zero",
) -> Tensor:
    """TreePO: a leaf compared with the leaves below each of its ancestors, averaged over the depths, [B]; 0 where not valid. `whiten` it.

    A = sum over d of w_d (R - mean of the leaves below the ancestor at depth d), w_d their number over the sum of these numbers, or equal. A depth at which
    a leaf is alone does not count, but depth 0 (the prompt) always does. With D = 1 whitened, REINFORCE++-baseline.

    Args:
        rewards, valid: [B], as in `estimators.centre`; on the CPU.
        ancestors: [B, D] int64 in 0..num_nodes-1, the node above the leaf at each depth; equal numbers at one depth are one node. -1 where the path ended.
        skip_constant: leave out depths > 0 at which all rewards are equal.
        singleton: of a prompt with one leaf: 0, or its reward as it is (released code).
    Raises:
        ValueError: unknown weight.
    Source:
        TreePO, arXiv:2508.17445, verified in the released code (core_algos.py).
    """
    if weight not in ("size", "mean"):
        raise ValueError(f"unknown weight of depths {weight!r}; known: size, mean")
    size, depths = ancestors.shape
    depth = torch.arange(depths)
    node = (ancestors.clamp_min(0) + num_nodes * depth).flatten()
    known = ((ancestors >= 0) & valid[:, None]).flatten()
    mean, std, count = group_statistics(rewards[:, None].expand(size, depths).flatten(), node, known, num_nodes * depths, 0)
    mean, std, count = (statistic[node].view(size, depths) for statistic in (mean, std, count))
    difference = torch.where(valid[:, None], rewards[:, None] - mean, torch.zeros_like(mean))
    if singleton == "raw":
        difference = torch.where(valid[:, None] & (count == 1), rewards[:, None], difference)
    used = known.view(size, depths) & ((depth == 0) | ((count > 1) & ~(skip_constant & (std == 0))))
    share = used.to(rewards.dtype) * (count if weight == "size" else torch.ones_like(count))
    return (share * difference).sum(1) / share.sum(1).clamp_min(1)


def step_entropy(entropy: Tensor, step: Tensor, mask: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Mean entropy of each step's decisions, [B, S], and whether the sample has that step, [B, S] bool. step: [B, T] int64 in 0..S-1."""
    number = torch.where(mask, step, 0)
    zero = entropy.new_zeros(len(entropy), num_steps)
    total = zero.scatter_add(1, number, torch.where(mask, entropy.detach(), torch.zeros_like(entropy)))
    count = zero.scatter_add(1, number, mask.to(entropy.dtype))
    return total / count.clamp_min(1), count > 0


def gate_steps(advantages: Tensor, entropy: Tensor, present: Tensor, *, gate: float = 1.0, clarity: float = 1.0, bonus: float = 0.05) -> Tensor:
    """EMPG: sure steps learn more, unsure ones less, and steps that lead to sure ones are favoured. Advantages of steps, [B, S], whose mean is 0.

        A_is = A_i exp(-gate H_is) / (mean of exp(-gate H)) + bonus exp(-clarity H_(i,s+1)),  less the mean over all steps,

    H the entropies scaled to 0 .. 1 over all steps; the last step of a sample has no bonus. A positive ``bonus`` puts a number on every step but the last,
    so samples without a reward must have no ``present`` step.

    Args:
        advantages: [B]. entropy: [B, S], see `step_entropy`. present: [B, S] bool, steps 0..n_i-1 of each sample. All processes' steps make one batch.
        gate, clarity: k and k' >= 0; with gate = bonus = 0 the input less its mean over steps. bonus: zeta >= 0.
    Source:
        EMPG, arXiv:2509.09265, formula in two notes that agree; defaults of an independent re-implementation.
    """
    zero = torch.zeros_like(entropy)
    low, high = torch.where(present, entropy, torch.inf).amin(), torch.where(present, entropy, -torch.inf).amax()
    scaled = torch.where(present, (entropy - low) / (high - low + 1e-8), zero)
    count = present.sum().clamp_min(1)
    weight = torch.where(present, (-gate * scaled).exp(), zero)
    follows = torch.cat([present[:, 1:], torch.zeros_like(present[:, :1])], 1)
    ahead = torch.where(follows, (-clarity * torch.cat([scaled[:, 1:], zero[:, :1]], 1)).exp(), zero)
    factor = weight / torch.where(weight.sum() > 0, weight.sum() / count, torch.ones_like(low))
    gated = torch.where(present, advantages[:, None].detach() * factor + bonus * ahead, zero)
    return torch.where(present, gated - gated.sum() / count, zero)


def steps_to_decisions(advantages: Tensor, step: Tensor, mask: Tensor) -> Tensor:
    """Every decision gets its step's advantage, [B, T]. advantages: [B, S]; step: [B, T] int64 in 0..S-1."""
    return torch.where(mask, advantages.gather(1, torch.where(mask, step, 0)), torch.zeros((), dtype=advantages.dtype, device=advantages.device))


def _is_last(mask: Tensor) -> Tensor:
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def _backward(addend: Tensor, factor: Tensor) -> Tensor:
    """y_t = addend_t + factor_t y_(t+1), y = 0 after the end, [B, T]; by doubling: log2(T) steps instead of T."""
    shift, length = 1, addend.shape[1]
    while shift < length:
        addend = torch.cat([addend[:, :-shift] + factor[:, :-shift] * addend[:, shift:], addend[:, -shift:]], 1)
        factor = torch.cat([factor[:, :-shift] * factor[:, shift:], factor[:, -shift:]], 1)
        shift *= 2
    return addend
