"""The least network rows that the updates of an iteration need, in closed form: what a run prints as ``nfe/minimum`` beside what it used.

Letters: c = 2 with guidance else 1, of the rollout for transitions and direct updates, of `matching.guidance_scale` for matching and pairs; K inner epochs;
r = 1 if a reference is evaluated; e = 1 if the old policy is; N training rows (with gradient, of one epoch); M of them that need an old log-probability of
their own.

| update | forward | backward |
| --- | --- | --- |
| transition | c (K + r) N | K N |
| matching, pairs | c (K N + (r + e) N + M) | K N |
| direct | c K N | K N |

M = 0 unless the objective takes ratios to the policy at the start of the iteration; then it is the rows after the first update: the first update's own
forward serves as theirs.
"""

from __future__ import annotations

from flowrl.config import Config
from flowrl.core.preference import NEEDS_REFERENCE, PAIR_OBJECTIVES
from flowrl.updates.direct import DIRECT_OBJECTIVES, steps_with_gradient
from flowrl.updates.matching import needs_old_velocity, takes_ratio
from samplers.nfe import Rows

__all__ = ["least_rows", "rows_per_unit", "units_of_samples"]


def least_rows(config: Config, iteration: int, *, rollout: int, units: int, idle_rows: int = 0, placeholders: int = 0) -> Rows:
    """(forward, backward) rows of an iteration over all processes.

    Args:
        rollout: its rows, without the factor c.
        units: trained in one epoch, of all processes: rows of decisions, samples, pairs, or latents to start from; 0 where nothing is trained.
        idle_rows: training rows without weight, which kept a process in step with others that had something to train.
        placeholders: processes with a unit that only stands in for nothing, and for which the reference was asked all the same.
    """
    sampled = 2 if config.rollout.guidance_scale > 1 else 1
    judged = config.likelihood == "matching" and config.objective.name not in DIRECT_OBJECTIVES
    trained = (2 if config.matching.guidance_scale > 1 else 1) if judged else sampled
    epochs, size, passes = config.objective.inner_epochs, rows_per_unit(config, iteration), _passes(config)
    later = _later_rows(config, config.rollout.groups_per_iteration) if units else 0
    forward = size * ((epochs + passes) * units + passes * placeholders) + later + idle_rows
    return sampled * rollout + trained * forward, size * epochs * units + idle_rows


def units_of_samples(config: Config, num_groups: int) -> int:
    """Units of an iteration whose samples are all trained."""
    repeat = max(1, config.direct.renoise) if config.objective.name == "draft" else 1
    return num_groups * config.rollout.group_size * repeat


def rows_per_unit(config: Config, iteration: int) -> int:
    """Rows with gradient, in one epoch, of what ``units`` counts above."""
    if config.objective.name in DIRECT_OBJECTIVES:
        return steps_with_gradient(config, iteration) * (2 if config.objective.name == "draft" and config.direct.recompute else 1)
    if config.likelihood == "transition":
        return 1
    return config.matching.num_times * (2 if config.objective.name in PAIR_OBJECTIVES else 1)


def _passes(config: Config) -> int:
    """r + e."""
    name = config.objective.name
    reference = config.kl.weight > 0 or name in NEEDS_REFERENCE
    old = config.likelihood == "matching" and name not in PAIR_OBJECTIVES and name not in DIRECT_OBJECTIVES and needs_old_velocity(config)
    return int(reference) + int(old)


def _later_rows(config: Config, num_groups: int) -> int:
    """M: what `Trainer.split` deals to later updates than the first, for ratios to the policy at the start of the iteration."""
    updates, off_policy = config.objective.updates_per_iteration, config.old_policy is not None and config.old_policy.rollout
    if config.likelihood == "transition" or not takes_ratio(config) or off_policy or updates == 1:
        return 0
    size = 1 if config.matching.combine == "exp_first" else config.matching.num_times  # rows that are dealt out together
    shards = config.rollout.group_shards
    dealt = config.rollout.group_size // shards * config.matching.num_times // size
    return size * sum(dealt - len(range(-number % updates, dealt, updates)) for number in range(num_groups * shards))
