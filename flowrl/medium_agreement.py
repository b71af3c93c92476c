"""Whether a run's model and its method are of the same kind, pictures or text, as far as files on this machine say. A part of `flowrl.agreement`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowrl.config import Config
    from flowrl.sections import ModelConfig

__all__ = ["medium_of", "wrong_medium"]

_ASSETS = Path(__file__).parent / "assets"


def medium_of(model: ModelConfig) -> Literal["pictures", "text"] | None:
    """What a model makes: by its family, else by the index of its folder. None = not to be seen from here, such as a hub id, or no model at all."""
    if model.family != "auto":
        return "text" if model.family == "causal_lm" else "pictures"
    embedded = model.path.startswith("flowrl:")
    folder = _ASSETS / model.path.removeprefix("flowrl:") if embedded else Path(model.path).expanduser()
    if (folder / "model_index.json").is_file():
        return "pictures"
    return "text" if (folder / "config.json").is_file() else None


def wrong_medium(config: Config) -> str:
    """The line for a language model with a method of pictures, or the other way round; "" where they fit, or where nobody can tell."""
    from flowrl.config import list_methods  # which reads this file

    medium, of_text, path = medium_of(config.model), config.likelihood == "token", config.model.path
    if medium is None or (medium == "text") == of_text:
        return ""
    methods, name = list_methods(), config.method.partition("+")[0]
    method = methods.get(name)
    brought = None if method is None else method.config.get("likelihood", "transition")
    if brought != config.likelihood:
        theirs = "language models" if of_text else "image generators"
        other = "an image generator; set likelihood: transition or matching" if of_text else "a language model; set likelihood: token"
        return f"likelihood: {config.likelihood} belongs to {theirs}, and model.path: {path} is {other}"
    if of_text:
        like = f"flow_{name}" if f"flow_{name}" in methods else "flow_grpo"
        return f"method: {name} trains language models, and model.path: {path} is an image generator; use {like}, or a language model such as flowrl:tiny-lm"
    bare = name.removeprefix("flow_")
    like = bare if bare in methods and methods[bare].config.get("likelihood") == "token" else "grpo"
    return f"method: {name} trains image generators, and model.path: {path} is a language model; use {like}, or an image generator such as flowrl:tiny-sd3"
