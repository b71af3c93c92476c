"""Advantages of samples as two free choices: what is taken off a reward (`centre`) and what the rest is divided by (`scale`).

| method | centre | scale |
| --- | --- | --- |
| REINFORCE | none, batch, ema | none |
| RLOO | leave_one_out | none |
| GRPO | group | group_std |
| Dr.GRPO | group | none |
| Lite PPO, Flow-GRPO's global_std | group | batch_std |
| OPO | length_weighted | none |
| Pass@k | best_minus_second | group_std |
| BNPO (Beta) | group | beta |
| NGRPO | virtual_max | group_std, the same ``virtual`` |
| a critic's value | given | any |

REINFORCE++, GAE and others that differ from token to token: `token_advantages`.

A sample without a reward (``valid`` False) has advantage 0 and is in no statistic. A sample put in from elsewhere (expert, replay, hint) may be kept out of the
statistics with ``stats_mask``: it is compared with them all the same. A group with fewer than two rewards in its statistics compares with nobody: its samples
get 0, or with ``singleton="raw"`` their reward as it is (verl). A spread of 0 divides by 1: nothing is blown up, members of a group with equal rewards have 0.

Letters: B samples, P groups, K rewards, k virtual rewards, n samples in a statistic. Rewards are on the CPU, where they were scored; float32 or float64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics

__all__ = [
    "CENTRES",
    "SCALES",
    "Beta",
    "CentreKind",
    "GroupCheck",
    "RewardAverage",
    "ScaleKind",
    "Singleton",
    "beta_parameters",
    "beta_weight",
    "centre",
    "check_groups",
    "combine_heads",
    "fit_beta",
    "group_success",
    "scale",
]

CentreKind: TypeAlias = Literal["none", "batch", "group", "leave_one_out", "length_weighted", "virtual_max", "best_minus_second", "ema", "given"]
CENTRES: tuple[CentreKind, ...] = ("none", "batch", "group", "leave_one_out", "length_weighted", "virtual_max", "best_minus_second", "ema", "given")

ScaleKind: TypeAlias = Literal["none", "group_std", "batch_std", "batch_std_centred", "beta", "given"]
SCALES: tuple[ScaleKind, ...] = ("none", "group_std", "batch_std", "batch_std_centred", "beta", "given")

Singleton: TypeAlias = Literal["zero", "raw"]


@dataclass(frozen=True, slots=True)
class RewardAverage:
    """An exponential average of the batches' mean rewards, the baseline of the centre ``ema``: take it off, then `update`.

    Attributes:
        decay: in [0, 1); 0 remembers the last batch only.
        total: sum of the means, each times (1 - decay) decay^age. weight: sum of these factors, so that total / weight has no bias towards 0.
    """

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def update(self, batch_mean: float) -> RewardAverage:
        """The average after a batch of this mean (over all processes)."""
        kept = self.decay
        return RewardAverage(kept, kept * self.total + (1 - kept) * batch_mean, kept * self.weight + (1 - kept))

    def value(self, batch_mean: float) -> float:
        """The baseline of the next batch; its own mean before any batch was seen."""
        return self.total / self.weight if self.weight > 0 else batch_mean

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON; ``RewardAverage(**state)`` loads it."""
        return asdict(self)


def centre(
    kind: CentreKind,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    num_groups: int,
    *,
    stats_mask: Tensor | None = None,
    singleton: Singleton = "zero",
    batch_mean: float | Tensor | None = None,
    lengths: Tensor | None = None,
    virtual: tuple[int, float] = (1, 1.0),
    baseline: float | Tensor | None = None,
) -> Tensor:
    """Rewards without what they are compared with, [B] in the dtype of ``rewards``, no gradient; 0 where not valid.

    | kind | taken off R_i |
    | --- | --- |
    | none | 0 |
    | batch | mean of all rewards of the iteration |
    | group | mean of the group |
    | leave_one_out | mean of the others of the group: n / (n - 1) times ``group`` |
    | length_weighted | sum n_i R_i / sum n_i over the group, n_i its length |
    | virtual_max | mean of the group and of k further rewards of the highest value |
    | best_minus_second | only the group's best sample has R - (second best), the others have 0 |
    | ema | ``baseline``, e.g. `RewardAverage.value` |
    | given | ``baseline`` [B], e.g. a critic's |

    The centred rewards of a group sum to 0 with group and leave_one_out (weighted by n_i with length_weighted), to at most 0 with virtual_max.

    Args:
        rewards: [B] float; anything, NaN too, where not valid. group: [B] int64 in 0..P-1. valid: [B] bool.
        stats_mask: [B] bool, samples that enter statistics, None = all. With best_minus_second the others have 0.
        singleton: of the five kinds that compare within a group; best_minus_second has 0 in any case, virtual_max counts its virtual rewards.
        batch_mean: the mean over all processes; None = of these samples.
        lengths: [B] >= 0, decisions of each sample, of length_weighted; a sample of length 0 is not in the statistics.
        virtual: k >= 0 and the highest reward; NGRPO: 1 and 1. k = 0 is ``group``.
        baseline: a number or [B], of ema and given.
    Raises:
        ValueError: unknown kind or singleton rule, or an argument of the kind is missing.
    Source:
        leave_one_out: RLOO, arXiv:2402.14740; group: GRPO, arXiv:2402.03300, and Dr.GRPO, arXiv:2503.20783; length_weighted: OPO, arXiv:2505.23585;
        best_minus_second: arXiv:2503.19595; all four read in verl's core_algos. virtual_max: NGRPO, arXiv:2509.18851, read in the released code.
        stats_mask and a singleton's 0 are ours; verl leaves its raw reward, and raises for best_minus_second.
    """
    if kind not in CENTRES:
        raise ValueError(f"unknown centre {kind!r}; known: {', '.join(CENTRES)}")
    _check_singleton(singleton)
    zero = torch.zeros_like(rewards)
    counted = valid if stats_mask is None else valid & stats_mask
    if kind == "none":
        return torch.where(valid, rewards, zero)
    if kind == "batch":
        mean = _batch_statistics(rewards, counted, 0)[0] if batch_mean is None else batch_mean
        return torch.where(valid, rewards - mean, zero)
    if kind in ("ema", "given"):
        if baseline is None:
            raise ValueError(f"the centre {kind} needs a baseline")
        return torch.where(valid, rewards - baseline, zero)
    if kind == "best_minus_second":
        return _best_minus_second(rewards, group, counted, num_groups)

    if kind == "length_weighted":
        if lengths is None:
            raise ValueError("the centre length_weighted needs the lengths of the samples")
        counted = counted & (lengths > 0)
    mean, _, count = _statistics(rewards, group, counted, num_groups, 0, virtual if kind == "virtual_max" else (0, 0.0))
    if kind == "length_weighted" and lengths is not None:
        weight = torch.where(counted, lengths.to(rewards.dtype), zero)
        above = torch.where(counted, weight * (rewards - mean[group]), zero)  # around the mean: equal rewards stay exact
        mean = mean + torch.zeros_like(mean).index_add_(0, group, above) / torch.zeros_like(mean).index_add_(0, group, weight).clamp_min(1)
    centred = rewards - mean[group]
    if kind == "leave_one_out":
        centred = torch.where(counted, centred * (count / (count - 1).clamp_min(1))[group], centred)
    alone = rewards if singleton == "raw" else zero
    return torch.where(valid, torch.where((count >= 2)[group], centred, alone), zero)


def scale(
    kind: ScaleKind,
    centred: Tensor,
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    num_groups: int,
    *,
    eps: float,
    ddof: int,
    stats_mask: Tensor | None = None,
    virtual: tuple[int, float] = (0, 0.0),
    batch_std: float | Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    beta: Beta | None = None,
) -> Tensor:
    """Centred rewards divided by a spread, [B], no gradient; 0 where not valid.

    | kind | centred_i is divided by |
    | --- | --- |
    | none | 1 |
    | group_std | std of the group's rewards + eps |
    | batch_std | std of all rewards of the iteration + eps: differences between prompts count |
    | batch_std_centred | std of all centred rewards + eps: they do not |
    | beta | (high - low) times the Beta density at the group's mean p of the rewards scaled to 0 .. 1, see `beta_weight`; no eps |
    | given | ``batch_std`` + eps |

    A std of 0 (equal rewards, or one) divides by 1 + eps.

    Args:
        centred: [B], of `centre`. rewards, group, valid, stats_mask: as there.
        eps: >= 0; verl 1e-6, TRL 1e-4. ddof: 1 in verl and TRL; closed forms in the success rate take 0.
        virtual: k and the highest reward: group_std over the group and its k virtual rewards (NGRPO). k = 0 is GRPO.
        batch_std: over all processes, of the raw or of the centred rewards; None = of these samples. Needed by given, which takes [B] too.
        bounds: lowest and highest reward that there can be, of beta.
        beta: fixed parameters, or those of all processes' groups; None = fitted to these groups with `beta_parameters`.
    Raises:
        ValueError: unknown kind, or an argument of the kind is missing; beta without two finite bounds: an unbounded reward has no success rate.
    Source:
        group_std: GRPO, arXiv:2402.03300, verl. batch_std: Lite PPO, arXiv:2508.08221, TRL's scale_rewards="batch"; the second reading is in other code.
        beta: BNPO, arXiv:2506.02864, read in the released code. A loss named bnpo elsewhere (TRL, ms-swift) is a token mean and not this.
        Deviation: a std of 0 divides by 1, so that samples outside of the statistics are not divided by eps.
    """
    if kind not in SCALES:
        raise ValueError(f"unknown scale {kind!r}; known: {', '.join(SCALES)}")
    zero = torch.zeros_like(centred)
    counted = valid if stats_mask is None else valid & stats_mask
    if kind == "none":
        return torch.where(valid, centred, zero)
    if kind == "beta":
        if bounds is None or not (-float("inf") < bounds[0] < bounds[1] < float("inf")):
            raise ValueError(f"the scale beta needs the lowest and the highest reward, both finite; it has {bounds}")
        success, known = group_success(rewards, group, counted, num_groups, bounds)
        weight = beta_weight(success, beta_parameters(success, known) if beta is None else beta)
        return torch.where(valid, centred / (bounds[1] - bounds[0]) * weight[group], zero)

    spread: Tensor
    if kind == "group_std":
        spread = _statistics(rewards, group, counted, num_groups, ddof, virtual)[1][group]
    elif batch_std is not None:
        spread = torch.as_tensor(batch_std, dtype=centred.dtype)
    elif kind == "given":
        raise ValueError("the scale given needs batch_std")
    else:
        spread = _batch_statistics(rewards if kind == "batch_std" else centred, counted, ddof)[1]
    return torch.where(valid, centred / (torch.where(spread > 0, spread, torch.ones_like(spread)) + eps), zero)


class Beta(NamedTuple):
    """Parameters of a Beta distribution, [] float64 each or numbers."""

    alpha: Tensor | float
    beta: Tensor | float


def group_success(rewards: Tensor, group: Tensor, counted: Tensor, num_groups: int, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """BNPO's success rate p of each group, the mean of (R - low) / (high - low), [P] in [0, 1]; and [P] bool, which groups have any reward.

    Args: as in `centre`; counted: [B] bool, the rewards that enter.
    """
    mean, _, count = group_statistics(rewards, group, counted, num_groups, 0)
    return ((mean - bounds[0]) / (bounds[1] - bounds[0])).clamp(0, 1), count > 0


def beta_parameters(success: Tensor, known: Tensor) -> Beta:
    """`fit_beta` of the success rates of groups, [P] in [0, 1] of all processes; known: [P] bool."""
    rate = success.double()
    mean, std = _batch_statistics(rate, known, 1)
    return fit_beta(mean, std, int(known.sum()))


def fit_beta(mean: float | Tensor, std: float | Tensor, count: int, *, most: float = 1e3) -> Beta:
    """BNPO's Beta density from the success rates of groups: with their mean M and variance V (ddof 1), c = M (1 - M) / V - 1,

        alpha = max(1, 1 + c M / 3),  beta = max(1, 1 + c (1 - M) / 3),  both at most ``most``.

    With fewer than two groups there is nothing to fit: alpha = beta = 1, weight 1, as with a reward that is only centred.

    Args:
        mean, std: of the ``count`` rates of all processes' groups.
    Source:
        arXiv:2506.02864, read in the released code, but for two edges: it takes M = 0, V = 1 for one group, and has no upper bound for equal rates.
    """
    one = torch.ones((), dtype=torch.float64)
    if count < 2:
        return Beta(one, one)
    mean, std = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, std))
    common = mean * (1 - mean) / std.square().clamp_min(1e-12) - 1
    return Beta(*((1 + common * part / 3).clamp(1, most) for part in (mean, 1 - mean)))


def beta_weight(success: Tensor, parameters: Beta, *, most: float = 1e6) -> Tensor:
    """One over the Beta density at each group's success rate, [P] in the dtype of ``success``, in [0, most]; computed in float64.

    alpha = beta = 1 gives 1; alpha = beta = 3/2 gives pi / 8 / sqrt(p (1 - p)), GRPO's scale for binary rewards. At p = 0 or 1 the density may be 0 and the
    weight ``most``; the centred rewards are 0 there.
    """
    p = success.double()
    alpha, beta = (torch.as_tensor(value, dtype=torch.float64) for value in parameters)
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_density = torch.special.xlogy(alpha - 1, p) + torch.special.xlog1py(beta - 1, -p)
    return (log_norm - log_density).exp().clamp(0, most).to(success.dtype)


def combine_heads(advantages: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the advantages that each of K rewards gives alone, [B]. GDPO, arXiv:2601.05242, ends with `token_advantages.whiten`.

    Args:
        advantages: [K, B]; a reward that is constant in a group adds 0 there and does not erase the others. weights: [K].
    """
    return (weights.to(advantages)[:, None] * advantages).sum(0)


class GroupCheck(NamedTuple):
    """What a comparison within groups cannot use, [P] bool each: groups with one reward, and groups with two or more that are all equal."""

    singleton: Tensor
    constant: Tensor


def check_groups(rewards: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, stats_mask: Tensor | None = None) -> GroupCheck:
    """Count these: their shares are the metrics ``frac_singleton`` and ``frac_zero_var``. Arguments as in `centre`."""
    counted = valid if stats_mask is None else valid & stats_mask
    _, std, count = group_statistics(rewards, group, counted, num_groups, 0)
    return GroupCheck(count == 1, (count >= 2) & (std == 0))


def _check_singleton(rule: str) -> None:
    if rule not in ("zero", "raw"):
        raise ValueError(f"unknown singleton rule {rule!r}; known: zero, raw")


def _batch_statistics(value: Tensor, counted: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    """Mean and std of all counted values, [] each."""
    mean, std, _ = group_statistics(value, torch.zeros(len(value), dtype=torch.int64), counted, 1, ddof)
    return mean[0], std[0]


def _statistics(rewards: Tensor, group: Tensor, counted: Tensor, num_groups: int, ddof: int, virtual: tuple[int, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, std and count of each group with its k virtual rewards, [P] each. A group without a reward of its own has only virtual ones."""
    k, highest = virtual
    if k < 0:
        raise ValueError(f"there cannot be {k} virtual rewards")
    if k > 0:
        rewards = torch.cat([rewards, rewards.new_full((k * num_groups,), highest)])
        group = torch.cat([group, torch.arange(num_groups).repeat(k)])
        counted = torch.cat([counted, torch.ones(k * num_groups, dtype=torch.bool)])
    return group_statistics(rewards, group, counted, num_groups, ddof)


def _best_minus_second(rewards: Tensor, group: Tensor, counted: Tensor, num_groups: int) -> Tensor:
    lowest = rewards.new_full((num_groups,), -torch.inf)
    number, nobody = torch.arange(len(rewards)), len(rewards)
    top = lowest.scatter_reduce(0, group, torch.where(counted, rewards, -torch.inf), "amax")
    is_top = counted & (rewards == top[group])
    first = torch.full((num_groups,), nobody).scatter_reduce_(0, group, torch.where(is_top, number, nobody), "amin")
    best = is_top & (number == first[group])
    second = lowest.scatter_reduce(0, group, torch.where(counted & ~best, rewards, -torch.inf), "amax")
    return torch.where(best & second.isfinite()[group], rewards - second[group], torch.zeros_like(rewards))
