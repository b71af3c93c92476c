"""Random pipelines of a few thousand parameters of every family, saved as real ones are, and the contract that every family keeps.

A new family is an entry of `BUILDERS`; tests/test_policies_families.py then holds it to every clause of `CONTRACT`. docs/models.md shows how.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import PROMPTS, ROOT, build_pipeline, make_config

from flowrl.policies import families
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.pipelines import load_pipeline
from flowrl.sections import ModelConfig
from flowrl.trainer import Trainer
from flowrl.types import UserError
from samplers.rollout import sample_ode

HEIGHT, WIDTH = 8, 12  # not square: rows and columns cannot be confused
LORA = {"rank": 4, "alpha": 6.0}  # alpha / rank = 1.5, so that forgetting it shows
COUNT = 3


def deterministic(policy: DiffusionPolicy, noise: Tensor, num_steps: int, rows: Tensor, guidance_scale: float) -> Tensor:
    """Clean latents by the flow ODE on the noise levels of the family's own pipeline."""
    return sample_ode(policy.velocity(guidance_scale), noise, policy.sigmas("diffusers", num_steps, None), rows)


@dataclass(frozen=True)
class Builder:
    """A family and what its contract needs to know.

    Attributes:
        family: in `flowrl.policies.families.FAMILIES`.
        build: writes a random pipeline into a folder and returns it.
        arguments: (start noise [B, L...], guidance scale, settings of the model) -> what the pipeline is called with beside prompts and steps.
        model: settings of ``model`` in a config, beside the path.
        noise_scale: of the start noise that the pipeline is given.
        deterministic: (policy, noise, num_steps, prompt rows, guidance scale) -> clean latents, as the pipeline makes them.
        guidance_scales: of classifier-free guidance.
        unreached: parts of names of adapters whose output the network does not use.
        overrides: of the training config of each method; None = the family cannot be trained by it.
    """

    family: str
    build: Callable[[Path], Path]
    arguments: Callable[[Tensor, float, Mapping[str, Any]], dict[str, Any]]
    model: Mapping[str, Any]
    deterministic: Callable[[DiffusionPolicy, Tensor, int, Tensor, float], Tensor] = deterministic
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    unreached: tuple[str, ...] = ()
    overrides: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)

    def policy(self, folder: Path, rows_per_forward: int = 64, moved: bool = False, **settings: Any) -> DiffusionPolicy:
        """Of the pipeline in a folder, found by its index; ``moved`` = every trainable weight changed, as a training does."""
        torch.manual_seed(0)
        config = ModelConfig(**{"path": str(folder), "lora": LORA, **self.model, **settings})
        policy = families.make_policy(config, torch.device("cpu"), rows_per_forward=rows_per_forward)
        if moved:
            generator = torch.Generator().manual_seed(5)
            for p in policy.trainable():
                p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
        return policy

    def plain(self, folder: Path) -> Any:
        """The pipeline as a user of diffusers has it."""
        kind = families._load(self.family)
        pipeline = load_pipeline(str(folder), kind.pipelines, kind.title, kind.example, {"default": torch.float32})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def theirs(self, pipeline: Any, noise: Tensor, num_steps: int = 4, guidance_scale: float = 1.0, more: Mapping[str, Any] | None = None) -> Tensor:
        """Pictures [B, 3, H, W] that diffusers draws, called with ``more`` arguments or others."""
        arguments = self.arguments(noise, guidance_scale, self.model) | dict(more or {})
        return pipeline(prompt=PROMPTS[: len(noise)], num_inference_steps=num_steps, output_type="pt", **arguments).images.float()

    def ours(self, policy: DiffusionPolicy, noise: Tensor, num_steps: int = 4, guidance_scale: float = 1.0) -> Tensor:
        """Pictures [B, 3, H, W] that the policy draws, before they are rounded."""
        with torch.no_grad():
            return policy.decode_with_grad(self.deterministic(policy, noise, num_steps, policy.prompt_rows(PROMPTS[: len(noise)]), guidance_scale))

    def config(self, tmp_path: Path, folder: Path, method: str, *overrides: str) -> Any:
        """Of a run of a few seconds."""
        settings = [f"model.{name}={'null' if value is None else value}" for name, value in self.model.items()]
        return make_config(tmp_path, folder, f"method={method}", *settings, *(self.overrides.get(method) or ()), *overrides)


def start_noise(policy: DiffusionPolicy, count: int = COUNT) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


def some_rows(policy: DiffusionPolicy, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise levels and prompts of a forward."""
    x = torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(0.05, 0.95, count, dtype=torch.float64), policy.prompt_rows([PROMPTS[i % 3] for i in range(count)])


def count_calls(module: Any) -> list[None]:
    """A list that grows by one with every forward."""
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def gradients(policy: DiffusionPolicy) -> dict[str, Tensor | None]:
    """Of every trainable parameter, of a weighted sum of a prediction."""
    v = policy.velocity()(*some_rows(policy, 5))
    (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad for name, p in policy.network.named_parameters() if p.requires_grad}


# --- the contract -------------------------------------------------------------------------------------------------------------------------------


def pictures_are_those_of_diffusers(builder: Builder, folder: Path, tmp_path: Path) -> None:
    """Without noise, from the same latents and prompts, with and without guidance."""
    policy, plain = builder.policy(folder), builder.plain(folder)
    noise, drawn = start_noise(policy), []
    for scale in builder.guidance_scales:
        ours = builder.ours(policy, noise, guidance_scale=scale)
        assert ours.shape == (COUNT, 3, HEIGHT, WIDTH)
        assert (ours - builder.theirs(plain, noise, guidance_scale=scale)).abs().max() < 1e-4
        assert (ours[0] - ours[1]).abs().max() > 1e-2  # pictures, not a constant
        drawn.append(ours)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(drawn))
    swapped = builder.deterministic(policy, noise, 4, policy.prompt_rows(PROMPTS[:COUNT][::-1]), 1.0)
    with torch.no_grad():
        assert (policy.decode_with_grad(swapped) - drawn[0]).abs().max() > 1e-3  # and the prompts matter


def rollout_and_training_predict_the_same(builder: Builder, folder: Path, tmp_path: Path) -> None:
    """The ratio of the first update of every iteration is 1, though rollout and training cut their rows differently."""
    sizes = ["training.rows_per_forward=5", "training.rows_per_backward=7"]
    trainer = Trainer(builder.config(tmp_path, folder, "flow_grpo_fast", "rollout.plan=chain", *sizes))
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["ratio/max_abs_log_first"] < 1e-6
        assert metrics["nfe/used"] == metrics["nfe/minimum"]


def a_row_does_not_depend_on_its_batch(builder: Builder, folder: Path, tmp_path: Path) -> None:
    policy = builder.policy(folder, moved=True)
    x, sigma, rows = some_rows(policy, 7)
    with torch.no_grad():
        together = policy.velocity()(x, sigma, rows)
        alone = torch.cat([policy.velocity()(x[i : i + 1], sigma[i : i + 1], rows[i : i + 1]) for i in range(7)])
        policy.rows_per_forward = 3
        split = policy.velocity()(x, sigma, rows)
    assert together.shape == x.shape and together.dtype == torch.float32
    assert max((together - alone).abs().max(), (together - split).abs().max()) < 1e-5


def every_prompt_is_encoded_once_wherever_it_is_kept(builder: Builder, folder: Path, tmp_path: Path) -> None:
    predictions = []
    for storage in ("device", "host", "disk", "disk"):
        policy = builder.policy(folder, prompt_storage=storage, prompt_folder=str(tmp_path / "prompts"))
        counts = [count_calls(encoder) for encoder in policy.text_encoders]  # a CPU encodes one by one
        rows = policy.prompt_rows([*PROMPTS, PROMPTS[1], ""])
        again = policy.prompt_rows([PROMPTS[2], "a new one", PROMPTS[2]])
        with torch.no_grad():
            predictions.append(policy.velocity(2.0)(*some_rows(policy, 5)))
        once = 0 if storage == "disk" and len(predictions) == 4 else len(PROMPTS) + 1  # "" was encoded before; the second time, all lie on the disk
        assert [len(calls) for calls in counts] == [once] * len(counts) and len(counts) > 0
        assert (rows[-1], rows[-2], again[0], again[0]) == (policy.unconditional_row, rows[1], rows[2], again[2])
        assert policy.pooled.shape == (len(PROMPTS) + 2, policy.pooled.shape[1])
        assert policy.pooled.isfinite().all() and len(policy.pooled.unique(dim=0)) == len(policy.pooled)
    assert all(torch.equal(predictions[0], other) for other in predictions[1:])


def exports_draw_the_same_pictures_in_plain_diffusers(builder: Builder, folder: Path, tmp_path: Path) -> None:
    base = builder.policy(folder)
    noise = start_noise(base)
    for adapter in ("lora", "full"):
        policy, place = builder.policy(folder, moved=True, adapter=adapter), tmp_path / adapter
        policy.export(place)
        plain = builder.plain(folder)
        if adapter == "lora":
            plain.load_lora_weights(place)
        else:
            plain.register_modules(**{policy.network_name: type(policy.network).from_pretrained(place / policy.network_name)})
        tuned = builder.ours(policy, noise)
        assert (builder.theirs(plain, noise) - tuned).abs().max() < 1e-4
        assert (builder.ours(base, noise) - tuned).abs().max() > 3e-3  # else it would pass with weights that were never loaded
        fresh = builder.policy(folder, adapter=adapter)
        fresh.load_export(place)
        for p, q in zip(policy.trainable(), fresh.trainable(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6, atol=0)


def gradients_reach_what_is_trained_and_nothing_else(builder: Builder, folder: Path, tmp_path: Path) -> None:
    policy = builder.policy(folder)
    found = gradients(policy)
    assert found and all(".lora_" in name for name in found)
    for name, gradient in found.items():
        reached = gradient is not None and bool(gradient.abs().max() > 0)
        # A has no gradient as long as B is 0
        assert reached == (".lora_B." in name and not any(part in name for part in builder.unreached)), name
    for module in (policy.network, policy.vae, *policy.text_encoders):
        assert all(p.requires_grad or p.grad is None for p in module.parameters())
    adapted = {name.partition(".lora_")[0] for name in found}
    assert all(any(name.endswith(target) for name in adapted) for target in policy.targets)  # no target is there for nothing


def latents_and_pictures_go_both_ways(builder: Builder, folder: Path, tmp_path: Path) -> None:
    policy = builder.policy(folder, rows_per_forward=2)
    assert policy.image_size == (HEIGHT, WIDTH)
    latents = start_noise(policy)
    images = policy.decode(latents)
    assert images.shape == (COUNT, 3, HEIGHT, WIDTH) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and torch.equal((images * 255).round() / 255, images)
    again = policy.encode(images)
    assert again.shape == latents.shape and again.dtype == torch.float32 and again.isfinite().all()
    with torch.no_grad():
        assert (policy.decode_with_grad(latents).cpu() - images).abs().max() <= 0.5 / 255 + 1e-6  # the nearest level
    torch.testing.assert_close(policy.from_vae(policy.to_vae(latents)), latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.encode(images[1:2]), again[1:2], rtol=1e-4, atol=1e-4)


def a_size_that_does_not_fit_is_one_clear_error(builder: Builder, folder: Path, tmp_path: Path) -> None:
    multiple = builder.policy(folder).size_multiple
    for name in ("height", "width"):
        with pytest.raises(UserError, match=rf"^model\.{name}: {multiple + 1} is not a multiple of {multiple}, which this model needs$"):
            builder.policy(folder, **{name: multiple + 1})


def checkpointing_does_not_change_the_gradient(builder: Builder, folder: Path, tmp_path: Path) -> None:
    plain, saving = (gradients(builder.policy(folder, moved=True, gradient_checkpointing=on)) for on in (False, True))
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient)


def it_trains(builder: Builder, folder: Path, tmp_path: Path) -> None:
    """Two iterations of a method that trains steps and of one that matches finished pictures; no network evaluation too many."""
    for method, overrides in {"flow_grpo_fast": (), "awm": ("rollout={plan: ode, num_steps: 4, solver: ode}", "matching.num_times=2")}.items():
        if builder.overrides.get(method, ()) is None:
            continue
        trainer = Trainer(builder.config(tmp_path, folder, method, *overrides))
        before = [p.detach().clone() for p in trainer.parameters]
        for iteration in (1, 2):
            metrics, _ = trainer.iterate(iteration)
            assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
            assert metrics["grad_norm"] > 0
        assert any(not torch.equal(p, q) for p, q in zip(before, trainer.parameters, strict=True))


CONTRACT: dict[str, Callable[[Builder, Path, Path], None]] = {
    clause.__name__: clause
    for clause in (
        pictures_are_those_of_diffusers,
        rollout_and_training_predict_the_same,
        a_row_does_not_depend_on_its_batch,
        every_prompt_is_encoded_once_wherever_it_is_kept,
        exports_draw_the_same_pictures_in_plain_diffusers,
        gradients_reach_what_is_trained_and_nothing_else,
        latents_and_pictures_go_both_ways,
        a_size_that_does_not_fit_is_one_clear_error,
        checkpointing_does_not_change_the_gradient,
        it_trains,
    )
}


def assert_family_contract(builder: Builder, tmp_path: Path) -> None:
    """All clauses, on a pipeline built for them; for a family outside of this repository."""
    folder = builder.build(tmp_path / "pipeline")
    for name, clause in CONTRACT.items():
        place = tmp_path / name
        place.mkdir()
        clause(builder, folder, place)


# --- random pipelines ---------------------------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> Any:
    """The embedded model's."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ROOT / "flowrl" / "assets" / "tiny-sd3" / "tokenizer")


def clip_settings(tokenizer: Any) -> dict[str, Any]:
    """Of a text encoder of 16 channels."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def letter_tokenizer() -> Any:
    """A T5 tokenizer whose tokens are letters."""
    from transformers import T5TokenizerFast

    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(code), -3.0) for code in range(ord("a"), ord("z") + 1))]
    return T5TokenizerFast(vocab=scores, extra_ids=0)


def byte_tokenizer() -> Any:
    """A Qwen2 tokenizer whose tokens are bytes, with a chat template like the real one's."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2TokenizerFast

    vocabulary = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2TokenizerFast(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    return tokenizer


VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Pictures of 2 x 2 pixels a latent."""


def build_flux(folder: Path, guidance_embeds: bool = True) -> Path:
    """FLUX.1-dev, or without guidance embeddings and with a fixed time shift of 1 schnell: one double and one single block."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip, letters = clip_tokenizer(), letter_tokenizer()
    shifts = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15} if guidance_embeds else {"shift": 1.0}
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifts),
        vae=AutoencoderKL(**VAE, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip_settings(clip))),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(letters), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
        tokenizer_2=letters,
    ).save_pretrained(folder)
    return folder


def build_flux2(folder: Path, is_distilled: bool = False) -> Path:
    """FLUX.2 [klein]: one double and one single block, and as many layers of Qwen3 as its pipeline reads."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vae = AutoencoderKLFlux2(**VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    words: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 27, "head_dim": 8}
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**words, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2)),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


# --- how they are called ------------------------------------------------------------------------------------------------------------------------


def sd3_arguments(noise: Tensor, guidance_scale: float, model: Mapping[str, Any]) -> dict[str, Any]:
    return {"latents": noise, "guidance_scale": guidance_scale, **model}


def flux_arguments(noise: Tensor, guidance_scale: float, model: Mapping[str, Any]) -> dict[str, Any]:
    """Packed by the pipeline's own code; guidance with two branches is another argument there than the network's guidance input."""
    from diffusers import FluxPipeline

    two_branches = {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * len(noise)} if guidance_scale > 1 else {}
    return {"latents": FluxPipeline._pack_latents(noise, *noise.shape), **two_branches, **model}


SIZE = {"height": HEIGHT, "width": WIDTH}
BUILDERS: dict[str, Builder] = {
    "sd3": Builder("sd3", build_pipeline, sd3_arguments, SIZE | {"max_sequence_length": 0}, unreached=("transformer_blocks.1.attn.add_q_proj",)),
    "flux": Builder("flux", build_flux, flux_arguments, SIZE | {"max_sequence_length": 40}),
    "flux2": Builder("flux2", build_flux2, sd3_arguments, SIZE | {"max_sequence_length": 40}),
}
"""Of the families whose networks are transformers; tests/unets.py has the others. Together, one for every name in `flowrl.policies.families.FAMILIES`."""
