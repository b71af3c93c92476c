"""Advantages of samples that look beyond their prompt: at bundles of prompts (RiskPO), and at the batch where a prompt's answers agree (COPO).

RiskPO. A bundle is a few prompts; its j-th *paper* is the j-th sample of each of them, and a paper's score is the sum of their rewards, so that prompts whose
samples all fail still tell something beside others. A paper is judged by where its score S stands among two quantiles (`paper_scores`,
`update_quantiles`, `risk_advantages`). Iteration by iteration: scores; update the quantiles with those of all processes; advantages with the new ones.

COPO. The local advantage compares samples of one prompt, the global one prompts of the batch; the entropy of a prompt's answers blends the two losses.

Letters: B samples, P groups (prompts), K bundles, J papers of a bundle. Rewards are on the CPU; a sample without a reward has 0 and is in nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.estimators import centre, scale

__all__ = ["Blend", "Papers", "QuantileMode", "Quantiles", "answer_entropy", "consistency_blend", "paper_scores", "risk_advantages", "update_quantiles"]

QuantileMode: TypeAlias = Literal["track", "batch", "mix"]


class Papers(NamedTuple):
    """The papers of the samples of an iteration.

    Attributes:
        scores: [K, B] float, score of paper j of bundle k in column j. known: [K, B] bool, the paper exists.
        bundle, position: [B] int64, the paper of each sample. used: [B] bool, the sample is in a paper.
    """

    scores: Tensor
    known: Tensor
    bundle: Tensor
    position: Tensor
    used: Tensor


def paper_scores(rewards: Tensor, group: Tensor, valid: Tensor, bundle: Tensor, num_bundles: int) -> Papers:
    """Sum of the j-th rewards of a bundle's prompts, for j up to its least number of valid samples; the samples beyond are in no paper.

    Args:
        rewards, valid: [B]. group: [B] int64 in 0..P-1. bundle: [P] int64 in 0..K-1, the bundle of each prompt; -1 = none.
            A prompt without any valid sample leaves its bundle.
    """
    num_groups, size = len(bundle), len(rewards)
    order = (2 * group + (~valid).long()).argsort(stable=True)  # by group, valid ones first, else as they came
    start = torch.bincount(group, minlength=num_groups).cumsum(0) - torch.bincount(group, minlength=num_groups)
    position = torch.empty_like(group)
    position[order] = torch.arange(size) - start[group[order]]
    count = torch.zeros(num_groups, dtype=torch.int64).index_add_(0, group, valid.long())
    inside = (bundle >= 0) & (count > 0)
    place = bundle.clamp_min(0)
    papers = torch.full((num_bundles,), size).scatter_reduce_(0, place, torch.where(inside, count, size), "amin")
    papers = torch.where(torch.zeros(num_bundles).index_add_(0, place, inside.float()) > 0, papers, 0)
    mine = place[group]
    used = valid & inside[group] & (position < papers[mine])
    flat = torch.zeros(num_bundles * size, dtype=rewards.dtype).index_add_(0, mine * size + position, torch.where(used, rewards, 0.0).to(rewards.dtype))
    return Papers(flat.view(num_bundles, size), torch.arange(size) < papers[:, None], mine, position, used)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """RiskPO's quantiles of paper scores, followed over iterations.

    Attributes:
        low, high: their values. seen: some batch was seen; before, the values mean nothing.
    """

    low: float = 0.0
    high: float = 0.0
    seen: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON; ``Quantiles(**state)`` loads it."""
        return asdict(self)


def update_quantiles(state: Quantiles, scores: Tensor, *, low: float = 0.2, high: float = 0.9, rate: float = 0.1) -> Quantiles:
    """Follow the quantiles: q + rate (level - share of the scores below q); the first batch sets them to its own. Host-side.

    Args:
        scores: [N], all papers of all processes, ``papers.scores[papers.known]``; without any, nothing changes.
    Source:
        RiskPO, arXiv:2510.00911; verified in the released code (ray_trainer.py, gradient steps on the pinball loss). Deviation: it follows 19 levels and
        takes the nearest to ``low`` and ``high``.
    """
    if len(scores) == 0:
        return state
    scores = scores.double()
    if not state.seen:
        q = torch.quantile(scores, torch.tensor([low, high], dtype=torch.float64))
        return Quantiles(q[0].item(), q[1].item(), True)
    step = [rate * (level - (scores < q).double().mean().item()) for level, q in ((low, state.low), (high, state.high))]
    return Quantiles(state.low + step[0], state.high + step[1], True)


def risk_advantages(
    papers: Papers,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    num_groups: int,
    *,
    quantiles: Quantiles | None,
    mode: QuantileMode = "track",
    low: float = 0.2,
    high: float = 0.9,
    mixture: float = 1.5,
    baseline: bool = True,
    normalize: bool = True,
    credit: Literal["uniform", "std", "share"] = "std",
    eps: float = 1e-6,
) -> Tensor:
    """RiskPO: mixed value-at-risk of the paper of each sample, [B]; 0 for samples in no paper.

        P1 = ((S - q_low)+ - (S - q_high)+ [+ q_low - q_high]) / (high - low + eps)    what lies between the quantiles
        P2 = -(q_low - S)+ / (low + eps)                                              what lies below
        P  = (mixture P2 + P1) / (mixture + 1) [/ (std of the bundle's scores + eps)]

    With ``baseline`` P is at most 0: papers at or above q_high have 0. mixture 0, low 0 and high 1 give S - (highest) or S - (lowest).

    | credit | a sample gets P times |
    | --- | --- |
    | uniform | 1 |
    | std | 1 / (std of its prompt's rewards + eps), a std up to 1e-3 counts as 1 |
    | share | its part of the paper's rewards above their prompts' means, (R - mean) / sum of these; equal parts where that sum is below 1e-6 |

    Args:
        papers: of `paper_scores` of the same samples. rewards, group, valid: as there.
        quantiles: from `update_quantiles` with this batch; None = of each bundle alone.
        mode: track = ``quantiles``, batch = those of each bundle's own papers, mix = the mean of both.
        low, high: levels, 0 <= low < high <= 1. mixture: omega >= 0, weight of the lower tail.
        normalize: a bundle with one paper, or equal ones, divides by 1. std is with ddof 1.
    Raises:
        ValueError: unknown mode or credit.
    Source:
        arXiv:2510.00911, verified in the released code (core_algos.py, ray_trainer.py). Its credit "std" divides by the prompt's std. Deviation: equal
        papers divide by 1 + eps there only if there is one, by eps otherwise.
    """
    if mode not in ("track", "batch", "mix") or credit not in ("uniform", "std", "share"):
        raise ValueError(f"unknown quantiles {mode!r} or credit {credit!r}; known: track, batch, mix; uniform, std, share")
    scores, known = papers.scores, papers.known
    q_low, q_high = _bundle_quantile(scores, known, low), _bundle_quantile(scores, known, high)
    if quantiles is not None and quantiles.seen and mode != "batch":
        share = 1.0 if mode == "track" else 0.5
        q_low, q_high = q_low + share * (quantiles.low - q_low), q_high + share * (quantiles.high - q_high)
    q_low, q_high = q_low[:, None], q_high[:, None]
    between = torch.minimum(torch.maximum(scores, q_low), q_high) - (q_high if baseline else q_low)  # the same, and exactly 0 beyond the quantile
    value = (mixture * -(q_low - scores).clamp_min(0) / (low + eps) + between / (high - low + eps)) / (mixture + 1)
    if normalize:
        row = torch.arange(len(scores))[:, None].expand_as(scores).flatten()
        std = group_statistics(scores.flatten(), row, known.flatten(), len(scores), 1)[1]
        value = value / (torch.where(std > 0, std, torch.ones_like(std)) + eps)[:, None]
    paper = value[papers.bundle, papers.position]

    mean, std, _ = group_statistics(rewards, group, valid, num_groups, 1)
    if credit == "std":
        paper = paper / (torch.where(std > 1e-3, std, torch.ones_like(std)) + eps)[group]
    elif credit == "share":
        above = torch.where(papers.used, rewards - mean[group], torch.zeros_like(rewards))
        index = papers.bundle * scores.shape[1] + papers.position
        total = torch.zeros(scores.numel(), dtype=rewards.dtype).index_add_(0, index, above)[index]
        members = torch.zeros(scores.numel(), dtype=rewards.dtype).index_add_(0, index, papers.used.to(rewards.dtype))[index]
        clear = total.abs() > 1e-6
        paper = paper * torch.where(clear, above / torch.where(clear, total, torch.ones_like(total)), 1 / members.clamp_min(1))
    return torch.where(papers.used, paper, torch.zeros_like(paper))


class Blend(NamedTuple):
    """COPO: [B] each; loss = weight loss(local) + (1 - weight) loss(world)."""

    local: Tensor
    world: Tensor
    weight: Tensor


def answer_entropy(answer: Tensor, group: Tensor, counted: Tensor, num_groups: int, num_answers: int) -> Tensor:
    """Entropy in nats of the frequencies of the different answers of each group, [P] in 0 .. log of their number; 0 for a group without any.

    Args:
        answer: [B] int64 in 0..num_answers-1, equal numbers are equal answers within a group. counted: [B] bool.
    """
    pair = group * num_answers + answer
    number = torch.zeros(num_groups * num_answers, dtype=torch.float64).index_add_(0, pair, counted.double()).view(num_groups, num_answers)
    share = number / number.sum(1, keepdim=True).clamp_min(1)
    return -torch.special.xlogy(share, share).sum(1)


def consistency_blend(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    num_groups: int,
    *,
    answer: Tensor | None,
    num_answers: int,
    success: tuple[float, float] | None = None,
    gamma: float = 3.0,
    entropy_centre: float = 1.0,
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["zero", "raw"] = "zero",
) -> Blend:
    """COPO: where a prompt's answers differ, its samples are compared with each other; where they agree, the prompt is compared with the batch.

    local: GRPO. world: (p - mean of p) / (std of p + eps) for every sample of a prompt, p its mean reward; 0 if there is one prompt, or all are equal.
    weight: sigmoid(gamma (H - entropy_centre)), H of `answer_entropy`.

    Args:
        rewards, group, valid: as in `estimators.centre`.
        answer: see `answer_entropy`; None = the entropy of right (R > 0) and wrong.
        success: mean and std of p over the prompts of all processes; None = of these.
        gamma, entropy_centre: our defaults. gamma inf gives GRPO where H is above the centre. ddof: of both standard deviations.
    Source:
        COPO, arXiv:2508.04138: the blend by a sigmoid of the entropy is in three notes that agree; the global advantage and both constants are our reading.
    """
    local = centre("group", rewards, group, valid, num_groups, singleton=singleton)
    local = scale("group_std", local, rewards, group, valid, num_groups, eps=eps, ddof=ddof)
    mean, _, count = group_statistics(rewards, group, valid, num_groups, 0)
    prompts, one = count > 0, torch.zeros(num_groups, dtype=torch.int64)
    if success is None:
        world = scale("batch_std", centre("batch", mean, one, prompts, 1), mean, one, prompts, 1, eps=eps, ddof=ddof)
    else:
        world = scale("given", centre("given", mean, one, prompts, 1, baseline=success[0]), mean, one, prompts, 1, eps=eps, ddof=ddof, batch_std=success[1])
    if answer is None:
        answer, num_answers = (rewards > 0).long(), 2
    entropy = answer_entropy(answer, group, valid, num_groups, num_answers)
    weight = torch.sigmoid(gamma * (entropy - entropy_centre)).to(rewards.dtype)
    return Blend(local, torch.where(valid, world[group], torch.zeros_like(rewards)), weight[group])


def _bundle_quantile(scores: Tensor, known: Tensor, level: float) -> Tensor:
    """Quantile of each row's known scores, linear between two of them, [K]; 0 for a row without any."""
    ordered = torch.where(known, scores, torch.inf).sort(1).values
    count = known.sum(1)
    place = level * (count - 1).clamp_min(0).to(scores.dtype)
    below, above = (ordered.gather(1, index[:, None])[:, 0] for index in (place.floor().long(), place.ceil().long()))
    value = torch.where(place == place.floor(), below, below + (place - place.floor()) * (above - below))
    return torch.where(count > 0, value, torch.zeros_like(value))
