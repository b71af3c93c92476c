"""Stable Diffusion 1 and 2, and XL: U-Nets that predict the noise (epsilon) or v, for kernel ddim.

Latents x = sqrt(1 - sigma^2) x0 + sigma noise with sigma = sqrt(1 - alphabar) at the integer timesteps of the training. The noise levels of a run are those of
diffusers' DDIMScheduler with leading spacing and the scheduler's steps_offset, whatever other scheduler the pipeline holds; so `rollout.grid` has no meaning
here, and `rollout.shift` is refused. The last step ends at sigma 0 (set_alpha_to_one), where a pipeline with set_alpha_to_one=False ends at alphabar_0. Start
noise is N(0, 1), also where the first sigma lies below 1. Nothing is clipped, and the safety checker is not loaded.

Verified against diffusers' StableDiffusionPipeline and StableDiffusionXLPipeline with DDIMScheduler: pictures, embeddings, exports.

Letters: R rows, n prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowrl.policies.base import DiffusionPolicy
from flowrl.sections import ModelConfig
from flowrl.types import UserError
from samplers.schedules import vp_grid

__all__ = ["StableDiffusionPolicy", "StableDiffusionXlPolicy"]

_ROUNDING = 1e-6  # of sigmas that were float32 on their way


class _UNetPolicy(DiffusionPolicy):
    """What both share.

    Raises:
        UserError: also where the scheduler is none of those that add noise by alphabar, the network predicts something else, or the config chooses an attention
            backend, which diffusers' U-Nets do not have.
    """

    network_name = "unet"
    targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> None:
        super().__init__(config, device, rows_per_forward=rows_per_forward, keep_reference=keep_reference)
        if config.attention_backend is not None:
            raise UserError(f"model.attention_backend: {self.title} has a U-Net, for which diffusers offers no choice; leave it out")
        scheduler = self.pipeline.scheduler
        name, settings = type(scheduler).__name__, scheduler.config
        self.prediction = str(settings.get("prediction_type", "epsilon"))
        if not hasattr(scheduler, "alphas_cumprod") or self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(
                f"model.path: {config.path} has a {name} that predicts {self.prediction}; {self.title} needs one with alphas_cumprod, and epsilon or v"
            )
        if settings.get("timestep_spacing") == "trailing":
            raise UserError(f"model.path: {config.path} spaces timesteps 'trailing' (a distilled or zero-SNR model), flowrl 'leading'; use another model")
        self._alphas_cumprod: list[float] = scheduler.alphas_cumprod.double().tolist()
        self._steps_offset = int(settings.get("steps_offset", 0))
        self._training_sigmas = (1 - torch.tensor(self._alphas_cumprod, dtype=torch.float64)).sqrt()

    @property
    def scheduler_shift(self) -> float:
        """1: there is none."""
        return 1.0

    def sigmas(self, grid: str, num_steps: int, shift: float | None) -> tuple[float, ...]:
        """sqrt(1 - alphabar) at the timesteps of a sampler, falling to 0; ``grid`` is of flow networks and not read.

        Raises:
            UserError: a shift is given, or the training had too few timesteps.
        """
        if shift is not None:
            raise UserError(f"rollout.shift: the noise levels of {self.title} are timesteps of its training and have no shift; set it to null")
        try:
            return vp_grid(self._alphas_cumprod, num_steps, self._steps_offset)
        except ValueError as error:
            raise UserError(f"num_steps: {error}") from error

    def timesteps(self, sigma: Tensor) -> Tensor:
        """The timesteps [R] int64 of the training at sigmas [R] float64: exact on the levels of `sigmas`, elsewhere the nearest.

        Raises:
            UserError: a sigma outside of the training's.
        """
        sigma, table = sigma.double().cpu(), self._training_sigmas
        if bool(((sigma < table[0] - _ROUNDING) | (sigma > table[-1] + _ROUNDING)).any()):
            low, high = table[0].item(), table[-1].item()
            raise UserError(f"{self.title} was trained at sigmas {low:.4f} to {high:.4f}, not at {sigma.min().item():.4g} to {sigma.max().item():.4g}")
        return (table - sigma[:, None]).abs().argmin(1)

    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``embeds`` [n, 77, D], the last hidden states of CLIP, and ``pooled`` [n, D], their mean: this network reads none, and the pipeline has none."""
        embeds = self.pipeline.encode_prompt(list(texts), self.device, 1, False)[0]
        return {"embeds": embeds, "pooled": embeds.mean(1)}

    def conditions(self, x: Tensor, prompts: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Further inputs of the network, for latents [R, L...]."""
        return None

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """The noise or v [R, 4, H, W]."""
        found: Tensor = network(
            x.to(prompts["embeds"].dtype),
            self.timesteps(sigma).to(self.device),
            encoder_hidden_states=prompts["embeds"],
            added_cond_kwargs=self.conditions(x, prompts),
            return_dict=False,
        )[0]
        return found

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """The VAE's: 4 channels, an eighth of the size."""
        return self.network.config.in_channels, height // self.size_multiple, width // self.size_multiple

    @property
    def default_size(self) -> int:
        """What the network was trained on."""
        return int(self.network.config.sample_size * self.size_multiple)

    @property
    def size_multiple(self) -> int:
        """A latent of the VAE."""
        return int(self.pipeline.vae_scale_factor)


class StableDiffusionPolicy(_UNetPolicy):
    """A trainable Stable Diffusion 1 or 2 pipeline."""

    title = "Stable Diffusion"
    pipelines = ("StableDiffusionPipeline",)
    example = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class StableDiffusionXlPolicy(_UNetPolicy):
    """A trainable Stable Diffusion XL pipeline, without refiner. The size conditions say that a picture of the run's size was neither resized nor cropped."""

    title = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    example = "stabilityai/stable-diffusion-xl-base-1.0"

    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``embeds`` [n, 77, D + D'] of both encoders and ``pooled`` [n, D'] of the second; all 0 of an empty prompt where the pipeline says so."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(list(texts), device=self.device, do_classifier_free_guidance=False)
        told = torch.tensor([text != "" or not self._zeros_for_empty for text in texts], device=self.device)
        return {"embeds": embeds.where(told[:, None, None], 0), "pooled": pooled.where(told[:, None], 0)}

    @property
    def _zeros_for_empty(self) -> bool:
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def _encoder_identity(self) -> str:
        return f"{super()._encoder_identity()}\n{self._zeros_for_empty}"

    def conditions(self, x: Tensor, prompts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pooled embedding; original size, crop and target size [R, 6]."""
        height, width = self.image_size
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=self.device)
        return {"text_embeds": prompts["pooled"], "time_ids": sizes.expand(len(x), -1)}
