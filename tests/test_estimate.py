"""`flowrl estimate`: its rows are those that runs use, its numbers of released code those of their formulas, and it needs no model for either."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flowrl.measure
from flowrl.cli import main
from flowrl.config import Config, list_methods, load_config
from flowrl.core.selection import fraction_mask
from flowrl.estimate import Spread, estimate, group_rows
from flowrl.measure import measure
from flowrl.trainer import Trainer

Configure = Callable[..., Config]
ROOT = Path(__file__).parent.parent


def config_of(tmp_path: Path, method: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(f"method: {method}\nrun_dir: {tmp_path / 'run'}\nrewards: [scene]\ndata: {{train: 'flowrl:tiny-sd3/train'}}\n")
    return load_config(path, overrides)


# --- our rows -----------------------------------------------------------------------------------------------------------------------------------

PLANS = {
    "chain": ["rollout.plan=chain"],
    "chain with guidance, KL and two epochs": ["rollout.plan=chain", "rollout.guidance_scale=2", "kl.weight=0.1", "objective.inner_epochs=2"],
    "moving window, shared noise": ["rollout.same_noise=true", "rollout.window={size: 1, high: 3, schedule: progressive, every: 1}"],
    "random window": ["rollout.same_noise=true", "rollout.window={size: 1, high: 3}"],
    "compressed": ["rollout.num_steps=6", "rollout.after_window={solver: dpm++, compression: 0.4}"],
    "growing window": ["rollout.same_noise=true", "rollout.window={schedule: backward, backward_first: 2, backward_stages: 3}"],
    "tree": ["rollout.plan=tree", "rollout.tree.splits=[0, 2]"],
    "granular": ["rollout.plan=granular", "rollout.same_noise=true", "rollout.num_steps=5", "rollout.window.high=2", "rollout.granularities=[1, 2]"],
    "fraction": ["rollout.plan=chain", "rollout.num_steps=5", "selection.fraction=0.6"],
    "depth": ["rollout={plan: tree, tree: {splits: [0], branching: 4, stochastic: all}}", "selection.depth={first: 2, last: 2, slide_every: 1, stop: 1}"],
    "best of each branch": ["rollout={plan: tree, tree: {splits: [0, 1], stochastic: all}}", "selection.width={keep: 0.5, mode: branch}"],
    "best and worst": ["rollout={plan: tree, tree: {splits: [0], branching: 4, stochastic: all}}", "selection.width={keep: 0.5, mode: extremes}"],
}


@pytest.mark.parametrize("overrides", PLANS.values(), ids=PLANS)
def test_the_estimate_of_rows_is_what_a_run_uses(configure: Configure, overrides: list[str]) -> None:
    config = configure("training.iterations=3", *overrides)
    expected, trainer = estimate(config), Trainer(config)
    used = [trainer.iterate(iteration)[0] for iteration in (1, 2, 3)]
    assert expected.forward == Spread.of(row["nfe/forward"] for row in used)
    assert expected.backward == Spread.of(row["nfe/backward"] for row in used)
    assert (expected.run_forward + expected.run_backward, expected.rows_note) == (used[-1]["nfe/total"], "")
    assert expected.run_pictures == used[-1]["images"]
    assert expected.training.mean * config.objective.inner_epochs == expected.backward.mean


def test_a_selection_by_rewards_has_an_upper_bound(configure: Configure) -> None:
    config = configure("training.iterations=2", "rollout.same_noise=true", "selection.contrast={high: 0.1, low: -0.1}")
    expected, trainer = estimate(config), Trainer(config)
    assert expected.rows_note.startswith("at most")
    for iteration in (1, 2):
        assert 0 < trainer.iterate(iteration)[0]["nfe/backward"] <= expected.backward.mean


def test_a_drawn_selection_under_shared_noise_has_a_mean(configure: Configure) -> None:
    config = configure("rollout={plan: chain, num_steps: 5, same_noise: true, group_size: 3}", "selection.fraction=0.3")
    _, rows, note = group_rows(config, 1)
    draws, steps = 20_000, 4  # by simulation: 3 samples keep 1 of 4 steps each, and step 0 is one row for all
    sample = torch.arange(3).repeat_interleave(steps).repeat(draws) + 3 * torch.arange(draws).repeat_interleave(3 * steps)
    group, step = torch.zeros(len(sample), dtype=torch.int64), torch.arange(steps).repeat(3 * draws)
    kept = fraction_mask(sample, group, 0.3, [torch.Generator().manual_seed(0)])
    first = torch.unique(sample[kept & (step == 0)] // 3)
    found = (len(first) + int((kept & (step > 0)).sum())) / draws
    assert rows == pytest.approx(found, abs=0.02)
    assert note.startswith("a mean")


def test_texts_pictures_and_evaluations_of_a_run(configure: Configure) -> None:
    config = configure("evaluation.compare_guidance_scales=[2]")
    expected = estimate(config)
    # 5 training prompts of which all are met, 4 for the evaluation of which 2 are new, and the empty one
    assert expected.run_text_encoder_rows == 8
    assert (expected.prompts, expected.samples, expected.pictures, expected.run_pictures) == (3, 12, 12, 72)
    # 8 images before and after, without and with guidance; 6 images once on the way; 3 steps
    assert (expected.evaluations, expected.evaluation_pictures) == (3, 2 * 2 * 8 + 6)
    assert expected.evaluation_rows == 3 * (16 + 2 * 16 + 6)
    short = estimate(config.model_copy(update={"training": config.training.model_copy(update={"iterations": 1})}))
    assert short.run_text_encoder_rows in (7, 8)  # 3 prompts were met, one or two of them the evaluation's


# --- rows of released code ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "forward", "backward"),
    [
        ("flow_grpo", [], 64_512, 20_736),  # the worked numbers of docs/nfe.md
        ("flow_grpo", ["kl.weight=0", "rollout.guidance_scale=1"], 21_888, 10_368),
        ("flow_grpo_fast", ["rollout.window.size=2"], 13_824, 2_304),
        ("flow_grpo_fast", ["rollout.window.size=1", "rollout.same_noise=true"], 12_672, 1_152),
        # T = 16, 12 images, int(15 * 0.6) = 9 steps each
        ("dance_grpo", ["rollout={plan: chain, num_steps: 16, group_size: 12, groups_per_iteration: 1}", "selection.fraction=0.6"], 12 * 25, 12 * 9),
        ("mix_grpo", ["rollout={plan: window, num_steps: 25, group_size: 12, groups_per_iteration: 1, window: {size: 4}}"], 12 * 29, 12 * 4),
        # 3 steps to the window's end, int(0.4 * 8) = 3 points and so 2 steps after it
        (
            "mix_grpo_flash",
            [
                "rollout={num_steps: 10, group_size: 2, groups_per_iteration: 1, window: {size: 3, schedule: frozen}, after_window: {compression: 0.4}}",
            ],
            2 * (5 + 3),
            2 * 3,
        ),
        # the README's 218 edges, and 138 with five depths of 16 edges pruned; 203 nodes
        ("branch_grpo", ["selection.depth=null", "selection.width=null"], 203 + 218, 218),
        ("branch_grpo", ["selection.depth={first: 15, last: 19, slide_every: 30, stop: 15}", "selection.width=null"], 203 + 138, 138),
        # of the 10 edges below each of the 16 children of the last split, 5 are kept; of all 160, 80
        ("branch_grpo", ["selection.depth=null", "selection.width={keep: 0.5, mode: branch}"], 203 + 138, 138),
        ("branch_grpo", ["selection.depth=null", "selection.width={keep: 0.5, mode: extremes}"], 203 + 138, 138),
        # T = 5, s = 0, 1, g = 1, 2: 5 + 2 (1 + 4 + 2) + 2 (1 + 3 + 2) + 2
        (
            "g2rpo",
            ["rollout={num_steps: 5, group_size: 2, groups_per_iteration: 1, window: {size: 2, low: 0, high: 2}, granularities: [1, 2]}"],
            5 + 14 + 12 + 2,
            2,
        ),
        # T = 50 with guidance, all steps trained
        ("ddpo", ["rollout={num_steps: 50, group_size: 8, groups_per_iteration: 1, guidance_scale: 5, train_fraction: 1.0}"], 2 * 8 * 100, 2 * 8 * 50),
        # T = 20, the last 14 with 5 images of which 2 are trained, two epochs
        (
            "b2_diffurl",
            [
                "rollout={num_steps: 20, group_size: 5, groups_per_iteration: 1, guidance_scale: 5, window: {backward_first: 14, backward_stages: 100}}",
                "objective.inner_epochs=2",
                "training.iterations=1",
            ],
            2 * (6 + 5 * 14 + 2 * 2 * 14),
            2 * 2 * 2 * 14,
        ),
    ],
)
def test_what_released_code_spends(tmp_path: Path, method: str, overrides: list[str], forward: int, backward: int) -> None:
    if method == "branch_grpo":
        overrides = ["rollout={num_steps: 20, group_size: 16, groups_per_iteration: 1, tree: {splits: [0, 3, 6, 9], stochastic: all}}", *overrides]
    released = estimate(config_of(tmp_path, method, "objective.updates_per_iteration=1", *overrides)).released
    assert released.forward is not None
    assert released.backward is not None
    assert (released.forward.mean, released.backward.mean) == (forward, backward)


@pytest.mark.parametrize("method", list_methods())
def test_every_method_has_an_estimate_or_says_why_not(tmp_path: Path, method: str) -> None:
    expected = estimate(config_of(tmp_path, method))
    released = expected.released
    if method in ("dynamic_treerpo", "tree_grpo"):
        assert released.forward is None
        assert released.name == {"dynamic_treerpo": "no public code", "tree_grpo": "zh-ding/TreeGRPO, not read"}[method]
    else:
        assert released.forward is not None
        assert released.forward.mean >= 0.75 * expected.forward.mean


def test_a_plan_that_the_released_code_does_not_have_is_no_number(tmp_path: Path) -> None:
    released = estimate(config_of(tmp_path, "flow_grpo", "rollout={plan: tree, group_size: 4, tree: {splits: [0, 1]}}")).released
    assert (released.forward, released.name) == (None, "yifan123/flow_grpo train_sd3.py has no plan: tree")


# --- the measurement ----------------------------------------------------------------------------------------------------------------------------


def test_a_measurement_takes_all_prompts_when_there_is_time(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    found = measure(config, estimate(config), seconds=60.0)
    assert (found.measured_prompts, found.prompts, found.samples, found.measured_iterations) == (3, 3, 12, 3)
    assert min(found.rollout, found.train, found.text_encoders, found.evaluations) > 0
    assert found.images_per_second == 12 / (found.rollout + found.reward + found.train)
    assert found.run > found.training == 6 * found.iteration
    assert 2**27 < found.peak_memory < 2**36
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("scoring", "reward"), [(0.001, 0.128), (0.03, 3.84 + 3.84 - 1.28)])
def test_a_measurement_without_time_takes_few_prompts_and_scales_them(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, scoring: float, reward: float
) -> None:
    calls: list[tuple[int, int]] = []

    def iterate(_trainer: Trainer, watch: Any, groups: int, iteration: int) -> tuple[float, float, float]:
        """0.04 s of rollout and 0.01 s of training a group, some seconds a picture."""
        calls.append((groups, iteration))
        watch.pictures = 4 * groups
        return 0.04 * groups, scoring * watch.pictures, 0.01 * groups

    monkeypatch.setattr(flowrl.measure, "_iterate", iterate)
    settings = ["rollout.groups_per_iteration=64", "rollout.same_noise=true", "rollout.window.high=2", "objective.updates_per_iteration=9"]
    config = configure(*settings, "training.rows_per_forward=128")  # 32 groups of 4 in a batch
    expected = estimate(config)
    found = measure(config, expected, seconds=0.0)
    # A group has 1 + 4 training rows: with 5 groups every one of 9 updates gets one.
    assert calls == [(5, 1), (5, 2)]
    assert (found.measured_prompts, found.measured_iterations, found.prompts) == (5, 1, 64)
    assert (found.rollout, found.train) == (pytest.approx(64 * 0.04), pytest.approx(64 * 0.01))
    assert found.reward == pytest.approx(reward)  # of the second batch, and what was left of the first when it came: scoring goes on while 1.28 s are sampled
    rows, pictures = expected.evaluation_rows / expected.rollout.mean, expected.evaluation_pictures
    assert found.evaluations == pytest.approx(rows * found.rollout + pictures * scoring)


# --- the command --------------------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_both_tables_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config_file: Path
) -> None:
    monkeypatch.setattr("flowrl.measure.measure.__defaults__", (0.0,))
    before = sorted(tmp_path.rglob("*"))
    assert main(["estimate", str(config_file), "rollout.same_noise=true", "rollout.window={size: 1, high: 3}"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert sorted(tmp_path.rglob("*")) == before
    for text in ("rows forward", "rows backward", "text-encoder rows", "yifan123/flow_grpo train_sd3_fast.py", " .. ", "images per second", "peak memory"):
        assert text in out


def test_as_json_it_is_one_object(capsys: pytest.CaptureFixture[str], config_file: Path) -> None:
    assert main(["estimate", str(config_file), "training.iterations=2", "--no-measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["iterations"], found["measured"]) == ("flow_grpo_fast", 2, None)
    # 3 prompts, 4 images, 4 steps of which 2 are trained, independent noise
    assert (found["forward"]["mean"], found["backward"]["mean"], found["rows"], found["run_forward"]) == (72, 24, 96, 144)
    assert found["released"]["forward"]["mean"] == 72


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["estimate"], "error: Missing argument 'CONFIG'"),
        (["estimate", "none.yaml"], "error: config none.yaml: no such file"),
        (["estimate", "CONFIG", "rollout.group_sise=4"], "error: rollout.group_sise: unknown key; did you mean group_size?"),
        (["estimate", "CONFIG", "--no-measure", "data.train=none.txt"], "error: prompts none.txt: no such file"),
        (["estimate", "CONFIG", "--json", "model.path=./none"], "error: model.path: ./none does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], config_file: Path, arguments: list[str], message: str) -> None:
    assert main([str(config_file) if a == "CONFIG" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(message)


def test_without_a_measurement_no_model_library_is_imported(config_file: Path) -> None:
    code = (
        f"import sys; from flowrl.cli import main; main(['estimate', {str(config_file)!r}, '--no-measure'])\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'peft', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
