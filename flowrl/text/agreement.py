"""Values of a run of a language model that are fine alone and impossible together: one line for each, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from flowrl.core.regularizers import KlKind
from flowrl.mistakes import did_you_mean
from flowrl.text.credit import CREDITS
from flowrl.text.factors import FACTORS
from flowrl.text.objectives import TOKEN_OBJECTIVES
from flowrl.text.parts import part_problems
from flowrl.text.shaping import SHAPERS

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["only_of_text", "token_disagreements"]

_TOKEN_KL: tuple[str, ...] = get_args(KlKind)
_OF_PICTURES = ("credit", "selection", "matching", "anchor", "direct", "layer_tuning")
_OF_STEPS = (("step_weight", "none"), ("dynamic_clip", 0.0))
_OF_TEXT = ("generation", "token_credit", "tokens", "entropy", "value", "environment", "tree", "partial")
_USED_OF_ROLLOUT = ("groups_per_iteration", "group_size")
_SQUARED = ("reg_grpo", "gvpo", "rover")
"""Squared losses, which have no bounds to clip."""


def token_disagreements(config: Config) -> Iterator[str]:
    """One line for every pair of values that do not go together in a run of a language model, with what to do."""
    o, a, kl = config.objective, config.advantage, config.kl
    if o.name not in TOKEN_OBJECTIVES:
        yield f"objective.name: {o.name} is no objective of tokens; {did_you_mean(o.name, TOKEN_OBJECTIVES)}"
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
    if kl.weight > 0 and kl.place == "reward" and config.token_credit.name == "answer":
        yield "kl.place: a price for every token needs a credit of tokens; set token_credit: {name: token_returns}, or kl.place: loss"
    if o.ratio in ("seq_mean", "seq_sum") and config.token_credit.name != "answer":
        yield f"objective.ratio: {o.ratio} moves whole answers, and token_credit: {config.token_credit.name} differs within them; use seq_mean_token"
    if o.ratio == "none" and o.name in ("cispo", "vespo"):
        yield f"objective.ratio: {o.name} weighs by the ratio, and none leaves it 1; use plain"
    if o.reduction == "seq_mean_token_sum_norm" and o.max_length is None and config.generation.max_new_tokens < 1:
        yield "objective.max_length: seq_mean_token_sum_norm needs it"
    if a.transform != "identity":
        yield f"advantage.transform: {a.transform} makes weights of pictures; with likelihood: token use identity"
    if a.centre != "none" and rollout.group_size == 1 and a.centre in ("group", "leave_one_out", "length_weighted", "best_minus_second"):
        yield f"advantage.centre: {a.centre} compares the answers of a group, and rollout.group_size is 1; use batch or ema, or larger groups"
    yield from part_problems("token_credit", CREDITS, config.token_credit.name, config.token_credit.args)
    for part in config.shaping:
        yield from part_problems("shaping", SHAPERS, part.name, part.args)
    for part in config.tokens.weights:
        yield from part_problems("tokens.weights", FACTORS, part.name, part.args)


def only_of_text(config: Config) -> Iterator[str]:
    """Settings of language models in a run of pictures."""
    for name in _OF_TEXT:
        part = getattr(config, name)
        if part is not None and part != type(part)():
            yield f"{name}: it belongs to language models; with likelihood: {config.likelihood} leave it out"
    if config.kl.weight > 0 and config.kl.form in _TOKEN_KL:
        yield f"kl.form: {config.kl.form} compares tokens; with likelihood: {config.likelihood} use fg_code, exact_mean, v_mse, x_mse or v_elbo"
    if config.kl.place == "reward":
        yield f"kl.place: reward takes the price off each token's reward; with likelihood: {config.likelihood} use loss"
