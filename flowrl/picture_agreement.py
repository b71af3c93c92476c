"""Values of `allocation` and `shaping` that cannot work in a run of pictures: one line for each. A part of `flowrl.agreement`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flowrl.allocation import ALLOCATORS
from flowrl.likelihood_agreement import DIRECT_NAMES, trains_steps
from flowrl.picture_shaping import PICTURE_SHAPERS
from flowrl.text.parts import make_part
from flowrl.text.shaping import SHAPERS
from flowrl.types import UserError

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["picture_disagreements"]


def picture_disagreements(config: Config) -> Iterator[str]:
    """One line for every value that does not go with pictures, with what to do."""
    yield from _allocation(config)
    for part in config.shaping:
        if part.name in SHAPERS and part.name not in PICTURE_SHAPERS:
            yield f"shaping: {part.name} shapes answers of language models; with likelihood: {config.likelihood} there is {', '.join(PICTURE_SHAPERS)}"
        else:
            yield from _problems("shaping", PICTURE_SHAPERS, part.name, part.args)
    if config.shaping and config.shaping[0].name in PICTURE_SHAPERS:
        yield from _likelihood(config)


def _allocation(config: Config) -> Iterator[str]:
    a, rollout, steps = config.allocation, config.rollout, trains_steps(config)
    if a.samples:
        yield f"allocation.samples: answers from elsewhere belong to language models; with likelihood: {config.likelihood} leave it out"
    problems = list(_problems("allocation", ALLOCATORS, a.name, a.args))
    yield from problems
    if problems or a.name == "uniform":
        return
    where = f"allocation.name: {a.name}"
    if getattr(ALLOCATORS[a.name], "gathers", False):
        others = ", ".join(name for name, part in ALLOCATORS.items() if not getattr(part, "gathers", False))
        yield f"{where} samples in rounds or keeps samples, which only language models do; with likelihood: {config.likelihood} use one of {others}"
        return
    if rollout.group_shards > 1:
        yield f"{where} looks at whole groups, which rollout.group_shards: {rollout.group_shards} takes apart; use uniform, or group_shards: 1"
    if config.data.pairs is not None:
        yield f"{where} has nothing to decide, stored pairs are the groups there are; use uniform"
    if getattr(ALLOCATORS[a.name], "rates", False) and config.reward_weights.kind == "gradient":
        yield f"{where} takes the weighted sum of the rewards as a success rate, and reward_weights.kind: gradient changes its weights; use fixed"
    if a.name == "drop" and not steps:
        yield f"{where} leaves out SDE steps, and here finished samples are trained; use likelihood: transition with an objective of steps, or uniform"
    if a.name != "knapsack":
        return
    uneven = f"{where} makes groups of different sizes, and"
    if rollout.plan not in ("chain", "window", "ode") or rollout.same_noise:
        what = "samples with the same start noise" if rollout.same_noise else f"the samples of a {rollout.plan} plan"
        yield f"{uneven} {what} share network rows; use plan: chain, window or ode with same_noise: false, or another allocator"
    if config.objective.name in DIRECT_NAMES:
        yield f"{uneven} objective {config.objective.name} compares no groups; use uniform"
    elif not steps and (config.critic is not None or config.objective.updates_per_iteration > 1):
        what = "a critic" if config.critic is not None else "several updates on finished samples"
        yield f"{uneven} {what} need equal ones; use critic: null and objective.updates_per_iteration: 1, or another allocator"


def _likelihood(config: Config) -> Iterator[str]:
    """A sample's own decisions have a log-probability, and the shaped total reaches them."""
    rollout, where = config.rollout, f"shaping: {config.shaping[0].name}"
    if not trains_steps(config) or rollout.plan not in ("chain", "window"):
        yield f"{where} ranks samples by the log-probability of their SDE steps; use likelihood: transition, an objective of steps, and plan: chain or window"
    elif rollout.kernel == "cps":
        yield f"{where} ranks samples by their log-probability, which the cps kernel does not give; use another kernel"
    if config.credit.normalize != "leaf":
        yield f"{where} changes rewards of whole samples, and credit.normalize: {config.credit.normalize} compares nodes; use leaf"
    if config.advantage.aggregate != "rewards":
        yield f"{where} changes the weighted sum of the rewards; use advantage.aggregate: rewards"
    if rollout.group_shards > 1:
        yield f"{where} ranks the samples of whole groups, which rollout.group_shards: {rollout.group_shards} takes apart; use group_shards: 1"


def _problems(where: str, table: Mapping[str, Callable[..., Any]], name: str, args: Mapping[str, Any]) -> Iterator[str]:
    try:
        make_part(where, table, name, args)
    except UserError as error:
        yield str(error)
