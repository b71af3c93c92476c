"""The table of objectives: complete, true, and what it says of names and arguments that do not exist."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import ROOT

from flowrl.agreement import settings_without_effect
from flowrl.config import Config, load_config
from flowrl.core.group_gates import GROUP_OBJECTIVES
from flowrl.core.list_losses import LIST_OBJECTIVES
from flowrl.core.objectives import OBJECTIVES
from flowrl.core.pair_losses import PAIR_LOSSES, PAIR_NEEDS
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.objective_names import OBJECTIVE_NAMES, arguments, load_objective, names_of, parameters
from flowrl.sections import ObjectiveConfig
from flowrl.text.objectives import TOKEN_OBJECTIVES
from flowrl.types import UserError

TABLES = [OBJECTIVES, GROUP_OBJECTIVES, LIST_OBJECTIVES, PAIR_OBJECTIVES, PAIR_LOSSES]


def load(tmp_path: Path, *overrides: str, method: str = "flow_grpo") -> Config:
    """6 steps, 4 groups of 4."""
    path = tmp_path / "run.yaml"
    rollout = {"num_steps": 6, "groups_per_iteration": 4, "group_size": 4, "same_noise": False}
    path.write_text(yaml.safe_dump({"method": method, "run_dir": "r", "rewards": ["ink"], "rollout": rollout, "matching": {"num_times": 4}}))
    return load_config(path, overrides)


def line(tmp_path: Path, *overrides: str, method: str = "flow_grpo") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, method=method)
    return str(caught.value).splitlines()


def test_the_table_holds_every_objective_of_the_core_by_its_function() -> None:
    for table in TABLES:
        for name, function in table.items():
            assert load_objective(name) is function, name
    assert {name for table in TABLES for name in table} < OBJECTIVE_NAMES.keys()
    assert TOKEN_OBJECTIVES.keys() <= OBJECTIVE_NAMES.keys()
    assert all("token" in OBJECTIVE_NAMES[name].likelihoods for name in TOKEN_OBJECTIVES)
    assert {name: frozenset(OBJECTIVE_NAMES[name].needs) for name in PAIR_NEEDS} == PAIR_NEEDS


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVE_NAMES.items() if entry.kind != "direct"])
def test_what_a_function_takes_is_filled_in_or_may_be_configured(name: str) -> None:
    entry, configured = OBJECTIVE_NAMES[name], {*ObjectiveConfig.model_fields, "centre"}
    for parameter in list(inspect.signature(load_objective(name)).parameters)[1:]:
        assert parameter in {*entry.needs, *configured, *parameters(name)}, parameter
    assert set(entry.above_zero) <= parameters(name).keys() | {"beta"}


def test_every_objective_is_in_the_document_with_its_arguments() -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    rows = {row.split("|")[1].strip(" `"): row for row in text.splitlines() if row.startswith("| `") and "." not in row.split("|")[1]}
    assert rows.keys() == OBJECTIVE_NAMES.keys()
    for name, entry in OBJECTIVE_NAMES.items():
        for parameter in parameters(name):
            assert f"`{parameter}`" in rows[name], (name, parameter)
        if entry.kind != "direct":
            assert rows[name].split("|")[3].strip() == ", ".join(entry.likelihoods), name


def test_the_kinds_and_what_they_judge() -> None:
    assert names_of("pair", "matching") == ("dpo", "ipo", "simpo", "rpo")
    assert names_of("direct") == ("refl", "draft", "direct_align")
    assert set(names_of("decisions", "transition")) == {*OBJECTIVES}
    assert {name for name in names_of("decisions", "matching") if name != "nft"} == {*OBJECTIVES} - {"gmpo", "vespo", "kimi"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.name=sapoo"], "objective.name: unknown objective sapoo; did you mean sapo?"),
        (
            ["objective={name: sapo, args: {temperature_postive: 2}}"],
            "objective.args: sapo takes temperature_positive, temperature_negative, not temperature_postive; did you mean temperature_positive?",
        ),
        (["objective={name: sapo, args: {temperature_positive: 0}}"], "objective.args: temperature_positive = 0 of sapo is not a number above 0"),
        (["objective={name: sapo, args: {temperature_positive: high}}"], "objective.args: temperature_positive = 'high' of sapo is not a number"),
        (["objective={name: mdpo, args: {penalty: -1}}"], "objective.args: penalty = -1 of mdpo is not a number of at least 0"),
        (["objective={name: mdpo, args: {penalty: true}}"], "objective.args: penalty = true of mdpo is not a number"),
        (["objective={name: vespo, args: {positive: 2}}"], "objective.args: positive = 2 of vespo is not a list of 2 numbers"),
        (["objective={name: vespo, args: {positive: [2, 0]}}"], "objective.args: positive = [2, 0] of vespo is not 2 numbers, each a number above 0"),
        (["objective={name: cispo, args: {cap: 5}}"], "objective.args: cispo takes no arguments beside the keys of the section; remove cap"),
        (["objective={name: cispo, args: {clip_high: 5}}"], "objective.args: clip_high has a key of its own; write objective.clip_high"),
        (
            ["objective.name=reg_grpo"],
            "objective.name: reg_grpo is made for the tokens of a language model; use another objective, or a language model with likelihood: token",
        ),
        (["objective={name: sapo, dual_clip: 3}"], "objective.dual_clip: it bounds the clipped surrogate, not sapo; leave it out"),
        (["objective={name: sapo, ratio_max: 3}"], "objective.ratio_max: it bounds the clipped surrogate, not sapo; leave it out"),
        (["objective={ratio: none, ratio_max: 3}"], "objective.ratio_max: with ratio: none every ratio is 1; leave it out"),
        (["objective={ratio: none, name: cispo}"], "objective.ratio: cispo caps ratios, and with none every ratio is 1; use plain, or objective reinforce"),
        (["objective={ratio: seq_mean, name: gmpo}"], "objective.ratio: gmpo makes its own ratio of the whole sample from plain ones; use plain"),
        (["objective={ratio: ratio_norm, name: kimi}"], "objective.ratio: kimi makes its own ratio of the whole sample from plain ones; use plain"),
        (["objective.max_length=4"], "objective.max_length: it is the constant of seq_mean_token_sum_norm, not of mean; leave it out"),
        (
            ["objective.ratio=seq_mean", "rollout={plan: tree, window: {size: 2, high: 4}}"],
            "rollout.plan: ratio: seq_mean judges a sample by all its steps, and samples of a tree plan share theirs; use chain or window",
        ),
        (
            ["objective.name=gmpo", "rollout={plan: granular, same_noise: true, window: {high: 2}}"],
            "rollout.plan: objective gmpo judges a sample by all its steps, and samples of a granular plan share theirs; use chain or window",
        ),
        (
            ["objective.ratio=seq_sum", "training.rows_per_backward=4"],
            "training.rows_per_backward: 4 is less than the 5 rows of a sample, which ratio: seq_sum trains together; use at least 5",
        ),
        (
            ["objective.ratio=seq_mean", "training.rows_per_backward=16", "rollout.same_noise=true"],
            "training.rows_per_backward: 16 is less than the 17 rows of a group of one start noise, which ratio: seq_mean trains together; use at least 17",
        ),
        (
            ["objective={ratio: seq_mean, updates_per_iteration: 5}", "rollout.same_noise=true"],
            "objective.updates_per_iteration: 5 is more than the 4 groups of one start noise, which ratio: seq_mean trains together; use fewer",
        ),
        (
            ["objective.ratio=seq_mean", "credit.backup=path"],
            "credit: ratio: seq_mean has one advantage for all steps of a sample; use normalize: leaf and backup: mean, or ratio: seq_mean_token",
        ),
        (
            ["objective.name=kimi", "advantage.scale=group_std", "credit.normalize=layer"],
            "credit: objective kimi has one advantage for all steps of a sample; use normalize: leaf and backup: mean, or ratio: seq_mean_token",
        ),
        (
            ["objective={ratio: seq_mean, step_weight: inv_dt}"],
            "objective.step_weight: inv_dt weighs single steps, and ratio: seq_mean judges them together; use none",
        ),
        (
            ["objective={ratio: seq_mean, dynamic_clip: 0.5}"],
            "objective.dynamic_clip: it gives each step its own bounds, and ratio: seq_mean judges them together; use 0",
        ),
        (
            ["objective.reduction=seq_mean_token_sum_norm", "rollout={plan: window, window: {schedule: backward, backward_first: 3}}"],
            "objective.max_length: the number of trained steps grows here; give the constant",
        ),
    ],
)
def test_what_cannot_work_on_sde_steps_is_one_line(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in line(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objective.reduction=seq_mean"],
            "objective.reduction: seq_mean is of the steps of a sample, or of tokens; with likelihood: matching use mean or group_mean",
        ),
        (
            ["objective.name=kimi"],
            "objective.name: kimi does not judge noised samples; set likelihood: transition, or use one of clipped_surrogate, reinforce, sapo, cispo, mdpo, "
            "bgpo, nft",
        ),
        (["objective.ratio=seq_mean"], "objective.ratio: seq_mean belongs to SDE steps; with likelihood: matching leave it out"),
    ],
)
def test_what_cannot_work_on_noised_samples_is_one_line(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in line(tmp_path, *overrides, method="awm")


def test_a_token_ratio_of_the_sequence_goes_with_credit_of_steps(tmp_path: Path) -> None:
    assert load(tmp_path, "objective={ratio: seq_mean_token, step_weight: inv_dt}", "advantage.scale=group_std", "credit.normalize=layer")


def test_arguments_arrive_as_the_functions_take_them(tmp_path: Path) -> None:
    found = arguments(load(tmp_path, "objective={name: vespo, args: {positive: [1, 2]}}").objective)
    assert found == {"positive": (1, 2)}
    assert load(tmp_path, "objective={name: nft, args: {scale: 1}}", method="diffusion_nft").objective.args == {"scale": 1}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ("name: sapo", ["clip_low", "clip_high"]),
        ("name: cispo", []),
        ("name: gmpo", []),
        ("ratio: none", ["clip_low", "clip_high"]),
        ("name: clipped_surrogate", []),
    ],
)
def test_clip_bounds_that_change_nothing_are_named(tmp_path: Path, settings: str, idle: list[str]) -> None:
    why: Any = "ratio none, which is always 1" if "none" in settings else settings.removeprefix("name: ") + ", which has no clip"
    found = list(settings_without_effect(load(tmp_path, f"objective={{{settings}, clip_low: 0.01, clip_high: 0.01}}")))
    assert [entry for entry in found if entry.startswith("objective.")] == [f"objective.{key} has no effect with {why}" for key in idle]
