"""Stable Diffusion 3 and 3.5: a rectified-flow transformer that reads two CLIP encoders and, where the pipeline has it, T5.

The network is diffusers' SD3Transformer2DModel at timestep 1000 sigma. Verified against diffusers' StableDiffusion3Pipeline: pictures, embeddings, exports.

Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.lora import JOINT_ATTENTION

__all__ = ["Sd3Policy"]


class Sd3Policy(DiffusionPolicy):
    """A trainable Stable Diffusion 3 pipeline."""

    title = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    example = "stabilityai/stable-diffusion-3.5-medium"
    targets = JOINT_ATTENTION

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens appended to a prompt; by default 0 for the embedded model, which was trained without them, and 256 as diffusers otherwise."""
        if self.config.max_sequence_length is not None:
            return self.config.max_sequence_length
        return 0 if self.config.path.startswith("flowrl:") else 256

    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``embeds`` [n, 77 + T5 tokens, D] and ``pooled`` [n, D] of the CLIP encoders."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """The velocity [R, 16, H, W]."""
        return network(
            hidden_states=x.to(prompts["embeds"].dtype),
            timestep=(sigma * 1000).to(device=self.device, dtype=x.dtype),
            encoder_hidden_states=prompts["embeds"],
            pooled_projections=prompts["pooled"],
            return_dict=False,
        )[0]

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """The VAE's: 16 channels, an eighth of the size."""
        factor = self.pipeline.vae_scale_factor
        return self.network.config.in_channels, height // factor, width // factor

    @property
    def default_size(self) -> int:
        """What the network was trained on."""
        return int(self.network.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_multiple(self) -> int:
        """A patch of the network."""
        return int(self.network.config.patch_size * self.pipeline.vae_scale_factor)
