"""Several rewards and hard constraints in a run of a language model: one line for each pair of values that is impossible together, with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowrl.objective_names import OBJECTIVE_NAMES
from flowrl.text.shapers import ShaperBase
from flowrl.text.shaping import SHAPERS

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["reward_disagreements"]

_OF_THE_SUM = ("gae", "risk", "consistency", "gigpo", "igpo", "tree", "segments", "branches", "soft_values")
"""Credits that compare the weighted sum of the rewards in their own way."""
_READ_REWARDS = ("token_nft", "copg_group", "lipo", "trpa", "a_star_po")
"""Objectives of answers and lists that read rewards, not only advantages."""
_REPLACE = ("win_rate", "length_rank", "exit_decay", "gate_product", "rank_unlikely", "constraint_gate")
"""Shapers that put something else in the place of the weighted sum. The others add to it, or change advantages."""


def reward_disagreements(config: Config) -> Iterator[str]:
    """What an advantage of each reward, a minimum, and weights that change do not go with."""
    kind = config.reward_weights.kind
    if config.token_credit.name == "turns":
        yield from _of_turns(config)
    if config.token_credit.name == "soft_values" and kind != "fixed":
        yield f"reward_weights.kind: {kind} changes what the policy is fitted to, and not what the values of token_credit: soft_values are; use fixed"
    if config.advantage.aggregate != "rewards" and config.data.pairs is None:
        yield from _of_the_aggregate(config)
    limited = [reward.key for reward in config.rewards if reward.minimum is not None]
    if not limited:
        return
    if config.objective.name == "token_nft":
        yield f"rewards: the minimum of {limited[0]} puts answers below 0, and token_nft takes rewards that are 0 or 1; leave it out"
    if config.partial is not None:
        yield f"rewards: the minimum of {limited[0]} ranks the answers of a group, and with partial some are not finished; leave it out"


def _of_turns(config: Config) -> Iterator[str]:
    """`TurnCredit` reads no reward."""
    reads, aggregate = "token_credit: turns reads only what the environment gives for each turn", config.advantage.aggregate
    if aggregate != "rewards":
        yield f"advantage.aggregate: {aggregate} gives each reward an advantage, and {reads}; use aggregate: rewards"
    for reward in (reward for reward in config.rewards if reward.minimum is not None):
        yield f"rewards: the minimum of {reward.key} does nothing, since {reads}; leave it out"
    for part in config.shaping:
        if getattr(SHAPERS.get(part.name), "rewards", ShaperBase.rewards) is not ShaperBase.rewards:
            yield f"shaping: {part.name} changes rewards, and {reads}; leave it out"
    if config.reward_weights.kind != "fixed":
        yield f"reward_weights.kind: {config.reward_weights.kind} weighs rewards, and {reads}; use fixed"


def _of_the_aggregate(config: Config) -> Iterator[str]:
    name, credit, where = config.objective.name, config.token_credit.name, f"advantage.aggregate: {config.advantage.aggregate}"
    entry = OBJECTIVE_NAMES.get(name)
    if name in _READ_REWARDS or (entry is not None and entry.kind == "pair"):
        yield f"{where} gives each reward an advantage, and {name} compares the weighted sum of the rewards; use aggregate: rewards"
    if credit in _OF_THE_SUM:
        yield f"{where} gives each reward an advantage, and token_credit: {credit} compares their weighted sum; use aggregate: rewards"
    for part in config.shaping:
        if part.name in _REPLACE or (part.name == "inserted" and part.args.get("kind") != "anchor"):
            yield f"{where} gives each reward an advantage, and shaping: {part.name} replaces their weighted sum; use aggregate: rewards"
