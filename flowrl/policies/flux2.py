"""FLUX.2 [klein]: a rectified-flow transformer that reads three layers of a Qwen3 language model, with a VAE whose latents are normalised by a batch norm.

The network is diffusers' Flux2Transformer2DModel at timestep sigma in [0, 1]. Latents are those of the pipeline: 2 x 2 patches of the VAE's latents as
channels, one token each. Choose a base model (FLUX.2-klein-base-4B): the others are distilled to four steps. Verified against diffusers' Flux2KleinPipeline:
pictures, embeddings, noise levels, exports.

Letters: n prompts, T tokens, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.flux import dynamic_shift
from flowrl.policies.lora import JOINT_ATTENTION
from flowrl.types import UserError

__all__ = ["Flux2Policy", "empirical_mu"]


def empirical_mu(num_tokens: int, num_steps: int) -> float:
    """FLUX.2's mu: between two lines in the number of picture tokens, one for 10 steps and one for 200, linear in the steps; above 4300 tokens the second.

    Source: black-forest-labs/flux2 as diffusers' `compute_empirical_mu` has it.
    """
    many = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return many
    few = 8.73809524e-05 * num_tokens + 1.89833333
    return many + (many - few) / 190.0 * (num_steps - 200)


class Flux2Policy(DiffusionPolicy):
    """A trainable FLUX.2 [klein] pipeline.

    Raises:
        UserError: also where the installed diffusers has no such pipeline.
    """

    title = "FLUX.2 [klein]"
    pipelines = ("Flux2KleinPipeline",)
    example = "black-forest-labs/FLUX.2-klein-base-4B"
    targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    """Attention of double blocks, and the projection of single blocks that attention shares with their feed-forward half."""
    pipeline_grid = "flux"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        if not hasattr(diffusers, self.pipelines[0]):
            raise UserError(f"model.path: {self.title} needs diffusers 0.37 or newer, and this is {diffusers.__version__}; pip install --upgrade diffusers")
        super().__init__(*arguments, **keywords)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the prompt with its chat template, padded; by default 512 as diffusers.

        Raises:
            UserError: the config asks for none.
        """
        if self.config.max_sequence_length == 0:
            raise UserError(f"model.max_sequence_length: {self.title} reads its prompt from these tokens alone; use more than 0, or null")
        return self.config.max_sequence_length or 512

    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``embeds`` [n, T, 3 D] and, the model having none of its own, ``pooled`` [n, 3 D]: their mean over the tokens that are no padding."""
        tokenizer, length = self.pipeline.tokenizer, self.max_sequence_length
        embeds, _ = self.pipeline.encode_prompt(prompt=list(texts), device=self.device, max_sequence_length=length)
        template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}], **template) for text in texts]
        encoded = tokenizer(chats, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        mask = encoded["attention_mask"].to(self.device)[:, :, None].float()
        return {"embeds": embeds, "pooled": ((embeds.float() * mask).sum(1) / mask.sum(1)).to(embeds.dtype)}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """The velocity [R, 128, H, W]."""
        embeds = prompts["embeds"]
        zero = torch.zeros(1, device=self.device)
        rows, columns, words = (torch.arange(size, device=self.device, dtype=torch.float32) for size in (*x.shape[2:], embeds.shape[1]))
        tokens: Tensor = network(
            hidden_states=x.to(embeds.dtype).flatten(2).transpose(1, 2),
            timestep=sigma.to(device=self.device, dtype=torch.float32),
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=torch.cartesian_prod(zero, zero, zero, words),
            img_ids=torch.cartesian_prod(zero, rows, columns, zero),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(x.shape)

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """128 channels, a sixteenth of the size."""
        return self.network.config.in_channels, height // self.size_multiple, width // self.size_multiple

    @property
    def default_size(self) -> int:
        """The pipeline's, 1024."""
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """A token: 2 x 2 latents of the VAE."""
        return int(2 * self.pipeline.vae_scale_factor)

    @property
    def scheduler_shift(self) -> float:
        """At 50 steps, the pipeline's default; see `shift_for`."""
        return self.shift_for(50)

    def shift_for(self, num_steps: int) -> float:
        """By the number of tokens and steps."""
        scheduler = self.pipeline.scheduler.config
        if not scheduler.use_dynamic_shifting:
            return float(scheduler.shift)
        return dynamic_shift(scheduler, empirical_mu(self.latent_shape[1] * self.latent_shape[2], num_steps))

    def to_vae(self, latents: Tensor) -> Tensor:
        """Out of the batch norm's units, and patches back into rows and columns."""
        mean, std = self._statistics()
        return F.pixel_shuffle(latents.float() * std + mean, 2)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse of `to_vae`."""
        mean, std = self._statistics()
        return (F.pixel_unshuffle(latents, 2) - mean) / std

    def _statistics(self) -> tuple[Tensor, Tensor]:
        norm, eps = self.vae.bn, self.vae.config.batch_norm_eps
        mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, (variance + eps).sqrt()
