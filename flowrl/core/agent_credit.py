"""Credit of the turns of an agent, or of the stages of a picture: advantages of steps, [B, S]; `token_advantages.steps_to_decisions` takes them to tokens.

| method | what a step is compared with |
| --- | --- |
| Flow-GRPO of AgentFlow | nothing of its own: its trajectory's GRPO advantage |
| GiGPO | its trajectory's rivals, plus other steps from the same state (`gigpo`) |
| SALT, ARPO's hard estimate | steps (or tokens) shared by trajectories get the mean of their advantages (`merged_advantages`) |
| IGPO | rewarded with how much likelier it makes the right answer (`turn_gains`, `turn_advantages`) |
| iStar (OPRL) | rewarded with a trained policy's log-ratios (`implicit_step_rewards`, `step_bonus`) |
| Step-GRPO | the same step of the other trajectories (`step_zscore`) |
| Step-SRPO | the judge's span and the answer's have rewards of their own (`span_advantages`) |

Letters: B trajectories, S steps in order, P groups, T tokens. present [B, S] bool: the trajectory has this step; steps 0..n_i-1. A trajectory without a reward
(``valid`` False) has 0 and is in no statistic. Rewards and index tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.estimators import Singleton, centre, scale
from flowrl.core.token_advantages import outcome_rewards, token_returns

__all__ = [
    "gigpo",
    "implicit_step_rewards",
    "merged_advantages",
    "number_keys",
    "span_advantages",
    "step_bonus",
    "step_zscore",
    "turn_advantages",
    "turn_gains",
]


def number_keys(keys: Sequence[Sequence[Hashable]], group: Sequence[int], num_steps: int) -> tuple[Tensor, int]:
    """Number what steps have in common: equal keys of one group have equal numbers, [B, S] int64 from 0, and how many there are. Host-side.

    Args:
        keys: B lists of at most S: a step's observation for `gigpo`; (everything before, action) for `merged_advantages`. Missing steps have number 0.
    """
    numbers: dict[tuple[int, Hashable], int] = {}
    rows = [[numbers.setdefault((prompt, key), len(numbers)) for key in steps] for prompt, steps in zip(group, keys, strict=True)]
    return torch.tensor([row + [0] * (num_steps - len(row)) for row in rows], dtype=torch.int64).view(len(rows), num_steps), max(len(numbers), 1)


def gigpo(
    rewards: Tensor,
    step_rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    present: Tensor,
    anchor: Tensor,
    num_groups: int,
    num_anchors: int,
    *,
    gamma: float = 0.95,
    weight: float = 1.0,
    normalize: bool = False,
    episode_over: Literal["trajectories", "steps"] = "trajectories",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Singleton = "zero",
) -> Tensor:
    """GiGPO: the episode's advantage plus that of the step among all steps of the group that started from the same state, [B, S].

        A_is = A_i + weight (G_is - mean of the cluster [/ (its std + eps)]),  G_is = r_is + gamma G_(i,s+1)

    A state met once adds 0: without repeated states, and with weight 0, this is Dr.GRPO, or with ``normalize`` GRPO.

    Args:
        rewards: [B], of whole trajectories. step_rewards: [B, S], of the environment.
        anchor: [B, S] int64 in 0..num_anchors-1, the state before each step, see `number_keys`; groups must not share numbers.
        normalize: divide both parts by their std ("mean_std_norm"); the released default does not.
        episode_over: what the episode's statistics count; "steps" is the released default, in which long trajectories weigh more.
        singleton: as in `estimators.centre`, of groups.
    Raises:
        ValueError: unknown episode_over.
    Source:
        arXiv:2505.10978, verified in gigpo/core_gigpo.py as vendored in WujiangXu/EPO. Deviations: trajectories by default, 0 for a single one.
    """
    used = present & valid[:, None]
    divide: Literal["group_std", "none"] = "group_std" if normalize else "none"
    if episode_over == "trajectories":
        episode = centre("group", rewards, group, valid, num_groups, singleton=singleton)
        episode = scale(divide, episode, rewards, group, valid, num_groups, eps=eps, ddof=ddof)[:, None].expand_as(used)
    elif episode_over == "steps":
        repeated, groups = (row[:, None].expand_as(used).flatten() for row in (rewards, group))
        flat = centre("group", repeated, groups, used.flatten(), num_groups, singleton=singleton)
        episode = scale(divide, flat, repeated, groups, used.flatten(), num_groups, eps=eps, ddof=ddof).view(used.shape)
    else:
        raise ValueError(f"unknown episode_over {episode_over!r}; known: trajectories, steps")
    returns = token_returns(step_rewards, used, gamma=gamma)
    return torch.where(used, episode + weight * _compared(returns, anchor, used, num_anchors, divide, eps, ddof), 0.0)


def merged_advantages(advantages: Tensor, key: Tensor, present: Tensor, valid: Tensor, num_keys: int) -> Tensor:
    """Steps that trajectories share get the mean of the trajectories' advantages, the others keep their own, [B, S].

    SALT: equal keys are equal actions after equal histories, so that a step all trajectories of a group share has 0. ARPO (agentic), hard estimate: the
    columns are tokens, and equal keys are one token of a shared prefix; its loss must count it once, or with weight 1 / (number of branches).

    Args:
        advantages: [B], e.g. GRPO's. key: [B, S] int64 in 0..num_keys-1, at most once in a trajectory, see `number_keys`; groups must not share numbers.
    Source:
        SALT, arXiv:2510.20022: structure from the abstract, the rest our reading. ARPO, arXiv:2507.19849: from secondary sources.
    """
    used = present & valid[:, None]
    own = advantages[:, None].expand_as(used)
    mean, _, _ = group_statistics(own.flatten(), key.flatten(), used.flatten(), num_keys, 0)
    return torch.where(used, mean[key], 0.0)


def turn_gains(answer_log_prob: Tensor, present: Tensor) -> Tensor:
    """IGPO: how much likelier each turn makes the right answer, p_after - p_before, [B, S]; 0 for the last turn, which gives the answer.

    The gains of a trajectory sum to the probability before its last turn less that before its first.

    Args:
        answer_log_prob: [B, S], mean log-probability of the right answer's tokens under the policy before each turn; anything where not present.
    Source:
        arXiv:2510.14967, verified in the released code (generation.py).
    """
    probability = torch.where(present, answer_log_prob.detach(), 0.0).exp()
    follows = torch.cat([present[:, 1:], torch.zeros_like(present[:, :1])], 1)
    return torch.where(follows, torch.cat([probability[:, 1:], probability[:, :1]], 1) - probability, torch.zeros_like(probability))


def turn_advantages(
    gains: Tensor,
    outcome: Tensor,
    group: Tensor,
    valid: Tensor,
    present: Tensor,
    num_groups: int,
    *,
    form: Literal["position", "first", "joint"] = "position",
    gamma: float = 1.0,
    outcome_weight: float = 1.0,
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """IGPO: advantages of turns from their gains and the outcome, which is the last turn's reward, [B, S]. G = discounted sum of the rewards from a turn on.

    | form | advantage |
    | --- | --- |
    | position | G - mean of G over the group at this turn; trajectories that are over count 0 there |
    | first | (G - mean of the group's G at the first turn) / (their std + eps); released with gamma 0.5 |
    | joint | discounted sum of rewards, each first (r - mean) / (std + eps) over all turns of the group: the paper's form, our reading |

    With constant gains, gamma 1 and form first this is GRPO on the outcome; position is Dr.GRPO if all have as many turns. A group with one valid
    trajectory has 0.

    Args:
        gains: [B, S], see `turn_gains`. outcome: [B], e.g. F1. outcome_weight: alpha.
    Raises:
        ValueError: unknown form.
    Source:
        arXiv:2510.14967; position and first verified in the released code (core_algos.py, there per token position).
    """
    used = present & valid[:, None]
    rewards = torch.where(used, gains, 0.0) + outcome_weight * outcome_rewards(outcome, used)
    groups = group[:, None].expand_as(used)
    if form == "joint":
        known, share = used.flatten(), rewards.flatten()
        centred = centre("group", share, groups.flatten(), known, num_groups)
        share = scale("group_std", centred, share, groups.flatten(), known, num_groups, eps=eps, ddof=ddof)
        result = token_returns(share.view(used.shape), used, gamma=gamma)
    elif form in ("position", "first"):
        returns = token_returns(rewards, used, gamma=gamma)
        if form == "position":
            turn = groups * used.shape[1] + torch.arange(used.shape[1])
            mean, _, _ = group_statistics(returns.flatten(), turn.flatten(), valid[:, None].expand_as(used).flatten(), num_groups * used.shape[1], 0)
            result = returns - mean[turn]
        else:
            mean, std, _ = group_statistics(returns[:, 0], group, valid, num_groups, ddof)
            result = (returns - mean[group][:, None]) / (torch.where(std > 0, std, torch.ones_like(std)) + eps)[group][:, None]
    else:
        raise ValueError(f"unknown form {form!r}; known: position, first, joint")
    rivals = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, group, valid.long())[group] >= 2
    return torch.where(used & rivals[:, None], result, 0.0)


def implicit_step_rewards(log_prob: Tensor, old_log_prob: Tensor, step: Tensor, mask: Tensor, num_steps: int, *, beta: float = 0.05) -> Tensor:
    """iStar: beta times the sum over a step's tokens of log pi_phi - log pi_old, [B, S], phi a policy trained with DPO on better and worse trajectories.

    Args:
        log_prob, old_log_prob: [B, T], of phi and of the sampling policy, constants. step: [B, T] int64 in 0..S-1. mask: [B, T] bool.
    Source:
        OPRL / iStar, arXiv:2509.19199: structure in secondary sources, beta our reading.
    """
    zero = torch.zeros_like(log_prob)
    ratio = torch.where(mask, (log_prob - old_log_prob).detach(), zero)
    return beta * zero.new_zeros(len(zero), num_steps).scatter_add_(1, torch.where(mask, step, 0), ratio)


def step_bonus(
    advantages: Tensor,
    step_rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    present: Tensor,
    num_groups: int,
    *,
    weight: float = 1.0,
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """iStar: the trajectory's advantage plus weight times its step rewards, these (r - mean) / (std + eps) over all steps of the group, [B, S].

    Args:
        advantages: [B], GRPO's or RLOO's; weight 0 gives them back. step_rewards: [B, S], see `implicit_step_rewards`.
    Source:
        arXiv:2509.19199: structure in secondary sources, weight our reading.
    """
    used = present & valid[:, None]
    groups = group[:, None].expand_as(used)
    return torch.where(used, advantages[:, None] + weight * _compared(step_rewards, groups, used, num_groups, "group_std", eps, ddof), 0.0)


def step_zscore(
    step_rewards: Tensor, group: Tensor, valid: Tensor, present: Tensor, num_groups: int, *, normalize: bool = True, eps: float = 1e-6, ddof: int = 1
) -> Tensor:
    """Step-GRPO: a step's reward compared with the same step of the group's other trajectories that have it, [B, S]; 0 where only one has.

    With one step this is GRPO.

    Args:
        step_rewards: [B, S]. normalize: divide by the std + eps.
    Source:
        R1-Router, arXiv:2505.22095; our reading. Not the Step-GRPO that penalises the length of steps.
    """
    used = present & valid[:, None]
    place = group[:, None] * used.shape[1] + torch.arange(used.shape[1])
    return _compared(step_rewards, place, used, num_groups * used.shape[1], "group_std" if normalize else "none", eps, ddof)


def span_advantages(judge: Tensor, answer: Tensor, is_judge: Tensor, mask: Tensor) -> Tensor:
    """Step-SRPO: tokens of the span that chooses how to think get both advantages, those of the answer its own, [B, T].

    Args:
        judge, answer: [B], advantages of the two rewards, each compared within its group. is_judge: [B, T] bool.
    Source:
        KAT, arXiv:2507.08297; our reading.
    """
    return torch.where(mask, answer[:, None] + torch.where(is_judge, judge[:, None], 0.0), 0.0)


def _compared(values: Tensor, place: Tensor, used: Tensor, num_places: int, divide: Literal["group_std", "none"], eps: float, ddof: int) -> Tensor:
    """Values [B, S] centred among those at the same place, and scaled there; 0 where unused or alone."""
    flat, places, known = values.flatten(), place.flatten(), used.flatten()
    centred = centre("group", flat, places, known, num_places)
    return scale(divide, centred, flat, places, known, num_places, eps=eps, ddof=ddof).view(values.shape)
