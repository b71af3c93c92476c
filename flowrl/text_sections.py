"""The sections of a config that only language models read, beside `GenerationConfig`. See flowrl/sections.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowrl.sections import Flag, Float, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Text, reward_entries

__all__ = [
    "AllocationConfig",
    "EntropyConfig",
    "EnvironmentConfig",
    "GuideConfig",
    "PairingConfig",
    "PartialConfig",
    "PluginConfig",
    "TokenCreditConfig",
    "TokensConfig",
    "TreeConfig",
    "ValueConfig",
    "plugin_entries",
]


class PluginConfig(Section):
    """A part by its name, with its arguments: ``overlong`` or ``{overlong: {cache: 16}}``."""

    name: Text
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")


def plugin_entries(value: Any) -> Any:
    """``overlong``, ``[overlong]``, ``{overlong: {cache: 16}}`` and ``[{name: overlong, args: {cache: 16}}]`` all become a list of mappings."""
    if isinstance(value, dict) and "name" not in value:
        value = [{"name": name, "args": args or {}} for name, args in value.items()]
    return reward_entries(value)


class TokenCreditConfig(Section):
    """From advantages of answers to those of tokens; ``answer`` is one for all tokens of an answer."""

    name: Text = Field("answer", description="see flowrl/text/credit.py")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")


class TokensConfig(Section):
    """Which tokens count, and how much."""

    weights: tuple[PluginConfig, ...] = Field((), description="factors of the tokens' losses, see flowrl/text/factors.py; they multiply")

    _shorthand = field_validator("weights", mode="before")(plugin_entries)


class EntropyConfig(Section):
    """A term of the loss that holds the entropy of tokens."""

    weight: Float = Field(0.0, description="of the bonus; negative punishes entropy")
    band: NonNegativeFloat = Field(0.0, description="EPO: weight of the penalty for leaving the band around the entropy's history")
    target: PositiveFloat | None = Field(None, description="the weight rises while the entropy is below it, and is 0 above (Skywork-OR1)")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")


class ValueConfig(Section):
    """A value of every token from a head on the policy's last hidden states, which PPO and its kin subtract; it does not train the policy's body."""

    hidden: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-3
    updates_per_iteration: PositiveInt = 8
    clip: PositiveFloat = 0.2
    warmup_iterations: NonNegativeInt = Field(0, description="iterations in which only the value learns")


class EnvironmentConfig(Section):
    """What an agent acts in, turn by turn, see flowrl/environments; `generation.max_new_tokens` is that of a turn."""

    name: Text = Field(description="an environment of flowrl, module:attribute, or path/to/file.py:attribute")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")
    max_turns: PositiveInt = Field(8, description="of an episode; the environment may end it earlier")
    max_tokens: PositiveInt | None = Field(
        None, description="of an episode after its prompt, the environment's too; one that has as many is cut; null = what the model's context leaves"
    )
    reply: Text | None = Field(
        None,
        description="how the environment's words are written, with {observation} in it; null = as a user's in the chat template, or on a line of their own",
    )


class TreeConfig(Section):
    """The answers of a group are the leaves of a tree, see flowrl/text/trees.py."""

    segment: PositiveInt = Field(512, description="tokens between two places where answers may fork")
    branches: Annotated[int, Field(ge=2)] = Field(2, description="most answers that one goes on as")
    roots: PositiveInt | None = Field(None, description="most beginnings at the prompt; null = branches")


class PartialConfig(Section):
    """Answers that stop at a window and go on in the next iteration, see flowrl/text/partial.py."""

    window: PositiveInt = Field(8192, description="tokens that an answer gets in an iteration")


class AllocationConfig(Section):
    """Which prompts are asked, and how often, and what is trained of it, see flowrl/allocation.py; and answers that come from elsewhere."""

    name: Text = Field("uniform", description="see flowrl/allocation.py")
    args: dict[str, Any] = Field(default_factory=dict, description="its arguments")
    samples: tuple[PluginConfig, ...] = Field((), description="answers that are put into groups, in this order, see flowrl/text/rounds.py")

    _shorthand = field_validator("samples", mode="before")(plugin_entries)


class GuideConfig(Section):
    """TGDPO's guide: a model trained with DPO says which tokens made the difference, see `flowrl.core.pair_tokens.guide_weights`."""

    path: Text | None = Field(None, description="a folder or a hub id: a model with the same tokenizer; null = the model itself, whose weights are all 1")
    alpha: NonNegativeFloat = Field(0.5, description="how much a token's log-ratio of guide and reference moves its weight; 0 = all weigh 1")
    limits: tuple[Float, Float] | None = Field(None, description="lowest and highest weight; null = as released, where a weight may be negative")


class PairingConfig(Section):
    """Which answers of a group become pairs, for objectives of pairs; stored pairs (`data.pairs`) are what they are. See docs/text_preferences.md."""

    rule: Literal["best_worst", "best_random", "all", "threshold", "random", "levels"] = Field("best_worst", description="see flowrl/core/pairing_rules.py")
    threshold: NonNegativeFloat = Field(0.0, description="rule threshold: rewards of a pair differ by more than this")
    cap: PositiveInt | None = Field(None, description="most pairs of a group, drawn; null = all, or 1 with rule random; refused with best_*")
    levels: tuple[Float, ...] = Field((), description="rule levels, and trpa: falling rewards; from the first upwards is level 1, from the second level 2, ...")
    skip_shared: Flag = Field(False, description="only what follows after the tokens that both answers begin with counts: pairs of turns or steps (REFUEL)")
    guide: GuideConfig | None = None
    revision: Text = Field("Improve your answer.", description="srpo: what a user says after a draft")
