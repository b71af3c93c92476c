"""Every method that ships with flowrl: its file, its configs, its page, its published values, and two iterations of it on the toy pipeline."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import save_file

from flowrl.config import Config, list_methods, load_config
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.likelihoods.matching import draw_times
from flowrl.planning import build_plan, minimum_rows, window_of
from flowrl.trainer import Trainer
from flowrl.types import Prompt, SampleBatch, UserError
from flowrl.updates.direct import DIRECT_OBJECTIVES
from flowrl.updates.minimum import least_rows, units_of_samples
from rewards.composite import WeightedRewards
from rewards.registry import load_reward
from samplers.schedules import sigma_grid

Configure = Callable[..., Config]

ROOT = Path(__file__).parent.parent
METHODS = [name for name, method in list_methods().items() if method.config.get("likelihood") != "token"]
"""Of pictures."""
DIRECT = ["draft", "refl", "srpo"]
PAIRED = ["flow_dpo", "flow_ipo", "flow_rpo", "flow_simpo"]
MATCHED = ["ac_flow", "awm", "diffusion_nft", "flow_rwr", "flow_sft", "orw_cfm_w2"]
STEPWISE = [name for name in METHODS if name not in [*DIRECT, *PAIRED, *MATCHED]]
ON_PAIRS = [*PAIRED, "flow_rwr", "flow_sft"]
TINY = [file for file in sorted((ROOT / "configs").glob("tiny_*.yaml")) if load_config(file).likelihood != "token"]
SD35 = sorted((ROOT / "configs").glob("sd35_medium_*.yaml"))


@pytest.fixture
def defaults(tmp_path: Path) -> Callable[..., Config]:
    """(method, *overrides) -> a run with the method's defaults and nothing else."""
    file = tmp_path / "defaults.yaml"
    file.write_text("run_dir: runs/x\nrewards: [scene]\n")
    return lambda method, *overrides: load_config(file, [f"method={method}", *overrides])


# --- files --------------------------------------------------------------------------------------------------------------------------------------


def test_these_methods_ship() -> None:
    chains, windows, trees = ["ddpo", "dance_grpo", "flow_grpo", "grpo_guard"], ["flow_grpo_fast", "mix_grpo", "mix_grpo_flash", "b2_diffurl"], ["g2rpo"]
    assert sorted([*chains, *windows, *trees, "branch_grpo", "dynamic_treerpo", "tree_grpo"]) == STEPWISE
    assert sorted([*STEPWISE, *MATCHED, *PAIRED, *DIRECT]) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_likelihood_and_the_objective_of_a_method_are_those_of_its_kind(method: str, defaults: Callable[..., Config]) -> None:
    config = defaults(method)
    assert config.likelihood == ("matching" if method in [*MATCHED, *PAIRED] else "transition")
    assert (config.objective.name in PAIR_OBJECTIVES, config.objective.name in DIRECT_OBJECTIVES) == (method in PAIRED, method in DIRECT)
    assert (config.rollout.plan == "ode") == (method not in STEPWISE)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is_where_it_comes_from_and_where_ours_differs(method: str, defaults: Callable[..., Config]) -> None:
    found = list_methods()[method]
    assert re.search(r"arXiv:\d{4}\.\d{5}", found.paper)
    assert found.summary.endswith(".") and len(found.summary) <= 160
    for line in (*found.verified, *found.deviations):
        assert line.endswith(".") and "  " not in line, line
    assert defaults(method).method == method


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_that_the_index_links_and_whose_commands_run_it(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    assert f"| [{method}]({method}.md) |" in (ROOT / "docs" / "methods" / "README.md").read_text()
    assert list_methods()[method].paper.split("arXiv:")[1][:10] in page
    commands = [shlex.split(line)[2:] for line in page.splitlines() if line.startswith("flowrl train ")]
    loaded = [load_config(ROOT / name, overrides) for name, *overrides in commands]
    assert [config.method for config in loaded[:2]] == [method, method]
    assert [config.model.path.partition(":")[0] for config in loaded[:2]] == ["flowrl", "stabilityai/stable-diffusion-3.5-medium"]


@pytest.mark.parametrize("method", [*DIRECT, *MATCHED, *PAIRED])
def test_a_page_of_a_method_without_sde_steps_names_where_it_is_measured(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    assert "\nMeasured on the embedded model: see [benchmarks/matching.md](../../benchmarks/matching.md).\n" in page


@pytest.mark.parametrize("method", [*ON_PAIRS, "README"])
def test_the_commands_for_stored_pairs_run(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text()
    commands = [shlex.split(line, comments=True)[2:] for line in page.splitlines() if line.startswith("flowrl prefer configs/")]
    assert commands
    for name, option, pairs, *overrides in commands:
        config = load_config(ROOT / name, [f"data.pairs={pairs}", *overrides])
        assert (option, config.data.pairs) == ("--pairs", "pairs/base")
        assert method in (config.method, "README")


def test_the_reward_on_the_page_of_refl_has_a_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "docs" / "methods" / "refl.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = WeightedRewards([("redness", 1.0, load_reward("my_reward:Redness"))])
    rewards.load(torch.device("cpu"), torch.float32)
    images = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    total = rewards.differentiable_total(SampleBatch([Prompt("a red circle")], images=images))
    assert total.item() == 1 - 0.375
    (slope,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(slope[0], torch.tensor([1 / 4, -1 / 8, -1 / 8]).view(3, 1, 1).expand(3, 2, 2))


@pytest.mark.parametrize("method", METHODS)
def test_every_override_on_a_page_fits_its_method(method: str, defaults: Callable[..., Config]) -> None:
    lines = [line for line in (ROOT / "docs" / "methods" / f"{method}.md").read_text().splitlines() if line.startswith("| `")]
    overrides = [tuple(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*=[^`]+)`", line.split("|")[1])) for line in lines]
    assert len(overrides) >= 2
    for settings in overrides:
        if settings:
            assert defaults(method, *settings)


def test_only_grpo_guard_is_a_modifier(defaults: Callable[..., Config]) -> None:
    assert [name for name, method in list_methods().items() if method.modifier is not None] == ["grpo_guard"]
    with pytest.raises(UserError, match="ddpo is a whole method and cannot be added to mix_grpo; these can: grpo_guard"):
        defaults("mix_grpo+ddpo")


@pytest.mark.parametrize("method", [*DIRECT, *MATCHED, *PAIRED])
def test_grpo_guard_is_refused_where_no_step_is_trained(method: str, defaults: Callable[..., Config]) -> None:
    with pytest.raises(UserError) as raised:
        defaults(f"{method}+grpo_guard")
    why = f"objective {defaults(method).objective.name}" if method in DIRECT else "likelihood: matching"
    changed = {"ratio": "ratio_norm", "step_weight": "inv_dt"}
    assert str(raised.value).splitlines() == [f"objective.{key}: {value} belongs to SDE steps; with {why} leave it out" for key, value in changed.items()]


@pytest.mark.parametrize("method", STEPWISE)
def test_grpo_guard_changes_the_ratio_and_nothing_else_of_a_method(method: str, defaults: Callable[..., Config]) -> None:
    plain, guarded = defaults(method), defaults(f"{method}+grpo_guard")
    objective = guarded.objective
    assert (objective.ratio, objective.step_weight, objective.clip_low, objective.clip_high) == ("ratio_norm", "inv_dt", 2e-6, 2e-6)
    same = {"ratio": plain.objective.ratio, "step_weight": plain.objective.step_weight, "clip_low": plain.objective.clip_low}
    restored = objective.model_copy(update=same | {"clip_high": plain.objective.clip_high})
    assert guarded.model_copy(update={"method": method, "objective": restored}) == plain


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_tiny_config_and_one_for_sd35(method: str) -> None:
    assert {load_config(file).method for file in TINY} >= {method}
    assert [load_config(file).model.path for file in SD35 if load_config(file).method == method] == ["stabilityai/stable-diffusion-3.5-medium"]


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_a_tiny_config_is_small_names_itself_and_says_how_it_differs_from_the_published_run(file: Path) -> None:
    config = load_config(file)
    assert (config.run_dir, config.model.path, config.model.adapter) == (f"runs/{file.stem}", "flowrl:tiny-sd3", "full")
    assert (config.evaluation.num_steps, config.rollout.num_steps) == (6, 6)
    pictures = config.rollout.groups_per_iteration * config.rollout.group_size
    if config.method in DIRECT:
        assert (pictures, [reward.name for reward in config.rewards]) == (64, ["ink"])
    elif config.method not in STEPWISE and config.rollout.group_size > 2:  # stored pairs are groups of two
        assert 240 <= pictures <= 272 or (config.objective.name in PAIR_OBJECTIVES and pictures == 512)  # 64 groups, so that there are 64 pairs
    assert file.read_text().startswith("# ")


@pytest.mark.parametrize("file", [file for file in TINY if load_config(file).method in STEPWISE], ids=lambda file: file.stem)
def test_a_tiny_config_samples_about_256_pictures_an_iteration_and_trains_steps_before_the_last(file: Path) -> None:
    config = load_config(file)
    rollout = config.rollout
    assert config.optimizer.learning_rate == 2e-4
    sigmas = sigma_grid(rollout.grid, rollout.num_steps, 1.0)  # the embedded model's shift
    for iteration in range(1, config.training.iterations + 1, 23):
        plan = build_plan(rollout, sigmas, shift=1.0, iteration=iteration, seed=iteration)
        assert 240 <= rollout.groups_per_iteration * len(plan.leaves) <= 272
        assert {plan.nodes[node.parent].step for node in plan.nodes if node.trained} <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("file", SD35, ids=lambda file: file.stem)
def test_a_config_for_sd35_keeps_the_published_objective_and_guides_rollouts_as_evaluations(file: Path) -> None:
    config, method = load_config(file), list_methods()[load_config(file).method].config
    kept = {"name", "clip_low", "clip_high", "beta", "margin", "sft_weight"} & method["objective"].keys()
    assert config.method not in STEPWISE or kept >= {"clip_low", "clip_high"}
    assert {key: getattr(config.objective, key) for key in kept} == {key: method["objective"][key] for key in kept}
    assert (config.model.height, config.model.adapter, config.evaluation.num_steps) == (512, "lora", 40)
    assert config.evaluation.guidance_scale == config.rollout.guidance_scale


# --- published values, by hand ------------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "ddpo": "rollout.num_steps 50, rollout.guidance_scale 5, advantage.eps 1e-6, advantage.history_size 16, optimizer.learning_rate 3e-4",
    "dance_grpo": "rollout.num_steps 16, rollout.shift 3, rollout.group_size 12, selection.fraction 0.6, advantage.ddof 1, objective.updates_per_iteration 3",
    "mix_grpo": "rollout.num_steps 25, rollout.window.size 4, rollout.window.every 25, rollout.window.stride 1, objective.updates_per_iteration 4",
    "mix_grpo_flash": "rollout.num_steps 25, rollout.window.every 20, rollout.after_window.compression 0.4, optimizer.learning_rate 1e-5",
    "branch_grpo": "rollout.num_steps 20, rollout.group_size 16, rollout.tree.sibling_scale 4, objective.clip_low 1e-3, objective.updates_per_iteration 37",
    "tree_grpo": "rollout.num_steps 10, rollout.group_size 27, rollout.window.start_decay 0.5, optimizer.weight_decay 0.01, optimizer.learning_rate 1e-5",
    "dynamic_treerpo": "rollout.window.size 4, rollout.group_size 16, rollout.tree.noise_growth 0.3, objective.dynamic_clip 0.5, layer_tuning.weight 0.01",
    "g2rpo": "rollout.num_steps 16, rollout.group_size 12, rollout.window.size 8, objective.updates_per_iteration 1, optimizer.learning_rate 2e-6",
    "grpo_guard": "rollout.num_steps 10, rollout.group_size 24, rollout.guidance_scale 4.5, objective.clip_high 2e-6, optimizer.learning_rate 1e-4",
    "b2_diffurl": "rollout.num_steps 20, rollout.group_size 5, rollout.window.backward_first 14, selection.contrast.low -0.5, objective.clip_low 0.1",
    "flow_grpo": "rollout.num_steps 10, rollout.group_size 24, kl.weight 0.04, objective.clip_low 1e-4, optimizer.learning_rate 3e-4",
    "awm": "rollout.num_steps 14, matching.power 0.25, matching.num_times 6, kl.weight 5e-3, anchor.weight 5, old_policy.decay_max 0.3",
    "diffusion_nft": "rollout.num_steps 10, matching.num_times 9, objective.beta 1, kl.weight 1e-4, old_policy.decay_max 0.5, optimizer.learning_rate 3e-4",
    "orw_cfm_w2": "advantage.temperature 2, kl.weight 1, rollout.guidance_scale 1",
    "ac_flow": "critic.advantage_clip 1, critic.warmup_iterations 100, critic.gate 0.1, advantage.clip 3, advantage.temperature 0.5, kl.weight 0.5",
    "flow_dpo": "objective.beta 50, matching.shift 1, old_policy.every 40, old_policy.decay_slope 0, optimizer.learning_rate 1e-5",
    "flow_ipo": "objective.beta 50, old_policy.every 40, optimizer.learning_rate 1e-5",
    "flow_simpo": "objective.beta 50, objective.margin 0, kl.weight 0.1, optimizer.learning_rate 1e-5",
    "flow_rpo": "objective.beta 50, objective.sft_weight 1, old_policy.every 40, optimizer.learning_rate 1e-5",
    "flow_sft": "rollout.group_size 24, kl.weight 0, optimizer.learning_rate 1e-5",
    "flow_rwr": "rollout.group_size 24, advantage.temperature 1, kl.weight 0, optimizer.learning_rate 1e-5",
    "refl": "rollout.num_steps 40, direct.low 30, direct.high 40, direct.threshold 2, direct.scale 1e-3, optimizer.learning_rate 1e-5",
    "draft": "direct.last_steps 1, direct.renoise 2",
    "srpo": "rollout.num_steps 25, direct.sigma_jump 0.1, direct.threshold 0.7, optimizer.learning_rate 5e-6, optimizer.max_grad_norm 0.1",
    "flow_grpo_fast": "rollout.window.size 3, rollout.groups_per_iteration 48, kl.weight 0, objective.clip_low 1e-5, optimizer.learning_rate 3e-4",
}


@pytest.mark.parametrize("method", METHODS)
def test_the_published_values_of_a_method(method: str, defaults: Callable[..., Config]) -> None:
    for entry in PUBLISHED[method].split(", "):
        key, number = entry.split()
        value: object = defaults(method)
        for part in key.split("."):
            value = getattr(value, part)
        assert value == float(number), entry


@pytest.mark.parametrize(
    ("method", "kernel", "level", "same_noise", "centre", "scale", "aggregate"),
    [
        ("ddpo", "ddim", 1.0, False, "history", "history", "rewards"),
        ("dance_grpo", "dance_sde", 0.3, True, "group", "group_std", "advantages"),
        ("mix_grpo", "flow_sde", 0.7, True, "group", "group_std", "advantages"),
        ("mix_grpo_flash", "flow_sde", 0.7, True, "group", "group_std", "advantages"),
        ("branch_grpo", "dance_sde", 0.3, True, "group", "group_std", "rewards"),
        ("tree_grpo", "flow_sde", 0.7, True, "group", "group_std", "advantages"),
        ("dynamic_treerpo", "flow_sde", 0.7, True, "group", "group_std", "rewards"),
        ("g2rpo", "flow_sde", 0.7, True, "group", "group_std", "advantages"),
        ("grpo_guard", "flow_sde", 0.7, False, "group", "group_std", "rewards"),
        ("b2_diffurl", "ddim", 1.0, True, "history", "history", "rewards"),
        ("flow_grpo", "flow_sde", 0.7, False, "group", "batch_std", "rewards"),
    ],
)
def test_the_published_parts_of_a_method(
    method: str, kernel: str, level: float, same_noise: bool, centre: str, scale: str, aggregate: str, defaults: Callable[..., Config]
) -> None:
    config = defaults(method)
    assert (config.rollout.kernel, config.rollout.noise_level, config.rollout.same_noise) == (kernel, (level,), same_noise)
    a = config.advantage
    assert (a.centre, a.scale, a.aggregate, a.clip) == (centre, scale, aggregate, 5.0)
    assert (config.rollout.log_prob_reduction, config.objective.name) == ("mean", "clipped_surrogate")


@pytest.mark.parametrize(
    ("method", "weighting", "times", "transform", "objective", "old_samples"),
    [
        ("awm", "ghuber", "grid", "identity", "clipped_surrogate", False),
        ("diffusion_nft", "self_normalised", "grid", "unit_interval", "nft", True),
        ("ac_flow", "uniform", "logit_normal", "exp", "reinforce", None),
        ("orw_cfm_w2", "uniform", "logit_normal", "exp", "reinforce", None),
        ("flow_dpo", "uniform", "logit_normal", "identity", "dpo", True),
        ("flow_ipo", "uniform", "logit_normal", "identity", "ipo", True),
        ("flow_simpo", "uniform", "logit_normal", "identity", "simpo", True),
        ("flow_rpo", "uniform", "logit_normal", "identity", "rpo", True),
        ("flow_sft", "uniform", "logit_normal", "best", "reinforce", None),
        ("flow_rwr", "uniform", "logit_normal", "softmax", "reinforce", None),
    ],
)
def test_the_published_parts_of_a_method_on_finished_samples(
    method: str, weighting: str, times: str, transform: str, objective: str, old_samples: bool | None, defaults: Callable[..., Config]
) -> None:
    config = defaults(method)
    assert (config.matching.weighting, config.matching.times, config.advantage.transform) == (weighting, times, transform)
    assert (config.objective.name, config.old_policy.rollout if config.old_policy else None) == (objective, old_samples)
    assert config.matching.num_times == len(times_of(config))


def times_of(config: Config) -> set[float]:
    """Different noise levels of a sample in one draw, on the grid of a model with shift 3."""
    m, rollout = config.matching, config.rollout
    drawn = draw_times(
        m.times,
        num_times=m.num_times,
        count=1,
        generator=torch.Generator().manual_seed(0),
        sigmas=tuple(sigma_grid(rollout.grid, rollout.num_steps, 3.0)),
        first=m.first_time,
        include_first=m.include_first,
        fraction=m.time_fraction,
    )
    return set(drawn.flatten().tolist())


def test_diffusion_nft_trains_every_level_of_the_rollout_but_the_last(defaults: Callable[..., Config]) -> None:
    assert times_of(defaults("diffusion_nft")) == set(list(sigma_grid("diffusers", 10, 3.0))[:9])


@pytest.mark.parametrize(
    ("method", "overrides", "forward", "backward"),
    [  # 48 groups; sampling + passes x samples x levels
        ("awm", [], 48 * 24 * 14 + 3 * 48 * 24 * 6, 48 * 24 * 6),
        ("awm", ["anchor.weight=0", "old_policy=null", "kl.weight=0"], 48 * 24 * 14 + 48 * 24 * 6, 48 * 24 * 6),
        ("awm", ["objective.updates_per_iteration=2"], 48 * 24 * 14 + 3 * 48 * 24 * 6 + 48 * 12 * 6, 48 * 24 * 6),
        ("diffusion_nft", [], 48 * 24 * 10 + 3 * 48 * 24 * 9, 48 * 24 * 9),
        ("diffusion_nft", ["kl.weight=0"], 48 * 24 * 10 + 2 * 48 * 24 * 9, 48 * 24 * 9),
        ("ac_flow", [], 48 * 8 * 14 + 2 * 48 * 8 * 4, 48 * 8 * 4),
        ("orw_cfm_w2", [], 48 * 24 * 14 + 2 * 48 * 24 * 4, 48 * 24 * 4),
        ("flow_dpo", [], 48 * 24 * 14 + 2 * 48 * 2 * 4, 48 * 2 * 4),  # a pair of each group
        ("flow_ipo", [], 48 * 24 * 14 + 2 * 48 * 2 * 4, 48 * 2 * 4),
        ("flow_rpo", [], 48 * 24 * 14 + 2 * 48 * 2 * 4, 48 * 2 * 4),
        ("flow_simpo", [], 48 * 24 * 14 + 2 * 48 * 2 * 4, 48 * 2 * 4),
        ("flow_simpo", ["kl.weight=0"], 48 * 24 * 14 + 48 * 2 * 4, 48 * 2 * 4),
        ("flow_sft", [], 48 * 24 * 14 + 48 * 24 * 4, 48 * 24 * 4),
        ("flow_rwr", [], 48 * 24 * 14 + 48 * 24 * 4, 48 * 24 * 4),
        ("refl", [], 8 * 4 * 40 + 8 * 4, 8 * 4),
        ("draft", [], 8 * 4 * 28 + 2 * 8 * 4, 2 * 8 * 4),  # two noisings
        ("draft", ["direct.last_steps=5", "direct.renoise=0"], 8 * 4 * 28 + 8 * 4 * 5, 8 * 4 * 5),
        ("srpo", [], 8 * 4 * 25 + 8 * 4, 8 * 4),
    ],
)
def test_the_rows_of_an_iteration_counted_by_hand_and_on_the_page(
    method: str, overrides: list[str], forward: int, backward: int, defaults: Callable[..., Config]
) -> None:
    config = defaults(method, *overrides)
    groups, rollout = config.rollout.groups_per_iteration, minimum_rows(config.rollout, iteration=1, seed=0)[0]
    units = groups if method in PAIRED else units_of_samples(config, groups)
    assert least_rows(config, 1, rollout=groups * rollout, units=units) == (forward, backward)
    page = " ".join((ROOT / "docs" / "methods" / f"{method}.md").read_text().split())
    if not overrides and method not in ("flow_ipo", "flow_rpo", "flow_rwr"):  # whose pages name another's
        assert f" {forward:,} " in page and f" {backward:,} backward an iteration" in page


def shape(config: Config, iteration: int = 1, seed: int = 0) -> tuple[int, int, int, list[int]]:
    """Leaves, rollout rows, training rows and trained steps of a group, from the plan; the closed formulas agree."""
    rollout = config.rollout
    plan = build_plan(rollout, sigma_grid(rollout.grid, rollout.num_steps, 3.0), shift=3.0, iteration=iteration, seed=seed)
    assert minimum_rows(rollout, iteration=iteration, seed=seed) == (plan.forward_rows, len(plan.train_rows))
    return len(plan.leaves), plan.forward_rows, len(plan.train_rows), sorted({plan.nodes[node.parent].step for node in plan.nodes if node.trained})


@pytest.mark.parametrize(
    ("method", "iteration", "expected"),
    [
        ("flow_grpo", 1, (24, 24 * 10, 24 * 9, [*range(9)])),
        ("grpo_guard", 1, (24, 24 * 10, 24 * 9, [*range(9)])),
        ("ddpo", 1, (2, 2 * 50, 2 * 49, [*range(49)])),
        ("dance_grpo", 1, (12, 1 + 12 * 15, 1 + 12 * 14, [*range(15)])),  # one start noise; the selection then keeps 9 of 15 steps of each sample
        ("mix_grpo", 1, (12, 1 + 12 * 24, 1 + 12 * 3, [0, 1, 2, 3])),
        ("mix_grpo", 300, (12, 12 + 12 * 13 + 0, 37, [11, 12, 13, 14])),  # floor(299 / 25) = 11
        ("mix_grpo_flash", 1, (12, 1 + 12 * (3 + 9), 37, [0, 1, 2, 3])),  # ceil(0.4 x 21) = 9 steps after the window
        ("dynamic_treerpo", 1, (16, 15 + 16 * 21, 15, [0, 1, 2, 3])),  # 1 + 2 + 4 + 8 nodes, then 16 paths of 21 steps
        ("branch_grpo", 1, (16, 203, 203 - 16, [*range(19)])),  # 1 + 3 x 2 + 3 x 4 + 3 x 8 + 10 x 16
        ("g2rpo", 1, (12, 0, 8, [*range(8)])),
        ("b2_diffurl", 1, (5, 7 + 5 * 13, 1 + 5 * 12, [*range(6, 19)])),  # n = 14: steps 6..19, of which the last is deterministic
        ("b2_diffurl", 100, (5, 1 + 5 * 19, 1 + 5 * 18, [*range(19)])),  # n = 14 + floor(7 x 99 / 100) = 20
    ],
)
def test_the_shape_of_a_published_group_counted_by_hand(
    method: str, iteration: int, expected: tuple[int, int, int, list[int]], defaults: Callable[..., Config]
) -> None:
    if method == "g2rpo":
        # After a stochastic step s: 2 + sum over g of (ceil((14 - s) / g) - 1) rows per child; s = 0..7, g = 1, 2, 3.
        suffix = [13 + 6 + 4, 12 + 6 + 4, 11 + 5 + 3, 10 + 5 + 3, 9 + 4 + 3, 8 + 4 + 2, 7 + 3 + 2, 6 + 3 + 2]
        expected = (8 * 12 * 3, 8 + 12 * sum(2 + n for n in suffix), 8, [*range(8)])
    assert shape(defaults(method), iteration) == expected


def test_the_tree_of_tree_grpo_starts_early_most_often(defaults: Callable[..., Config]) -> None:
    config = defaults("tree_grpo")
    starts = [window_of(config.rollout, 1, seed)[0] for seed in range(2000)]
    shares = [starts.count(i) / len(starts) for i in range(7)]
    assert sum(shares) == pytest.approx(1.0)
    # (1 - r) r^i / (1 - r^7) with r = 0.5: the notes' .504 .252 .126 .063 .031 .016 .008; 4 standard errors of 2000 draws
    for i, share in enumerate(shares):
        expected = 0.5 * 0.5**i / (1 - 0.5**7)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)
    # i rows before the tree, 1 + 3 + 9 in it, 27 paths of 7 - i steps after it: 202 176 150 124 98 72 46
    found = [shape(config, 1, starts.index(i)) for i in range(7)]
    assert found == [(27, rows, 13, [i, i + 1, i + 2]) for i, rows in enumerate([202, 176, 150, 124, 98, 72, 46])]


def test_the_noise_of_dynamic_treerpo_grows_with_depth_and_stays_below_one(defaults: Callable[..., Config]) -> None:
    rollout = defaults("dynamic_treerpo").rollout
    plan = build_plan(rollout, sigma_grid("shifted", 25, 3.0), shift=3.0, iteration=26, seed=0)
    levels = {plan.nodes[node.parent].step: node.noise_level for node in plan.nodes if node.trained}
    assert levels == pytest.approx({1: 0.7, 2: 0.77, 3: 0.84, 4: 0.91})  # 0.7 (1 + 0.3 j / 3); the window has moved by one


def test_the_mixed_mode_of_branch_grpo_has_noise_at_the_splits_and_in_a_window(defaults: Callable[..., Config]) -> None:
    mixed = defaults("branch_grpo", "rollout.tree.stochastic=window", "rollout.window={schedule: progressive, size: 4, every: 30}")
    assert shape(mixed, 1)[3] == [0, 1, 2, 3, 6, 9]  # the released mixed mode's steps
    assert shape(mixed, 31)[3] == [0, 1, 2, 3, 4, 6, 9]


# --- two iterations on the toy pipeline ---------------------------------------------------------------------------------------------------------

TOY = {
    "flow_grpo": [],
    "flow_grpo_fast": [],
    "dance_grpo": ["rollout.num_steps=6"],
    "mix_grpo": ["rollout.num_steps=6", "rollout.window={size: 2, high: null, every: 1}"],
    "mix_grpo_flash": ["rollout.num_steps=7", "rollout.window={size: 2, high: null, every: 1}"],
    "dynamic_treerpo": ["rollout.num_steps=5", "rollout.window={size: 2, high: null, every: 1}"],
    "branch_grpo": ["rollout.num_steps=5", "rollout.tree.splits=[0, 2]"],
    "tree_grpo": ["rollout.num_steps=5", "rollout.window={size: 2, high: 4}", "rollout.group_size=9"],
    "g2rpo": ["rollout.num_steps=7", "rollout.window={size: 2, high: 2}", "objective.updates_per_iteration=1"],
    "grpo_guard": [],
    "b2_diffurl": ["rollout.num_steps=5", "rollout.window={backward_first: 3, backward_stages: 2}", "rollout.guidance_scale=1"],
    "ddpo": ["rollout.num_steps=5", "rollout.group_size=2", "rollout.groups_per_iteration=5"],
    "awm": ["rollout.num_steps=5", "matching={num_times: 2, time_fraction: 1.0}"],
    "diffusion_nft": ["rollout.num_steps=5", "matching.num_times=4"],
    "ac_flow": ["critic={widths: [8, 8], hidden: 8, warmup_iterations: 1, ramp_iterations: 2, gate: -1}", "advantage={history_size: 8, history_least: 4}"],
    "orw_cfm_w2": [],
    "flow_dpo": ["old_policy.every=1"],
    "flow_ipo": ["old_policy.every=1"],
    "flow_rpo": ["old_policy=null"],
    "flow_simpo": ["kl.weight=0"],
    "flow_sft": [],
    "flow_rwr": ["old_policy={rollout: true, every: 1, decay_slope: 0.0}"],
    "refl": ["direct={low: 2, high: 4}", "rewards=[toys:Warmth]"],
    "draft": ["rewards=[toys:Warmth]"],
    "srpo": ["rewards=[toys:Warmth]"],
}
EVERYWHERE = ["rewards={toys:brightness: 1.0, toys:redness: 0.5}", "optimizer.weight_decay=0", "objective.updates_per_iteration=2"]


def assert_an_iteration_is_sound(metrics: dict[str, Any], *, trains: bool = True) -> None:
    assert metrics["nfe/used"] == metrics["nfe/minimum"]
    assert metrics.get("ratio/max_abs_log_first", 0.0) < 1e-6
    assert all(math.isfinite(value) for value in metrics.values() if value is not None), metrics
    assert (metrics["grad_norm"] is not None and metrics["grad_norm"] > 0) == trains


@pytest.mark.parametrize("name", [*METHODS, *(f"{method}+grpo_guard" for method in STEPWISE)])
def test_two_iterations_of_a_method(configure: Configure, name: str) -> None:
    method = name.partition("+")[0]
    trainer = Trainer(configure(*EVERYWHERE, f"method={name}", *TOY[method]))
    before = [p.detach().clone() for p in trainer.parameters]
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert_an_iteration_is_sound(metrics, trains=method != "ac_flow" or iteration == 2)
        assert ("ratio/max_abs_log_first" in metrics) == (method in [*STEPWISE, "awm"])
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_while_the_critic_learns_alone_the_policy_stays_as_it_is(configure: Configure) -> None:
    trainer = Trainer(configure(*EVERYWHERE, "method=ac_flow", *TOY["ac_flow"]))
    assert trainer.engine.critic is not None
    before, critic = ([p.detach().clone() for p in parameters] for parameters in (trainer.parameters, trainer.engine.critic.parameters))
    metrics, _ = trainer.iterate(1)
    assert (metrics["critic/strength"], metrics["nfe/backward"], metrics["nfe/forward"]) == (0, 0, 3 * 4 * 4)
    assert all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
    assert any(not torch.equal(p, old) for p, old in zip(trainer.engine.critic.parameters, critic, strict=True))
    assert trainer.iterate(2)[0]["critic/strength"] == 0.5  # the first of two iterations of the ramp


def test_without_a_value_ac_flow_is_orw_cfm_w2(configure: Configure) -> None:
    same = [*EVERYWHERE, "advantage={centre: group, scale: group_std, eps: 1.0e-4, clip: 3, transform: exp, temperature: 2}", "kl.weight=1"]
    critic = "critic={enabled: false, warmup_iterations: 0, ramp_iterations: 0, advantage_clip: 100}"
    trainers = [Trainer(configure(*same, "method=ac_flow", critic)), Trainer(configure(*same, "method=orw_cfm_w2"))]
    for iteration in (1, 2):
        for trainer in trainers:
            trainer.iterate(iteration)
    for ours, theirs in zip(trainers[0].parameters, trainers[1].parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # the critic's advantages are float32


@pytest.mark.parametrize("method", ON_PAIRS)
def test_two_iterations_on_stored_pairs(configure: Configure, tmp_path: Path, method: str) -> None:
    latents = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, side in itertools.product(range(3), range(2)):
        save_file({"latent": latents[i, side]}, tmp_path / f"{i}_{side}.safetensors")
    lines = [json.dumps({"prompt": toys.PROMPTS[i], "chosen": f"{i}_0.safetensors", "rejected": f"{i}_1.safetensors"}) for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    config = configure(*EVERYWHERE, f"method={method}", "old_policy=null", f"data.pairs={tmp_path / 'pairs.jsonl'}", "rollout.group_size=2")
    trainer = Trainer(config)
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert_an_iteration_is_sound(metrics)
        assert metrics["images"] == 0  # nothing was sampled


# On a tree of 5 steps that branches at 0 and 2 a group has 2 + 2 + 4 + 4 edges at steps 0..3, whose children have the depths 1..4.
OPTIONS = {
    "depth": (["selection.depth={first: 3, last: 4, slide_every: 1, stop: 2}"], [4 / 12, 6 / 12]),  # depths 3 and 4 out, then 2 and 3
    "width, branch": (["selection.width={keep: 0.5, mode: branch}"], [8 / 12, 8 / 12]),  # one of the two children of each node at step 2, and its step 3
    "width, extremes": (["selection.width={keep: 0.5, mode: extremes}"], [8 / 12, 8 / 12]),  # the best and the worst of 4 leaves
    "path": (["credit.backup=path"], None),
    "level": (["credit.backup=level"], None),
    "mixed": (["rollout.tree.stochastic=window", "rollout.window={schedule: progressive, size: 2, every: 30}"], None),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_two_iterations_of_the_options_of_branch_grpo(configure: Configure, option: str) -> None:
    settings, kept = OPTIONS[option]
    trainer = Trainer(configure(*EVERYWHERE, "method=branch_grpo", *TOY["branch_grpo"], *settings))
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"]
        assert metrics["ratio/max_abs_log_first"] < 1e-6
        assert metrics.get("selection/kept") == (None if kept is None else pytest.approx(kept[iteration - 1]))


@pytest.mark.parametrize("file", [file for file in TINY if load_config(file).data.pairs is None], ids=lambda file: file.stem)
def test_a_tiny_config_trains_the_embedded_model(file: Path) -> None:
    config = load_config(file)
    at_once = ["critic.warmup_iterations=0", "critic.gate=-1"] if config.critic else []  # else the policy waits for its critic
    trainer = Trainer(load_config(file, ["rollout.groups_per_iteration=2", *at_once]))
    metrics, _ = trainer.iterate(1)
    assert_an_iteration_is_sound(metrics)
