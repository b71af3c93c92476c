"""Stable Diffusion 3 / 3.5 as a policy: prompt embeddings cached once, one velocity function for rollout and training, VAE decoding.

The velocity is diffusers' SD3Transformer2DModel at timestep 1000 sigma. Classifier-free guidance evaluates the unconditional half without gradient
and detached, as Flow-GRPO's released code trains it; so the gradient is guidance_scale times that of the conditional branch.

Letters: R rows, U distinct prompts, L... latent axes (channels, height, width).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from flowrl.config import ModelConfig
from flowrl.policies.lora import add_lora, lora_state_dict, scale_lora
from flowrl.types import UserError, Velocity

__all__ = ["ASSETS", "NetworkRows", "Sd3Policy", "load_pipeline", "resolve_model_path"]

ASSETS = Path(__file__).parent.parent / "assets"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_KEYWORD = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"  # diffusers renamed it in 0.40


@dataclass(slots=True)
class NetworkRows:
    """Counted network evaluations: one row = one latent through the transformer once."""

    forward: int = 0
    backward: int = 0


def resolve_model_path(path: str) -> str:
    """``flowrl:NAME`` -> the embedded model's folder; anything else unchanged."""
    if not path.startswith("flowrl:"):
        return path
    folder = ASSETS / path.removeprefix("flowrl:")
    if not (folder / "model_index.json").is_file():
        known = ", ".join(f"flowrl:{f.parent.name}" for f in sorted(ASSETS.glob("*/model_index.json")))
        raise UserError(f"model.path: {path} is not an embedded model; known: {known or 'none (broken installation)'}")
    return str(folder)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Within it, diffusers and transformers draw no progress bars; their warnings stay."""
    switches = [logging for logging in (diffusers_logging, transformers_logging) if logging.is_progress_bar_enabled()]
    for switch in switches:
        switch.disable_progress_bar()
    try:
        yield
    finally:
        for switch in switches:
            switch.enable_progress_bar()


def load_pipeline(path: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Load a pipeline from a folder, a hub id or ``flowrl:NAME``; the VAE always in float32. Only a download shows progress.

    Raises:
        UserError: the folder is missing or is not a Stable Diffusion 3 pipeline.
    """
    where = resolve_model_path(path)
    if Path(where).exists() and not (Path(where) / "model_index.json").is_file():
        raise UserError(f"model.path: {path} is not a diffusers pipeline (no model_index.json); give the folder that save_pretrained wrote")
    if not Path(where).exists() and (where.startswith((".", "/", "~")) or where.count("/") != 1):
        raise UserError(f"model.path: {path} does not exist; give a folder, a hub id such as stabilityai/stable-diffusion-3.5-medium, or flowrl:tiny-sd3")
    local = Path(where) if Path(where).exists() else None
    try:
        index = StableDiffusion3Pipeline.load_config(where)
        kind = str(index.get("_class_name"))
        if not kind.startswith("StableDiffusion3"):
            raise UserError(f"model.path: {path} is a {kind}, not a Stable Diffusion 3 pipeline")
        parts = {name: entry[0] for name, entry in index.items() if isinstance(entry, (list, tuple))}
        for name in parts:
            if local and parts[name] is not None and not (local / name).is_dir():  # transformers would make an empty tokenizer without a word
                raise UserError(f"model.path: {path} has no folder {name}, which its model_index.json names; copy the whole pipeline")
        absent = {name: None for name, library in parts.items() if library is None}  # diffusers wants to be told
        with _without_progress_bars() if local else nullcontext():
            pipeline = StableDiffusion3Pipeline.from_pretrained(where, **{_DTYPE_KEYWORD: {"vae": torch.float32, "default": dtype}}, **absent)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, SafetensorError) as error:
        raise UserError(f"model.path: {path} could not be loaded as a Stable Diffusion 3 pipeline: {str(error).splitlines()[0]}") from error
    return pipeline


class Sd3Policy:
    """A trainable SD3 pipeline.

    Args:
        config: the ``model`` section of a run.
        device: where the networks live.
        rows_per_forward: most rows in one forward without gradient.
        keep_reference: keep what `reference` needs (a frozen copy under full fine-tuning; LoRA needs none).
    Raises:
        UserError: the model cannot be loaded, or the size is not a multiple of what the model needs.
    """

    prediction = "flow"

    def __init__(self, config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> None:
        self.config, self.device, self.rows_per_forward = config, device, rows_per_forward
        self.dtype = _DTYPES[config.dtype]
        load_dtype = torch.float32 if config.adapter == "full" else self.dtype  # full fine-tuning keeps float32 weights under autocast
        self.pipeline = load_pipeline(config.path, load_dtype)
        self.transformer: SD3Transformer2DModel = self.pipeline.transformer.to(device)
        self.vae = self.pipeline.vae.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        for module in (self.transformer, self.vae, *self._text_encoders):
            module.requires_grad_(False).eval()
        self.reference_transformer: nn.Module | None = None
        if config.adapter == "lora":
            add_lora(self.transformer, config.lora)
        else:
            if keep_reference:
                self.reference_transformer = copy.deepcopy(self.transformer)
            self.transformer.requires_grad_(True)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.training_module: nn.Module = self.transformer  # the trainer may wrap it (DDP); the weights are the same
        self.rows = NetworkRows()
        self._row_of: dict[str, int] = {}
        self._embeds = torch.empty(0)
        self._pooled = torch.empty(0)
        self._reference = False
        self.latent_shape = self._latent_shape()
        self.unconditional_row = int(self.prompt_rows([""])[0])

    @property
    def _text_encoders(self) -> list[nn.Module]:
        encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3)
        return [e for e in encoders if e is not None]

    def _latent_shape(self) -> tuple[int, int, int]:
        factor, patch = self.pipeline.vae_scale_factor, self.transformer.config.patch_size
        default = self.transformer.config.sample_size * factor
        sizes = (self.config.height or default, self.config.width or default)
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size % (factor * patch):
                raise UserError(f"model.{name}: {size} is not a multiple of {factor * patch}, which this model needs")
        return (self.transformer.config.in_channels, sizes[0] // factor, sizes[1] // factor)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the decoded pictures, in pixels."""
        factor = self.pipeline.vae_scale_factor
        return self.latent_shape[1] * factor, self.latent_shape[2] * factor

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens appended to a prompt; by default 0 for the embedded model, which was trained without them, and 256 as diffusers otherwise."""
        if self.config.max_sequence_length is not None:
            return self.config.max_sequence_length
        return 0 if self.config.path.startswith("flowrl:") else 256

    @property
    def scheduler_shift(self) -> float:
        """The static time shift of the pipeline's scheduler."""
        return float(self.pipeline.scheduler.config.shift)

    # --- prompts ---

    @torch.no_grad()
    def prompt_rows(self, texts: Sequence[str]) -> Tensor:
        """Row numbers [len(texts)] int64 of prompts in the embedding cache; every distinct text is encoded once in the life of the policy."""
        new = [t for t in dict.fromkeys(texts) if t not in self._row_of]
        # The last bits of an embedding may depend on its batch, and a resumed run meets the prompts in another order: one by one where runs are bit-exact.
        size = 1 if self.device.type == "cpu" else 64
        embeds, pooled = [self._embeds] if len(self._embeds) else [], [self._pooled] if len(self._pooled) else []
        for start in range(0, len(new), size):
            for encoder in self._text_encoders:
                encoder.to(self.device)
            found = self.pipeline.encode_prompt(
                prompt=new[start : start + size],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            embeds.append(found[0])
            pooled.append(found[2])
        if new:
            self._row_of |= {text: len(self._row_of) + offset for offset, text in enumerate(new)}
            self._embeds, self._pooled = torch.cat(embeds), torch.cat(pooled)
        return torch.tensor([self._row_of[t] for t in texts], dtype=torch.int64)

    @property
    def pooled(self) -> Tensor:
        """The pooled embeddings [n, D] of all prompts that were ever asked for, by row number."""
        return self._pooled

    # --- the network ---

    def _forward(self, x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        module = self.training_module if grad else self.transformer
        if self._reference and self.reference_transformer is not None:
            module = self.reference_transformer
        index = prompt_row.to(self.device)
        timestep = (sigma * 1000).to(device=self.device, dtype=torch.float32)
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        with autocast:
            out = module(
                hidden_states=x.to(self._embeds.dtype),
                timestep=timestep,
                encoder_hidden_states=self._embeds[index],
                pooled_projections=self._pooled[index],
                return_dict=False,
            )[0]
        self.rows.forward += len(x)
        self.rows.backward += len(x) if grad else 0
        return out.float()

    def velocity(self, guidance_scale: float = 1.0) -> Velocity:
        """The policy's velocity under classifier-free guidance; 1 evaluates the conditional branch only.

        Returns:
            A function (x [R, L...] float32, sigma [R] float64, prompt_row [R]) -> [R, L...] float32. Without gradient it splits the rows
            into forwards of at most ``rows_per_forward``; with gradient it evaluates them at once.
        """

        def evaluate(x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
            conditional = self._forward(x, sigma, prompt_row)
            if guidance_scale == 1.0:
                return conditional
            with torch.no_grad():
                unconditional = self._forward(x, sigma, torch.full_like(prompt_row, self.unconditional_row))
            return unconditional + guidance_scale * (conditional - unconditional)

        def call(x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
            size = self.rows_per_forward
            if torch.is_grad_enabled() or len(x) <= size:
                return evaluate(x, sigma, prompt_row)
            return torch.cat([evaluate(*chunk) for chunk in zip(x.split(size), sigma.split(size), prompt_row.split(size), strict=True)])

        return call

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the velocity is that of the model before training: LoRA switched off, or the frozen copy. Without gradient only."""
        if self.config.adapter == "full" and self.reference_transformer is None:
            raise RuntimeError("full fine-tuning keeps a reference only when it is built with keep_reference=True")
        if self.config.adapter == "lora":
            self.transformer.disable_adapters()
        self._reference = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._reference = False
            if self.config.adapter == "lora":
                self.transformer.enable_adapters()

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that learn, in a fixed order."""
        return [p for p in self.transformer.parameters() if p.requires_grad]

    @property
    def _lora_scale(self) -> float:
        return self.config.lora.alpha / self.config.lora.rank

    # --- pictures and files ---

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, L...] clean latents -> images [B, 3, H, W] float32 in [0, 1] on the CPU, each pixel one of the 256 levels k / 255.

        So a picture is rounded once, here: what a reward scores, locally or over a network, is what a PNG file of it holds.
        """
        size = max(1, min(len(latents), self.rows_per_forward))
        levels = [self._pixels(chunk.to(self.device)).mul(255).round().to(torch.uint8).cpu() for chunk in latents.split(size)]
        return torch.cat(levels).float() / 255

    def decode_with_grad(self, latents: Tensor) -> Tensor:
        """`decode` with the gradient by the latents: [B, L...] -> images [B, 3, H, W] float32 in [0, 1] on the policy's device.

        The pictures are those that `decode` gives before it rounds them, clamped like them: a pixel outside [0, 1] has no gradient, as no reward can see how
        far outside it is. All are decoded at once and keep their activations; with ``model.gradient_checkpointing`` each is decoded alone, and again in
        the backward pass, which takes the memory of one.
        """
        if not self.config.gradient_checkpointing:
            return self._pixels(latents)
        return torch.cat([checkpoint(self._pixels, one, use_reentrant=False) for one in latents.split(1)])

    def _pixels(self, latents: Tensor) -> Tensor:
        vae = self.vae.config
        raw = latents.float() / vae.scaling_factor + (vae.shift_factor or 0.0)
        return self.vae.decode(raw, return_dict=False)[0].div(2).add(0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] float in [0, 1] -> clean latents [B, L...] float32, the mode of the VAE's posterior."""
        vae = self.vae.config
        size = max(1, min(len(images), self.rows_per_forward))
        parts = [self.vae.encode(chunk.to(self.device).float() * 2 - 1).latent_dist.mode() for chunk in images.split(size)]
        return (torch.cat(parts) - (vae.shift_factor or 0.0)) * vae.scaling_factor

    def export(self, folder: Path) -> None:
        """Write what plain diffusers loads: ``pytorch_lora_weights.safetensors`` (load_lora_weights) or ``transformer/`` (from_pretrained).

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if self.config.adapter == "lora":
                StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=lora_state_dict(self.transformer, self._lora_scale))
            else:
                self.transformer.save_pretrained(folder / "transformer")
        except SafetensorError as error:  # how safetensors reports a failed write
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error

    def load_export(self, folder: Path) -> None:
        """Put exported weights into this policy.

        Raises:
            UserError: the folder holds no export of this kind of adapter.
        """
        from safetensors.torch import load_file

        if self.config.adapter == "lora":
            from peft import set_peft_model_state_dict

            file = folder / "pytorch_lora_weights.safetensors"
            if not file.is_file():
                raise UserError(f"{folder} holds no LoRA weights (pytorch_lora_weights.safetensors)")
            state: dict[str, Any] = scale_lora({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, 1 / self._lora_scale)
            outcome = set_peft_model_state_dict(self.transformer, state)
            if outcome.unexpected_keys:
                raise UserError(f"{file} does not fit this model: unexpected {outcome.unexpected_keys[0]}")
        else:
            if not (folder / "transformer" / "config.json").is_file():
                raise UserError(f"{folder} holds no exported transformer (transformer/config.json)")
            loaded = SD3Transformer2DModel.from_pretrained(folder / "transformer", **{_DTYPE_KEYWORD: torch.float32})
            self.transformer.load_state_dict(loaded.state_dict())
