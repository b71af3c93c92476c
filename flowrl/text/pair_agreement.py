"""Values of preference runs of language models that are impossible together: one line for each, with what to do. A part of `flowrl.text.agreement`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from flowrl.core.preference import NEEDS_REFERENCE
from flowrl.core.reductions import REDUCTIONS
from flowrl.objective_names import OBJECTIVE_NAMES

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["pair_disagreements"]

_OF_LEVELS = "trpa"
_OWN_COMPARISON = ("copg_group", "lipo", "trpa", "a_star_po")
"""List losses that read rewards as they are, or levels of them."""


def pair_disagreements(config: Config) -> Iterator[str]:
    """Pairs, lists, stored pairs, and the pull to a lagged policy."""
    o, p = config.objective, config.pairing
    entry = OBJECTIVE_NAMES.get(o.name)
    if entry is None:
        return
    if entry.kind == "pair":
        yield from _of_pairs(config)
    else:
        for name in type(p).model_fields:
            if getattr(p, name) != getattr(type(p)(), name) and (name, o.name) != ("levels", _OF_LEVELS):
                yield f"pairing.{name}: {o.name} compares no pairs; leave it out, or use an objective of pairs, such as dpo"
    if any(low >= high for high, low in pairwise(p.levels)):
        yield f"pairing.levels: {list(p.levels)} do not fall; level 1 is from the first upwards, level 2 from the second"
    if o.name in _OWN_COMPARISON and (config.advantage.centre, config.advantage.scale) != ("none", "none"):
        yield f"advantage: {o.name} compares rewards itself; set centre: none and scale: none"
    if o.name == _OF_LEVELS and not p.levels:
        yield "pairing.levels: trpa compares answers of different levels; give the rewards at which levels begin, for example [1]"
    shapers = {part.name for part in config.shaping}
    if o.name == "a_star_po" and "reference_value" not in shapers:
        yield "shaping: a_star_po regresses rewards less what the reference could reach; add reference_value"
    if "reference_value" in shapers and config.data.pairs is not None:
        yield "data.pairs: reference_value compares rewards with those of fresh answers, and stored pairs have none; leave it out"
    if (o.name == "a_star_po" or "list_losses" in entry.function) and o.reduction != "seq_mean":
        yield f"objective.reduction: the loss of {o.name} is that of a whole answer; use seq_mean"
    if config.data.pairs is not None:
        yield from _of_stored_pairs(config)
    if config.anchor.weight > 0 and config.old_policy is None:
        yield "anchor.weight: there is no old policy to anchor to; give old_policy, for example {every: 2, decay_slope: 0}, or weight 0"
    if config.anchor.weight > 0 and config.kl.form not in ("k1", "k2", "k3", "k3_k2", "abs"):
        yield f"kl.form: it says how anchor.weight measures distance, and {config.kl.form} compares velocities; use k2"


def _of_pairs(config: Config) -> Iterator[str]:
    o, p, name = config.objective, config.pairing, config.objective.name
    if config.kl.weight > 0 and config.kl.place == "loss":
        pull = "is pulled to the reference by its own beta" if name in NEEDS_REFERENCE else "has no reference"
        yield f"kl.weight: {name} {pull}, and a divergence needs samples of the policy; leave it out"
    for where, value, idle in (
        ("entropy.weight", config.entropy.weight, 0.0),
        ("anchor.weight", config.anchor.weight, 0.0),
        ("tokens.weights", config.tokens.weights, ()),
        ("token_credit.name", config.token_credit.name, "answer"),
        ("value", config.value, None),
        ("generation.importance", config.generation.importance if config.generation.importance != "none" else None, None),
    ):
        if value != idle:
            yield f"{where}: {name} compares whole answers; leave it out"
    if o.reduction not in REDUCTIONS:
        yield f"objective.reduction: {o.reduction} is of tokens, and {name} has one loss for a pair; use {' or '.join(REDUCTIONS)}"
    if p.rule == "levels" and not p.levels:
        yield "pairing.levels: the rule levels needs the rewards at which levels begin, for example [1]"
    if p.rule != "threshold" and p.threshold != 0:
        yield f"pairing.threshold: the rule {p.rule} has none; use rule: threshold"
    if p.guide is not None and name != "dpo":
        yield f"pairing.guide: a guide weighs the tokens of dpo, not of {name}; use dpo, or leave it out"
    rows = 6 if name == "srpo" and o.args.get("alpha") != 1 else 2
    if config.training.rows_per_backward < rows:
        yield f"training.rows_per_backward: {config.training.rows_per_backward} is less than the {rows} rows of a pair, which are trained together; use {rows}"
    if config.reward_weights.kind != "fixed":
        yield f"reward_weights.kind: {config.reward_weights.kind} changes advantages, which objective {name} does not use; use fixed"
    groups = config.rollout.groups_per_iteration
    if p.rule in ("best_worst", "best_random") and o.updates_per_iteration > groups:
        yield f"objective.updates_per_iteration: {o.updates_per_iteration} is more than the {groups} pairs of an iteration; use fewer"


def _of_stored_pairs(config: Config) -> Iterator[str]:
    o, entry = config.objective, OBJECTIVE_NAMES[config.objective.name]
    if entry.kind != "pair" and "ref_log_prob" not in entry.needs:
        yield f"data.pairs: {o.name} needs samples of the policy; use an objective of pairs such as dpo, or leave data.pairs out"
    if config.rollout.group_size != 2:
        yield f"rollout.group_size: a stored pair is a group of 2, not of {config.rollout.group_size}; set rollout.group_size: 2"
    if config.old_policy is not None and config.old_policy.rollout:
        yield "old_policy.rollout: stored pairs are not sampled; leave it out"
    if config.logging.rollouts_every is not None:
        yield "logging.rollouts_every: stored pairs are not sampled; leave it out"
    if config.advantage.aggregate != "rewards":
        yield "advantage.aggregate: stored pairs have no rewards of which each could have an advantage; use aggregate: rewards"
    for name in ("environment", "tree", "partial"):
        if getattr(config, name) is not None:
            yield f"{name}: it says how answers are sampled, and stored pairs are not; leave it out"
    if config.allocation.name != "uniform" or config.allocation.samples:
        yield "allocation: it decides what is sampled, and stored pairs are not; leave it out"
    if o.args.get("online"):
        yield "objective.args: online is for answers that the policy has sampled, and data.pairs stores them; leave it out"
