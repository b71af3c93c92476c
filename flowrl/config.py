"""The schema of a run and its loader. Unknown keys are errors with the nearest known name; every message says what to do."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from flowrl.agreement import disagreements
from flowrl.mistakes import DISAGREEMENT, did_you_mean, explain
from flowrl.sections import (
    AdvantageConfig,
    AnchorConfig,
    CreditConfig,
    CriticConfig,
    DataConfig,
    DirectConfig,
    EmaConfig,
    EvaluationConfig,
    GenerationConfig,
    KLConfig,
    LayerTuningConfig,
    LoggingConfig,
    MatchingConfig,
    ModelConfig,
    NonNegativeInt,
    ObjectiveConfig,
    OldPolicyConfig,
    OptimizerConfig,
    RewardConfig,
    RewardWeightsConfig,
    RolloutConfig,
    Section,
    SelectionConfig,
    Text,
    TrainingConfig,
    reward_entries,
)
from flowrl.text_sections import (
    AllocationConfig,
    EntropyConfig,
    EnvironmentConfig,
    PairingConfig,
    PartialConfig,
    PluginConfig,
    TokenCreditConfig,
    TokensConfig,
    TreeConfig,
    ValueConfig,
    plugin_entries,
)
from flowrl.types import UserError

__all__ = ["Config", "Method", "dump_config", "list_methods", "load_config"]

_METHODS = Path(__file__).parent / "methods"
_OPEN_MAPPINGS = ("rewards", "data.eval")  # the user names the keys, so an override replaces them instead of adding to them
_NOT_A_RUN = "not a run: write keys with values, such as `run_dir: runs/first`"


class Config(Section):
    """A complete, resolved run."""

    method: Text = Field("flow_grpo", description="a method, or a method and a modifier, such as mix_grpo+grpo_guard")
    run_dir: Text = Field(description="the folder that the run makes, for example runs/first")
    seed: NonNegativeInt = 0
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="at least one reward, for example [scene]")
    rollout: RolloutConfig = RolloutConfig()
    generation: GenerationConfig = GenerationConfig()
    allocation: AllocationConfig = AllocationConfig()
    shaping: tuple[PluginConfig, ...] = Field((), description="what is done to rewards and advantages before training, in this order; see docs/text_methods.md")
    likelihood: Literal["transition", "matching", "token"] = Field(
        "transition", description="density of SDE steps, flow-matching loss of the finished sample, or probability of the tokens of a language model"
    )
    matching: MatchingConfig = MatchingConfig()
    old_policy: OldPolicyConfig | None = None
    anchor: AnchorConfig = AnchorConfig()
    critic: CriticConfig | None = None
    direct: DirectConfig = DirectConfig()
    reward_weights: RewardWeightsConfig = RewardWeightsConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    credit: CreditConfig = CreditConfig()
    token_credit: TokenCreditConfig = TokenCreditConfig()
    tokens: TokensConfig = TokensConfig()
    value: ValueConfig | None = None
    environment: EnvironmentConfig | None = None
    tree: TreeConfig | None = None
    partial: PartialConfig | None = None
    pairing: PairingConfig = PairingConfig()
    selection: SelectionConfig = SelectionConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    kl: KLConfig = KLConfig()
    entropy: EntropyConfig = EntropyConfig()
    layer_tuning: LayerTuningConfig = LayerTuningConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig | None = EmaConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    _shorthand = field_validator("rewards", mode="before")(reward_entries)
    _plugins = field_validator("shaping", mode="before")(plugin_entries)

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if lines := list(disagreements(self)):
            raise PydanticCustomError(DISAGREEMENT, "{lines}", {"lines": lines})
        return self


class Method(Section):
    """A method file: a named choice of the parts of a run, where it comes from and where ours differs."""

    summary: Text
    paper: Text
    verified: tuple[Text, ...]
    deviations: tuple[Text, ...]
    config: dict[str, Any] = Field(description="default sections, merged underneath the user's file")
    modifier: dict[str, dict[str, Any]] | None = Field(None, description="what `method: other+this` lays over the other method's sections; null = it cannot")


@cache
def list_methods() -> dict[str, Method]:
    """All methods that ship with flowrl, name -> contents, in alphabetical order."""
    files = sorted(_METHODS.rglob("*.yaml"), key=lambda file: file.stem)
    return {file.stem: Method.model_validate(OmegaConf.to_container(OmegaConf.load(file))) for file in files}


def _method_defaults(name: str) -> tuple[dict[str, Any], list[str]]:
    """The defaults of a method, or of `method+modifier+...`, and what is wrong with the name."""
    methods, lines = list_methods(), []
    first, *modifiers = name.split("+")
    for part in (first, *modifiers):
        if part not in methods:
            lines.append(f"method: unknown method {part}; {did_you_mean(part, methods)}")
    if lines:
        return {}, lines
    defaults: dict[str, Any] = dict(methods[first].config)
    for part in modifiers:
        modifier = methods[part].modifier
        if modifier is None:
            able = ", ".join(other for other, method in methods.items() if method.modifier is not None)
            return {}, [f"method: {part} is a whole method and cannot be added to {first}; these can: {able}"]
        defaults = _merge(defaults, modifier)
    return defaults, []


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML file, put the defaults of its method underneath and the overrides on top, and check everything.

    Args:
        path: a YAML file; OmegaConf interpolations such as ``${oc.env:HOME}`` are resolved. Its key ``extends`` names a file from its folder to lie on top of.
        overrides: ``key=value`` with dotted keys and YAML values: ``rollout.num_steps=6``, ``ema=null``, ``rewards=[scene, jpeg]``.
            A mapping is merged into a section and replaces `rewards` and `data.eval`.

    Raises:
        UserError: the file cannot be read or is not YAML, an override is malformed, or the run is invalid; then with one line per mistake.
    """
    user = _read_layers(Path(path), ())
    for override in overrides:
        _apply_override(user, override)
    lines: list[str] = []
    name = user.get("method", Config.model_fields["method"].default)
    merged = user
    if isinstance(name, str) and name:
        below, lines = _method_defaults(name)
        merged = _merge(below, user)
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or path}: {_first_line(error)}") from error
    try:
        config = Config.model_validate(resolved)
    except ValidationError as error:
        lines += explain(error, Config, resolved)
    if lines:
        raise UserError("\n".join(lines))
    return config


def dump_config(config: Config) -> str:
    """The whole run as YAML; ``load_config`` of it gives an equal Config."""

    def escape(value: Any) -> Any:
        if isinstance(value, str):  # a literal "${" must not come back as an interpolation
            return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
        if isinstance(value, dict):
            return {key: escape(item) for key, item in value.items()}
        return [escape(item) for item in value] if isinstance(value, list) else value

    return OmegaConf.to_yaml(OmegaConf.create(escape(config.model_dump(mode="json"))))


def _read_layers(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file on top of what it extends; ``above``: the files that led here."""
    top = _read_yaml(path)
    base = top.pop("extends", None)
    if base is None:
        return top
    if not isinstance(base, str) or not base:
        raise UserError(f"config {path}: `extends` is the path of another config, from this one's folder")
    place = (path.parent / base).resolve()
    if place in above or place == path.resolve():
        raise UserError(f"config {path}: `extends` leads back to {place}")
    return _merge_layer(_read_layers(place, (*above, path.resolve())), top)


def _merge_layer(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged; what the user names the keys of (`rewards`, `data.eval`) is replaced."""
    merged = _merge(below, above)
    for key in _OPEN_MAPPINGS:
        section, _, name = key.rpartition(".")
        source, target = (above.get(section, {}), merged.get(section)) if section else (above, merged)
        if isinstance(source, Mapping) and isinstance(target, dict) and name in source:
            target[name] = source[name]
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"config {path}: no such file") from error
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: is not UTF-8 text") from error
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"config {path}: not valid YAML ({_what_yaml_said(error)})") from error
    except OSError as error:  # how OmegaConf says that the whole file is one number
        raise UserError(f"config {path}: {_NOT_A_RUN}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"config {path}: {_NOT_A_RUN}")
    plain: Any = OmegaConf.to_container(loaded, resolve=False)
    return {str(key): value for key, value in plain.items()}


def _apply_override(config: dict[str, Any], override: str) -> None:
    """Set one dotted key in place; sections on the way are made, list entries must exist."""
    key, equals, text = override.partition("=")
    parts = re.sub(r"\[(\w+)\]", r".\1", key.strip()).split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: write key=value, for example rollout.num_steps=6")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {override!r}: the value is not valid YAML ({_what_yaml_said(error)})") from error
    node: Any = config
    for depth, part in enumerate(parts):
        place: Any = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is a list; name an entry by its number, 0 to {len(node) - 1}")
            place = int(part)
        old = node[place] if isinstance(node, list) else node.get(place)
        if depth == len(parts) - 1:
            replace = ".".join(parts) in _OPEN_MAPPINGS
            value = parsed["value"]
            node[place] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) and not replace else value
        elif not isinstance(old, dict | list):
            node[place] = {}
        node = node[place]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _what_yaml_said(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        return f"{line}{error.problem or error.context}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
