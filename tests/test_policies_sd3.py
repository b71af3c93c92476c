"""Sd3Policy is the pipeline that diffusers loads: the same pictures, the same files, the gradient that Flow-GRPO asks for, no row evaluated twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from toys import PROMPTS
from transformers.utils import logging as transformers_logging

from flowrl.policies import pipelines
from flowrl.policies.pipelines import resolve_model_path
from flowrl.policies.sd3 import Sd3Policy
from flowrl.sections import ModelConfig
from flowrl.types import UserError
from samplers.direct import denoise
from samplers.rollout import sample_ode
from samplers.schedules import sigma_grid

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 6.0}  # alpha / rank = 1.5, so that forgetting it shows


def load_pipeline(path: str, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    return pipelines.load_pipeline(path, Sd3Policy.pipelines, Sd3Policy.title, Sd3Policy.example, {"default": dtype})


def make_policy(pipeline: Path | str, rows_per_forward: int = 64, keep_reference: bool = False, **settings: Any) -> Sd3Policy:
    torch.manual_seed(0)
    defaults = {} if str(pipeline).startswith("flowrl:") else {"max_sequence_length": 0}
    config = ModelConfig(path=str(pipeline), **{"lora": LORA, **defaults, **settings})
    return Sd3Policy(config, CPU, rows_per_forward=rows_per_forward, keep_reference=keep_reference)


def move_weights(policy: Sd3Policy) -> Sd3Policy:
    """What a training does: every trainable weight changes."""
    generator = torch.Generator().manual_seed(5)
    for p in policy.trainable():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return policy


def some_rows(policy: Sd3Policy, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *policy.latent_shape, generator=generator)
    sigma = torch.linspace(0.05, 1.0, count, dtype=torch.float64)
    return x, sigma, policy.prompt_rows([PROMPTS[i % 3] for i in range(count)])


def diffusers_pictures(pipeline: StableDiffusion3Pipeline, noise: Tensor, num_steps: int, guidance_scale: float, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPTS[: len(noise)],
        latents=noise,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        output_type="pt",
        **more,
    )
    return out.images.float()


def our_pictures(policy: Sd3Policy, noise: Tensor, grid: str, num_steps: int, guidance_scale: float) -> Tensor:
    sigmas = sigma_grid(grid, num_steps, policy.scheduler_shift)
    with torch.no_grad():
        return policy.decode_with_grad(sample_ode(policy.velocity(guidance_scale), noise, sigmas, policy.prompt_rows(PROMPTS[: len(noise)])))


def start_noise(policy: Sd3Policy, count: int) -> Tensor:
    return torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(3))


# --- the same pictures --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_the_ode_sampler_draws_the_pictures_of_the_embedded_pipeline(guidance_scale: float) -> None:
    policy = make_policy("flowrl:tiny-sd3")
    noise = start_noise(policy, 3)
    plain = load_pipeline("flowrl:tiny-sd3", torch.float32)
    theirs = diffusers_pictures(plain, noise, 10, guidance_scale, sigmas=np.linspace(1, 1 / 10, 10).tolist())
    ours = our_pictures(policy, noise, "shifted", 10, guidance_scale)
    assert ours.shape == (3, 3, 32, 32)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours[0] - ours[1]).abs().max() > 1e-2  # pictures, not a constant


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
@pytest.mark.parametrize("grid", ["shifted", "diffusers"])
def test_both_grids_are_those_of_a_pipeline_with_a_shift(pipeline: Path, grid: str, guidance_scale: float) -> None:
    policy = make_policy(pipeline)
    assert policy.scheduler_shift == 3.0
    noise = start_noise(policy, 3)
    given = {"sigmas": np.linspace(1, 1 / 6, 6).tolist()} if grid == "shifted" else {}
    theirs = diffusers_pictures(load_pipeline(str(pipeline), torch.float32), noise, 6, guidance_scale, **given)
    other = {"shifted": "diffusers", "diffusers": "shifted"}[grid]
    assert (our_pictures(policy, noise, grid, 6, guidance_scale) - theirs).abs().max() < 1e-4
    assert (our_pictures(policy, noise, other, 6, guidance_scale) - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_exported_weights_draw_the_same_pictures_in_plain_diffusers(tmp_path: Path, pipeline: Path, adapter: str, guidance_scale: float) -> None:
    policy = move_weights(make_policy(pipeline, adapter=adapter))
    policy.export(tmp_path)
    if adapter == "lora":
        plain = load_pipeline(str(pipeline), torch.float32)
        plain.load_lora_weights(tmp_path)
    else:
        transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
        plain = StableDiffusion3Pipeline.from_pretrained(pipeline, transformer=transformer, text_encoder_3=None, tokenizer_3=None)
    noise = start_noise(policy, 3)
    tuned = our_pictures(policy, noise, "diffusers", 6, guidance_scale)
    assert (diffusers_pictures(plain, noise, 6, guidance_scale) - tuned).abs().max() < 1e-4
    base = our_pictures(make_policy(pipeline), noise, "diffusers", 6, guidance_scale)
    assert (base - tuned).abs().max() > 1e-2  # else the test would pass with weights that were never loaded


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_exported_weights_can_be_loaded_back(tmp_path: Path, pipeline: Path, adapter: str) -> None:
    policy, fresh = move_weights(make_policy(pipeline, adapter=adapter)), make_policy(pipeline, adapter=adapter)
    policy.export(tmp_path)
    fresh.load_export(tmp_path)
    for p, q in zip(policy.trainable(), fresh.trainable(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="holds no"):
        fresh.load_export(tmp_path / "elsewhere")


# --- the reference ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_reference_is_the_base_model_whatever_was_trained(pipeline: Path, adapter: str) -> None:
    base = load_pipeline(str(pipeline), torch.float32).transformer
    policy = move_weights(make_policy(pipeline, adapter=adapter, keep_reference=True))
    x, sigma, rows = some_rows(policy, 6)
    velocity = policy.velocity()
    embeds, _, pooled, _ = load_pipeline(str(pipeline), torch.float32).encode_prompt(
        [PROMPTS[i % 3] for i in range(6)], None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    with torch.no_grad():
        expected = base(x, timestep=(sigma * 1000).float(), encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False)[0]
        tuned = velocity(x, sigma, rows)
    with policy.reference():
        referred = velocity(x, sigma, rows)
    assert (referred - expected).abs().max() < 1e-6
    assert (tuned - expected).abs().max() > 1e-3
    assert torch.equal(velocity(x, sigma, rows).detach(), tuned)  # and it is switched back
    assert all(p.requires_grad for p in policy.trainable())
    assert len(policy.trainable()) > 0


def test_a_new_adapter_changes_no_bit_of_the_output(pipeline: Path) -> None:
    policy = make_policy(pipeline)
    x, sigma, rows = some_rows(policy, 6)
    velocity = policy.velocity()
    with policy.reference():
        off = velocity(x, sigma, rows)
    with torch.no_grad():
        assert torch.equal(velocity(x, sigma, rows), off)


def test_full_fine_tuning_without_a_kept_copy_has_no_reference(pipeline: Path) -> None:
    policy = make_policy(pipeline, adapter="full")
    with pytest.raises(RuntimeError, match="keep_reference"), policy.reference():
        pass


# --- guidance and rows --------------------------------------------------------------------------------------------------------------------------


def gradients(policy: Sd3Policy, guidance_scale: float, count: int = 5) -> list[Tensor]:
    x, sigma, rows = some_rows(policy, count)
    v = policy.velocity(guidance_scale)(x, sigma, rows)
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    return list(torch.autograd.grad((v * weight).sum(), policy.trainable()))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_guidance_multiplies_the_gradient_of_the_conditional_branch(pipeline: Path, adapter: str) -> None:
    # v = u + w (c - u) with u constant: dv = w dc.
    policy = move_weights(make_policy(pipeline, adapter=adapter))
    alone, guided = gradients(policy, 1.0), gradients(policy, 3.0)
    largest = max(g.abs().max().item() for g in alone)
    assert largest > 0
    for a, g in zip(alone, guided, strict=True):
        torch.testing.assert_close(g, 3.0 * a, rtol=1e-4, atol=1e-5 * largest)


def test_the_unconditional_branch_has_its_own_prompt_and_no_graph(pipeline: Path) -> None:
    policy = move_weights(make_policy(pipeline))
    x, sigma, rows = some_rows(policy, 5)
    with torch.no_grad():
        conditional = policy.velocity(1.0)(x, sigma, rows)
        unconditional = policy.velocity(1.0)(x, sigma, policy.prompt_rows([""] * 5))
    policy.rows.forward = policy.rows.backward = 0
    guided = policy.velocity(3.0)(x, sigma, rows)
    torch.testing.assert_close(guided.detach(), unconditional + 3 * (conditional - unconditional))
    assert (unconditional - conditional).abs().max() > 1e-4
    assert (policy.rows.forward, policy.rows.backward) == (10, 5)


def test_without_gradient_the_rows_are_split_and_each_is_evaluated_once(pipeline: Path) -> None:
    policy = move_weights(make_policy(pipeline, rows_per_forward=3))
    x, sigma, rows = some_rows(policy, 7)
    seen: list[int] = []
    policy.network.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True)
    with torch.no_grad():
        split = policy.velocity(2.0)(x, sigma, rows)
    assert seen == [3, 3, 3, 3, 1, 1]
    assert (policy.rows.forward, policy.rows.backward) == (14, 0)
    policy.rows_per_forward = 64
    with torch.no_grad():
        torch.testing.assert_close(policy.velocity(2.0)(x, sigma, rows), split, rtol=0, atol=1e-5)


def test_gradient_checkpointing_does_not_change_the_gradient(pipeline: Path) -> None:
    plain = gradients(move_weights(make_policy(pipeline)), 1.0)
    saving = gradients(move_weights(make_policy(pipeline, gradient_checkpointing=True)), 1.0)
    for a, b in zip(plain, saving, strict=True):
        torch.testing.assert_close(b, a)


def test_half_precision_keeps_trainable_weights_and_velocities_in_float32(pipeline: Path) -> None:
    exact = make_policy(pipeline)
    for adapter in ("lora", "full"):
        policy = make_policy(pipeline, dtype="bfloat16", adapter=adapter)
        assert {p.dtype for p in policy.trainable()} == {torch.float32}
        assert policy.vae.dtype == torch.float32
        with torch.no_grad():
            v, v_exact = (p.velocity()(*some_rows(p, 4)) for p in (policy, exact))
        assert v.dtype == torch.float32
        assert 0 < (v - v_exact).abs().max() < 0.1


# --- pictures with a gradient -------------------------------------------------------------------------------------------------------------------


def some_latents(policy: Sd3Policy, count: int = 3) -> Tensor:
    return 0.5 * torch.randn(count, *policy.latent_shape, generator=torch.Generator().manual_seed(4))


def decode_gradient(policy: Sd3Policy, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures, and the gradient of a weighted sum of their pixels."""
    latents = latents.clone().requires_grad_()
    images = policy.decode_with_grad(latents)
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(6))
    return images.detach(), torch.autograd.grad((images * weight).sum(), latents)[0]


def test_decoding_with_gradient_gives_the_pictures_of_decode_and_the_gradient_of_a_finite_difference(pipeline: Path) -> None:
    policy = make_policy(pipeline)
    latents = some_latents(policy)
    images, slope = decode_gradient(policy, latents)
    assert torch.equal((images * 255).round() / 255, policy.decode(latents))
    assert images.dtype == torch.float32
    assert not policy.decode(latents.requires_grad_()).requires_grad
    weight = torch.randn(images.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float32).double()
    for seed in range(3):
        direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            up, down = (policy.decode_with_grad(latents.detach() + s * direction).double() for s in (2e-3, -2e-3))
        torch.testing.assert_close((slope * direction).sum().double(), ((up - down) * weight).sum() / 4e-3, rtol=1e-2, atol=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in policy.vae.parameters())


def test_pixels_clamped_in_decoding_have_no_gradient(pipeline: Path) -> None:
    policy = make_policy(pipeline)
    latents = (30 * some_latents(policy)).requires_grad_()
    images = policy.decode_with_grad(latents)
    assert images.min() >= 0
    assert images.max() <= 1
    clamped = (images == 0) | (images == 1)
    assert 0 < clamped.sum() < images.numel()
    assert torch.autograd.grad(images[clamped].sum(), latents, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(images[~clamped].sum(), latents)[0].abs().max() > 0


def test_gradient_checkpointing_decodes_the_same_pictures_with_the_same_gradient_one_by_one(pipeline: Path) -> None:
    plain, saving = make_policy(pipeline), make_policy(pipeline, gradient_checkpointing=True)
    seen: list[int] = []
    saving.vae.decoder.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    latents = some_latents(plain)
    for ours, theirs in zip(decode_gradient(saving, latents), decode_gradient(plain, latents), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert seen == [1] * 6  # three pictures, and once more each in the backward pass


def test_the_gradient_of_a_picture_reaches_the_adapter_through_every_step(pipeline: Path) -> None:
    policy = move_weights(make_policy(pipeline))
    noise, rows = start_noise(policy, 3), policy.prompt_rows(PROMPTS[:3])
    sigmas = sigma_grid("shifted", 3, policy.scheduler_shift)

    def gradient(steps: bool) -> tuple[float, list[Tensor]]:
        policy.rows.forward = policy.rows.backward = 0
        loss = policy.decode_with_grad(denoise(policy.velocity(), noise, 0, sigmas, rows, checkpoint=steps)).square().mean()
        return loss.item(), list(torch.autograd.grad(loss, policy.trainable()))

    value, plain = gradient(False)
    assert (policy.rows.forward, policy.rows.backward) == (9, 9)
    _, saving = gradient(True)
    assert (policy.rows.forward, policy.rows.backward) == (18, 18)  # recomputed rows are evaluated, so they are counted
    largest = max(g.abs().max().item() for g in plain)
    for a, b in zip(plain, saving, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * largest)
    with torch.no_grad():  # a step of the parameters down the gradient lowers the loss by its square
        square = sum(g.square().sum().item() for g in plain)
        for p, g in zip(policy.trainable(), plain, strict=True):
            p.add_(g, alpha=-1e-3 * value / square)
    assert gradient(False)[0] - value == pytest.approx(-1e-3 * value, rel=0.05)


# --- prompts ------------------------------------------------------------------------------------------------------------------------------------


# --- pictures back into latents -----------------------------------------------------------------------------------------------------------------


def test_encoding_is_the_mode_of_the_vae_in_the_units_of_the_network(pipeline: Path) -> None:
    policy = make_policy(pipeline, rows_per_forward=2)
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = policy.encode(images)
    assert latents.shape == (5, *policy.latent_shape) and latents.dtype == torch.float32 and not latents.requires_grad
    with torch.no_grad():
        mean = policy.vae.encode(2 * images - 1).latent_dist.mean  # of pixels in [-1, 1]
    torch.testing.assert_close(latents, (mean - 0.1) * 0.7)  # the toy VAE's shift and scaling, which decoding undoes: z / 0.7 + 0.1
    torch.testing.assert_close(policy.encode(images[3:4]), latents[3:4])
    assert torch.equal(policy.encode(images.double()), policy.encode(images))


def test_what_the_embedded_model_draws_comes_back_from_its_latents() -> None:
    policy = make_policy("flowrl:tiny-sd3")
    assert policy.image_size == (32, 32)
    images = our_pictures(policy, start_noise(policy, 3), "shifted", 6, 1.0)
    again = policy.decode(policy.encode(images))
    assert (again - images).abs().mean() < 0.03
    assert (policy.decode(policy.encode(images.flip(0))) - images).abs().mean() > 0.03


def test_the_size_of_the_pictures_is_that_of_the_latents(pipeline: Path) -> None:
    policy = make_policy(pipeline, height=12, width=8)
    assert policy.image_size == (12, 8)
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape[2:] == policy.image_size
    assert policy.encode(torch.zeros(1, 3, *policy.image_size)).shape[1:] == policy.latent_shape


def test_every_distinct_prompt_is_encoded_once(pipeline: Path) -> None:
    policy = make_policy(pipeline)
    counts = [0, 0]
    for i, encoder in enumerate((policy.pipeline.text_encoder, policy.pipeline.text_encoder_2)):
        encoder.register_forward_hook(lambda _m, args, _out, i=i: counts.__setitem__(i, counts[i] + len(args[0])))
    first = policy.prompt_rows([*PROMPTS, *PROMPTS, ""])
    second = policy.prompt_rows([PROMPTS[2], "a new one", PROMPTS[2]])
    assert counts == [len(PROMPTS) + 1, len(PROMPTS) + 1]  # the empty prompt was encoded when the policy was made
    assert first[: len(PROMPTS)].tolist() == first[len(PROMPTS) : -1].tolist()
    assert first[-1] == policy.unconditional_row
    assert second[0] == second[2] == first[2]
    assert len(set(first.tolist()) | set(second.tolist())) == len(PROMPTS) + 2


def test_an_embedding_does_not_depend_on_the_prompts_before_it(pipeline: Path) -> None:
    # A resumed run meets the prompts in another order and must have the same bits.
    a, b = make_policy(pipeline), make_policy(pipeline)
    a.prompt_rows(PROMPTS)
    for text in reversed(PROMPTS):
        b.prompt_rows([text])
    x = torch.randn(len(PROMPTS), *a.latent_shape)
    sigma = torch.full((len(PROMPTS),), 0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(a.velocity()(x, sigma, a.prompt_rows(PROMPTS)), b.velocity()(x, sigma, b.prompt_rows(PROMPTS)))


# --- loading ------------------------------------------------------------------------------------------------------------------------------------


def test_loading_switches_progress_bars_off_and_on_again(pipeline: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    assert diffusers_logging.is_progress_bar_enabled()
    make_policy(pipeline)
    assert capfd.readouterr().err == ""
    assert [str(w.message) for w in recwarn if "dtype" in str(w.message)] == []
    assert diffusers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


def test_the_size_is_the_models_own_or_the_one_asked_for(pipeline: Path) -> None:
    assert make_policy(pipeline).latent_shape == (4, 4, 4)
    assert make_policy(pipeline, height=4, width=8).latent_shape == (4, 2, 4)
    with pytest.raises(UserError, match=r"model\.height: 10 is not a multiple of 4"):
        make_policy(pipeline, height=10, width=8)


def test_t5_tokens_are_left_out_only_for_the_embedded_model(pipeline: Path) -> None:
    policy = make_policy(pipeline)
    assert policy.max_sequence_length == 0
    policy.config = ModelConfig(path=str(pipeline))
    assert policy.max_sequence_length == 256
    policy.config = ModelConfig(path="flowrl:tiny-sd3")
    assert policy.max_sequence_length == 0


def test_an_unknown_embedded_model_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="flowrl:nothing is not an embedded model; known: flowrl:tiny-sd3"):
        resolve_model_path("flowrl:nothing")


def test_adapter_targets_that_match_nothing_are_named(pipeline: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.targets: attn\.to_z match no module"):
        make_policy(pipeline, lora={"rank": 4, "alpha": 8.0, "targets": ("attn.to_z",)})
