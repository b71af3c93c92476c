"""Several rewards and hard constraints: from the scores of samples to advantages of samples, of pictures and of text.

`advantage.aggregate` says whether the weighted sum of the rewards has an advantage, or each reward one of its own; `rewards.minimum` puts samples that break
a constraint below the others. The formulas are in core/estimators.py and core/aggregation.py.

Letters: B samples of this process, P sets of samples that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.aggregation import batch_standardised, gate
from flowrl.estimation import Estimator, batch_spread
from flowrl.reward_weights import RewardWeights
from flowrl.types import Scores

__all__ = ["compared", "gated"]


def gated(config: Config, scores: Mapping[str, Scores], sets: Tensor, num_sets: int, counted: Tensor | None = None) -> Scores:
    """The total, where samples that break a constraint rank below all others that they are compared with, see `gate`. Once more changes nothing.

    Args:
        scores: of each reward [B], and "total". sets: [B] int64 in 0..P-1, equal for samples that are compared.
        counted: [B] bool, samples that others are compared with; None = all.
    """
    total, satisfied = scores["total"], _satisfied(config, scores)
    if satisfied is None:
        return total
    return Scores(gate(total.values.double(), satisfied, sets, total.valid, num_sets, counted=counted), total.valid)


def compared(
    config: Config,
    weights: RewardWeights,
    estimator: Estimator,
    scores: Mapping[str, Scores],
    everywhere: Mapping[str, Scores],
    sets: Tensor,
    num_sets: int,
    *,
    prompts: tuple[Tensor, Tensor],
    lengths: Tensor | None = None,
    stats_mask: tuple[Tensor, Tensor] | None = None,
    added: tuple[Scores, Scores] | None = None,
) -> Tensor:
    """Advantages [B] float64, not clamped, 0 where not valid: of the total reward, or the weighted sum of each reward's. Once an iteration, as `Estimator`.

    Args:
        weights: the current ones of the rewards.
        scores, sets: as of `gated`; ``everywhere``: of all processes, in any fixed order; a total alone (the gradient of one reward is measured) is compared.
        prompts, lengths, stats_mask: see `Estimator`.
        added: what shaping has added to the total, here and everywhere: a further reward of weight 1 where each reward is compared by itself.
    Raises:
        UserError: no sample of any process has a total, or a score of a required reward.
    """
    a, own = config.advantage, None if stats_mask is None else stats_mask[0]
    total = gated(config, scores, sets, num_sets, own)
    if a.aggregate == "rewards" or scores.keys() == {"total"}:
        return estimator(total, everywhere["total"], sets, num_sets, prompts=prompts, lengths=lengths, stats_mask=stats_mask)
    out = torch.zeros(len(sets), dtype=torch.float64)
    optional = {reward.key for reward in config.rewards if not reward.required}
    heads = [(name, weights.weights[name], scores[name], everywhere[name]) for name in weights.names]
    if added is not None:
        heads.append(("of the shaping", 1.0, *added))
    for name, weight, here, there in heads:
        if name in optional and not bool(there.valid.any()):
            continue
        eps = a.eps + a.std_floor * batch_spread(there, a.ddof, None if stats_mask is None else stats_mask[1])
        valid = here.valid & total.valid
        one = estimator(here, there, sets, num_sets, prompts=prompts, name=name, valid=valid, lengths=lengths, stats_mask=stats_mask, eps=eps)
        out += weight * one
    satisfied = _satisfied(config, scores)
    if satisfied is not None:
        out = gate(out, satisfied, sets, total.valid, num_sets, counted=own)
    return out if a.aggregate == "advantages" else _standardised(config, estimator, out, total.valid, own)


def _satisfied(config: Config, scores: Mapping[str, Scores]) -> Tensor | None:
    """[B] bool: samples that keep every hard constraint; None where there is no constraint, or only a total, as of stored pairs and of one reward's gradient.
    One that cannot be scored does not break it.
    """
    limits = {reward.key: reward.minimum for reward in config.rewards if reward.minimum is not None and reward.key in scores}
    if not limits:
        return None
    return torch.stack([~(scores[name].values < limit) for name, limit in limits.items()]).all(0)


def _standardised(config: Config, estimator: Estimator, advantages: Tensor, valid: Tensor, own: Tensor | None) -> Tensor:
    """GDPO: over the samples of all processes that enter statistics."""
    a, known = config.advantage, advantages[valid if own is None else valid & own]
    count = estimator.add(float(len(known)))
    if count <= a.ddof:
        return advantages
    mean = estimator.add(float(known.sum())) / count
    std = (estimator.add(float((known - mean).square().sum())) / (count - a.ddof)) ** 0.5
    return batch_standardised(advantages, valid, mean=mean, std=std, eps=a.eps)
