"""Settings of a run of a language model that would change nothing: those that contradict another value, and those that are only worth a warning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowrl.objective_names import OBJECTIVE_NAMES
from flowrl.stated import asked
from flowrl.text.batch import trains_later

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["effect_disagreements", "idle_settings"]

_OF_PICTURES = {"evaluation": ("num_steps", "guidance_scale", "compare_guidance_scales"), "training": ("offload_rollouts",)}
_KEPT_ANSWERS = ("past", "dynamic")
"""Allocators that train answers of earlier iterations, or may."""
_OF_THEIR_OWN = ("gigpo", "turns", "igpo")
"""Credits of turns with a signal of their own, whatever `rewards` say: what the environment gave for a turn, or the gain in likelihood of the right answer."""
_ONLY_ADVANTAGES = ("novelty", "position_bonus")
"""Shapers that leave rewards as they are."""


def effect_disagreements(config: Config) -> Iterator[str]:
    """One line for every value that could only have been meant for another run, with what to do."""
    o = config.objective
    for section, names in _OF_PICTURES.items():
        part = getattr(config, section)
        for name in names:
            if getattr(part, name) != type(part).model_fields[name].default:
                yield f"{section}.{name}: it belongs to models of pictures; with likelihood: token leave it out"
    if config.partial is None and any(part.name == "fresh" for part in config.tokens.weights):
        yield "tokens.weights: fresh leaves out tokens of earlier iterations, and without partial there are none; leave it out"
    if OBJECTIVE_NAMES[o.name].kind == "pair":
        yield from _of_pairs(config)


def _of_pairs(config: Config) -> Iterator[str]:
    o, p = config.objective, config.pairing
    if p.levels and p.rule != "levels":
        yield f"pairing.levels: the rule {p.rule} has none; use rule: levels"
    if p.revision != type(p).model_fields["revision"].default and (o.name != "srpo" or o.args.get("alpha") == 1):
        yield f"pairing.revision: {'with alpha: 1 srpo' if o.name == 'srpo' else o.name} lets nobody improve a draft; leave it out"
    if config.data.pairs is not None:
        for name in sorted({"rule", "threshold", "cap", "levels"} & asked(config, "pairing")):
            yield f"pairing.{name}: it says which answers of a group become pairs, and stored pairs are what they are; leave it out"
    for part in config.shaping:
        if part.name in _ONLY_ADVANTAGES or (part.name == "inserted" and part.args.get("kind") == "anchor"):
            yield f"shaping: {part.name} changes advantages, which objective {o.name} does not use; leave it out"


def _leaves_sampler(config: Config) -> bool:
    """Whether a policy is trained on answers of another than itself, so that ratios are not all 1."""
    old, a = config.old_policy, config.allocation
    others = bool(a.samples) or a.name in _KEPT_ANSWERS or config.partial is not None
    return trains_later(config) or others or (old is not None and old.rollout)


def idle_settings(config: Config) -> Iterator[str]:
    """One line, for a warning, for every value that was asked for beyond the method's own and changes nothing in this run."""
    o, a, g, kl, p = config.objective, config.advantage, config.generation, config.kl, config.pairing
    entry, limit, old = OBJECTIVE_NAMES[o.name], g.max_new_tokens, config.old_policy
    if g.importance == "none" or (g.importance is None and g.engine != "vllm"):
        why = "importance weights off; set generation.importance: truncated or masked"
        yield from _named("generation", config, ("importance_level", "importance_low", "importance_high"), why)
    if old is not None and not old.rollout and config.anchor.weight == 0:
        yield "old_policy is kept and never used; set old_policy.rollout: true or anchor.weight, or old_policy: null"
    if o.name == "bapo" and not _leaves_sampler(config):
        yield "objective.updates_per_iteration: with 1 every ratio is 1, and the bounds that bapo searches never act; use at least 2, or clipped_surrogate"
    if entry.kind == "pair":
        names = tuple(name for name in type(a).model_fields if name != "temperature")  # that of transforms has a line of its own
        yield from _named("advantage", config, names, f"objective {o.name}, which compares the rewards of two answers")
        if p.rule in ("best_worst", "best_random") and config.data.pairs is None:
            yield from _named("pairing", config, ("cap",), f"rule {p.rule}, which makes at most one pair of a group")
    if entry.clips and o.ratio != "none" and not _leaves_sampler(config):
        yield from _named("objective", config, ("clip_low", "clip_high", "dual_clip"), "one update per iteration, whose ratios are all 1")
    if kl.weight == 0:
        forms = () if config.anchor.weight > 0 else ("form",)
        yield from _named("kl", config, (*forms, "place"), "kl.weight 0")
    elif kl.place == "reward" and kl.form != "k1" and config.anchor.weight == 0:
        yield from _named("kl", config, ("form",), "place reward, where the price of a token is its log-ratio, k1")
    if p.guide is not None and p.guide.path is None and "guide" in asked(config, "pairing"):
        yield "pairing.guide has no effect without pairing.guide.path: to the model itself all tokens weigh 1"
    for name, length, what in (
        ("partial.window", None if config.partial is None else config.partial.window, "no answer goes on in another iteration"),
        ("tree.segment", None if config.tree is None else config.tree.segment, "answers fork at the prompt alone"),
    ):
        if length is not None and length >= limit:
            yield f"{name}: {length} is not below generation.max_new_tokens, {limit}, so {what}"
    if config.token_credit.name == "turns":
        for reward in config.rewards:
            if reward.weight != 0 and reward.name != "episode":
                yield f"rewards: {reward.key} trains nothing with token_credit: turns, which reads what the environment gives for each turn; it is only shown"
    given = any(reward.name == "episode" for reward in config.rewards)
    if config.environment is not None and not given and config.token_credit.name not in _OF_THEIR_OWN:
        yield f"environment: what {config.environment.name} gives for an episode has no effect unless `rewards` lists episode"


def _named(section: str, config: Config, names: tuple[str, ...], why: str) -> Iterator[str]:
    known = asked(config, section)
    yield from (f"{section}.{name} has no effect with {why}" for name in names if name in known)
