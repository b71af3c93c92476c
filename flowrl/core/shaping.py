"""Shaped rewards: what a sample gets for its rank, its rivals, its choice among several, its constraints or its way towards success.

Rewards in, rewards out, before any advantage is estimated; no gradient and no state. Shaping by length is in `length_shaping`, what acts on advantages in
`advantage_shaping`, constraints that need no baseline answer, hypervolumes and weights that change in `aggregation`. A sample that is not valid gets 0 here
and is in no statistic.

Letters: B samples, P groups, G valid samples of a group, K heads or candidates, C choices or centres, S decisions, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.list_losses import win_rates

__all__ = [
    "centre_distance",
    "cluster_centres",
    "collinear",
    "constraint_gate",
    "exit_decay",
    "exploration_reward",
    "gap",
    "gate_product",
    "group_rank",
    "marginal_gains",
    "preferences",
    "progress_reward",
    "rank_unlikely",
    "referee_reward",
    "soft_choice",
    "weighted_heads",
    "win_rate",
]


def group_rank(values: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
    """Rank of each valid sample among those of its group, from 0 for the least, [B] int64; equals rank in their order, what is not valid after all others."""
    order = torch.where(valid, values, torch.zeros_like(values)).argsort(stable=True)
    order = order[(~valid)[order].argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    count = torch.zeros(num_groups, dtype=torch.int64, device=group.device).index_add_(0, group, torch.ones_like(group))
    place = torch.arange(len(order), device=group.device) - (count.cumsum(0) - count)[group[order]]
    return torch.empty_like(order).scatter_(0, order, place)


def exit_decay(correct: Tensor, position: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, decay: float = 0.5) -> Tensor:
    """S-GRPO: of the exits of one trace the first right one gets 1, the next right one ``decay``, then ``decay``^2, ...; a wrong one 0. [B] float64.

    The advantage is this minus the group's mean, without a standard deviation (centre group, scale none).

    Args:
        correct, valid: [B] bool. position: [B], where the trace was left; the full trace last. group: [B] int64 in 0..P-1, exits of one trace.
    Source:
        S-GRPO, arXiv:2505.07686, from a secondary write-up.
    """
    right = correct & valid
    power = torch.full((), decay, dtype=torch.float64, device=correct.device) ** group_rank(position, group, right, num_groups)
    return torch.where(right, power, torch.zeros_like(power))


def gate_product(form: Tensor, outcome: Tensor, quality: Tensor) -> Tensor:
    """Posterior-GRPO: form + outcome + outcome * quality, [B]: the quality of the reasoning counts only where the answer is right.

    Args:
        form, outcome: [B] in {0, 1}. quality: [B] in [0, 1], from a reward model; anything where the outcome is 0.
    Source:
        arXiv:2508.05170, from a secondary write-up.
    """
    return form + outcome + torch.where(outcome == 0, torch.zeros_like(quality), outcome * quality)


def rank_unlikely(rewards: Tensor, likelihood: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, strength: float = 0.25) -> Tensor:
    """Unlikeliness reward: R (1 - strength k / G), k = 0 .. G-1 the rank by likelihood in the group, 0 for the least likely. [B]

    Right answers that the policy hardly ever gives gain on those it always gives; what has reward 0 keeps it.

    Args:
        rewards: [B] float. likelihood: [B], mean log-probability per decision under the policy that sampled. group: [B] int64. valid: [B] bool.
        strength: in [0, 1]; 0 changes nothing. Released: 0.25, with 2 epochs per batch and G = 32.
    Source:
        arXiv:2506.02355; verified in the released code (ray_lean_trainer.py).
    """
    rank = group_rank(likelihood, group, valid, num_groups).to(rewards)
    count = torch.zeros(num_groups, dtype=rewards.dtype, device=rewards.device).index_add_(0, group, valid.to(rewards)).clamp_min(1)
    return torch.where(valid, rewards * (1 - strength * rank / count[group]), torch.zeros_like(rewards))


def soft_choice(predicted: Tensor, gold: Tensor) -> Tensor:
    """TW-GRPO's partial credit: chosen / right choices where nothing wrong was chosen, else 0. [B] float64 in [0, 1]; an exact match is 1.

    Args:
        predicted, gold: [B, C] bool, True = chosen, right.
    Source:
        arXiv:2505.24718; verified in the released code (open_r1/grpo.py). Without a right choice, choosing none is the exact match: ours.
    """
    chosen, right = predicted.sum(-1).double(), gold.sum(-1).double()
    share = torch.where(right > 0, chosen / right.clamp_min(1), torch.ones_like(chosen))
    return torch.where((predicted & ~gold).any(-1), torch.zeros_like(share), share)


def exploration_reward(count: Tensor, first_correct: Tensor, accepted: Tensor) -> Tensor:
    """AEPO: of N answers the k-th is the first right one: 1 / sqrt(N k); none is right: -1 / N; no answer, or not accepted: -1. [B] float64 in [-1, 1].

    Args:
        count: [B] int, N >= 0. first_correct: [B] int, k from 1; 0 = none. accepted: [B] bool, False = cannot be read, or points `collinear`.
    Source:
        InfiGUI-G1, arXiv:2508.05731; verified in the released code (reward_fn.py), which adds 1 for the format where the answers are accepted.
    """
    number = count.double().clamp_min(1)
    value = torch.where(first_correct > 0, (number * first_correct.clamp_min(1)).rsqrt(), -1 / number)
    return torch.where(accepted, value, -torch.ones_like(value))


def collinear(points: Tensor, mask: Tensor) -> Tensor:
    """Whether any three of a sample's points are on one line, [B] bool: answers spread along a line scan, they do not aim.

    Args:
        points: [B, N, 2]. mask: [B, N] bool, True = a point. All triples of N are looked at.
    Source:
        As `exploration_reward`.
    """
    triples = torch.combinations(torch.arange(points.shape[1], device=points.device), 3)
    first, second, third = points.double()[:, triples].unbind(2)
    (x2, y2), (x3, y3) = (second - first).unbind(-1), (third - first).unbind(-1)
    return (torch.isclose(y2 * x3, y3 * x2, rtol=1e-9, atol=0.0) & mask[:, triples].all(2)).any(1)


def constraint_gate(rewards: Tensor, baseline: Tensor, satisfied: Tensor, log_ratio: Tensor, *, kl_max: float) -> Tensor:
    """CGPO (CRPG): max(1 - u / kl_max, 0) sigmoid(R - R of a baseline answer) where all constraints hold, else 0. [B] >= 0

    The advantage is this minus the mean of the batch. A negative u raises the reward, as written. `aggregation.gate` needs no baseline answer.

    Args:
        rewards, baseline: [B], of the answer, and of a golden answer or the reference policy's to the same prompt.
        satisfied: [B, H] bool, one column per judge; H = 0 is no constraint.
        log_ratio: [B], u = sum over the decisions of log_prob - ref_log_prob; a constant. kl_max: > 0; inf = no KL term.
    Source:
        arXiv:2409.20370, from the paper's text. Its CODPO has `pairing_rules.constrained_pairs`; its CRRAFT is `transforms.transform` with ``best`` on the
        satisfying samples, times the calibrated reward (the weight: our reading).
    """
    calibrated = torch.sigmoid(rewards - baseline) * (1 - log_ratio.detach() / kl_max).clamp_min(0)
    return torch.where(satisfied.all(1), calibrated, torch.zeros_like(calibrated))


def weighted_heads(heads: Tensor, weights: Tensor) -> Tensor:
    """Multi-objective GRPO (arXiv:2503.21819) and RLUF (arXiv:2505.14946): sum over k of w_k R_k, [B], from heads [K, B] and weights [K].

    A head of weight 0 is not looked at, NaN or not. Normalising each head before the sum instead is GDPO (`aggregation.batch_standardised`).
    """
    used = (weights != 0)[:, None]
    return (weights[:, None] * torch.where(used, heads, torch.zeros_like(heads))).sum(0)


def progress_reward(distance: Tensor, success: Tensor, valid: Tensor, *, eps: float = 1e-6) -> Tensor:
    """SRPO (VLA): 1 for a success, else sigmoid((mean D - D) / (std D + eps)) / 2, statistics over the valid failures of the batch. [B] in [0, 1]

    Failures stay below 1/2 and in the order of their distance to what succeeded; one failure alone gets 1/4.

    Args:
        distance: [B] float, see `centre_distance`; inf where there is no success to compare with, which gives 0. success, valid: [B] bool.
    Source:
        arXiv:2511.15605, from a detailed note; the form of the squashing is our reading.
    """
    failed = valid & ~success & distance.isfinite()
    one = torch.zeros_like(distance, dtype=torch.int64)
    mean, std, _ = group_statistics(distance, one, failed, 1, 0)
    squashed = torch.sigmoid((mean - torch.where(failed, distance, mean)) / (std + eps)) / 2
    return torch.where(valid & success, torch.ones_like(distance), torch.where(failed, squashed, torch.zeros_like(distance)))


def cluster_centres(points: Tensor, *, radius: float, least: int) -> Tensor:
    """Means [C, D] of the clusters that DBSCAN finds in points [N, D]; without any cluster the points themselves. On the host.

    A point with at least ``least`` points within ``radius`` (itself counted) is dense; dense points within radius of each other share a cluster, which has
    also the other points within radius of one of them (of several clusters: the one with the earliest point). Points of no cluster are left out.

    Args:
        points: embeddings of successes; add earlier ones to have a memory. radius: > 0. least: >= 1.
    Source:
        As `progress_reward`; DBSCAN: Ester et al. 1996. What to do without a cluster is ours.
    """
    near = torch.cdist(points, points) <= radius
    near.fill_diagonal_(True)  # cdist of equal rows may be above 0
    dense = near.sum(1) >= least
    label = torch.where(dense, torch.arange(len(points)), len(points))
    while True:  # the least label spreads; at most N rounds
        spread = torch.where(near & dense[None], label[None], len(points)).amin(1) if len(points) else label
        if spread.equal(label):
            break
        label = spread
    found = [points[label == number].mean(0) for number in label.unique().tolist() if number < len(points)]
    return torch.stack(found) if found else points


def centre_distance(embedding: Tensor, centres: Tensor) -> Tensor:
    """Distance of each embedding [B, D] to the nearest of the centres [C, D], [B]; inf if there is none."""
    nothing = torch.full_like(embedding[:, :1], torch.inf)
    return torch.cat([torch.cdist(embedding, centres, compute_mode="donot_use_mm_for_euclid_dist"), nothing], 1).amin(1)


def referee_reward(scores: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """URPO: Kendall's tau between a referee's scores and the true order, over the pairs that truly differ. [B] float64 in [-1, 1]; 0 without such a pair.

    A pair is 1 in the right order, -1 in the wrong one, 0 for equal scores. With K = 2: -1, 0 or 1.

    Args:
        scores, truth: [B, K], larger is better. mask: [B, K] bool, True = a candidate.
    Source:
        arXiv:2507.17515 for the three kinds of data in one GRPO batch, from a secondary write-up; the reward's form is our reading.
    """
    pair = torch.triu((mask[:, :, None] & mask[:, None]), 1)
    true = torch.where(pair, (truth[:, :, None] - truth[:, None]).sign().double(), 0.0)
    agree = torch.where(true != 0, (scores[:, :, None] - scores[:, None]).sign().double() * true, 0.0)
    return agree.sum((1, 2)) / true.abs().sum((1, 2)).clamp_min(1)


def marginal_gains(values: Tensor, mask: Tensor, initial: Tensor) -> Tensor:
    """SubPO: what each decision adds to a set function, F(so far) - F(before), [B, S]; 0 where masked. The sum is F(all) - F(nothing).

    Args:
        values: [B, S] float, F of what is there after each decision; anything where masked. mask: [B, S] bool. initial: [B], F of nothing.
    Source:
        arXiv:2307.13372; our reading. With F a sum over the decisions these are ordinary rewards.
    """
    kept = torch.cat([initial[:, None], torch.where(mask, values, torch.zeros_like(values))], 1)
    place = torch.arange(kept.shape[1], device=mask.device)
    counts = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    latest = torch.where(counts, place, torch.zeros_like(place)).cummax(1).values  # the last decision that counts, up to each place
    filled = kept.gather(1, latest)
    return filled[:, 1:] - filled[:, :-1]


def preferences(scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    """P(i beats j) = sigmoid((s_i - s_j) / temperature), [B, B], from scores [B]; temperature 0: 1, 0, or 1/2 for a tie."""
    margin = scores[:, None] - scores[None]
    return torch.sigmoid(margin / temperature) if temperature > 0 else (margin.sign() + 1) / 2


def win_rate(preference: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Self-play (SPO): how often a sample beats the other valid ones of its group, [B] in [0, 1]; 1/2 for a sample alone, 0 where not valid.

    Where P_ij + P_ji = 1 a group's rates sum to G / 2. With comparisons of certain outcome the rate is the rank / (G - 1).

    Args:
        preference: [B, B] float, P(i beats j), 1/2 for a tie; read within groups only, off the diagonal. group: [B] int64. valid: [B] bool.
    Source:
        arXiv:2401.04056. `list_losses.win_rates` against the own group; `rewards.win_rate` asks a judge for the comparisons.
    """
    rivals = (group[:, None] == group[None]) & valid[:, None] & valid[None]
    rivals = rivals & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    rate, met = win_rates(preference, rivals)
    return torch.where(met, rate, 0.5 * valid.to(rate))


def gap(rewards: Tensor, reference: Tensor, group: Tensor) -> Tensor:
    """PIT: R minus the reward of the group's reference answer, [B]; centring on the group's mean cancels it.

    Args:
        rewards: [B]. reference: [P]. group: [B] int64.
    Source:
        arXiv:2310.00898; our reading.
    """
    return rewards - reference[group]
