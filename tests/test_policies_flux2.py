"""Flux2Policy beside diffusers' Flux2KleinPipeline: noise levels by resolution and steps, prompts, the batch norm of the VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from families import BUILDERS, HEIGHT, WIDTH, some_rows, start_noise

from flowrl.policies import flux2
from flowrl.policies.flux2 import Flux2Policy, empirical_mu
from flowrl.sections import ModelConfig
from flowrl.types import UserError

pytestmark = pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinPipeline"), reason="diffusers before 0.37")
FLUX2 = BUILDERS["flux2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FLUX2.build(tmp_path_factory.mktemp("flux2") / "klein")


def test_a_new_family_is_a_short_file() -> None:
    assert len(Path(flux2.__file__).read_text().splitlines()) < 150


@pytest.mark.parametrize(("tokens", "steps"), [(6, 4), (1024, 10), (4096, 50), (4096, 200), (4300, 28), (4301, 28), (9216, 10)])
def test_mu_is_that_of_diffusers(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_the_noise_levels_follow_resolution_and_steps(folder: Path) -> None:
    policy: Any = FLUX2.policy(folder)
    policy.latent_shape = (128, 32, 48)
    for steps in (4, 28):
        scheduler = policy.pipeline.scheduler
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=empirical_mu(32 * 48, steps))
        assert policy.sigmas("diffusers", steps, None) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert policy.shift_for(4) > policy.shift_for(28) > policy.scheduler_shift == policy.shift_for(50)
    policy.pipeline.scheduler.register_to_config(use_dynamic_shifting=False)
    assert policy.shift_for(4) == policy.scheduler_shift == 3.0


def test_the_network_sees_sigma_and_positions_as_the_pipeline_gives_them(folder: Path) -> None:
    policy = FLUX2.policy(folder)
    assert policy.latent_shape == (16, HEIGHT // 4, WIDTH // 4)
    seen: dict[str, Any] = {}
    policy.network.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    x, sigma, rows = some_rows(policy, 3)
    with torch.no_grad():
        assert policy.velocity()(x, sigma, rows).shape == x.shape
    pipeline = policy.pipeline
    assert torch.equal(seen["hidden_states"], pipeline._pack_latents(x))
    assert torch.equal(seen["img_ids"], pipeline._prepare_latent_ids(x)[0])
    assert torch.equal(seen["txt_ids"], pipeline._prepare_text_ids(torch.zeros(1, 40, 1))[0])
    assert seen["timestep"].dtype == torch.float32 and seen["timestep"].tolist() == pytest.approx([0.05, 0.5, 0.95])


def test_encoding_is_the_pipelines_own(folder: Path) -> None:
    policy = FLUX2.policy(folder)
    images = torch.rand(3, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = policy.pipeline._encode_vae_image(2 * images - 1, generator=None)
    torch.testing.assert_close(policy.encode(images), theirs)
    latents = start_noise(policy)
    assert policy.to_vae(latents).shape == (3, 4, HEIGHT // 2, WIDTH // 2)


def test_the_pooled_embedding_is_the_mean_over_the_words_and_not_over_the_padding(folder: Path) -> None:
    short, long = (FLUX2.policy(folder, max_sequence_length=length) for length in (40, 60))
    texts = ["", "a red circle", "two blue squares"]
    rows = short.prompt_rows(texts)
    assert torch.equal(long.prompt_rows(texts), rows)
    a, b = short.pooled[rows], long.pooled[rows]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    embeds = short.prompts.take(short.prompt_rows(["a red circle"]))["embeds"][0]
    tokens = len("u:a red circle;a:")  # by the tiny template, a token a byte
    torch.testing.assert_close(a[1], embeds[:tokens].mean(0))
    assert (a[1] - embeds.mean(0)).abs().max() > 1e-2


def test_the_length_of_prompts(folder: Path) -> None:
    policy: Any = FLUX2.policy(folder)
    policy.config = ModelConfig(path=str(folder))
    assert policy.max_sequence_length == 512
    with pytest.raises(UserError, match=r"^model\.max_sequence_length: FLUX\.2 \[klein\] reads its prompt from these tokens alone; use more than 0, or null$"):
        FLUX2.policy(folder, max_sequence_length=0)


def test_a_guidance_input_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.guidance: this FLUX\.2 \[klein\] takes no guidance scale"):
        FLUX2.policy(folder, guidance=3.5)


def test_a_diffusers_without_the_pipeline_is_one_clear_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux2Policy, "pipelines", ("Flux9Pipeline",))
    with pytest.raises(UserError, match=r"^model\.path: FLUX\.2 \[klein\] needs diffusers 0\.37 or newer, and this is .*; pip install --upgrade diffusers$"):
        FLUX2.policy(folder, family="flux2")
