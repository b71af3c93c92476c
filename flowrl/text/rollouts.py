"""How a run samples its answers: the sections `environment`, `tree`, `partial`, and the credit `segments`; and which of them go with which credit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from flowrl.core.objectives import OBJECTIVES
from flowrl.text.agents import EpisodeRollout
from flowrl.text.partial import PartialRollout
from flowrl.text.segments import SegmentCredit, SegmentRollout
from flowrl.text.trees import TreeRollout
from flowrl.types import Completions, Prompt, Scores

if TYPE_CHECKING:
    from flowrl.config import Config
    from flowrl.policies.causal_lm import CausalLmPolicy
    from flowrl.text.rollout_base import Rollout

__all__ = ["make_rollout", "rollout_disagreements"]

_OF_TURNS = ("gigpo", "igpo", "salt", "turns")
_OF_VALUES = ("gae", "soft_values")
_OF_TREES = {"tree": "token_returns", "branches": "answer"}
"""Credits of answers that fork, and what to use where they do not."""
_OWN_BASELINE = {
    "gae": "the values",
    "risk": "the bundles",
    "segments": "the segments' values",
    "soft_values": "the values",
    "branches": "the branches",
}


def make_rollout(
    config: Config, policy: CausalLmPolicy, credit: object, prompts: Sequence[Sequence[Prompt]], score: Callable[[Sequence[Prompt], Completions], Scores]
) -> Rollout | None:
    """What samples the answers of a run; None = one answer for each member of each group, in one go.

    Args:
        prompts: of training and of every evaluation. score: see `SegmentRollout`.
    Raises:
        UserError: an environment cannot be used.
    """
    if config.environment is not None:
        return EpisodeRollout(config, policy, prompts)
    if config.tree is not None:
        return TreeRollout(config, policy)
    if config.partial is not None:
        return PartialRollout(config, policy)
    return SegmentRollout(config, policy, credit, score) if isinstance(credit, SegmentCredit) else None


def rollout_disagreements(config: Config) -> Iterator[str]:
    """Credits, ways of sampling and values that do not go together."""
    credit, a = config.token_credit, config.advantage
    ways = [name for name in ("environment", "tree", "partial") if getattr(config, name) is not None] + ["token_credit"] * (credit.name == "segments")
    if len(ways) > 1:
        shown = "the segments of token_credit" if ways[1] == "token_credit" else ways[1]
        yield f"{ways[0]}: answers are sampled either so or by {shown}; leave one out"
    if ways and (config.allocation.name != "uniform" or config.allocation.samples):
        yield f"allocation: it decides what is sampled, and so does {ways[0]}; leave one out"
    if config.environment is None and any(reward.name == "episode" for reward in config.rewards):
        yield "rewards: episode is what an environment gives, and there is none; set environment, or choose another reward"
    if credit.name in _OF_TURNS and config.environment is None:
        yield f"token_credit: {credit.name} is of turns in an environment; set environment, or use answer"
    if credit.name in _OF_TREES and config.tree is None:
        yield f"token_credit: {credit.name} is of answers that fork; set tree, or use {_OF_TREES[credit.name]}"
    if credit.name in _OF_VALUES and config.value is None:
        yield f"token_credit: {credit.name} needs values; set value: {{}}"
    if config.value is not None and credit.name not in _OF_VALUES:
        yield f"value: token_credit: {credit.name} does not read it; use gae, or leave it out"
    if (config.objective.name == "oreo") != (credit.name == "soft_values"):
        yield "token_credit: soft_values and objective oreo fit a policy and its values to each other; set both, or neither"
    if credit.name != "branches" and any(part.name == "once" for part in config.tokens.weights):
        yield "tokens.weights: once is of tokens that branches share; set token_credit: {name: branches}, or leave it out"
    if config.partial is not None and credit.name != "gae":
        yield f"partial: an answer that goes on has no reward yet, and token_credit: {credit.name} needs one; use gae"
    if config.partial is not None and "fresh" not in {part.name for part in config.tokens.weights}:
        yield "tokens.weights: with partial, tokens of earlier iterations would be trained again; add fresh"
    if credit.name in _OWN_BASELINE and (a.centre, a.scale) != ("none", "none"):
        yield f"advantage: with token_credit: {credit.name}, {_OWN_BASELINE[credit.name]} say what a reward is compared with; use centre: none, scale: none"
    if credit.name == "consistency" and (a.centre, a.scale) != ("group", "group_std"):
        yield "advantage: with token_credit: consistency it is centre: group, scale: group_std"
    if credit.name == "consistency" and config.objective.name not in OBJECTIVES:
        yield f"token_credit: consistency adds up two losses, which {config.objective.name} cannot; use clipped_surrogate"
    if credit.name in ("gigpo", "turns") and (a.centre != "group" or a.scale not in ("none", "group_std")):
        yield f"advantage: with token_credit: {credit.name} it is centre: group, and scale: none or group_std"
    if credit.name == "tree" and (a.centre, a.scale) != ("group", "none"):
        yield "advantage: with token_credit: tree it is centre: group, scale: none"
    if credit.name == "igpo" and (a.centre, a.scale) != ("group", "none"):
        yield "advantage: with token_credit: igpo it is centre: group, scale: none; its form says what is divided"
    if credit.name == "risk":
        bundle = credit.args.get("bundle", 5)
        if isinstance(bundle, int) and bundle > config.rollout.groups_per_iteration:
            yield f"token_credit: risk needs bundles of {bundle} prompts, and rollout.groups_per_iteration is {config.rollout.groups_per_iteration}; use more"
