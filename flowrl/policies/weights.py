"""Trained weights on their way into files: a LoRA folded into the network, a cast that loses no number to infinity, a LoRA file that says how it is scaled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from torch import Tensor, nn

from flowrl.policies.pipelines import without_progress_bars
from flowrl.types import UserError

__all__ = ["cast", "cast_module", "fold_lora", "lora_facts", "quietly", "save_lora_file"]

_FACTS = "lora_adapter_metadata"  # where diffusers looks for the adapter's settings, from 0.34 on


def cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype; None, and tensors of integers, stay as they are.

    Raises:
        UserError: a number is not finite, or would not be after the cast.
    """
    if dtype is None or not value.is_floating_point():
        return value
    found = value.to(dtype)
    if bool(found.isfinite().all()):
        return found
    if not bool(value.isfinite().all()):
        raise UserError(f"{name} holds numbers that are not finite: the training diverged; export an earlier --checkpoint")
    kind, most = str(dtype).removeprefix("torch."), float(value.abs().max())
    raise UserError(f"--dtype {kind}: {name} holds {most:.3g}, and {kind} ends at {torch.finfo(dtype).max:.3g}; use bfloat16 or float32")


def cast_module(module: nn.Module, dtype: torch.dtype | None, title: str) -> None:
    """`cast` all parameters and buffers in place; messages call a tensor TITLE.its name."""
    if dtype is None:
        return
    for name, parameter in module.named_parameters():
        parameter.data = cast(f"{title}.{name}", parameter.data, dtype)
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix=f"{title}.{prefix}".rstrip("."), recurse=False):
            setattr(part, name.rpartition(".")[2], cast(name, buffer, dtype))


def fold_lora(network: Any) -> None:
    """Adds the adapter to the weights, each sum taken in float32 and rounded once to the weight's dtype, and removes it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in [m for m in network.modules() if isinstance(m, BaseTunerLayer)]:
        base = module.get_base_layer()
        dtype = base.weight.dtype
        base.to(torch.float32)
        module.merge()
        base.to(dtype)
    network.unload_lora()


def lora_facts(network: Any, rank: int) -> dict[str, Any]:
    """The settings of an adapter whose scale is in its weights (`lora_state_dict`), so that alpha is the rank, as peft's LoraConfig takes them."""
    (config,) = network.peft_config.values()
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}  # empty, but older releases of diffusers ask for them
    return {"r": rank, "lora_alpha": rank, "target_modules": sorted(config.target_modules), **patterns}


def save_lora_file(weights: Mapping[str, Tensor], file: str, facts: Mapping[str, Any], prefix: str) -> None:
    """A LoRA file with its adapter's settings, as diffusers writes them. They are the only entry of the header: safetensors writes several in any order, and
    equal runs shall write equal files.
    """
    text = json.dumps({f"{prefix}.{key}": value for key, value in facts.items()}, sort_keys=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, file, metadata={_FACTS: text})


@contextmanager
def quietly() -> Iterator[None]:
    """Within it, files are written without progress bars, and without a warning for each part that a pipeline does not have."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        diffusers_logging.set_verbosity(level)
