"""Stable Diffusion pipelines of a few thousand random parameters, with the classes and the scheduler settings of the published ones, saved to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import SIZE, VAE, Builder, clip_settings, clip_tokenizer
from torch import Tensor

from flowrl.policies.base import DiffusionPolicy
from samplers.rollout import sample_ode

__all__ = ["SCHEDULE", "UNET_BUILDERS", "ZERO_SNR", "build_sd", "build_sdxl", "ddim", "set_scheduler"]

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
ZERO_SNR = SCHEDULE | {"clip_sample": False, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def _unet(**settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **settings,
    )


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{**VAE, "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True}, scaling_factor=scaling_factor)


def build_sd(folder: Path) -> Path:
    """Write a random StableDiffusionPipeline: 4 x 4 latents of 4 channels, 8 x 8 pixels, the scheduler of Stable Diffusion 1.5, and as its index says a safety
    checker, of which there is no file.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=16, attention_head_dim=2),
        scheduler=PNDMScheduler(skip_prk_steps=True, **SCHEDULE),
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip_settings(tokenizer))),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | checker | {"requires_safety_checker": True}))
    return folder


def build_sdxl(folder: Path) -> Path:
    """Write a random StableDiffusionXLPipeline: 4 x 4 latents of 4 channels, 8 x 8 pixels, the scheduler of Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    tokenizer = clip_tokenizer()
    StableDiffusionXLPipeline(
        unet=_unet(
            cross_attention_dim=32,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **SCHEDULE),
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip_settings(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**clip_settings(tokenizer))),
        tokenizer_2=tokenizer,
    ).save_pretrained(folder)
    return folder


def set_scheduler(folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
    """Give a saved pipeline another scheduler."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **settings}))


def ddim(pipeline: Any, *, set_alpha_to_one: bool = True) -> Any:
    """The pipeline with DDIM instead of its own sampler, on the same training schedule."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=set_alpha_to_one)
    return pipeline


@dataclass(frozen=True)
class UNetBuilder(Builder):
    """Its pipeline samples by DDIM, as the policy does."""

    def plain(self, folder: Path) -> Any:
        pipeline = ddim(super().plain(folder))
        pipeline.check_inputs = lambda *_, **__: None  # it wants multiples of 8 pixels, whatever the VAE
        return pipeline


def _deterministic(policy: DiffusionPolicy, noise: Tensor, num_steps: int, rows: Tensor, guidance_scale: float) -> Tensor:
    return sample_ode(policy.velocity(guidance_scale), noise, policy.sigmas("shifted", num_steps, None), rows, prediction=policy.prediction)


def _arguments(noise: Tensor, guidance_scale: float, model: Mapping[str, Any]) -> dict[str, Any]:
    return {"latents": noise, "guidance_scale": guidance_scale, **model}


_METHODS = {"flow_grpo_fast": ("rollout.kernel=ddim", "rollout.noise_level=1"), "awm": None}
UNET_BUILDERS = {
    "sd": UNetBuilder("sd", build_sd, _arguments, SIZE, _deterministic, overrides=_METHODS),
    "sdxl": UNetBuilder("sdxl", build_sdxl, _arguments, SIZE, _deterministic, overrides=_METHODS),
}
"""By the family's name; tests/test_policies_families.py holds them to the contract of tests/families.py."""
