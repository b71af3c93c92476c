"""Values of a run's allocation, samples and shaping that are impossible together: one line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flowrl.allocation import ALLOCATORS
from flowrl.objective_names import OBJECTIVE_NAMES
from flowrl.text.parts import make_part, part_problems
from flowrl.text.rounds import SOURCES
from flowrl.text.shaping import SHAPERS
from flowrl.types import UserError

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["sample_disagreements"]

_UNEVEN = ("dynamic", "past", "knapsack", "xrpo")
"""Allocators that gather groups, or ask prompts differently often."""
_OF_EXPERTS = ("chord", "rl_plus_off_policy")


def sample_disagreements(config: Config) -> Iterator[str]:
    """One line for every pair of values that do not go together, with what to do."""
    a, o = config.allocation, config.objective
    sources = {part.name: part.args for part in a.samples}
    shapers = {part.name: part.args for part in config.shaping}
    yield from _problems("allocation", ALLOCATORS, a.name, a.args)
    for part in a.samples:
        yield from _problems("allocation.samples", SOURCES, part.name, part.args)
    for part in config.shaping:
        if not any(part_problems("shaping", SHAPERS, part.name, part.args)):  # those have been told
            yield from _problems("shaping", SHAPERS, part.name, part.args)
    if len(sources) < len(a.samples):
        yield "allocation.samples: one of them stands there twice; keep one"
    if (sources or a.name == "past") and (config.generation.engine != "transformers" or config.generation.importance not in (None, "none")):
        yield "allocation: answers from elsewhere have no log-probabilities of a sampling engine; use generation: {engine: transformers, importance: none}"
    if "expert" not in sources:
        if o.name in _OF_EXPERTS:
            yield f"objective.name: {o.name} learns from an expert's answers; add allocation: {{samples: [expert]}}"
        for name in ("inserted", "constraint_gate"):
            if name in shapers:
                yield f"shaping: {name} compares with an expert's answer; add allocation: {{samples: [expert]}}"
    if "expert" in sources:
        for name in {"rank_unlikely", "novelty"} & shapers.keys():
            yield f"shaping: {name} compares how likely answers were, and nobody sampled the expert's; take expert out of allocation.samples"
        if o.name in ("clip_cov", "kl_cov", "lp_reg"):
            yield f"objective.name: {o.name} chooses tokens by how likely they were, and nobody sampled the expert's; take expert out of allocation.samples"
    if ("exits" in sources) != ("exit_decay" in shapers):
        yield "shaping: exit_decay and the source exits of allocation.samples belong together; add the other one"
    if "exits" in sources and (len(sources) > 1 or a.name in _UNEVEN):
        yield "allocation.samples: exits make whole groups of equal size; use no other source with them, and an allocator that asks every prompt equally often"
    if a.name in ("past", "dynamic") and o.name in OBJECTIVE_NAMES and not OBJECTIVE_NAMES[o.name].takes_ratio and (a.name == "past" or a.args.get("carry")):
        yield f"objective.name: {o.name} does not look at the policy that sampled, and allocation keeps answers of earlier ones; use one with a ratio"
    expert = sources.get("expert", {})
    own = config.rollout.group_size - bool(expert.get("within"))
    if "expert" in sources and own == 1 and not expert.get("statistics") and config.advantage.centre in ("group", "leave_one_out"):
        yield "rollout.group_size: beside the expert's answer one is left, which has nobody to be compared with; use larger groups"
    if shapers.get("inserted", {}).get("kind") == "anchor" and expert.get("statistics"):
        yield "shaping: inserted anchors the expert's advantage to the others', which must not depend on it; set statistics: false of the source expert"
    if "position_bonus" in shapers and shapers["position_bonus"].get("marker") is None and getattr(config, "environment", None) is None:
        yield "shaping: position_bonus finds a call by the text that it begins with; give its marker, or an environment"
    if config.token_credit.name != "answer":
        for name in ("novelty", "position_bonus", "inserted"):
            if name in shapers and not (name == "inserted" and shapers[name].get("kind") != "anchor"):
                yield f"shaping: {name} changes advantages of whole answers, and token_credit: {config.token_credit.name} differs within them; use answer"
    if config.reward_weights.kind == "gradient":
        for name in {"gate_product", "constraint_gate"} & shapers.keys():
            yield f"shaping: {name} reads several rewards at once, and reward_weights: gradient measures each alone; use fixed weights"
    if config.reward_weights.kind == "gradient" and "history_length" in shapers:
        yield "shaping: history_length remembers what it has seen, and reward_weights: gradient looks several times; use fixed weights"


def _problems(where: str, table: Mapping[str, Callable[..., Any]], name: str, args: Mapping[str, Any]) -> Iterator[str]:
    try:
        make_part(where, table, name, args)
    except UserError as error:
        yield str(error)
