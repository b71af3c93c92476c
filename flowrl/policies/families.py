"""The families of image generators, the language models beside them, and the policy of a run."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from flowrl.mistakes import did_you_mean
from flowrl.policies.language_models import is_language_model
from flowrl.policies.pipelines import pipeline_class
from flowrl.policies.trained import TrainedPolicy
from flowrl.sections import ModelConfig
from flowrl.types import UserError

__all__ = ["FAMILIES", "family_of", "make_policy"]

FAMILIES: dict[str, str] = {
    "sd3": "flowrl.policies.sd3:Sd3Policy",
    "flux": "flowrl.policies.flux:FluxPolicy",
    "flux2": "flowrl.policies.flux2:Flux2Policy",
    "sd": "flowrl.policies.unet:StableDiffusionPolicy",
    "sdxl": "flowrl.policies.unet:StableDiffusionXlPolicy",
    "causal_lm": "flowrl.policies.causal_lm:CausalLmPolicy",
}
"""Name in `model.family` -> ``module:class``. A new family is a file and a line here; docs/models.md shows how."""


def family_of(config: ModelConfig) -> type[TrainedPolicy]:
    """The class of a model's family: the one that the config names, or the one whose pipeline the model's index names, or a language model by its config.json.

    Raises:
        UserError: the family is unknown, no family has such a pipeline, or the model cannot be reached.
    """
    if config.family != "auto":
        if config.family not in FAMILIES:
            raise UserError(f"model.family: unknown family {config.family}; {did_you_mean(config.family, FAMILIES)}")
        return _load(config.family)
    try:
        kind = pipeline_class(config.path, _load("sd3").example)
    except UserError:
        if is_language_model(config.path):
            return _load("causal_lm")
        raise
    for name in FAMILIES:
        if kind in _load(name).pipelines:
            return _load(name)
    known = ", ".join(f"{_load(name).title} ({name})" for name in FAMILIES)
    raise UserError(f"model.path: {config.path} is a {kind}; flowrl knows {known}; docs/models.md shows how to add a family")


def make_policy(config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> Any:
    """The policy of a run, a `DiffusionPolicy` or a `CausalLmPolicy`, whose arguments and errors these are, beside those of `family_of`."""
    kind: Any = family_of(config)
    return kind(config, device, rows_per_forward=rows_per_forward, keep_reference=keep_reference)


def _load(name: str) -> type[TrainedPolicy]:
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[TrainedPolicy] = getattr(importlib.import_module(module), attribute)
    return found
