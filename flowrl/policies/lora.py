"""LoRA adapters through peft, placed as Flow-GRPO places them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from flowrl.sections import LoraConfig
from flowrl.types import UserError

__all__ = ["JOINT_ATTENTION", "add_lora", "lora_state_dict", "scale_lora"]

JOINT_ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""The attention projections of networks that let text and picture attend to each other."""


def add_lora(network: Any, config: LoraConfig, default: tuple[str, ...]) -> None:
    """Add one trainable float32 adapter, Gaussian A and zero B, so that the network's output does not change at first.

    Args:
        default: the family's targets, where the config names none.
    Raises:
        UserError: no module's name ends with any of ``config.targets``.
    """
    targets = list(config.targets or default)
    try:
        network.add_adapter(PeftLoraConfig(r=config.rank, lora_alpha=config.alpha, init_lora_weights="gaussian", target_modules=targets))
    except ValueError as error:
        raise UserError(f"model.lora.targets: {', '.join(targets)} match no module of the network ({str(error).splitlines()[0]})") from error
    cast_training_params(network, dtype=torch.float32)


def scale_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same weights with every B times ``scale``."""
    return {name: value * scale if ".lora_B." in name else value for name, value in state.items()}


def lora_state_dict(network: nn.Module, scale: float) -> dict[str, Tensor]:
    """The adapter's weights under peft's names. ``scale`` = alpha / rank is multiplied into B, because readers of a file without alpha take alpha = rank."""
    state: dict[str, Tensor] = get_peft_model_state_dict(network)
    return scale_lora(state, scale)
