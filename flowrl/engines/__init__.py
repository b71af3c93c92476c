"""What a trainer trains: pictures or text. An engine samples, assigns credit, builds updates and evaluates; the trainer knows nothing but its protocol."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from flowrl.policies.families import family_of
from flowrl.sections import ModelConfig

if TYPE_CHECKING:
    from flowrl.engines.base import Engine

__all__ = ["ENGINES", "engine_of"]

ENGINES: dict[str, str] = {"images": "flowrl.engines.diffusion:DiffusionEngine", "text": "flowrl.engines.text:TextEngine"}
"""What a policy makes, its ``medium`` -> ``module:class``."""


def engine_of(config: ModelConfig) -> type[Engine]:
    """The class of the engine for a model. Raises what `family_of` raises."""
    module, _, attribute = ENGINES[family_of(config).medium].partition(":")
    found: type[Engine] = getattr(importlib.import_module(module), attribute)
    return found
