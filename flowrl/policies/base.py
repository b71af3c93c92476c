"""What all families of image generators share as policies: adapters, the prompt cache, one prediction function for rollout and training, pictures, files.

A family is a subclass in a file of its own with a line in flowrl/policies/families.py: it says which pipeline it is, how prompts are embedded, how its network
is called, and what its latents are. docs/models.md shows how to write one.

Classifier-free guidance evaluates the unconditional half without gradient and detached, as Flow-GRPO's released code trains it; so the gradient is
guidance_scale times that of the conditional branch.

Letters: R rows, L... latent axes (channels, height, width).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowrl.memory import fitting_parts, halved
from flowrl.policies.lora import lora_state_dict, scale_lora
from flowrl.policies.pipelines import DTYPE_KEYWORD, load_pipeline, resolve_model_path
from flowrl.policies.prompts import PromptCache
from flowrl.policies.trained import NetworkRows, TrainedPolicy
from flowrl.policies.weights import cast, cast_module, fold_lora, lora_facts, quietly, save_lora_file
from flowrl.sections import ModelConfig
from flowrl.types import UserError, Velocity
from samplers.schedules import sigma_grid

__all__ = ["DiffusionPolicy", "NetworkRows"]


class DiffusionPolicy(TrainedPolicy):
    """A trainable diffusers pipeline.

    Args:
        config: the ``model`` section of a run.
        device: where the networks live.
        rows_per_forward: most rows in one forward without gradient.
        keep_reference: keep what `reference` needs (a frozen copy under full fine-tuning; LoRA needs none).
    Raises:
        UserError: the model cannot be loaded, or the size is not a multiple of what the model needs.
    """

    title: ClassVar[str]
    """In messages, such as "Stable Diffusion 3"."""
    pipelines: ClassVar[tuple[str, ...]]
    """Names of diffusers' pipeline classes; the first one is loaded."""
    example: ClassVar[str]
    """A hub id."""
    network_name: ClassVar[str] = "transformer"
    """Of the trained network in the pipeline, and of its folder."""
    targets: ClassVar[tuple[str, ...]]
    """Endings of the modules that get LoRA adapters."""
    smaller_model = "set model.dtype: bfloat16, model.text_encoders: offload, smaller pictures, or shard the model over several devices"
    medium: ClassVar[str] = "images"
    """A key of flowrl.engines.ENGINES."""
    prediction = "flow"
    """A key of samplers.kernels.PREDICTIONS."""
    pipeline_grid: ClassVar[str] = "diffusers"
    """A key of samplers.schedules.GRIDS: what the pipeline samples on by itself, and so what the grid `diffusers` means here."""

    def __init__(self, config: ModelConfig, device: torch.device, *, rows_per_forward: int = 256, keep_reference: bool = False) -> None:
        super().__init__(config, device, rows_per_forward=rows_per_forward)
        self.pictures_at_once = rows_per_forward
        dtypes = {self.network_name: self._weights_dtype, "default": self.dtype}
        self.pipeline: Any = load_pipeline(config.path, self.pipelines, self.title, self.example, dtypes)
        self.network: Any = getattr(self.pipeline, self.network_name).to(device)
        self.vae: Any = self.pipeline.vae.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if config.guidance is not None and not self.takes_guidance:
            raise UserError(f"model.guidance: this {self.title} takes no guidance scale as an input; leave it out (rollout.guidance_scale is another thing)")
        for module in (self.network, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self._make_trainable(self.targets, keep_reference)
        if config.gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
        self._speed_up()
        self.training_module = self.network
        self.prompts = self._prompt_cache()
        self._freed = False
        self.latent_shape = self._latent_shape()
        self.unconditional_row = int(self.prompt_rows([""])[0])

    def _speed_up(self) -> None:
        """Attention backend, compilation, and how the VAE works, as the config says."""
        config = self.config
        if config.attention_backend is not None:
            try:
                for network in self._networks:
                    network.set_attention_backend(config.attention_backend)
            except (ValueError, RuntimeError, ImportError, AttributeError) as error:
                raise UserError(f"model.attention_backend: {config.attention_backend} cannot be used: {str(error).splitlines()[0]}") from error
        names = getattr(self.network, "_repeated_blocks", None) or getattr(self.network, "_no_split_modules", None) or ()  # SD3's has only the latter
        self._compile(self._networks, names, "diffusers")
        if config.vae_slicing:
            self.vae.enable_slicing()
        if config.vae_tiling:
            self.vae.enable_tiling()
        if config.vae_channels_last:
            self.vae.to(memory_format=torch.channels_last)

    # --- what a family says ---

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Embeddings of prompts by the pipeline's own encoders, [len(texts), ...] each, of a shape that no prompt changes. One, which a critic reads, is
        called ``pooled``: [len(texts), D].
        """

    @abstractmethod
    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, prompts: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction [R, L...] for latents [R, L...] float32 at sigma [R] float64, with the prompts' embeddings [R, ...]. Runs under autocast."""

    @abstractmethod
    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of so many pixels."""

    @property
    @abstractmethod
    def default_size(self) -> int:
        """Height and width in pixels, where the config says nothing."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """What height and width must be a multiple of, in pixels."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the network has an input for the guidance scale, `model.guidance`."""
        return False

    @property
    def scheduler_shift(self) -> float:
        """The time shift of the pipeline's scheduler at this size."""
        return float(self.pipeline.scheduler.config.shift)

    def shift_for(self, num_steps: int) -> float:
        """The time shift for a sampler of so many steps, where the pipeline lets it depend on them."""
        return self.scheduler_shift

    def sigmas(self, grid: str, num_steps: int, shift: float | None) -> tuple[float, ...]:
        """The noise levels of a sampler, falling to 0; shift None = the scheduler's own."""
        return sigma_grid(self.pipeline_grid if grid == "diffusers" else grid, num_steps, self.shift_for(num_steps) if shift is None else shift)

    def to_vae(self, latents: Tensor) -> Tensor:
        """From latents of the network to those of the VAE, float32."""
        vae = self.vae.config
        return latents.float() / vae.scaling_factor + (vae.shift_factor or 0.0)

    def from_vae(self, latents: Tensor) -> Tensor:
        """The inverse of `to_vae`."""
        vae = self.vae.config
        return (latents - (vae.shift_factor or 0.0)) * vae.scaling_factor

    # --- sizes and prompts ---

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that the pipeline has."""
        found = (getattr(self.pipeline, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
        return [encoder for encoder in found if encoder is not None]

    def _latent_shape(self) -> tuple[int, int, int]:
        sizes = (self.config.height or self.default_size, self.config.width or self.default_size)
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size % self.size_multiple:
                raise UserError(f"model.{name}: {size} is not a multiple of {self.size_multiple}, which this model needs")
        return self.latent_shape_of(*sizes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the decoded pictures, in pixels."""
        return self.config.height or self.default_size, self.config.width or self.default_size

    def prompt_rows(self, texts: Sequence[str]) -> Tensor:
        """Row numbers [len(texts)] int64 of prompts in the cache; every distinct text is encoded once in the life of the policy."""
        # The last bits of an embedding may depend on its batch, and a resumed run meets the prompts in another order: one by one where runs are bit-exact.
        return self.prompts.rows(texts, batch=1 if self.device.type == "cpu" else 64)

    def _prompt_cache(self) -> PromptCache:
        config = self.config
        folder = None if config.prompt_folder is None else Path(config.prompt_folder).expanduser()
        return PromptCache(self._embed, device=self.device, storage=config.prompt_storage, folder=folder, identity=self._encoder_identity())

    def _encoder_identity(self) -> str:
        """What an embedding depends on beside its text: the encoders, by their files or their commit on the hub, and how they are called."""
        where = Path(resolve_model_path(self.config.path))
        files = sorted(file for part in ("text_encoder*", "tokenizer*") for file in where.glob(f"{part}/*") if file.is_file())
        facts = [f"{file.parent.name}/{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        facts += [f"{type(encoder).__name__} {getattr(encoder.config, '_commit_hash', None)}" for encoder in self.text_encoders]
        dtypes = sorted({str(p.dtype) for encoder in self.text_encoders for p in encoder.parameters()})  # not model.dtype: some keep float32 parts
        return "\n".join([str(where), type(self).__name__, *dtypes, str(self.config.max_sequence_length), *facts])

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        if self._freed:
            raise UserError(f"model.text_encoders: free, and the prompt '{texts[0]}' was not among those of the run's prompt sets; use offload")
        for encoder in self.text_encoders:
            encoder.to(self.device)
        found = self.embed(texts)
        if self.config.text_encoders == "offload":
            for encoder in self.text_encoders:
                encoder.to("cpu")
        return found

    @staticmethod
    def for_new_prompts(config: ModelConfig) -> ModelConfig:
        """The same model where not all prompts are known beforehand: encoders that a run would give up wait in host memory."""
        return config.model_copy(update={"text_encoders": "offload"}) if config.text_encoders == "free" else config

    def finish_prompts(self, texts: Sequence[str]) -> None:
        """Encode all prompts of a run; where the config says so, the encoders are given up after that."""
        if self.config.text_encoders != "free":
            return
        self.prompt_rows(texts)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)
        self._freed = True

    @property
    def pooled(self) -> Tensor:
        """The pooled embeddings [n, D] of all prompts that were ever asked for, by row number."""
        return self.prompts.pooled

    # --- the network ---

    def _forward(self, x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
        if self.company is not None:
            self.company.turn()
        count = len(x)
        if self.config.pad_rows:
            filled = torch.arange(1 << (count - 1).bit_length()).clamp_max(count - 1)  # the last row, again and again
            x, sigma, prompt_row = x[filled.to(x.device)], sigma[filled.to(sigma.device)], prompt_row[filled.to(prompt_row.device)]
            self.rows.padding += len(x) - count
        with self._autocast():
            out = self.predict(self._module(), x.to(self.device), sigma, self.prompts.take(prompt_row))[:count]
        self.rows.forward += count
        self.rows.backward += count if torch.is_grad_enabled() else 0
        return out.float()

    def velocity(self, guidance_scale: float = 1.0) -> Velocity:
        """The policy's prediction under classifier-free guidance; 1 evaluates the conditional branch only.

        Returns:
            A function (x [R, L...] float32, sigma [R] float64, prompt_row [R]) -> [R, L...] float32. Without gradient it splits the rows
            into forwards of at most ``rows_per_forward`` and answers where x is; with gradient it evaluates them at once.
        """

        def evaluate(x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
            conditional = self._forward(x, sigma, prompt_row)
            if guidance_scale == 1.0:
                return conditional
            with torch.no_grad():
                unconditional = self._forward(x, sigma, torch.full_like(prompt_row, self.unconditional_row))
            return unconditional + guidance_scale * (conditional - unconditional)

        def call(x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return evaluate(x, sigma, prompt_row)
            return self.in_parts(len(x), lambda rows: evaluate(x[rows], sigma[rows], prompt_row[rows]).to(x.device))

        return call

    # --- several processes ---

    def shard(self, device: torch.device, timeout_minutes: float) -> None:
        """Share the weights, and the reference's, among all processes; every one must call it, before anything else is done with a policy made on the CPU.

        Args:
            device: where the policy works from now on.
            timeout_minutes: how long a process waits for another one.
        """
        super().shard(device, timeout_minutes)
        self.vae.to(device)
        self.prompts = self._prompt_cache()
        self.unconditional_row = int(self.prompt_rows([""])[0])

    @torch.no_grad()
    def _keep_company(self) -> None:
        prompt = torch.tensor([self.unconditional_row])
        self._forward(torch.zeros(1, *self.latent_shape, device=self.device), torch.full((1,), 0.5, dtype=torch.float64), prompt)
        self.rows.idle += 1

    @property
    def _lora_scale(self) -> float:
        return self.config.lora.alpha / self.config.lora.rank

    # --- pictures and files ---

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, L...] clean latents -> images [B, 3, H, W] float32 in [0, 1] on the CPU, each pixel one of the 256 levels k / 255.

        So a picture is rounded once, here: what a reward scores, locally or over a network, is what a PNG file of it holds.
        """
        levels = self._in_parts(latents, lambda part: self._pixels(part.to(self.device)).mul(255).round().to(torch.uint8).cpu())
        return levels.float() / 255

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
        return self.vae.decode(self.to_vae(latents), return_dict=False)[0].div(2).add(0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] float in [0, 1] -> clean latents [B, L...] float32, the mode of the VAE's posterior."""
        return self.from_vae(self._in_parts(images, lambda part: self.vae.encode(part.to(self.device).float() * 2 - 1).latent_dist.mode()))

    def _in_parts(self, values: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """``work`` on as many values at a time as the VAE's memory holds."""

        def shrink(pictures: int) -> None:
            help = "set model.vae_tiling: true, or smaller pictures"
            self.pictures_at_once = halved("pictures decoded at once", pictures, self.device, help=help)

        return fitting_parts(len(values), lambda: self.pictures_at_once, lambda part: work(values[part]), shrink)

    def export(self, folder: Path, form: Literal["lora", "network", "pipeline"] | None = None, dtype: torch.dtype | None = None) -> None:
        """Write what plain diffusers loads: pytorch_lora_weights.safetensors (load_lora_weights), the network's folder or a whole pipeline (from_pretrained).

        Arguments and errors as of `TrainedPolicy.export`.
        """
        is_lora = self.config.adapter == "lora"
        form = form or ("lora" if is_lora else "network")
        with self._writing(folder):
            if form == "lora":
                layers = {name: cast(name, value, dtype) for name, value in lora_state_dict(self.network, self._lora_scale).items()}
                save = partial(save_lora_file, facts=lora_facts(self.network, self.config.lora.rank), prefix=self.network_name)
                type(self.pipeline).save_lora_weights(folder, **{f"{self.network_name}_lora_layers": layers}, save_function=save)
                return
            if is_lora:
                fold_lora(self.network)
            parts = {self.network_name: self.network} if form == "network" else self.pipeline.components
            for name, part in parts.items():
                if isinstance(part, nn.Module):
                    cast_module(part, dtype, name)
            with quietly():
                if form == "network":
                    self.network.save_pretrained(folder / self.network_name)
                else:
                    self.pipeline.save_pretrained(folder)

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
            prefix = f"{self.network_name}."
            state: dict[str, Any] = scale_lora({k.removeprefix(prefix): v for k, v in load_file(file).items()}, 1 / self._lora_scale)
            outcome = set_peft_model_state_dict(self.network, state)
            if outcome.unexpected_keys:
                raise UserError(f"{file} does not fit this model: unexpected {outcome.unexpected_keys[0]}")
        else:
            place = folder / self.network_name
            if not (place / "config.json").is_file():
                raise UserError(f"{folder} holds no exported {self.network_name} ({self.network_name}/config.json)")
            loaded = type(self.network).from_pretrained(place, **{DTYPE_KEYWORD: torch.float32})
            self.network.load_state_dict(loaded.state_dict())
