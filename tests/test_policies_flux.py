"""FluxPolicy beside diffusers' FluxPipeline: packing, positions, the guidance input, noise levels by resolution; dev and schnell."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from families import BUILDERS, HEIGHT, WIDTH, Builder, build_flux, flux_arguments, gradients, some_rows, start_noise

from flowrl.policies.flux import dynamic_shift, pack, unpack
from flowrl.sections import ModelConfig
from flowrl.types import UserError
from samplers.schedules import flux_shift

DEV = BUILDERS["flux"]
SCHNELL = Builder("flux", lambda folder: build_flux(folder, guidance_embeds=False), flux_arguments, DEV.model)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return DEV.build(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SCHNELL.build(tmp_path_factory.mktemp("flux") / "schnell")


def seen_by_the_network(policy: Any, count: int = 3) -> dict[str, Any]:
    """The keyword arguments of one forward."""
    seen: dict[str, Any] = {}
    handle = policy.network.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        policy.velocity()(*some_rows(policy, count))
    handle.remove()
    return seen


def test_packing_is_that_of_the_pipeline_and_loses_nothing() -> None:
    x = torch.randn(2, 4, 6, 10)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(unpack(tokens, 6, 10), FluxPipeline._unpack_latents(tokens, 48, 80, 8))
    assert torch.equal(unpack(tokens, 6, 10), x)


def test_the_network_sees_sigma_positions_and_guidance_as_the_pipeline_gives_them(dev: Path, schnell: Path) -> None:
    policy = DEV.policy(dev)
    seen = seen_by_the_network(policy)
    channels, height, width = policy.latent_shape
    assert (channels, height, width) == (4, HEIGHT // 2, WIDTH // 2)
    assert seen["hidden_states"].shape == (3, height * width // 4, 16)
    assert seen["timestep"].dtype == torch.float32 and seen["timestep"].tolist() == pytest.approx([0.05, 0.5, 0.95])
    ids = FluxPipeline._prepare_latent_image_ids(3, height // 2, width // 2, torch.device("cpu"), torch.float32)
    assert torch.equal(seen["img_ids"], ids) and ids.ndim == 2
    assert seen["txt_ids"].shape == (40, 3) and seen["txt_ids"].abs().max() == 0
    assert seen["guidance"].tolist() == [3.5] * 3
    assert seen_by_the_network(DEV.policy(dev, guidance=1.5))["guidance"].tolist() == [1.5] * 3
    assert seen_by_the_network(DEV.policy(dev, guidance=0.0))["guidance"].tolist() == [0.0] * 3
    assert seen_by_the_network(SCHNELL.policy(schnell))["guidance"] is None


def test_the_guidance_input_draws_the_pictures_that_it_draws_in_diffusers(dev: Path) -> None:
    plain, noise = DEV.plain(dev), start_noise(DEV.policy(dev))
    pictures = {guidance: DEV.ours(DEV.policy(dev, guidance=guidance), noise) for guidance in (None, 3.5, 20.0)}
    assert torch.equal(pictures[None], pictures[3.5])
    assert (pictures[20.0] - pictures[3.5]).abs().max() > 1e-3
    for guidance in (3.5, 20.0):
        assert (DEV.theirs(plain, noise, more={"guidance_scale": guidance}) - pictures[guidance]).abs().max() < 1e-4


def test_schnell_draws_the_pictures_of_its_pipeline_and_trains(schnell: Path) -> None:
    policy, plain = SCHNELL.policy(schnell), SCHNELL.plain(schnell)
    noise = start_noise(policy)
    assert (SCHNELL.ours(policy, noise) - SCHNELL.theirs(plain, noise)).abs().max() < 1e-4
    assert policy.sigmas("diffusers", 4, None) == (1.0, 0.75, 0.5, 0.25, 0.0)  # shift 1, and not the grid that SD3 gets from the scheduler alone
    assert all(g is not None and g.abs().max() > 0 for name, g in gradients(policy).items() if ".lora_B." in name)
    with pytest.raises(UserError, match=r"^model\.guidance: this FLUX\.1 takes no guidance scale as an input; leave it out"):
        SCHNELL.policy(schnell, guidance=3.5)


@pytest.mark.parametrize(("size", "mu"), [((512, 512), 0.63), ((1024, 1024), 1.15), ((768, 1360), 1.147292)])
def test_the_time_shift_follows_the_resolution(dev: Path, size: tuple[int, int], mu: float) -> None:
    policy: Any = DEV.policy(dev)
    policy.latent_shape = (16, size[0] // 8, size[1] // 8)  # of the real VAE
    tokens = size[0] * size[1] // 256
    assert policy.scheduler_shift == pytest.approx(math.exp(mu), rel=1e-4)
    assert policy.scheduler_shift == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-9)
    assert policy.scheduler_shift == pytest.approx(flux_shift(tokens), rel=1e-9)
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 6, 6).tolist(), mu=calculate_shift(tokens))
    assert policy.sigmas("diffusers", 6, None) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert policy.sigmas("flux", 6, None) == policy.sigmas("shifted", 6, None) == policy.sigmas("diffusers", 6, None)
    assert policy.sigmas("diffusers", 6, 3.0) == policy.sigmas("shifted", 6, 3.0)


def test_both_kinds_of_time_shift_are_those_of_the_scheduler() -> None:
    for kind in ("exponential", "linear"):
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        shift = dynamic_shift(scheduler.config, 1.3)
        assert scheduler.time_shift(1.3, 1.0, 0.4) == pytest.approx(shift * 0.4 / (1 + (shift - 1) * 0.4))


def test_the_length_of_prompts_is_that_of_the_published_models(dev: Path, schnell: Path) -> None:
    policy: Any = DEV.policy(dev)
    fast: Any = SCHNELL.policy(schnell)
    assert policy.prompts.take(policy.prompt_rows(["a"]))["embeds"].shape == (1, 40, 16)
    policy.config, fast.config = ModelConfig(path=str(dev)), ModelConfig(path=str(schnell))
    assert (policy.max_sequence_length, fast.max_sequence_length) == (512, 256)
    for length in (0, 513):
        with pytest.raises(UserError, match=rf"^model\.max_sequence_length: {length} T5 tokens do not fit FLUX\.1; use 1 to 512, or null$"):
            DEV.policy(dev, max_sequence_length=length)


def test_the_size_is_the_pipelines_own_where_the_config_says_nothing(dev: Path) -> None:
    policy = DEV.policy(dev)
    assert (policy.default_size, policy.size_multiple) == (256, 4)  # 128 latents, 2 pixels each here; 8 in the real VAE
    assert DEV.policy(dev, height=None, width=None).latent_shape == (4, 128, 128)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # full fine-tuning: float32 weights of norms, inputs in bfloat16
def test_half_precision_keeps_adapters_and_velocities_in_float32(dev: Path) -> None:
    exact = DEV.policy(dev, moved=True)
    for adapter in ("lora", "full"):
        policy = DEV.policy(dev, dtype="bfloat16", adapter=adapter)
        assert {p.dtype for p in policy.trainable()} == {torch.float32}
        assert {p.dtype for p in policy.network.parameters() if not p.requires_grad} == ({torch.bfloat16} if adapter == "lora" else set())
        assert seen_by_the_network(policy)["timestep"].dtype == torch.float32
    policy = DEV.policy(dev, dtype="bfloat16", moved=True)
    with torch.no_grad():
        v, v_exact = (p.velocity()(*some_rows(p, 4)) for p in (policy, exact))
    assert v.dtype == torch.float32
    assert 0 < (v - v_exact).abs().max() < 0.1
