"""The families of image generators, and the policy of a run."""

from __future__ import annotations

import importlib

import torch

from flowrl.mistakes import did_you_mean
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.pipelines import pipeline_class
from flowrl.sections import ModelConfig
from flowrl.types import UserError

__all__ = ["FAMILIES", "family_of", "make_policy"]

FAMILIES: dict[str, str] = {
    "sd3": "flowrl.policies.sd3:Sd3Policy",
    "flux": "flowrl.policies.flux:FluxPolicy",
    "flux2": "flowrl.policies.flux2:Flux2Policy",
    "sd": "flowrl.policies.unet:StableDiffusionPolicy",
    "sdxl": "flowrl.policies.unet:StableDiffusionXlPolicy",
}
"""Name in `model.family` -> ``module:class``. A new family is a file and a line here; docs/models.md shows how."""


def family_of(config: ModelConfig) -> type[DiffusionPolicy]:
    """The class of a model's family: the one that the config names, or the one whose pipeline the model's index names.

    Raises:
        UserError: the family is unknown, no family has such a pipeline, or the model cannot be reached.
    """
    if config.family != "auto":
        if config.family not in FAMILIES:
            raise UserError(f"model.family: unknown family {config.family}; {did_you_mean(config.family, FAMILIES)}")
        return _load(config.family)
    kind = pipeline_class(config.path, _load("sd3").example)
    for name in FAMILIES:
        if kind in _load(name).pipelines:
            return _load(name)
    known = ", ".join(f"{_load(name).title} ({name})" for name in FAMILIES)
    raise UserError(f"model.path: {config.path} is a {kind}; flowrl knows {known}; docs/models.md shows how to add a family")


def make_policy(config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> DiffusionPolicy:
    """The policy of a run; arguments and errors as of `DiffusionPolicy`, and those of `family_of`."""
    return family_of(config)(config, device, rows_per_forward=rows_per_forward, keep_reference=keep_reference)


def _load(name: str) -> type[DiffusionPolicy]:
    module, _, attribute = FAMILIES[name].partition(":")
    found: type[DiffusionPolicy] = getattr(importlib.import_module(module), attribute)
    return found
