"""All objectives by name: where each lives, what it judges, what it takes. docs/objectives.md has their formulas.

Nothing heavy is imported before an objective is looked at itself (its arguments, or the function).
"""

from __future__ import annotations

import importlib
import inspect
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from flowrl.mistakes import did_you_mean
from flowrl.sections import ObjectiveConfig

__all__ = ["OBJECTIVE_NAMES", "Likelihood", "ObjectiveEntry", "argument_problems", "arguments", "load_objective", "names_of", "parameters"]

Likelihood: TypeAlias = Literal["transition", "matching", "token"]
Kind: TypeAlias = Literal["decisions", "group", "pair", "direct"]


@dataclass(frozen=True, slots=True)
class ObjectiveEntry:
    """What is to be known of an objective without calling it.

    Attributes:
        function: ``module:function``.
        likelihoods: those that it can judge; a direct objective follows the reward's gradient and judges none.
        kind: what it is called with: `Decisions`, `Decisions` of whole groups, `Pairs`, or a differentiable reward.
        needs: what the likelihood must give beyond these: names of arguments of the function, or of fields of `Pairs`.
        clips: objective.clip_low and clip_high have an effect.
        takes_ratio: it compares with the policy that sampled, so old log-probabilities are needed.
        whole: a loss of whole samples, from the log-probability of each of their decisions.
        above_zero: arguments that must be above 0; all other numbers are at least 0.
        more: further functions, ``module:function``, whose arguments ``objective.args`` holds: what the objective chooses tokens or bounds with.
        surrogate: objective.dual_clip and objective.ratio_max have an effect.
    """

    function: str
    likelihoods: tuple[Likelihood, ...]
    kind: Kind = "decisions"
    needs: tuple[str, ...] = ()
    clips: bool = False
    takes_ratio: bool = True
    whole: bool = False
    above_zero: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    surrogate: bool = False


_ANY: tuple[Likelihood, ...] = ("transition", "matching", "token")
_SAMPLED: tuple[Likelihood, ...] = ("transition", "token")
_TOKEN: tuple[Likelihood, ...] = ("token",)
_PICTURE_PAIRS: tuple[Likelihood, ...] = ("matching", "token")
_OBJECTIVES, _GATES, _GROUPS = "flowrl.core.objectives", "flowrl.core.gates", "flowrl.core.group_gates"
_BOUNDS, _WEIGHTS, _GATED, _COVARIANCE = "flowrl.core.bounds", "flowrl.core.token_weights", "flowrl.text.gated", "flowrl.text.covariance"
_PREFERENCE, _PAIRS, _LISTS = "flowrl.core.preference", "flowrl.core.pair_losses", "flowrl.core.list_losses"


def _group(function: str, *needs: str, above_zero: tuple[str, ...] = ("beta",), more: tuple[str, ...] = ()) -> ObjectiveEntry:
    return ObjectiveEntry(function, _TOKEN, "group", needs=("group", "num_groups", *needs), whole=True, above_zero=above_zero, more=more)


def _pair(name: str, *needs: str, above_zero: tuple[str, ...] = ()) -> ObjectiveEntry:
    return ObjectiveEntry(f"{_PAIRS}:{name}", _TOKEN, "pair", needs=needs, takes_ratio=False, above_zero=above_zero)


OBJECTIVE_NAMES: dict[str, ObjectiveEntry] = {
    "clipped_surrogate": ObjectiveEntry(f"{_OBJECTIVES}:clipped_surrogate", _ANY, clips=True, surrogate=True),
    "reinforce": ObjectiveEntry(f"{_OBJECTIVES}:reinforce", _ANY, takes_ratio=False),
    "sapo": ObjectiveEntry(f"{_GATES}:sapo", _ANY, above_zero=("temperature_positive", "temperature_negative")),
    "cispo": ObjectiveEntry(f"{_GATES}:cispo", _ANY, clips=True),
    "mdpo": ObjectiveEntry(f"{_GATES}:mdpo", _ANY),
    "bgpo": ObjectiveEntry(f"{_GATES}:bgpo", _ANY),
    "gmpo": ObjectiveEntry(f"{_GATES}:gmpo", _SAMPLED, clips=True, whole=True),
    "vespo": ObjectiveEntry(f"{_GATES}:vespo", _SAMPLED, whole=True, above_zero=("positive", "negative")),
    "kimi": ObjectiveEntry(f"{_GATES}:kimi", _SAMPLED, whole=True),
    "nft": ObjectiveEntry(f"{_OBJECTIVES}:nft", ("matching",), needs=("negative_log_prob",), takes_ratio=False, above_zero=("scale",)),
    "rover": ObjectiveEntry(f"{_GATES}:rover", _TOKEN, needs=("next_value",), above_zero=("kappa",)),
    "token_nft": ObjectiveEntry(f"{_GATES}:token_nft", _TOKEN, needs=("success_rate",)),
    "rl_plus_off_policy": ObjectiveEntry(f"{_GATES}:rl_plus_off_policy", _TOKEN, needs=("is_foreign",), clips=True, surrogate=True),
    "chord": ObjectiveEntry("flowrl.text.mixed:chord", _TOKEN, needs=("is_expert", "iteration", "own_scale", "expert_scale"), clips=True),
    "remix": ObjectiveEntry("flowrl.text.mixed:remix", _TOKEN, needs=("proximal_log_prob",), clips=True),
    "lp_reg": ObjectiveEntry(
        f"{_GATES}:lp_reg",
        _TOKEN,
        needs=("base", "selected", "proxy_log_prob"),
        clips=True,
        more=(f"{_WEIGHTS}:low_probability_selection",),
        surrogate=True,
    ),
    "annealed_mdpo": ObjectiveEntry(f"{_GATES}:mdpo", _TOKEN),
    "bapo": ObjectiveEntry(
        f"{_OBJECTIVES}:clipped_surrogate",
        _TOKEN,
        above_zero=("low_step", "high_step"),
        more=tuple(f"{_BOUNDS}:{name}" for name in ("bound_candidates", "bound_statistics", "choose_bounds")),
        surrogate=True,
    ),
    "capo": ObjectiveEntry(f"{_GATED}:capo", _TOKEN, needs=("square_sum",), clips=True, above_zero=("step", "threshold"), surrogate=True),
    "clip_cov": ObjectiveEntry(f"{_COVARIANCE}:clip_cov", _TOKEN, needs=("dropped",), clips=True),
    "kl_cov": ObjectiveEntry(f"{_COVARIANCE}:kl_cov", _TOKEN, needs=("held",)),
    "oreo": ObjectiveEntry("flowrl.core.soft_values:oreo", _TOKEN, needs=("value", "ref_log_prob"), takes_ratio=False, above_zero=("beta",)),
    "reg_grpo": _group(f"{_GROUPS}:reg_grpo", above_zero=("scale", "min_std")),
    "gvpo": _group(f"{_GROUPS}:gvpo", "ref_log_prob"),
    "drpo": _group(f"{_GROUPS}:drpo", above_zero=("temperature", "length_scale", "max_length"), more=("flowrl.core.regularizers:kl_barrier",)),
    "copg_group": _group(f"{_LISTS}:copg_group", "ref_log_prob"),
    "sppo_group": _group(f"{_LISTS}:sppo_group"),
    "trpa": _group(f"{_LISTS}:trpa", "level", above_zero=("beta", "top_strength")),
    "lipo": _group(f"{_LISTS}:lipo", "ref_log_prob", above_zero=("beta", "tie")),
    "a_star_po": _group("flowrl.core.soft_values:a_star_po", "ref_log_prob"),
    "dpo": ObjectiveEntry(f"{_PREFERENCE}:dpo", _PICTURE_PAIRS, "pair", needs=("reference",), takes_ratio=False),
    "ipo": ObjectiveEntry(f"{_PREFERENCE}:ipo", _PICTURE_PAIRS, "pair", needs=("reference",), takes_ratio=False),
    "simpo": ObjectiveEntry(f"{_PREFERENCE}:simpo", _PICTURE_PAIRS, "pair", takes_ratio=False),
    "rpo": ObjectiveEntry(f"{_PREFERENCE}:rpo", _PICTURE_PAIRS, "pair", needs=("reference",), takes_ratio=False),
    "robust_dpo": _pair("robust_dpo", "reference"),
    "length_normalised_dpo": _pair("length_normalised_dpo", "reference"),
    "vpo": _pair("vpo", "reference"),
    "sppo": _pair("sppo", "previous"),
    "dno": _pair("dno", "previous", "reward"),
    "inpo": _pair("inpo", "reference", "previous"),
    "rebel": _pair("rebel", "previous", "reward"),
    "copg": _pair("copg", "reference", "reward"),
    "osp": _pair("osp", "reference", "preference"),
    "srpo": _pair("srpo", "reference", "revising"),
    "p3o": _pair("p3o", "reference", "previous", "reward", above_zero=("clip",)),
    "refl": ObjectiveEntry("flowrl.updates.direct:DirectUpdate", (), "direct", takes_ratio=False),
    "draft": ObjectiveEntry("flowrl.updates.direct:DirectUpdate", (), "direct", takes_ratio=False),
    "direct_align": ObjectiveEntry("flowrl.updates.direct:DirectUpdate", (), "direct", takes_ratio=False),
}
"""Name -> what is known of it."""


def names_of(kind: Kind, likelihood: Likelihood | None = None) -> tuple[str, ...]:
    """Objectives of a kind, and of a likelihood (None = all)."""
    return tuple(name for name, entry in OBJECTIVE_NAMES.items() if entry.kind == kind and (likelihood is None or likelihood in entry.likelihoods))


def load_objective(name: str) -> Callable[..., Any]:
    """The function of an objective."""
    return _load(OBJECTIVE_NAMES[name].function)


def _load(place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


@cache
def parameters(name: str) -> Mapping[str, Any]:
    """What ``objective.args`` may hold: parameter -> its type. Those that have a key of their own in the section, such as clip_low, are not among them."""
    entry = OBJECTIVE_NAMES[name]
    if entry.kind == "direct":
        return {}
    known = {"clip_low", "clip_high", "dual_clip", "ratio_max", "centre", *entry.needs}
    known |= {"beta", "margin", "sft_weight", "label_smoothing"} if entry.kind == "pair" else set()
    found = [p for place in (entry.function, *entry.more) for p in inspect.signature(_load(place), eval_str=True).parameters.values()]
    return {p.name: p.annotation for p in found if p.kind is p.KEYWORD_ONLY and p.default is not p.empty and p.name not in known}


def arguments(config: ObjectiveConfig) -> dict[str, Any]:
    """``objective.args`` as the function takes them."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.args.items()}


def argument_problems(config: ObjectiveConfig) -> Iterator[str]:
    """One line for each mistake in ``objective.args`` of a known objective."""
    if not config.args:
        return
    name, known = config.name, parameters(config.name)
    for key, value in config.args.items():
        if key not in known:
            if key in ObjectiveConfig.model_fields and key != "args":
                yield f"objective.args: {key} has a key of its own; write objective.{key}"
            elif known:
                yield f"objective.args: {name} takes {', '.join(known)}, not {key}; {did_you_mean(key, known)}"
            else:
                yield f"objective.args: {name} takes no arguments beside the keys of the section; remove {key}"
        elif wanted := _wanted(known[key], value, key in OBJECTIVE_NAMES[name].above_zero):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            yield f"objective.args: {key} = {shown} of {name} is not {wanted}"


def _wanted(annotation: Any, value: Any, above_zero: bool) -> str:
    """What a value should have been, or nothing where it fits."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        rest = [part for part in parts if part is not type(None)]
        if value is None and len(rest) < len(parts):
            return ""
        return _wanted(rest[0], value, above_zero)
    if origin is Literal:
        return "" if value in parts else f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            return f"a list of {len(parts)} numbers"
        lines = [wanted for part, one in zip(parts, value, strict=True) if (wanted := _wanted(part, one, above_zero))]
        return f"{len(parts)} numbers, each {lines[0]}" if lines else ""
    if annotation is bool:
        return "" if isinstance(value, bool) else "true or false"
    if annotation is str:
        return "" if isinstance(value, str) else "text"
    number = "a whole number" if annotation is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int if annotation is int else int | float) or not math.isfinite(value):
        return number
    if value < 0 or (above_zero and value == 0):
        return f"{number} {'above 0' if above_zero else 'of at least 0'}"
    return ""
