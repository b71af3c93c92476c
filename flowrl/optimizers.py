"""The optimiser of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flowrl.sections import OptimizerConfig
from flowrl.types import UserError

__all__ = ["make_optimizer"]


def make_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, with moments in the parameters' precision or in 8 bits.

    Raises:
        UserError: 8 bits were asked for where bitsandbytes is missing, or on parameters that are on no CUDA device.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if parameters[0].device.type != "cuda":
        raise UserError("optimizer.name: adamw_8bit needs a CUDA device; use adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer.name: adamw_8bit needs bitsandbytes, which cannot be imported ({error}); install flowrl-diffusion[8bit]") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer
