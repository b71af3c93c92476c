"""FLUX.1 (dev and schnell): a rectified-flow transformer of double and single blocks that reads T5 tokens and the pooled output of CLIP.

The network is diffusers' FluxTransformer2DModel at timestep sigma in [0, 1]. It sees the latents packed: 2 x 2 patches as tokens at positions (0, row, column);
here and in samplers they stay unpacked. FLUX.1-dev is guidance-distilled: the guidance scale is an input, `model.guidance`, and there is no second branch
unless `rollout.guidance_scale` asks for one. Verified against diffusers' FluxPipeline: pictures, embeddings, noise levels, exports.

Letters: R rows, N picture tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.lora import JOINT_ATTENTION
from flowrl.types import UserError

__all__ = ["FluxPolicy", "dynamic_shift", "pack", "unpack"]

_LONGEST_PROMPT = 512  # tokens; diffusers' FluxPipeline refuses more


def pack(x: Tensor) -> Tensor:
    """Latents [R, C, H, W] -> tokens [R, H/2 W/2, 4 C], one a 2 x 2 patch."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: [R, H/2 W/2, 4 C] -> [R, C, H, W]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def dynamic_shift(scheduler: Mapping[str, Any], mu: float) -> float:
    """The time shift that diffusers' FlowMatchEulerDiscreteScheduler makes of mu: exp(mu), or mu itself with ``time_shift_type: linear``."""
    return math.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu


class FluxPolicy(DiffusionPolicy):
    """A trainable FLUX.1 pipeline."""

    title = "FLUX.1"
    pipelines = ("FluxPipeline",)
    example = "black-forest-labs/FLUX.1-dev"
    targets = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    """Of Flow-GRPO's FLUX run: attention of double and single blocks, feed-forward layers of double blocks."""
    pipeline_grid = "flux"

    @property
    def takes_guidance(self) -> bool:
        """True for dev, False for schnell."""
        return bool(self.network.config.guidance_embeds)

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens; by default 512 for guidance-distilled networks (dev) and 256 for the others (schnell), as they were published.

        Raises:
            UserError: the config asks for none, or for more than the network knows.
        """
        length = self.config.max_sequence_length
        if length is None:
            return _LONGEST_PROMPT if self.takes_guidance else 256
        if not 1 <= length <= _LONGEST_PROMPT:
            raise UserError(f"model.max_sequence_length: {length} T5 tokens do not fit FLUX.1; use 1 to {_LONGEST_PROMPT}, or null")
        return length

    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``embeds`` [n, T5 tokens, D] and ``pooled`` [n, D] of CLIP."""
        embeds, pooled, _ = self.pipeline.encode_prompt(prompt=list(texts), prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length)
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """The velocity [R, C, H, W]."""
        embeds = prompts["embeds"]
        height, width = x.shape[2:]
        rows, columns = (torch.arange(size // 2, device=self.device, dtype=torch.float32) for size in (height, width))
        guidance = 3.5 if self.config.guidance is None else self.config.guidance
        tokens: Tensor = network(
            hidden_states=pack(x.to(embeds.dtype)),
            timestep=sigma.to(device=self.device, dtype=torch.float32),
            guidance=torch.full((len(x),), guidance, device=self.device) if self.takes_guidance else None,
            pooled_projections=prompts["pooled"],
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device),
            img_ids=torch.cartesian_prod(torch.zeros(1, device=self.device), rows, columns),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """The VAE's: 16 channels, an eighth of the size."""
        factor = self.pipeline.vae_scale_factor
        return self.network.config.in_channels // 4, height // factor, width // factor

    @property
    def default_size(self) -> int:
        """The pipeline's, 1024."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """A token: two latents."""
        return int(2 * self.pipeline.vae_scale_factor)

    @property
    def scheduler_shift(self) -> float:
        """exp(mu) with mu linear in the number of tokens for dev, the scheduler's fixed one for schnell."""
        scheduler = self.pipeline.scheduler.config
        if not scheduler.use_dynamic_shifting:
            return float(scheduler.shift)
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        first, last = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        tokens = self.latent_shape[1] // 2 * (self.latent_shape[2] // 2)
        return dynamic_shift(scheduler, first + (last - first) / (high - low) * (tokens - low))
