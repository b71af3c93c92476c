"""`flowrl estimate`: its rows are those that runs use, its numbers of released code those of their formulas, and it needs no model for either."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from PIL import Image

import flowrl.measure
from flowrl.cli import main
from flowrl.config import Config, list_methods, load_config
from flowrl.core.selection import fraction_mask
from flowrl.estimate import Released, Spread, estimate, group_rows
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


# Methods that train finished samples; the toy's rollout has 4 steps, 3 groups of 4 samples. The second entry: forward and backward rows of an
# iteration by hand, where all iterations have the same; the note.
DPM = "rollout={plan: ode, solver: dpm++}"
MATCHING = "matching={num_times: 2, times: uniform}"
WARM = "those of an iteration after the critic's warm-up; "
TIES = "at most: groups whose samples all score alike give no pair"
RATIOS = ["objective.clip_low=1.0", "objective.updates_per_iteration=3"]
SAMPLES: dict[str, tuple[list[str], tuple[int, int] | None, str]] = {
    "awm: policy, reference and slow copy at 2 levels": (["method=awm", MATCHING], (12 * 4 + 24 * 3, 24), ""),
    "awm on a chain": (["method=awm", MATCHING, "rollout.plan=chain"], (12 * 4 + 24 * 3, 24), ""),
    "awm with guidance": (["method=awm", MATCHING, "rollout.guidance_scale=2"], (2 * 12 * 4 + 24 * 3, 24), ""),
    "awm without penalties": (["method=awm", MATCHING, "kl.weight=0", "anchor.weight=0", "old_policy=null"], (12 * 4 + 24, 24), ""),
    "awm in three updates": (["method=awm", MATCHING, *RATIOS], (12 * 4 + 24 * 3 + 16, 24), ""),  # 8 of 12 samples come after the first update
    "awm in three updates and two epochs": (["method=awm", MATCHING, *RATIOS, "objective.inner_epochs=2"], (12 * 4 + 24 * 4 + 16, 48), ""),
    "awm off-policy": (["method=awm", MATCHING, *RATIOS, "old_policy.rollout=true"], (12 * 4 + 24 * 3, 24), ""),
    "heun": (["method=awm", MATCHING, "rollout.solver=heun"], (12 * 7 + 24 * 3, 24), ""),
    "euler": (["method=awm", MATCHING, "rollout.solver=ode"], (12 * 4 + 24 * 3, 24), ""),
    "shared start noise": (
        ["method=awm", MATCHING, "rollout={plan: window, solver: ode, same_noise: true, window: {schedule: frozen, low: 1}}"],
        (3 * (2 + 4 * 2) + 24 * 3, 24),
        "",
    ),
    "diffusion_nft": (["method=diffusion_nft", DPM, "matching.num_times=3"], (12 * 4 + 36 * 3, 36), ""),
    "diffusion_nft without KL": (["method=diffusion_nft", "matching.num_times=3", "kl.weight=0", "objective.inner_epochs=2"], (12 * 4 + 36 * 3, 72), ""),
    "orw_cfm_w2": (["method=orw_cfm_w2"], (12 * 4 + 48 * 2, 48), ""),
    "flow_rwr": (["method=flow_rwr"], (12 * 4 + 48, 48), ""),
    "flow_sft": (["method=flow_sft"], (12 * 4 + 48, 48), ""),
    "ac_flow": (
        ["method=ac_flow", "critic={warmup_iterations: 0, gate: -1.0e+9, ramp_iterations: 2}"],
        (12 * 4 + 48 * 2, 48),
        WARM + "until its gate opens nothing is trained",
    ),
    "ac_flow without a value": (["method=ac_flow", "critic={warmup_iterations: 0, enabled: false}"], (12 * 4 + 48 * 2, 48), ""),
    "flow_dpo": (["method=flow_dpo"], (12 * 4 + 24 * 2, 24), TIES),
    "flow_ipo in two updates and two epochs": (
        ["method=flow_ipo", "objective.updates_per_iteration=2", "objective.inner_epochs=2"],
        (12 * 4 + 24 * 3, 48),
        TIES,
    ),
    "flow_simpo": (["method=flow_simpo"], (12 * 4 + 24 * 2, 24), TIES),
    "flow_simpo without KL": (["method=flow_simpo", "kl.weight=0"], (12 * 4 + 24, 24), TIES),
    "flow_rpo with guidance": (["method=flow_rpo", "matching.guidance_scale=2"], (12 * 4 + 2 * 24 * 2, 24), TIES),
    "refl": (["method=refl", "direct={low: 2, high: 4}"], (12 * 4 + 12, 12), ""),
    "draft, two noisings": (["method=draft"], (12 * 4 + 24, 24), ""),
    "draft, two steps and two epochs": (["method=draft", "direct={last_steps: 2, renoise: 0}", "objective.inner_epochs=2"], (12 * 4 + 48, 48), ""),
    "draft, some steps": (["method=draft", "direct={last_steps: 3, renoise: 0, random_steps: true}"], None, ""),
    "srpo with guidance": (["method=srpo", "rollout.guidance_scale=2"], (2 * (12 * 4 + 12), 12), ""),
}


def assert_used(config: Config, rows: tuple[int, int] | None, note: str) -> dict[str, Any]:
    """Three iterations use what the estimate says; returns the estimate."""
    expected, trainer = estimate(config), Trainer(config)
    used = [trainer.iterate(iteration)[0] for iteration in (1, 2, 3)]
    assert all(row["nfe/used"] == row["nfe/minimum"] for row in used)
    assert expected.forward == Spread.of(row["nfe/forward"] for row in used)
    assert expected.backward == Spread.of(row["nfe/backward"] for row in used)
    assert (expected.run_forward + expected.run_backward, expected.run_pictures) == (used[-1]["nfe/total"], used[-1]["images"])
    assert rows is None or (expected.forward, expected.backward) == (Spread.of([rows[0]]), Spread.of([rows[1]]))
    assert expected.rows_note == note
    return expected.as_dict()


@pytest.mark.parametrize("case", SAMPLES)
def test_the_estimate_of_finished_samples_is_what_a_run_uses(configure: Configure, case: str) -> None:
    overrides, rows, note = SAMPLES[case]
    direct = overrides[0] in ("method=refl", "method=draft", "method=srpo")
    config = configure("training.iterations=3", f"rewards={{{'ink' if direct else 'toys:brightness'}: 1.0}}", *overrides)
    expected = assert_used(config, rows, note)
    assert (expected["prompts"], expected["samples"], expected["pictures"], expected["pictures_encoded"]) == (3, 12, 12, 0)
    assert expected["training"]["mean"] * config.objective.inner_epochs == expected["backward"]["mean"]


def test_groups_whose_samples_score_alike_are_not_trained(configure: Configure) -> None:
    config = configure("training.iterations=2", "method=flow_dpo", "rewards=[toys:constant]")
    expected, trainer = estimate(config), Trainer(config)
    for iteration in (1, 2):
        found = trainer.iterate(iteration)[0]
        assert found["nfe/used"] == found["nfe/minimum"] < expected.rows
        assert (found["pair/count"], found["nfe/backward"], expected.backward.mean) == (0, 0, 24)


@pytest.mark.parametrize(
    ("critic", "shut", "note"),
    [
        ("{warmup_iterations: 2, enabled: false}", 2, "in the first 2 iterations"),
        ("{warmup_iterations: 1, gate: -1.0e+9}", 1, "in the first iteration and until its gate opens"),
    ],
)
def test_the_critics_warm_up_trains_nothing_and_is_counted_as_if_it_were_over(configure: Configure, critic: str, shut: int, note: str) -> None:
    config = configure("training.iterations=3", "method=ac_flow", f"critic={critic}")
    expected, trainer = estimate(config), Trainer(config)
    assert expected.rows_note == f"{WARM}{note} nothing is trained"
    for iteration in (1, 2, 3):
        used = trainer.iterate(iteration)[0]
        rows = (48, 0) if iteration <= shut else (expected.forward.mean, expected.backward.mean)
        assert (used["nfe/forward"], used["nfe/backward"]) == rows


def stored_pairs(folder: Path, kind: str) -> str:
    """Five pairs for the prompts of the toy, as pictures or latents; returns their file."""
    torch.manual_seed(0)
    lines = []
    for number, prompt in enumerate(toys.PROMPTS[:5]):
        names = {}
        for side in ("chosen", "rejected"):
            names[side] = f"{number}_{side}.{kind}"
            if kind == "npy":
                np.save(folder / names[side], torch.randn(4, 4, 4).numpy())
            else:
                Image.fromarray(torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()).save(folder / names[side])
        lines.append(json.dumps({"prompt": prompt, **names}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return f"data.pairs={folder / 'pairs.jsonl'}"


STORED = {  # 3 groups of 2 stored samples at 4 levels
    "flow_dpo": (["method=flow_dpo", "old_policy=null"], (24 * 2, 24)),
    "flow_simpo without KL": (["method=flow_simpo", "old_policy=null", "kl.weight=0", "objective.inner_epochs=2"], (48, 48)),
    "flow_sft": (["method=flow_sft"], (24, 24)),
}


@pytest.mark.parametrize("kind", ["npy", "png"])
@pytest.mark.parametrize("case", STORED)
def test_stored_pairs_are_not_rolled_out(configure: Configure, tmp_path: Path, case: str, kind: str) -> None:
    overrides, rows = STORED[case]
    config = configure("training.iterations=3", "rollout.group_size=2", "data.train=none.txt", stored_pairs(tmp_path, kind), *overrides)
    expected = assert_used(config, rows, "")
    assert (expected["prompts"], expected["samples"], expected["rollout"]["mean"]) == (3, 6, 0)
    assert (expected["pictures"], expected["scores"], expected["pictures_encoded"]) == (0, 0, 6 if kind == "png" else 0)
    assert expected["run_text_encoder_rows"] == 8


def test_pictures_with_gradient_are_decoded_and_scored_again(configure: Configure) -> None:
    rewards = "rewards={ink: 1.0, toys:brightness: 0.0}"
    draft = estimate(configure(rewards, "method=draft", "objective.inner_epochs=2"))
    assert (draft.pictures, draft.pictures_with_gradient, draft.scores) == (12, 2 * 24, 2 * 12 + 2 * 24)
    srpo = estimate(configure(rewards, "method=srpo", "direct.positive_text=good"))  # the reward is asked with and without the text
    assert (srpo.pictures, srpo.pictures_with_gradient, srpo.scores) == (12, 12, 2 * 12 + 2 * 12)


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
        ("awm", [], 36_864, 6_912),  # on-policy; 48 groups of 24, T = 14, 6 levels: 14 + 6 * 3 and 6
        ("awm", ["old_policy.rollout=true", "anchor.weight=0", "rollout.guidance_scale=2"], 1152 * (28 + 18), 6_912),
        ("awm", ["old_policy.rollout=true", "objective.inner_epochs=2"], 1152 * (14 + 2 * 6 * 4), 2 * 6_912),
        ("diffusion_nft", [], 1152 * (10 + 3 * 9), 1152 * 9),
        ("diffusion_nft", ["kl.weight=0"], 1152 * (10 + 3 * 9), 1152 * 9),  # the reference is asked for nothing
        ("flow_dpo", ["rollout.guidance_scale=2"], 48 * (2 * 24 * 14 + 4 * 4), 48 * 2 * 4),
    ],
)
def test_what_released_code_spends(tmp_path: Path, method: str, overrides: list[str], forward: int, backward: int) -> None:
    if method == "branch_grpo":
        overrides = ["rollout={num_steps: 20, group_size: 16, groups_per_iteration: 1, tree: {splits: [0, 3, 6, 9], stochastic: all}}", *overrides]
    released = estimate(config_of(tmp_path, method, "objective.updates_per_iteration=1", *overrides)).released
    assert released.forward is not None
    assert released.backward is not None
    assert (released.forward.mean, released.backward.mean) == (forward, backward)


@pytest.mark.parametrize("method", [name for name, method in list_methods().items() if method.config.get("likelihood") != "token"])
def test_every_method_has_an_estimate_or_says_why_not(tmp_path: Path, method: str) -> None:
    expected = estimate(config_of(tmp_path, method))
    released = expected.released
    unknown = {
        "tree_grpo": "zh-ding/TreeGRPO, not read",
        "flow_sft": "yifan123/flow_grpo, not read",
        "flow_rwr": "yifan123/flow_grpo, not read",
        "orw_cfm_w2": "markerthu/orw-cfm finetune_fm.py, its rows not read",
        "srpo": "Tencent-Hunyuan/SRPO fastvideo/SRPO.py, its rows not read",
        **dict.fromkeys(("refl", "draft"), "not read"),
        **dict.fromkeys(("dynamic_treerpo", "ac_flow", "flow_ipo", "flow_simpo", "flow_rpo"), "no public code"),
    }
    if method in unknown:
        assert (released.forward, released.name) == (None, unknown[method])
    else:
        assert released.forward is not None
        assert released.forward.mean >= 0.75 * expected.forward.mean


@pytest.mark.parametrize(
    ("method", "overrides", "name"),
    [
        ("flow_grpo", ["rollout={plan: tree, group_size: 4, tree: {splits: [0, 1]}}"], "yifan123/flow_grpo train_sd3.py has no plan: tree"),
        (
            "flow_grpo",
            ["likelihood=matching", "kl.form=v_mse"],
            "yifan123/flow_grpo train_sd3.py has no likelihood: matching with objective.name: clipped_surrogate",
        ),
        (
            "flow_dpo",
            ["objective.name=ipo"],
            "yifan123/flow_grpo train_sd3_dpo.py has no likelihood: matching with objective.name: ipo",
        ),
        ("awm", ["kl.weight=0"], "scxue/advantage_weighted_matching train_sd3_awm.py fails without KL"),
        ("diffusion_nft", ["rollout.guidance_scale=2"], "NVlabs/DiffusionNFT train_nft_sd3.py has no guidance"),
    ],
)
def test_what_the_released_code_does_not_have_is_no_number(tmp_path: Path, method: str, overrides: list[str], name: str) -> None:
    released = estimate(config_of(tmp_path, method, *overrides)).released
    assert (released.forward, released.name) == (None, name)


def test_released_loops_were_not_read_for_stored_pairs(tmp_path: Path) -> None:
    config = config_of(tmp_path, "flow_dpo", "rollout.group_size=2", "old_policy=null", stored_pairs(tmp_path, "npy"))
    assert estimate(config).released == Released("yifan123/flow_grpo train_sd3_dpo.py was not read for stored pairs")


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
    assert [found.rollout, found.train] == pytest.approx([64 * 0.04, 64 * 0.01])
    assert found.reward == pytest.approx(reward)  # of the second batch, and what was left of the first when it came: scoring goes on while 1.28 s are sampled
    rows, pictures = expected.evaluation_rows / expected.rollout.mean, expected.evaluation_pictures
    assert found.evaluations == pytest.approx(rows * found.rollout + pictures * scoring)


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_a_measurement_on_stored_pairs_times_a_few_evaluated_pictures(configure: Configure, tmp_path: Path, kind: str) -> None:
    config = configure("method=flow_dpo", "old_policy=null", "rollout.group_size=2", "evaluation.compare_guidance_scales=[2]", stored_pairs(tmp_path, kind))
    found = measure(config, estimate(config), seconds=60.0)
    assert (found.measured_prompts, found.samples, found.measured_iterations, found.reward) == (3, 6, 3, 0)
    assert min(found.rollout, found.train, found.text_encoders, found.evaluations) > 0


def test_a_measurement_on_stored_pairs_without_time_scales_few_of_them(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flowrl.measure, "_iterate", lambda _trainer, _watch, groups, _iteration: (0.04 * groups, 0.0, 0.01 * groups))
    monkeypatch.setattr(flowrl.measure, "_evaluate", lambda _trainer: (0.5, 0.25))
    settings = ["rollout={group_size: 2, groups_per_iteration: 64}", "objective.updates_per_iteration=3", stored_pairs(tmp_path, "npy")]
    config = configure("method=flow_dpo", "old_policy=null", *settings)
    expected = estimate(config)
    found = measure(config, expected, seconds=0.0)
    assert (found.measured_prompts, found.reward) == (3, 0)  # one pair for each update
    assert [found.rollout, found.train] == pytest.approx([64 * 0.04, 64 * 0.01])
    assert found.evaluations == pytest.approx(0.5 * expected.evaluation_rows + 0.25 * expected.evaluation_pictures)


@pytest.mark.parametrize(
    "overrides",
    [["method=ac_flow", "critic={widths: [4], hidden: 4, updates_per_iteration: 1}"], ["method=draft", "rewards=[ink]", "rollout.num_steps=4"]],
    ids=["ac_flow", "draft"],
)
def test_a_measurement_trains(configure: Configure, monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    backward: list[int] = []
    original = Trainer.iterate

    def iterate(trainer: Trainer, iteration: int) -> tuple[dict[str, Any], dict[str, float]]:
        metrics, timings = original(trainer, iteration)
        backward.append(metrics["nfe/backward"])
        return metrics, timings

    monkeypatch.setattr(Trainer, "iterate", iterate)
    config = configure(*overrides)
    expected = estimate(config)
    found = measure(config, expected, seconds=0.0)
    assert min(found.rollout, found.reward, found.train, found.evaluations) > 0
    assert backward == [found.measured_prompts * expected.backward.mean / 3] * len(backward)


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


def test_the_command_prints_what_only_some_runs_have(capsys: pytest.CaptureFixture[str], tmp_path: Path, config_file: Path) -> None:
    pairs = ["method=flow_dpo", "old_policy=null", "rollout.group_size=2", stored_pairs(tmp_path, "png")]
    for arguments, shown, hidden in (
        (pairs, ["pictures encoded 6 36 ", "was not read for stored pairs"], ["with gradient", "training rows are"]),
        (["method=draft", "rewards=[ink]"], ["with gradient", "released: not read"], ["pictures encoded"]),
        (["method=flow_dpo"], [f"training rows are {TIES}", "rows 120 720 120 720 1.00x"], ["with gradient"]),
        (["method=ac_flow"], [f"training rows are {WARM}in the first 100 iterations and until its gate opens nothing is trained"], ["with gradient"]),
    ):
        assert main(["estimate", str(config_file), *arguments, "--no-measure"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        out = " ".join(out.split())
        assert all(text in out for text in shown), out
        assert not any(text in out for text in hidden), out


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
        f"import sys; from flowrl.cli import main; main(['estimate', {str(config_file)!r}, '--no-measure', '--no-memory'])\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'peft', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
