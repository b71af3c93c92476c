"""Values of a run of a language model that are fine alone and impossible together: one line for each, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, get_args

from flowrl.core.bounds import bound_candidates
from flowrl.core.regularizers import KlKind
from flowrl.mistakes import did_you_mean
from flowrl.objective_agreement import objective_disagreements
from flowrl.objective_names import OBJECTIVE_NAMES, argument_problems, arguments
from flowrl.text.credit import CREDITS
from flowrl.text.effect_agreement import effect_disagreements
from flowrl.text.factors import FACTORS
from flowrl.text.objectives import TOKEN_OBJECTIVES
from flowrl.text.pair_agreement import pair_disagreements
from flowrl.text.parts import part_problems
from flowrl.text.reward_agreement import reward_disagreements
from flowrl.text.rollouts import rollout_disagreements
from flowrl.text.sample_agreement import sample_disagreements
from flowrl.text.shaping import SHAPERS
from flowrl.text.terms import band_arguments

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["only_of_text", "token_disagreements"]

_TOKEN_KL: tuple[str, ...] = get_args(KlKind)
_OF_PICTURES = ("credit", "selection", "matching", "direct", "layer_tuning")
_OF_STEPS = (("step_weight", "none"), ("dynamic_clip", 0.0))
_OF_TEXT = ("generation", "token_credit", "tokens", "entropy", "value", "environment", "tree", "partial", "pairing")
_USED_OF_ROLLOUT = ("groups_per_iteration", "group_size")
_SQUARED = ("reg_grpo", "gvpo", "rover", "kimi", "oreo")
"""Squared losses, which have no bounds to clip."""
_PLAIN = ("rover", "oreo", "token_nft", "lp_reg", "capo", "clip_cov", "kl_cov", "remix")
"""Objectives that read the log-probability of the token itself, or choose single tokens."""


def token_disagreements(config: Config) -> Iterator[str]:
    """One line for every pair of values that do not go together in a run of a language model, with what to do."""
    o, a, kl = config.objective, config.advantage, config.kl
    if o.name not in TOKEN_OBJECTIVES:
        yield f"objective.name: {o.name} is no objective of tokens; {did_you_mean(o.name, TOKEN_OBJECTIVES)}"
    elif o.name in OBJECTIVE_NAMES:
        yield from objective_disagreements(config)
        yield from _of_the_objective(config)
        yield from effect_disagreements(config)
    for name in _OF_PICTURES:
        part = getattr(config, name)
        if part != type(part)():
            yield f"{name}: it belongs to models of pictures; with likelihood: token leave it out"
    rollout, plain = config.rollout, type(config.rollout)()
    for name in type(rollout).model_fields:
        if name not in _USED_OF_ROLLOUT and getattr(rollout, name) != getattr(plain, name):
            yield f"rollout.{name}: it belongs to models of pictures; with likelihood: token leave it out, and see `generation`"
    for name, idle in _OF_STEPS:
        if getattr(o, name) != idle:
            yield f"objective.{name}: it belongs to SDE steps; with likelihood: token leave it out"
    if o.ratio == "ratio_norm":
        yield "objective.ratio: ratio_norm is the ratio of Gaussian steps; with likelihood: token use plain, or a level such as seq_mean"
    if config.critic is not None:
        yield "critic: it judges noised pictures; with likelihood: token use `value`"
    if kl.weight > 0 and kl.form not in _TOKEN_KL:
        yield f"kl.form: {kl.form} compares velocities; with likelihood: token use {', '.join(_TOKEN_KL)}"
    priced, credit = any(part.name == "kl_price" for part in config.shaping), config.token_credit.name
    takes_price = getattr(CREDITS.get(credit), "takes_price", False)
    if kl.weight > 0 and kl.place == "loss" and kl.form == "k1":
        yield "kl.form: k1 has no gradient on average as a term of the loss; use k2, k3 or k3_k2, or kl.place: reward"
    if kl.weight > 0 and kl.place == "reward" and credit == "answer" and not priced:
        yield "kl.place: a price for every token needs a credit of tokens; set token_credit: {name: token_returns}, shaping: [kl_price], or kl.place: loss"
    if kl.weight > 0 and kl.place == "reward" and credit != "answer" and credit in CREDITS and not takes_price:
        yield f"kl.place: token_credit: {credit} takes no price off the reward of a token; use kl: {{place: loss, form: k3}}"
    if priced and not (kl.weight > 0 and kl.place == "reward"):
        yield "shaping: kl_price takes kl.weight off rewards; set kl: {weight: 0.03, place: reward}, or leave it out"
    if priced and takes_price:
        yield f"shaping: kl_price and token_credit: {credit} would both take the price; leave one of them out"
    yield from _of_the_entropy(config)
    if o.ratio in ("seq_mean", "seq_sum") and config.token_credit.name != "answer":
        yield f"objective.ratio: {o.ratio} moves whole answers, and token_credit: {config.token_credit.name} differs within them; use seq_mean_token"
    if o.reduction == "seq_mean_token_sum_norm" and o.max_length is None and config.generation.max_new_tokens < 1:
        yield "objective.max_length: seq_mean_token_sum_norm needs it"
    yield from reward_disagreements(config)
    if a.transform != "identity":
        yield f"advantage.transform: {a.transform} makes weights of pictures; with likelihood: token use identity"
    if a.centre != "none" and rollout.group_size == 1 and a.centre in ("group", "leave_one_out", "length_weighted", "best_minus_second"):
        yield f"advantage.centre: {a.centre} compares the answers of a group, and rollout.group_size is 1; use batch or ema, or larger groups"
    yield from rollout_disagreements(config)
    yield from pair_disagreements(config)
    yield from part_problems("token_credit", CREDITS, config.token_credit.name, config.token_credit.args)
    for part in config.shaping:
        yield from part_problems("shaping", SHAPERS, part.name, part.args)
    yield from sample_disagreements(config)
    for part in config.tokens.weights:
        yield from part_problems("tokens.weights", FACTORS, part.name, part.args)
        if part.name == "divergence" and config.training.sharding != "none":
            yield f"tokens.weights: divergence needs the output head whole, and training.sharding is {config.training.sharding}; set none, or leave it out"


def _of_the_objective(config: Config) -> Iterator[str]:
    """What the objective needs of advantages, bounds, and the size of a micro-batch."""
    o, a = config.objective, config.advantage
    entry, plain = OBJECTIVE_NAMES[o.name], type(o)()
    if o.name in _SQUARED and (o.clip_low, o.clip_high) != (plain.clip_low, plain.clip_high):
        yield f"objective.clip_low: {o.name} is a squared loss and has nothing to clip; leave clip_low and clip_high out"
    if o.name in _PLAIN and o.ratio != "plain":
        yield f"objective.ratio: {o.name} reads the log-probability of each token; use plain"
    if entry.whole and config.token_credit.name != "answer":
        yield f"objective.name: {o.name} judges whole answers, and token_credit: {config.token_credit.name} differs within them; use answer"
    if o.name == "token_nft":
        if (a.centre, a.scale) != ("none", "none"):
            yield f"advantage: token_nft takes rewards as they are, not centre {a.centre} and scale {a.scale}; set centre: none and scale: none"
        if config.token_credit.name != "answer":
            yield f"token_credit: token_nft asks whether an answer is right, and {config.token_credit.name} differs within it; use answer"
    if o.name == "bapo" and not list(argument_problems(o)):
        known = signature(bound_candidates).parameters
        try:
            bound_candidates(**{name: value for name, value in arguments(o).items() if name in known})
        except ValueError as error:
            yield f"objective.args: {error}"
    size, rows = config.rollout.group_size, config.training.rows_per_backward
    if entry.kind == "group" and rows < size:
        yield f"training.rows_per_backward: {rows} is less than the {size} answers of a group, which {o.name} trains together; use at least {size}"


def _of_the_entropy(config: Config) -> Iterator[str]:
    e = config.entropy
    if e.band > 0 and e.target is not None:
        yield "entropy.band: it and target each have bounds under entropy.args; use one of them"
    elif e.band > 0 and e.weight <= 0:
        yield f"entropy.band: it is multiplied with entropy.weight, which is {e.weight:g}; set a weight above 0"
    elif e.band > 0:
        yield from _fits("entropy.args", band_arguments, e.args)
    elif e.target is not None:
        yield from _fits("entropy.args", _controller_arguments, e.args)
    elif e.args:
        yield f"entropy.args: {', '.join(e.args)} belong to target or band, and there is neither; leave them out"


def _controller_arguments(step: float = 0.005, low: float = 0.0, high: float = math.inf) -> None:
    """Of `EntropyController`, beside its target and its first coefficient."""
    if not (step > 0 and 0 <= low <= high):
        raise ValueError(f"step {step} must be above 0, and low {low} in 0 to high {high}")


def _fits(where: str, function: Callable[..., object], args: Mapping[str, Any]) -> Iterator[str]:
    """One line where a function does not take these arguments."""
    problems = list(part_problems(where, {where: function}, where, args))
    if problems:
        yield problems[0].replace(f"{where}: {where} has", f"{where}: there is")
        return
    try:
        function(**args)
    except (TypeError, ValueError) as error:
        yield f"{where}: {error}"


def only_of_text(config: Config) -> Iterator[str]:
    """Settings of language models in a run of pictures."""
    for name in _OF_TEXT:
        if getattr(config, name) != type(config).model_fields[name].default:
            yield f"{name}: it belongs to language models; with likelihood: {config.likelihood} leave it out"
    if config.evaluation.greedy:
        yield f"evaluation.greedy: it belongs to language models; with likelihood: {config.likelihood} leave it out"
    if config.kl.weight > 0 and config.kl.form in _TOKEN_KL:
        yield f"kl.form: {config.kl.form} compares tokens; with likelihood: {config.likelihood} use fg_code, exact_mean, v_mse, x_mse or v_elbo"
    if config.kl.place == "reward":
        yield f"kl.place: reward takes the price off each token's reward; with likelihood: {config.likelihood} use loss"
