"""Which objective goes with which ratio, reduction and plan: one line for each choice that cannot work. A part of `flowrl.agreement`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowrl.mistakes import did_you_mean
from flowrl.objective_names import OBJECTIVE_NAMES, argument_problems, names_of
from flowrl.sections import ObjectiveConfig

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["SEQUENCE_RATIOS", "clip_has_effect", "judges_whole_samples", "objective_disagreements", "trains_whole_samples"]

SEQUENCE_RATIOS = ("seq_mean", "seq_mean_token", "seq_sum")
"""Levels of `objective.ratio` that need all decisions of a sample at once."""

_OF_LIKELIHOOD = {"transition": "SDE steps", "matching": "noised samples", "token": "tokens"}


def judges_whole_samples(objective: ObjectiveConfig) -> bool:
    """Whether one number stands for all decisions of a sample, so that they must have one advantage."""
    return objective.ratio in ("seq_mean", "seq_sum") or OBJECTIVE_NAMES[objective.name].whole


def trains_whole_samples(objective: ObjectiveConfig) -> bool:
    """Whether all decisions of a sample must be in one micro-batch."""
    return objective.ratio in SEQUENCE_RATIOS or OBJECTIVE_NAMES[objective.name].whole


def clip_has_effect(objective: ObjectiveConfig) -> bool:
    """Whether clip_low and clip_high change anything."""
    return OBJECTIVE_NAMES[objective.name].clips and objective.ratio != "none"


def objective_disagreements(config: Config) -> Iterator[str]:
    """One line for every value of `objective` that cannot work here, with what to do. The name must be known, see `unknown_objective`."""
    o, likelihood = config.objective, config.likelihood
    entry = OBJECTIVE_NAMES[o.name]
    yield from argument_problems(o)
    if entry.kind == "direct" and likelihood == "token":
        yield f"objective.name: {o.name} differentiates a reward through the picture, and text has none; use another objective"
    elif entry.kind != "direct" and likelihood not in entry.likelihoods:
        yield _wrong_likelihood(o.name, likelihood)
    if o.dual_clip is not None and not entry.surrogate:
        yield f"objective.dual_clip: it bounds the clipped surrogate, not {o.name}; leave it out"
    if o.ratio_max is not None and not entry.surrogate:
        yield f"objective.ratio_max: it bounds the clipped surrogate, not {o.name}; leave it out"
    if o.ratio == "none":
        if o.ratio_max is not None:
            yield "objective.ratio_max: with ratio: none every ratio is 1; leave it out"
        if o.name == "cispo":
            yield "objective.ratio: cispo caps ratios, and with none every ratio is 1; use plain, or objective reinforce"
    if entry.whole and o.ratio != "plain":
        yield f"objective.ratio: {o.name} makes its own ratio of the whole sample from plain ones; use plain"
    if entry.kind in ("group", "pair") and likelihood == "token" and o.ratio != "plain" and not entry.whole:
        yield f"objective.ratio: {o.name} has no ratio of a decision; use plain"
    if o.max_length is not None and o.reduction != "seq_mean_token_sum_norm":
        yield f"objective.max_length: it is the constant of seq_mean_token_sum_norm, not of {o.reduction}; leave it out"
    if likelihood == "transition" and entry.kind == "decisions":
        yield from _steps(config)
    elif likelihood == "token":
        yield from _tokens(config)
    elif o.reduction not in ("mean", "group_mean"):
        what = f"objective {o.name}" if entry.kind == "direct" else f"likelihood: {likelihood}"
        yield f"objective.reduction: {o.reduction} is of the steps of a sample, or of tokens; with {what} use mean or group_mean"


def unknown_objective(name: str) -> str:
    """The line for a name that is no objective's, or nothing."""
    return "" if name in OBJECTIVE_NAMES else f"objective.name: unknown objective {name}; {did_you_mean(name, OBJECTIVE_NAMES)}"


def _wrong_likelihood(name: str, likelihood: str) -> str:
    entry = OBJECTIVE_NAMES[name]
    able = " or ".join(entry.likelihoods if likelihood == "token" else [other for other in entry.likelihoods if other != "token"])
    if entry.likelihoods == ("token",):
        return f"objective.name: {name} is made for the tokens of a language model; use another objective, or a language model with likelihood: token"
    if entry.kind == "pair" or name == "nft":
        return f"objective.name: {name} judges finished samples; set likelihood: {able}"
    others = ", ".join(other for other in names_of("decisions") if likelihood in OBJECTIVE_NAMES[other].likelihoods)
    return f"objective.name: {name} does not judge {_OF_LIKELIHOOD[likelihood]}; set likelihood: {able}, or use one of {others}"


def _steps(config: Config) -> Iterator[str]:
    """SDE steps: a sample has several, unless samples share them."""
    o, rollout = config.objective, config.rollout
    whole = f"ratio: {o.ratio}" if o.ratio in SEQUENCE_RATIOS else f"objective {o.name}"
    if trains_whole_samples(o):
        if rollout.plan in ("tree", "granular"):
            yield f"rollout.plan: {whole} judges a sample by all its steps, and samples of a {rollout.plan} plan share theirs; use chain or window"
        steps, shared = (rollout.chain_steps if rollout.plan == "chain" else _longest_window(config)), rollout.same_noise
        rows, unit = (1 + (steps - 1) * rollout.group_size, "group of one start noise") if shared else (steps, "sample")
        if config.training.rows_per_backward < rows:
            yield (
                f"training.rows_per_backward: {config.training.rows_per_backward} is less than the {rows} rows of a {unit}, which {whole} trains together; "
                f"use at least {rows}"
            )
        if shared and o.updates_per_iteration > rollout.groups_per_iteration:
            yield (
                f"objective.updates_per_iteration: {o.updates_per_iteration} is more than the {rollout.groups_per_iteration} groups of one start noise, which "
                f"{whole} trains together; use fewer"
            )
    if judges_whole_samples(o):
        if config.credit.normalize != "leaf" or config.credit.backup != "mean":
            yield f"credit: {whole} has one advantage for all steps of a sample; use normalize: leaf and backup: mean, or ratio: seq_mean_token"
        if o.step_weight != "none":
            yield f"objective.step_weight: {o.step_weight} weighs single steps, and {whole} judges them together; use none"
        if o.dynamic_clip > 0:
            yield f"objective.dynamic_clip: it gives each step its own bounds, and {whole} judges them together; use 0"
    if o.reduction == "seq_mean_token_sum_norm" and o.max_length is None and rollout.plan == "window" and rollout.window.schedule == "backward":
        yield "objective.max_length: the number of trained steps grows here; give the constant"


def _longest_window(config: Config) -> int:
    window = config.rollout.window
    return config.rollout.num_steps - 1 if window.schedule == "backward" else window.size


def _tokens(config: Config) -> Iterator[str]:
    o = config.objective
    if clip_has_effect(o) and o.ratio == "plain" and max(o.clip_low, o.clip_high) <= 1e-3:
        yield f"objective.clip_low: {o.clip_low:g} is a range of SDE steps, and would stop nearly every token; use about 0.2"
