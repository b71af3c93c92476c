"""Stable Diffusion and Stable Diffusion XL: U-Nets that predict epsilon or v, the DDIM that diffusers runs, and the transitions that DDPO trains.

What every family keeps is tested in tests/test_policies_families.py.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from families import some_rows, start_noise
from PIL import Image
from torch import Tensor
from toys import PROMPTS, as_prompts, make_config
from unets import SCHEDULE, UNET_BUILDERS, ZERO_SNR, UNetBuilder, ddim, set_scheduler

from flowrl.config import Config, load_config
from flowrl.evaluation import Evaluator, build_rewards, sigmas_of
from flowrl.likelihoods.transition import TransitionLikelihood, select_rows
from flowrl.policies.unet import StableDiffusionPolicy, StableDiffusionXlPolicy
from flowrl.run import train
from flowrl.sampling import sample_to_folder
from flowrl.sections import RewardConfig
from flowrl.seeds import generator
from flowrl.trainer import Trainer
from flowrl.types import Rollout, UserError
from samplers.kernels import load_kernel
from samplers.ode import Ode, noiseless_kernel
from samplers.plans import Plan, chain_plan, tree_plan, window_plan
from samplers.rollout import execute, sample_ode

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
Folders = Mapping[str, Path]
each_family = pytest.mark.parametrize("name", UNET_BUILDERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Family -> its random pipeline, and "v": one that predicts v and whose training ends in pure noise."""
    place = tmp_path_factory.mktemp("unets")
    built = {name: builder.build(place / name) for name, builder in UNET_BUILDERS.items()}
    built["v"] = shutil.copytree(built["sd"], place / "v")
    set_scheduler(built["v"], "DDIMScheduler", ZERO_SNR)
    return built


def policy_of(folders: Folders, name: str, **settings: Any) -> Any:
    return UNET_BUILDERS["sd" if name == "v" else name].policy(folders[name], **settings)


# --- DDIM without noise -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "num_steps"), [("sd", 7), ("sdxl", 10), ("v", 7)])  # 1000 is no multiple of 7
def test_pictures_are_those_of_the_ddim_scheduler_of_diffusers(name: str, num_steps: int, folders: Folders) -> None:
    builder, policy = UNET_BUILDERS["sd" if name == "v" else name], policy_of(folders, name)
    assert policy.prediction == ("v_prediction" if name == "v" else "epsilon")
    noise, plain = start_noise(policy), builder.plain(folders[name])
    assert plain.scheduler.init_noise_sigma == 1  # so diffusers too starts with N(0, 1), wherever the first sigma lies
    for scale in (1.0, 5.0):
        ours = builder.ours(policy, noise, num_steps, scale)
        assert (ours - builder.theirs(plain, noise, num_steps, scale)).abs().max() < 1e-4
    # a pipeline that stops at alphabar_0 instead of 1 draws almost the same picture
    other = builder.theirs(ddim(plain, set_alpha_to_one=False), noise, num_steps, 5.0)
    assert 1e-4 < (ours - other).abs().max() < 2e-2


def test_a_v_network_read_as_an_epsilon_network_draws_another_picture(folders: Folders) -> None:
    builder, policy = UNET_BUILDERS["sd"], policy_of(folders, "v")
    right = builder.ours(policy, start_noise(policy), 7)
    policy.prediction = "epsilon"
    assert (builder.ours(policy, start_noise(policy), 7) - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["sd", "v"])
def test_noise_levels_are_those_of_the_timesteps_of_ddim(name: str, folders: Folders) -> None:
    policy = policy_of(folders, name)
    scheduler = ddim(UNET_BUILDERS["sd"].plain(folders[name])).scheduler
    for num_steps in (5, 20, 50):
        scheduler.set_timesteps(num_steps)
        sigmas = policy.sigmas("shifted", num_steps, None)
        assert policy.timesteps(torch.tensor(sigmas[:-1], dtype=torch.float64)).tolist() == scheduler.timesteps.tolist()
        assert sigmas[-1] == 0 < sigmas[0] < 1
        expected = (1 - scheduler.alphas_cumprod.double()[scheduler.timesteps]).sqrt()
        torch.testing.assert_close(torch.tensor(sigmas[:-1], dtype=torch.float64), expected, rtol=0, atol=1e-12)
        assert policy.sigmas("flux", num_steps, None) == sigmas
    assert scheduler.timesteps[-1] == 1  # steps_offset


@pytest.mark.parametrize("name", ["sd", "v"])
def test_a_noise_level_goes_back_to_its_timestep(name: str, folders: Folders) -> None:
    policy = policy_of(folders, name)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    alphas = ddim(UNET_BUILDERS["sd"].plain(folders[name])).scheduler.alphas_cumprod
    levels = (1 - alphas.double()[order]).sqrt()
    assert torch.equal(policy.timesteps(levels), order)
    below = order < 990  # where a rescaled schedule ends, float32 has too few levels
    assert torch.equal(policy.timesteps(levels[below].float()), order[below])
    middle = (levels[order == 500] + 0.4 * (levels[order == 501] - levels[order == 500])).double()
    assert policy.timesteps(middle).tolist() == [500]
    for stray in (0.01, 1.001):
        with pytest.raises(UserError, match=r"^Stable Diffusion was trained at sigmas 0\.\d+ to \d\.\d+, not at"):
            policy.timesteps(torch.tensor([0.5, stray], dtype=torch.float64))


def test_deterministic_steps_of_flow_networks_stay_euler_steps() -> None:
    assert isinstance(noiseless_kernel(), Ode)
    x, v = (torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    sigmas = (1.0, 0.7, 0.0)
    expected = x
    for a, b in ((1.0, 0.7), (0.7, 0.0)):
        expected = expected + torch.tensor(b - a, dtype=torch.float64).float() * v
    assert torch.equal(sample_ode(lambda *_: v, x, sigmas, torch.zeros(3)), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_deterministic_steps_by_hand(prediction: str) -> None:
    x, out = (torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    found = sample_ode(lambda *_: out, x, (0.8, 0.6, 0.0), torch.zeros(1), prediction=prediction)
    for (a, s), (a_next, s_next) in (((0.6, 0.8), (0.8, 0.6)), ((0.8, 0.6), (1.0, 0.0))):
        clean, noise = ((x - s * out) / a, out) if prediction == "epsilon" else (a * x - s * out, s * x + a * out)
        x = a_next * clean + s_next * noise
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


# --- rollouts ---------------------------------------------------------------------------------------------------------------------------------------


def roll_out(policy: Any, plan: Plan, guidance_scale: float = 1.0, groups: int = 2) -> Rollout:
    rows = policy.prompt_rows(PROMPTS[:groups])
    generators = [torch.Generator().manual_seed(g) for g in range(groups)]
    return execute(policy.velocity(guidance_scale), plan, rows, generators, policy.latent_shape, device=CPU, prediction=policy.prediction)


def chain_of(policy: Any, num_steps: int = 6, group_size: int = 2, noise_level: float = 1.0) -> Plan:
    sigmas = policy.sigmas("shifted", num_steps, None)
    return chain_plan(sigmas, group_size, noise_level=noise_level, train_fraction=1.0, same_noise=False, kernel="ddim")


def log_prob_by_hand(scheduler: DDIMScheduler, epsilon: Tensor, x: Tensor, x_next: Tensor, timestep: int, previous: int, eta: float) -> Tensor:
    """Of a DDIM step, mean over elements, from alphabar alone: arXiv:2010.02502, equations 12 and 16."""
    alpha_bar, alpha_bar_next = scheduler.alphas_cumprod[timestep].double(), scheduler.alphas_cumprod[previous].double()
    clean = (x.double() - (1 - alpha_bar).sqrt() * epsilon.double()) / alpha_bar.sqrt()
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    mean = alpha_bar_next.sqrt() * clean + (1 - alpha_bar_next - variance).sqrt() * epsilon.double()
    density = -((x_next.double() - mean) ** 2) / (2 * variance) - variance.sqrt().log() - math.log(math.sqrt(2 * math.pi))
    return density.flatten(1).mean(1)


def log_probs_by_hand(policy: Any, rollout: Rollout, scheduler: DDIMScheduler, guidance_scale: float, eta: float) -> Tensor:
    """Of all edges of a rollout of prompts 0 and 1, float64."""
    times, prompts, found = scheduler.timesteps.tolist(), policy.prompt_rows(PROMPTS[:2]), []
    with torch.no_grad():
        epsilon = policy.velocity(guidance_scale)(rollout.row_x, rollout.row_sigma, prompts[rollout.row_group])
    for edge, row in enumerate(rollout.edge_row.tolist()):
        k, one = int(rollout.edge_step[edge]), slice(row, row + 1)
        x_next = rollout.edge_x_next[edge : edge + 1]
        found.append(log_prob_by_hand(scheduler, epsilon[one], rollout.row_x[one], x_next, times[k], times[k + 1], eta))
    return torch.cat(found)


@pytest.mark.parametrize(("name", "eta"), [("sd", 1.0), ("sdxl", 1.0), ("sd", 0.5)])
def test_log_probabilities_and_ratios_are_those_of_ddpo(name: str, eta: float, folders: Folders) -> None:
    policy = policy_of(folders, name)
    rollout = roll_out(policy, chain_of(policy, noise_level=eta), guidance_scale=5.0)
    scheduler = ddim(UNET_BUILDERS[name].plain(folders[name])).scheduler
    scheduler.set_timesteps(6)
    old = log_probs_by_hand(policy, rollout, scheduler, 5.0, eta)
    assert len(old) == 2 * 2 * 5
    torch.testing.assert_close(rollout.edge_old_log_prob.double(), old, rtol=0, atol=1e-5)
    for p, q in zip(policy.trainable(), policy_of(folders, name, moved=True).trainable(), strict=True):
        p.data.copy_(q.data)
    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), policy.prompt_rows(PROMPTS[:2]))
    with torch.no_grad():
        new = TransitionLikelihood("ddim", "mean", policy.prediction)(policy.velocity(5.0), batch).log_prob
    expected = (log_probs_by_hand(policy, rollout, scheduler, 5.0, eta) - old).exp()
    torch.testing.assert_close((new - rollout.edge_old_log_prob).double().exp(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - 1).abs().max() > 1e-3


@each_family
def test_the_gradient_of_the_log_probability_is_its_slope(name: str, folders: Folders) -> None:
    policy = policy_of(folders, name, moved=True)
    rollout = roll_out(policy, chain_of(policy))
    scheduler = ddim(UNET_BUILDERS[name].plain(folders[name])).scheduler
    scheduler.set_timesteps(6)
    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), policy.prompt_rows(PROMPTS[:2]))
    weight = torch.randn(len(rollout.edge_row), generator=torch.Generator().manual_seed(4))
    out = TransitionLikelihood("ddim", "mean", policy.prediction)(policy.velocity(), batch)
    slope = torch.autograd.grad((weight * out.log_prob).sum(), policy.trainable())
    square = sum(g.double().square().sum() for g in slope)
    values = []
    for step in (0.0005, -0.001):  # to one side, then to the other
        for p, g in zip(policy.trainable(), slope, strict=True):
            p.data.add_(g, alpha=float(step / square.sqrt()))
        values.append((weight.double() * log_probs_by_hand(policy, rollout, scheduler, 1.0, 1.0)).sum())
    torch.testing.assert_close((values[0] - values[1]) / 0.001, square.sqrt(), rtol=0.05, atol=0)


def test_a_sampled_step_is_the_step_of_the_scheduler_with_that_noise(folders: Folders) -> None:
    policy = policy_of(folders, "v")
    rollout = roll_out(policy, chain_of(policy))
    scheduler = ddim(UNET_BUILDERS["sd"].plain(folders["v"])).scheduler
    scheduler.set_timesteps(6)
    start = torch.cat([torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(g)) for g in range(2)])
    first = rollout.row_step == 0
    assert torch.equal(rollout.row_x[first], start)  # N(0, 1), not scaled by the first sigma
    drawn = [torch.Generator().manual_seed(g) for g in range(2)]
    noise = [torch.randn(2, *policy.latent_shape, generator=g) for g in drawn for _ in range(2)][1::2]  # the second draw of each group
    with torch.no_grad():
        output = policy.velocity()(start, rollout.row_sigma[first], policy.prompt_rows([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2))
    expected = scheduler.step(output, int(scheduler.timesteps[0]), start, eta=1.0, variance_noise=torch.cat(noise)).prev_sample
    torch.testing.assert_close(rollout.edge_x_next[rollout.edge_step == 0], expected, rtol=1e-5, atol=1e-5)


def test_steps_before_and_after_a_window_are_ddim_without_noise(folders: Folders) -> None:
    policy = policy_of(folders, "sd")
    sigmas = policy.sigmas("shifted", 6, None)
    rollout = roll_out(policy, window_plan(sigmas, 3, noise_level=1.0, start=2, size=2, same_noise=True, kernel="ddim"))
    scheduler = ddim(UNET_BUILDERS["sd"].plain(folders["sd"])).scheduler
    scheduler.set_timesteps(6)
    rows = policy.prompt_rows(PROMPTS[:2])

    @torch.no_grad()
    def walk(x: Tensor, first: int, last: int) -> Tensor:
        for k in range(first, last):
            level = torch.full((len(x),), sigmas[k], dtype=torch.float64)
            output = policy.velocity()(x, level, rows.repeat_interleave(len(x) // 2))
            x = scheduler.step(output, int(scheduler.timesteps[k]), x, eta=0.0).prev_sample
        return x

    start = torch.cat([torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(g)) for g in range(2)])
    torch.testing.assert_close(rollout.row_x[rollout.row_step == 2], walk(start, 0, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rollout.leaves, walk(rollout.edge_x_next[rollout.edge_step == 3], 4, 6), rtol=1e-4, atol=1e-4)


def test_kernels_and_solvers_of_flow_networks_are_refused(folders: Folders) -> None:
    policy = policy_of(folders, "sd")
    sigmas = policy.sigmas("shifted", 6, None)
    with pytest.raises(ValueError, match="Heun and DPM-Solver\\+\\+ steps need a flow velocity; this network predicts epsilon"):
        roll_out(policy, tree_plan(sigmas, roots=1, branching={1: 2}, noise_levels={1: 1.0}, kernel="ddim", solver="dpm++"))
    with pytest.raises(ValueError, match="kernel flow_sde fits networks that predict a flow velocity; this one predicts epsilon: use ddim"):
        roll_out(policy, window_plan(sigmas, 3, noise_level=1.0, start=2, size=2, same_noise=True, kernel="flow_sde"))
    assert load_kernel("ddim", "epsilon").predictions >= {"epsilon", "v_prediction"}


# --- training ---------------------------------------------------------------------------------------------------------------------------------------

TOY = {
    "ddpo": ["rollout.num_steps=5", "rollout.group_size=2", "rollout.groups_per_iteration=5"],
    "b2_diffurl": ["rollout.num_steps=5", "rollout.window={backward_first: 3, backward_stages: 2}"],
}


def toy_config(tmp_path: Path, folder: Path, method: str, *overrides: str) -> Config:
    return make_config(tmp_path, folder, f"method={method}", "optimizer.weight_decay=0", "objective.updates_per_iteration=2", *TOY[method], *overrides)


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("sd", "ddpo", []),
        ("sd", "b2_diffurl", []),
        ("sdxl", "ddpo", []),
        ("sdxl", "b2_diffurl", ["model.adapter=full"]),
        ("v", "ddpo", ["kl={weight: 0.1, form: exact_mean}"]),
        ("sd", "ddpo", ["model.dtype=bfloat16", "model.gradient_checkpointing=true", "model.prompt_storage=host"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else value,
)
def test_two_iterations(name: str, method: str, settings: list[str], folders: Folders, tmp_path: Path) -> None:
    trainer = Trainer(toy_config(tmp_path, folders[name], method, *settings))
    assert trainer.engine.likelihood.kernel.prediction == trainer.policy.prediction  # a ratio would be 1 with the wrong formula, too
    before = [p.detach().clone() for p in trainer.parameters]
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
        assert metrics["ratio/max_abs_log_first"] < (1e-3 if "model.dtype=bfloat16" in settings else 1e-5)  # a step to half the sigma and guidance 5 amplify
        assert all(math.isfinite(value) for value in metrics.values() if value is not None), metrics
        assert metrics["grad_norm"] > 0
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_a_whole_run_writes_evaluations_and_weights_that_diffusers_loads(folders: Folders, tmp_path: Path) -> None:
    config = toy_config(tmp_path, folders["sd"], "ddpo", "training.iterations=2", "evaluation={every: 2, num_images: 2, final_num_images: 2}")
    run = train(config)
    metrics, rows = ([json.loads(line) for line in (run / name).read_text().splitlines()] for name in ("metrics.jsonl", "evals.jsonl"))
    assert [line["iteration"] for line in metrics] == [1, 2]
    assert {row["iteration"] for row in rows} == {0, 2}
    exported = next(run.rglob("pytorch_lora_weights.safetensors"))
    plain = UNET_BUILDERS["sd"].plain(folders["sd"])
    plain.load_lora_weights(exported.parent)
    assert plain.get_active_adapters()


NEEDS_FLOW = r"Stable Diffusion predicts epsilon, and matching, ODE plans and what builds on them need a flow model; train its steps: likelihood transition"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout.kernel=flow_sde"], r"^rollout\.kernel: kernel flow_sde fits networks that predict a flow velocity; this one predicts epsilon: use ddim$"),
        (["rollout.shift=3"], r"^rollout\.shift: the noise levels of Stable Diffusion are timesteps of its training and have no shift; set it to null$"),
        (["rollout.num_steps=2000"], r"num_steps: 2000 steps with offset 1 do not fit into 1000 training timesteps"),
        (["rollout.after_window={solver: dpm++}", "method=b2_diffurl", *TOY["b2_diffurl"]], r"rollout\.after_window .* need a flow model; use after_window"),
        (["rollout.after_window={compression: 0.5}", "method=b2_diffurl", *TOY["b2_diffurl"]], r"rollout\.after_window .* need a flow model; use after_window"),
        (
            ["method=awm", "matching.num_times=2"],
            NEEDS_FLOW,
        ),
        (
            ["method=refl", "rewards=[toys:Warmth]", "direct={low: 1, high: 2}"],
            NEEDS_FLOW,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_needs_a_flow_network_is_one_clear_error(settings: list[str], message: str, folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(toy_config(tmp_path, folders["sd"], "ddpo", *settings))


# --- evaluations and pictures -----------------------------------------------------------------------------------------------------------------------


def test_evaluations_draw_what_ddim_draws(folders: Folders, tmp_path: Path) -> None:
    builder: UNetBuilder = UNET_BUILDERS["sd"]
    config, policy = toy_config(tmp_path, folders["sd"], "ddpo"), builder.policy(folders["sd"])
    scorer = build_rewards([RewardConfig(name="toys:brightness")])
    scorer.load(CPU)
    sigmas = sigmas_of(config.rollout, 4, policy)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    found = Evaluator(policy, {"eval": as_prompts(PROMPTS[:3])}, scorer, sigmas=sigmas, seed=7, accelerator=accelerator)("eval", 3, 5.0, 3)
    noise = torch.stack([torch.randn(policy.latent_shape, generator=generator("eval", 7, "eval", i)) for i in range(3)])
    theirs = builder.theirs(builder.plain(folders["sd"]), noise, 4, 5.0)
    torch.testing.assert_close(found.images, theirs, rtol=0, atol=0.51 / 255)  # rounded to 256 levels


def test_sampled_files_hold_what_ddim_draws(folders: Folders, tmp_path: Path) -> None:
    files = sample_to_folder(str(folders["sdxl"]), PROMPTS[:2], tmp_path / "out", None, "last", 4, 5.0, 3, 1)
    noise = torch.stack([torch.randn(4, 4, 4, generator=generator("sample", 3, text, 0)) for text in PROMPTS[:2]])
    plain = UNET_BUILDERS["sdxl"].plain(folders["sdxl"])
    theirs = plain(prompt=PROMPTS[:2], latents=noise, num_inference_steps=4, guidance_scale=5.0, height=8, width=8, output_type="pt").images
    ours = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.51 / 255)


# --- prompts and sizes ------------------------------------------------------------------------------------------------------------------------------


def test_embeddings_of_stable_diffusion_are_the_last_hidden_states_and_their_mean(folders: Folders) -> None:
    policy = policy_of(folders, "sd")
    assert isinstance(policy, StableDiffusionPolicy)
    found = policy.embed(PROMPTS[:2])
    tokenizer, encoder = policy.pipeline.tokenizer, policy.pipeline.text_encoder
    tokens = tokenizer(PROMPTS[:2], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    torch.testing.assert_close(found["embeds"], encoder(tokens).last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled"], found["embeds"].mean(1))


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_prompt_of_xl_is_zero_where_the_pipeline_says_so(zeros: bool, folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "sdxl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
    builder = UNET_BUILDERS["sdxl"]
    policy = builder.policy(folder)
    assert isinstance(policy, StableDiffusionXlPolicy)
    found = policy.embed(["", PROMPTS[0]])
    assert all((value[0].abs().max() == 0) == zeros and value[1].abs().max() > 0 for value in found.values())
    noise = start_noise(policy)
    assert (builder.ours(policy, noise, 4, 5.0) - builder.theirs(builder.plain(folder), noise, 4, 5.0)).abs().max() < 1e-4
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": not zeros}))
    assert builder.policy(other)._encoder_identity().splitlines()[-1] != policy._encoder_identity().splitlines()[-1]  # embeddings on disk are not mixed up


def test_the_size_conditions_of_xl_are_those_of_an_uncropped_picture_of_that_size(folders: Folders) -> None:
    policy = policy_of(folders, "sdxl", height=8, width=12)
    seen: list[Mapping[str, Tensor]] = []
    policy.network.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True)
    x, sigma, rows = some_rows(policy, 3)
    policy.velocity()(x, sigma, rows)
    expected = policy.pipeline._get_add_time_ids((8, 12), (0, 0), (8, 12), torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(seen[0]["time_ids"], expected.expand(3, -1))
    assert torch.equal(seen[0]["text_embeds"], policy.prompts.take(rows)["pooled"])


def test_sizes_and_targets(folders: Folders) -> None:
    for name in ("sd", "sdxl"):
        policy = UNET_BUILDERS[name].policy(folders[name], height=None, width=None)
        assert (policy.image_size, policy.latent_shape, policy.size_multiple) == ((8, 8), (4, 4, 4), 2)
        adapted = {key.partition(".lora_")[0] for key, p in policy.network.named_parameters() if p.requires_grad}
        assert len(adapted) == len([key for key, _ in policy.network.named_modules() if key.endswith(("attn1", "attn2"))]) * 4
        assert {part for key in adapted for part in key.split(".") if part.startswith("attn")} >= {"attn1", "attn2"}


# --- loading ----------------------------------------------------------------------------------------------------------------------------------------


def test_a_safety_checker_is_neither_needed_nor_loaded(folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = json.loads((folders["sd"] / "model_index.json").read_text())
    assert index["safety_checker"][1] == "StableDiffusionSafetyChecker" and not (folders["sd"] / "safety_checker").exists()
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        policy = policy_of(folders, "sd")
        broken = shutil.copytree(folders["sd"], tmp_path / "broken")
        (broken / "safety_checker").mkdir()
        (broken / "safety_checker" / "config.json").write_text("no config")
        other = UNET_BUILDERS["sd"].policy(broken)
        (broken / "model_index.json").write_text(json.dumps(index | {"safety_checker": [None, None], "image_encoder": [None, None]}))
        third = UNET_BUILDERS["sd"].policy(broken)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert [p.pipeline.safety_checker for p in (policy, other, third)] == [None, None, None]
    assert [record.getMessage() for record in caplog.records if "safety" in record.getMessage()] == []
    shutil.rmtree(broken / "text_encoder")
    with pytest.raises(UserError, match="has no folder text_encoder, which its model_index.json names"):
        UNET_BUILDERS["sd"].policy(broken)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "DDIMScheduler",
            SCHEDULE | {"clip_sample": False, "prediction_type": "sample"},
            "has a DDIMScheduler that predicts sample; Stable Diffusion needs one with alphas_cumprod, and epsilon or v",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "has a FlowMatchEulerDiscreteScheduler that predicts epsilon; .* needs one with alphas_cumprod"),
        ("DDIMScheduler", ZERO_SNR | {"timestep_spacing": "trailing"}, "spaces timesteps 'trailing' .*, flowrl 'leading'"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_one_clear_error(kind: str, settings: dict[str, Any], message: str, folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    set_scheduler(folder, kind, settings)
    with pytest.raises(UserError, match=rf"^model\.path: .* {message}"):
        UNET_BUILDERS["sd"].policy(folder)


def test_an_attention_backend_is_refused(folders: Folders) -> None:
    with pytest.raises(UserError, match=r"^model\.attention_backend: Stable Diffusion has a U-Net, for which diffusers offers no choice; leave it out$"):
        policy_of(folders, "sd", attention_backend="native")


# --- configs ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "model"), [("sd15_ddpo", "stable-diffusion-v1-5"), ("sd15_b2_diffurl", "stable-diffusion-v1-5"), ("sdxl_ddpo", "stable-diffusion-xl")]
)
def test_a_shipped_config_runs_on_a_random_model_of_its_class(file: str, model: str, folders: Folders, tmp_path: Path) -> None:
    path = ROOT / "configs" / f"{file}.yaml"
    config = load_config(path)
    assert model in config.model.path and config.run_dir == f"runs/{file}" and config.method == file.partition("_")[2]
    assert (config.rollout.kernel, config.rollout.noise_level, config.rollout.guidance_scale, config.rollout.shift) == ("ddim", (1.0,), 5.0, None)
    assert config.evaluation.guidance_scale == config.rollout.guidance_scale
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    small = ["rollout.num_steps=4", "rollout.window.backward_first=3"] if config.rollout.plan == "window" else ["rollout.num_steps=4"]
    small += ["rollout.groups_per_iteration=1", "training.device=cpu", "model.height=8", "model.width=8", "model.dtype=float32"]
    small += [f"model.path={folders[file.partition('_')[0][:4].replace('sd15', 'sd')]}", f"data.train={tmp_path / 'prompts.txt'}"]
    small += [f"data.eval={{eval: {tmp_path / 'prompts.txt'}}}", "rewards=[toys:brightness]", "objective.updates_per_iteration=1"]
    metrics, _ = Trainer(load_config(path, small)).iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"] > 0
    assert metrics["ratio/max_abs_log_first"] < 1e-6
