"""Values of a run that are fine alone and impossible together: one line for each such pair, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel

from flowrl.likelihood_agreement import DIRECT_NAMES, PAIR_NAMES, likelihood_disagreements
from flowrl.medium_agreement import wrong_medium
from flowrl.objective_agreement import clip_has_effect, objective_disagreements, unknown_objective
from flowrl.objective_names import OBJECTIVE_NAMES
from flowrl.stated import are_known, asked

if TYPE_CHECKING:
    from flowrl.config import Config
    from flowrl.sections import RolloutConfig

__all__ = ["BOUNDED_KERNELS", "disagreements", "settings_without_effect"]

BOUNDED_KERNELS = ("cps", "ddim", "sde_dpm++")
"""Kernels whose noise level is a share of the noise that the next latent holds; the others can go above 1, and the trainer warns."""


def disagreements(config: Config) -> Iterator[str]:
    """One line for every pair of values that do not go together, with what to do."""
    if not are_known(config.method):
        return  # `load_config` says so; what the method would have brought is missing everywhere
    lines = list(_disagreements(config))
    line = wrong_medium(config) if lines else ""
    yield from [line] if line else lines  # nearly every section is the other medium's


def _disagreements(config: Config) -> Iterator[str]:
    if line := unknown_objective(config.objective.name):
        yield line  # what goes with it cannot be known
        return
    from flowrl.picture_agreement import picture_disagreements  # they read classes that read the config's
    from flowrl.text.agreement import only_of_text, token_disagreements

    if config.likelihood == "token":
        yield from token_disagreements(config)
    else:
        if config.rollout.num_steps < 2:
            yield "rollout.num_steps: 1 leaves nothing to train, the last step is never stochastic; use at least 2"
        else:
            yield from _plan(config.rollout)
        yield from only_of_text(config)
        yield from picture_disagreements(config)
        yield from objective_disagreements(config)
        yield from likelihood_disagreements(config)
    if config.likelihood == "transition":
        yield from _selection(config)
        yield from _credit(config)
    yield from _advantage(config)
    yield from _several_rewards(config)
    yield from _shards(config)
    yield from _training(config)


def _plan(rollout: RolloutConfig) -> Iterator[str]:
    chain, tree, granular = (rollout.plan == name for name in ("chain", "tree", "granular"))
    problems = list(_chain(rollout) if chain else _window(rollout) if _has_window(rollout) else ())
    problems += [*_tree(rollout)] if tree else [*_granular(rollout)] if granular else []
    if rollout.plan == "ode" and rollout.same_noise:
        problems.append("rollout.same_noise: from one start noise the plan ode makes one picture group_size times; set same_noise: false")
    yield from problems
    after = rollout.after_window
    if rollout.plan not in ("window", "tree") and (after.solver != "ode" or after.compression < 1):
        yield f"rollout.after_window: the plan {rollout.plan} takes no steps after a window; use plan: window or tree, or leave it out"
    if not problems and rollout.plan != "ode":
        yield from _noise(rollout)


def _has_window(rollout: RolloutConfig) -> bool:
    return rollout.plan in ("window", "granular") or (rollout.plan == "tree" and (rollout.tree.splits is None or rollout.tree.stochastic == "window"))


def _chain(rollout: RolloutConfig) -> Iterator[str]:
    if int(rollout.train_fraction * rollout.num_steps) < 1:
        yield (
            f"rollout.train_fraction: {rollout.train_fraction} of {rollout.num_steps} steps is less than one step; "
            f"use at least {math.ceil(1000 / rollout.num_steps) / 1000}"
        )


def _window(rollout: RolloutConfig) -> Iterator[str]:
    window, high, last = rollout.window, rollout.window_high, rollout.num_steps - 1
    if window.schedule == "backward":
        if rollout.plan != "window":
            yield f"rollout.window.schedule: backward grows a window from the end and fits plan: window, not {rollout.plan}"
        if not 2 <= window.backward_first <= rollout.num_steps:
            yield f"rollout.window.backward_first: {window.backward_first} is not within the {rollout.num_steps} steps; use 2 to {rollout.num_steps}"
    elif high > last:
        yield f"rollout.window.high: {high} is too large for {rollout.num_steps} steps, of which the last is never stochastic; use at most {last}"
    elif window.low >= high:
        yield f"rollout.window.low: {window.low} leaves no step below window.high = {high}; use at most {high - 1}"
    elif window.size > high - window.low:
        yield (
            f"rollout.window.size: {window.size} does not fit into the {high - window.low} steps {window.low}..{high - 1}; "
            f"use a smaller size or a larger window.high (at most {last})"
        )


def _tree(rollout: RolloutConfig) -> Iterator[str]:
    tree, last = rollout.tree, rollout.num_steps - 2
    splits = range(rollout.window.size) if tree.splits is None else tree.splits
    if tree.splits is not None and (not splits or len(set(splits)) < len(splits) or max(splits) > last):
        yield f"rollout.tree.splits: {list(splits)} must be different steps within 0..{last} (the last step is never stochastic)"
    if len(tree.branching) not in (1, len(splits)):
        yield f"rollout.tree.branching: {len(tree.branching)} numbers for {len(splits)} splits; give one number, or one for each split"
        return
    leaves = math.prod(tree.branching * len(splits) if len(tree.branching) == 1 else tree.branching)
    if rollout.group_size % leaves:
        yield (
            f"rollout.group_size: a tree with these branching factors has {leaves:,} leaves, and {rollout.group_size} is not a multiple of them; "
            f"use {leaves:,}, or lower rollout.tree.branching"
        )
    elif rollout.same_noise and rollout.group_size > leaves:
        yield f"rollout.same_noise: {rollout.group_size // leaves} trees from one start noise would be one tree; use group_size {leaves:,} or same_noise: false"


def _granular(rollout: RolloutConfig) -> Iterator[str]:
    left = rollout.num_steps - rollout.window_high - 1
    if not rollout.same_noise:
        yield "rollout.same_noise: the granular plan has one anchor path per prompt; set same_noise: true"
    if len(set(rollout.granularities)) < len(rollout.granularities):
        yield f"rollout.granularities: {list(rollout.granularities)} names one twice; the same pictures would count double"
    elif max(rollout.granularities) > left:
        yield (
            f"rollout.granularities: a stride of {max(rollout.granularities)} does not fit into the {left} steps that remain two steps after step "
            f"{rollout.window_high - 1}; use at most {left}, or a smaller window.high"
        )


def _stochastic_steps(rollout: RolloutConfig) -> list[int]:
    """The steps of a tree that carry noise, with the window at its first start; of the other plans as many numbers as they have such steps."""
    if rollout.plan == "chain":
        return list(range(rollout.chain_steps))
    window = range(rollout.window.low, rollout.window.low + rollout.window.size)
    if rollout.plan != "tree":
        return list(window)
    splits = window if rollout.tree.splits is None else rollout.tree.splits
    return sorted({"splits": {*splits}, "window": {*splits, *window}, "all": {*range(rollout.num_steps - 1)}}[rollout.tree.stochastic])


def _noise(rollout: RolloutConfig) -> Iterator[str]:
    levels, steps = rollout.noise_level, len(_stochastic_steps(rollout))
    moving = rollout.window.schedule == "backward" or (rollout.plan == "tree" and rollout.tree.stochastic == "window" and rollout.tree.splits is not None)
    if len(levels) > 1 and (moving or len(levels) != steps):
        count = "a number of stochastic steps that changes" if moving else f"{steps} stochastic steps"
        yield f"rollout.noise_level: {len(levels)} levels for {count}; give one number" + ("" if moving else ", or one for each step")
    top = max(levels) * (1 + rollout.tree.noise_growth if rollout.plan == "tree" else 1)
    if top > 1 and rollout.kernel in BOUNDED_KERNELS:
        yield f"rollout.noise_level: {top:g} is more noise than a {rollout.kernel} step can hold; use at most 1" + (
            "" if max(levels) > 1 else ", after the growth of rollout.tree.noise_growth"
        )


def _selection(config: Config) -> Iterator[str]:
    rollout, selection = config.rollout, config.selection
    if selection.fraction < 1 and rollout.plan not in ("chain", "window"):
        yield f"selection.fraction: a subset of each sample's steps fits plan: chain or window; the samples of a {rollout.plan} plan share their steps"
    if selection.width is not None and rollout.plan == "tree" and max(rollout.tree.branching) == 1:
        yield "selection.width: a tree with branching 1 has no branches to prune; raise rollout.tree.branching, or leave it out"
    for name in ("depth", "width"):
        if getattr(selection, name) is not None and rollout.plan != "tree":
            yield f"selection.{name}: pruning needs a tree; use plan: tree, or leave it out"
    depth = selection.depth
    if depth is not None and rollout.plan == "tree":
        if depth.last < depth.first:
            yield f"selection.depth: first = {depth.first} lies after last = {depth.last}"
        elif rollout.num_steps >= 2:
            trained = {k + 1 for k in _stochastic_steps(rollout)}
            span = depth.last - depth.first
            if any(trained <= {*range(first, first + span + 1)} for first in range(min(depth.stop, depth.first), depth.first + 1)):
                yield f"selection.depth: depths {depth.first}..{depth.last} would leave no decision to train; use a narrower window"
    contrast = selection.contrast
    if contrast is not None:
        if rollout.plan != "window" or not rollout.same_noise:
            yield "selection.contrast: best against worst needs the samples of a branch; use plan: window with same_noise: true"
        if contrast.low >= contrast.high:
            yield f"selection.contrast: low = {contrast.low} must be below high = {contrast.high}"


def _credit(config: Config) -> Iterator[str]:
    credit, advantage, plan = config.credit, config.advantage, config.rollout.plan
    if credit.normalize != "leaf" and (advantage.centre, advantage.scale) != ("group", "group_std"):
        yield f"credit.normalize: {credit.normalize} compares nodes by their z-score; set advantage.centre: group and advantage.scale: group_std"
    if credit.normalize != "leaf" and plan == "granular":
        yield "credit.normalize: leaves of a granular plan are compared within their step and granularity; use leaf"
    if credit.integrate == "sum" and plan != "granular":
        yield "credit.integrate: only a granular plan has several granularities to sum over; use mean"
    if credit.integrate == "sum" and credit.backup != "mean":
        yield f"credit.integrate: a sum over granularities and backup: {credit.backup} exclude each other; use one of them"
    if advantage.aggregate != "rewards" and credit.normalize != "leaf":
        yield f"advantage.aggregate: {credit.normalize} compares nodes by the weighted sum of the rewards; use aggregate: rewards"
    if credit.backup != "mean" and config.rollout.kernel == "cps":
        yield f"credit.backup: {credit.backup} weighs children by their probability, which the cps kernel does not give; use mean or another kernel"
    if config.layer_tuning.weight > 0 and plan != "tree":
        yield "layer_tuning.weight: the supervised term follows the best path of a tree; use plan: tree, or weight 0"


def _advantage(config: Config) -> Iterator[str]:
    a = config.advantage
    for key, value in (("centre", a.centre), ("scale", a.scale)):
        if value == "history" and a.aggregate != "rewards":
            yield f"advantage.aggregate: {key} history remembers the weighted sum of the rewards; use aggregate: rewards"
            break
    if "history" in (a.centre, a.scale) and a.history_least > a.history_size:
        yield f"advantage.history_least: {a.history_least} rewards are never reached with history_size {a.history_size}; use at most {a.history_size}"
    if a.centre == "length_weighted" and config.likelihood != "token":
        yield "advantage.centre: length_weighted weighs answers by their lengths, and pictures have none; use group"
    bounded = [key for key, value in (("centre: virtual_max", a.centre), ("scale: beta", a.scale)) if key.endswith(f" {value}")]
    for key in bounded[:1]:
        if a.aggregate != "rewards":
            yield f"advantage.aggregate: {key} needs the range of the weighted sum of the rewards; use aggregate: rewards"
        if config.reward_weights.kind == "gradient":
            yield f"reward_weights.kind: {key} needs the range of the weighted sum, and gradient changes its weights; use fixed"
        if any(reward.minimum is not None for reward in config.rewards):
            yield f"rewards: a minimum puts samples below the lowest reward, and {key} needs its range; leave it out"
    if config.data.pairs is not None and bounded:
        yield f"data.pairs: stored pairs have no rewards with a range, which {bounded[0]} needs; leave it out"


def _shards(config: Config) -> Iterator[str]:
    """What needs a whole group in one place."""
    rollout, shards = config.rollout, config.rollout.group_shards
    if shards == 1:
        return
    if config.likelihood == "token":
        yield "rollout.group_shards: the answers of a language model to one prompt share its cache; leave it out"
        return
    if rollout.group_size % shards:
        yield f"rollout.group_shards: {rollout.group_size} samples cannot be shared by {shards} parts; use a divisor of group_size"
    if rollout.plan not in ("chain", "window", "ode") or rollout.same_noise:
        what = "samples with the same start noise" if rollout.same_noise else f"the samples of a {rollout.plan} plan"
        yield f"rollout.group_shards: {what} share network rows and stay together; use plan: chain, window or ode with same_noise: false, or group_shards: 1"
    if config.data.pairs is not None or config.objective.name in PAIR_NAMES:
        yield "rollout.group_shards: the two samples of a pair stay together; use group_shards: 1"
    for key, value, idle in (
        ("credit.normalize", config.credit.normalize, "leaf"),
        ("objective.dynamic_clip", config.objective.dynamic_clip, 0.0),
        ("advantage.aggregate", "gdpo" if config.advantage.aggregate == "gdpo" else "", ""),
        ("advantage.transform", config.advantage.transform if config.advantage.transform in ("softmax", "best") else "identity", "identity"),
        ("objective.reduction", config.objective.reduction if config.objective.reduction == "group_mean" else "mean", "mean"),
    ):
        if value != idle:
            yield f"{key}: {value} looks at whole groups, which rollout.group_shards: {shards} takes apart; use another one, or group_shards: 1"


def _training(config: Config) -> Iterator[str]:
    rollout = config.rollout
    images, what = rollout.groups_per_iteration * rollout.group_size, "answers" if config.likelihood == "token" else "images"
    if rollout.group_size < 2 and config.likelihood != "token":
        yield f"rollout.group_size: {rollout.group_size} is too small, a group needs at least 2 samples to compare"
    if config.objective.updates_per_iteration > images:
        yield (
            f"objective.updates_per_iteration: {config.objective.updates_per_iteration} is more than the {images} {what} of an iteration "
            "(groups_per_iteration x group_size)"
        )
    for guidance_scale, name in ((rollout.guidance_scale, "rollout"), (config.evaluation.guidance_scale, "evaluation")):
        if guidance_scale > 1 and config.training.rows_per_forward < 2:
            yield f"training.rows_per_forward: with {name}.guidance_scale > 1 every image takes 2 rows; use at least 2"
    if config.model.prompt_storage == "disk" and config.model.prompt_folder is None:
        yield "model.prompt_storage: disk needs model.prompt_folder"
    if (config.model.height is None) != (config.model.width is None):
        yield "model.height and model.width: give both or neither"
    for where, rewards in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        keys = [reward.key for reward in rewards]
        for name in sorted({key for key in keys if keys.count(key) > 1}):
            yield f"{where}: {name} is listed twice; keep one and set its weight, or give each a label"
    if all(reward.weight == 0 for reward in config.rewards):
        yield "rewards: every weight is 0, nothing would be learned; give at least one reward another weight"


def _several_rewards(config: Config) -> Iterator[str]:
    """Hard constraints, optional rewards and weights that change."""
    weights, weighted = config.reward_weights, [reward for reward in config.rewards if reward.weight != 0]
    if weighted and all(not reward.required for reward in weighted):
        yield "rewards: none that has a weight is required, so a sample might have no reward at all; make one of them required"
    name = config.objective.name
    if name in DIRECT_NAMES:
        for reward in (reward for reward in config.rewards if reward.minimum is not None):
            yield f"rewards: {reward.key} has a minimum, and objective {name} follows gradients of rewards, which know no constraint; leave it out"
    if weights.kind == "fixed":
        return
    where = f"reward_weights.kind: {weights.kind}"
    if name in PAIR_NAMES or name in DIRECT_NAMES:
        yield f"{where} changes advantages, which objective {name} does not use; use fixed"
    if len(weighted) < 2 and weights.kind == "gradient":
        yield f"{where} needs at least two rewards that have a weight; use fixed"
    if weights.kind == "gradient":
        if any(reward.weight < 0 for reward in weighted):
            yield f"{where} keeps weights positive; give positive weights, or use fixed"
        if config.critic is not None or config.advantage.centre in ("history", "ema") or config.advantage.scale == "history":
            yield f"{where} takes the gradient of each reward alone, which a critic or a history of totals cannot give; leave them out, or use fixed"
        return
    if weights.split is not None and weights.split not in config.data.eval:
        yield f"reward_weights.split: {weights.split} is no prompt set of data.eval; use one of {', '.join(config.data.eval)}"
    watched = {reward.key for reward in config.evaluation.rewards or config.rewards}
    for reward in weighted:
        if reward.key not in watched:
            yield f"{where} needs every reward in the evaluation; add {reward.key} to evaluation.rewards"
        if weights.reference is not None and reward.key not in weights.reference:
            yield f"reward_weights.reference: lacks {reward.key}; give a value for every reward that has a weight"


def settings_without_effect(config: Config) -> Iterator[str]:
    """Keys that differ from their default and change nothing in this run, for a warning; a method's own defaults may be among them."""
    rollout, window, credit = config.rollout, config.rollout.window, config.credit
    used_windows = {
        "random": ("start_decay",),
        "progressive": ("every", "stride"),
        "decay": ("every", "every_least", "stride"),
        "exp_decay": ("every", "stride", "exp_rate", "exp_after"),
        "frozen": (),
        "backward": ("backward_first", "backward_stages"),
    }
    always = ("schedule",) if window.schedule == "backward" else ("schedule", "low", "high", "size")
    keep = (*always, *used_windows[window.schedule]) if _has_window(rollout) else ()
    yield from _changed("rollout.window", window, except_for=keep, why="the window's schedule" if _has_window(rollout) else f"plan {rollout.plan}")
    if rollout.plan != "tree":
        yield from _changed("rollout.tree", rollout.tree, why=f"plan {rollout.plan}")
    ode = rollout.plan == "ode"
    unused = {"train_fraction": rollout.plan != "chain", "granularities": rollout.plan != "granular", "solver": not ode}
    unused |= dict.fromkeys(("noise_level", "kernel", "log_prob_reduction"), ode)
    yield from _changed("rollout", rollout, only=[key for key, idle in unused.items() if idle], why=f"plan {rollout.plan}")
    yield from _of_the_likelihood(config)
    if credit.backup == "mean":
        yield from _changed("credit", credit, only=["temperature"], why="backup mean")
    if config.likelihood == "token":
        from flowrl.text.effect_agreement import idle_settings  # which reads classes that read the config's

        yield from idle_settings(config)
    if not (config.likelihood == "token" and OBJECTIVE_NAMES[config.objective.name].kind == "pair"):
        yield from _of_the_advantage(config)
    yield from _of_the_clip(config)
    kind = config.reward_weights.kind
    used = {"hypervolume": ("split", "reference"), "gradient": ("every", "rate"), "fixed": ()}[kind]
    yield from _changed("reward_weights", config.reward_weights, except_for=("kind", *used), why=f"kind {kind}")
    if config.data.pairs is not None:
        yield from (f"rewards: the minimum of {reward.key} has no effect with stored pairs" for reward in config.rewards if reward.minimum is not None)
    if config.layer_tuning.weight == 0:
        yield from _changed("layer_tuning", config.layer_tuning, why="weight 0")


def _of_the_advantage(config: Config) -> Iterator[str]:
    a = config.advantage
    if a.aggregate == "rewards":
        yield from _changed("advantage", a, only=["std_floor"], why="aggregate rewards")
    if "history" not in (a.centre, a.scale):
        yield from _changed("advantage", a, only=["history_size", "history_least"], why=f"centre {a.centre} and scale {a.scale}")
    if a.scale in ("none", "history", "beta"):
        yield from _changed("advantage", a, only=["ddof"], why="scale history, which has ddof 0" if a.scale == "history" else f"scale {a.scale}")
    if a.scale in ("none", "beta"):
        yield from _changed("advantage", a, only=["eps"], why=f"scale {a.scale}")
    used = {"virtual": a.centre == "virtual_max", "decay": a.centre == "ema"}
    used["singleton"] = a.centre in ("group", "leave_one_out", "length_weighted", "virtual_max")
    yield from _changed("advantage", a, only=[key for key, live in used.items() if not live], why=f"centre {a.centre}")


def _of_the_clip(config: Config) -> Iterator[str]:
    o = config.objective
    if not clip_has_effect(o):
        why = "ratio none, which is always 1" if o.ratio == "none" else f"{o.name}, which has no clip"
        yield from _changed("objective", o, only={"clip_low", "clip_high", "dynamic_clip"} & asked(config, "objective"), why=why)


def _of_the_likelihood(config: Config) -> Iterator[str]:
    name, m = config.objective.name, config.matching
    direct, pairs = name in DIRECT_NAMES, name in PAIR_NAMES
    if config.likelihood == "transition" or direct:
        yield from _changed("matching", m, why=f"objective {name}" if direct else "likelihood transition")
    else:
        unused = {"power": m.weighting != "ghuber"}
        unused |= dict.fromkeys(("first_time", "include_first", "time_fraction"), m.times != "grid")
        unused |= {"low": m.times != "uniform", "high": m.times != "uniform", "shift": m.times == "grid"}
        yield from _changed("matching", m, only=[key for key, idle in unused.items() if idle], why=f"weighting {m.weighting} and times {m.times}")
    own = {
        "refl": ("low", "high"),
        "draft": ("last_steps", "random_steps", "renoise", "recompute"),
        "direct_align": ("sigma_low", "sigma_high", "sigma_jump", "inversion"),
    }
    of_all = ("positive_text", "negative_text", "threshold", "scale")
    yield from _changed("direct", config.direct, except_for=(*own[name], *of_all) if direct else (), why=f"objective {name}")
    if pairs or direct:
        yield from _changed("advantage", config.advantage, only=["transform", "temperature"], why=f"objective {name}")
    elif config.advantage.transform not in ("exp", "softmax"):
        yield from _changed("advantage", config.advantage, only=["temperature"], why=f"transform {config.advantage.transform}")
    smoothed = ("dpo", "rpo", "robust_dpo", "length_normalised_dpo", "vpo")
    used = {"beta": OBJECTIVE_NAMES[name].kind == "pair" or name in ("nft", "sppo_group"), "margin": name == "simpo", "sft_weight": name == "rpo"}
    used["label_smoothing"] = name in smoothed
    yield from _changed("objective", config.objective, only=[key for key, live in used.items() if not live], why=f"objective {name}")


def _changed(where: str, section: BaseModel, *, why: str, only: Collection[str] | None = None, except_for: Collection[str] = ()) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        if name not in except_for and (only is None or name in only) and getattr(section, name) != field.default:
            yield f"{where}.{name} has no effect with {why}"
