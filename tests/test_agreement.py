"""Values of a run that do not go together: one line each, found when the config is loaded, before anything else."""

from pathlib import Path

import pytest
import yaml

from flowrl.agreement import BOUNDED_KERNELS, settings_without_effect
from flowrl.config import load_config
from flowrl.types import UserError
from samplers.kernels import KERNELS, load_kernel

BASE = {"run_dir": "r", "rewards": ["scene"], "objective": {"updates_per_iteration": 1}}
TREE = {"plan": "tree", "num_steps": 8, "window": {"size": 3, "high": 4}, "group_size": 8, "same_noise": True}
GRANULAR = {"plan": "granular", "num_steps": 8, "window": {"size": 3, "high": 3}, "same_noise": True}
ODE = {"plan": "ode", "num_steps": 8}
MATCHING = {"likelihood": "matching", "kl": {"form": "v_mse"}}
WINDOW = {"plan": "window", "num_steps": 8, "window": {"size": 3, "high": 4}}


def load(tmp_path, *overrides, **sections):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | sections))
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("rollout", "overrides", "line"),
    [
        (WINDOW, ["rollout.window.high=8"], "rollout.window.high: 8 is too large for 8 steps, of which the last is never stochastic; use at most 7"),
        (
            WINDOW,
            ["rollout.window={size: 8, high: 7}"],
            "rollout.window.size: 8 does not fit into the 7 steps 0..6; use a smaller size or a larger window.high (at most 7)",
        ),
        (WINDOW, ["rollout.window={low: 4}"], "rollout.window.low: 4 leaves no step below window.high = 4; use at most 3"),
        (WINDOW, ["rollout.window.schedule=backward"], "rollout.window.backward_first: 14 is not within the 8 steps; use 2 to 8"),
        (
            TREE,
            ["rollout.window={schedule: backward, backward_first: 4}"],
            "rollout.window.schedule: backward grows a window from the end and fits plan: window, not tree",
        ),
        (
            TREE,
            ["rollout.group_size=20"],
            "rollout.group_size: a tree with these branching factors has 8 leaves, and 20 is not a multiple of them; use 8, or lower rollout.tree.branching",
        ),
        (
            TREE,
            ["rollout.group_size=16"],
            "rollout.same_noise: 2 trees from one start noise would be one tree; use group_size 8 or same_noise: false",
        ),
        (TREE, ["rollout.tree.branching=[2, 2]"], "rollout.tree.branching: 2 numbers for 3 splits; give one number, or one for each split"),
        (TREE, ["rollout.tree.splits=[0, 3, 7]"], "rollout.tree.splits: [0, 3, 7] must be different steps within 0..6 (the last step is never stochastic)"),
        (TREE, ["rollout.tree.splits=[]"], "rollout.tree.splits: [] must be different steps within 0..6 (the last step is never stochastic)"),
        (GRANULAR, ["rollout.same_noise=false"], "rollout.same_noise: the granular plan has one anchor path per prompt; set same_noise: true"),
        (
            GRANULAR,
            ["rollout.granularities=[1, 5]"],
            "rollout.granularities: a stride of 5 does not fit into the 4 steps that remain two steps after step 2; use at most 4, or a smaller window.high",
        ),
        (GRANULAR, ["rollout.granularities=[2, 2]"], "rollout.granularities: [2, 2] names one twice; the same pictures would count double"),
        (
            GRANULAR,
            ["rollout.after_window.solver=dpm++"],
            "rollout.after_window: the plan granular takes no steps after a window; use plan: window or tree, or leave it out",
        ),
        (ODE, ["rollout.same_noise=true"], "rollout.same_noise: from one start noise the plan ode makes one picture group_size times; set same_noise: false"),
        (
            ODE,
            ["rollout.after_window.compression=0.5"],
            "rollout.after_window: the plan ode takes no steps after a window; use plan: window or tree, or leave it out",
        ),
        (WINDOW, ["rollout.noise_level=[0.5, 0.6]"], "rollout.noise_level: 2 levels for 3 stochastic steps; give one number, or one for each step"),
        (
            {**TREE, "tree": {"splits": [0, 2, 4], "stochastic": "window"}},
            ["rollout.noise_level=[0.5, 0.6]"],
            "rollout.noise_level: 2 levels for a number of stochastic steps that changes; give one number",
        ),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(tmp_path, rollout, overrides, line):
    sections = {"rollout": rollout} | (MATCHING if rollout["plan"] == "ode" else {})
    assert load(tmp_path, **sections).rollout.plan == rollout["plan"]
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, **sections)
    assert line in str(caught.value).splitlines()


def test_the_bounded_kernels_are_those_that_say_so():
    assert {name for name in KERNELS if name != "ode" and load_kernel(name).noise_is_bounded} == set(BOUNDED_KERNELS)


@pytest.mark.parametrize("kernel", BOUNDED_KERNELS)
def test_noise_that_a_kernel_cannot_make_is_refused(tmp_path, kernel):
    with pytest.raises(UserError, match="rollout.noise_level: "):
        load(tmp_path, f"rollout.kernel={kernel}", "rollout.noise_level=1.2", rollout=WINDOW)
    with pytest.raises(UserError, match="rollout.noise_level: "):
        load(tmp_path, f"rollout.kernel={kernel}", "rollout.noise_level=0.9", "rollout.tree.noise_growth=0.5", rollout=TREE)
    load(tmp_path, "rollout.noise_level=1.2", rollout=WINDOW)  # flow_sde can; the trainer warns


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["selection.fraction=0.5"],
            "selection.fraction: a subset of each sample's steps fits plan: chain or window; the samples of a tree plan share their steps",
        ),
        (["selection.depth={first: 1, last: 3, stop: 1}"], "selection.depth: depths 1..3 would leave no decision to train; use a narrower window"),
        (["selection.depth={first: 3, last: 2}"], "selection.depth: first = 3 lies after last = 2"),
        (["selection.contrast={}"], "selection.contrast: best against worst needs the samples of a branch; use plan: window with same_noise: true"),
        (["selection.contrast={low: 0.6}"], "selection.contrast: low = 0.6 must be below high = 0.5"),
        (["credit.normalize=layer"], "credit.normalize: layer compares nodes by their z-score; set advantage.centre: group and advantage.scale: group_std"),
        (["credit.integrate=sum"], "credit.integrate: only a granular plan has several granularities to sum over; use mean"),
        (
            ["advantage={centre: history, scale: history, aggregate: advantages}"],
            "advantage.aggregate: centre history remembers the weighted sum of the rewards; use aggregate: rewards",
        ),
        (
            ["advantage={centre: history, scale: history, history_least: 32}"],
            "advantage.history_least: 32 rewards are never reached with history_size 16; use at most 16",
        ),
        (["credit={integrate: sum, backup: level}"], "credit.integrate: a sum over granularities and backup: level exclude each other; use one of them"),
        (
            ["credit.normalize=sibling", "advantage={centre: group, scale: group_std, aggregate: advantages}"],
            "advantage.aggregate: sibling compares nodes by the weighted sum of the rewards; use aggregate: rewards",
        ),
        (
            ["selection.width={}", "rollout.tree.branching=1"],
            "selection.width: a tree with branching 1 has no branches to prune; raise rollout.tree.branching, or leave it out",
        ),
        (
            ["credit.backup=level", "rollout.kernel=cps"],
            "credit.backup: level weighs children by their probability, which the cps kernel does not give; use mean or another kernel",
        ),
        (["rollout.plan=window", "selection.width={}"], "selection.width: pruning needs a tree; use plan: tree, or leave it out"),
        (
            ["rollout.plan=window", "layer_tuning.weight=0.1"],
            "layer_tuning.weight: the supervised term follows the best path of a tree; use plan: tree, or weight 0",
        ),
    ],
)
def test_credit_and_selection_that_do_not_fit_the_plan_are_refused(tmp_path, overrides, line):
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, rollout=TREE)
    assert line in str(caught.value).splitlines()


def test_a_granular_plan_keeps_comparing_leaves(tmp_path):
    with pytest.raises(UserError, match="credit.normalize: leaves of a granular plan are compared within their step and granularity; use leaf"):
        load(tmp_path, "credit.normalize=layer", "advantage={centre: group, scale: group_std}", rollout=GRANULAR)


def test_pruning_that_leaves_decisions_is_accepted(tmp_path):
    config = load(tmp_path, "selection.depth={first: 3, last: 3, stop: 2}", "selection.width={}", rollout=TREE)
    assert config.selection.depth is not None and config.selection.width is not None


def test_settings_that_change_nothing_are_named(tmp_path):
    overrides = [
        "rollout.tree.noise_growth=0.3",
        "rollout.window.start_decay=0.5",
        "rollout.window.schedule=frozen",
        "credit.temperature=2",
        "advantage.history_size=20",
    ]
    found = list(settings_without_effect(load(tmp_path, *overrides, rollout=WINDOW)))
    assert found == [
        "rollout.window.start_decay has no effect with the window's schedule",
        "rollout.tree.noise_growth has no effect with plan window",
        "credit.temperature has no effect with backup mean",
        "advantage.history_size has no effect with centre group and scale batch_std",
    ]
    chain = load(tmp_path, "objective={name: reinforce, dynamic_clip: 0.5}", "rollout.plan=chain", rollout=WINDOW)
    assert "objective.dynamic_clip has no effect with reinforce, which has no clip" in list(settings_without_effect(chain))
    assert "rollout.window.size has no effect with plan chain" in list(settings_without_effect(chain))


def test_an_ode_plan_has_no_use_for_noise_and_only_it_for_a_solver(tmp_path):
    unused = ["rollout.noise_level=[0.5, 9]", "rollout.kernel=cps", "rollout.log_prob_reduction=sum", "rollout.train_fraction=0.01", "rollout.window.size=99"]
    unused += ["rollout.tree.splits=[77]", "rollout.granularities=[9]"]
    found = list(settings_without_effect(load(tmp_path, *unused, "rollout.solver=heun", rollout=ODE, **MATCHING)))
    names = ["rollout.window.size", "rollout.tree.splits"]
    names += [f"rollout.{key}" for key in ("kernel", "noise_level", "train_fraction", "granularities", "log_prob_reduction")]
    assert [line for line in found if line.startswith("rollout.")] == [f"{name} has no effect with plan ode" for name in names]
    assert "rollout.solver has no effect with plan window" in list(settings_without_effect(load(tmp_path, "rollout.solver=heun", rollout=WINDOW)))


def test_a_run_with_a_likelihood_of_its_own_names_what_it_does_not_use(tmp_path):
    used = list(settings_without_effect(load(tmp_path, "matching={num_times: 3, times: uniform, low: 0.2}", rollout=ODE, **MATCHING)))
    assert used == []
    unused = list(settings_without_effect(load(tmp_path, "matching.low=0.2", "direct.scale=3", "objective.beta=2", rollout=WINDOW)))
    assert unused == [
        "matching.low has no effect with likelihood transition",
        "direct.scale has no effect with objective clipped_surrogate",
        "objective.beta has no effect with objective clipped_surrogate",
    ]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_sets_nothing_without_an_effect(path):
    assert list(settings_without_effect(load_config(path))) == []


BETA = "advantage={centre: group, scale: beta}"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["advantage.centre=length_weighted"], "advantage.centre: length_weighted weighs answers by their lengths, and pictures have none; use group"),
        (
            ["advantage={scale: history, aggregate: gdpo}"],
            "advantage.aggregate: scale history remembers the weighted sum of the rewards; use aggregate: rewards",
        ),
        (
            ["advantage={centre: virtual_max, aggregate: advantages}"],
            "advantage.aggregate: centre: virtual_max needs the range of the weighted sum of the rewards; use aggregate: rewards",
        ),
        ([BETA, "advantage.aggregate=gdpo"], "advantage.aggregate: scale: beta needs the range of the weighted sum of the rewards; use aggregate: rewards"),
        (
            [BETA, "rewards=[{name: ink, minimum: 0.1}, scene]"],
            "rewards: a minimum puts samples below the lowest reward, and scale: beta needs its range; leave it out",
        ),
        (
            [BETA, "reward_weights.kind=gradient", "rewards=[ink, scene]"],
            "reward_weights.kind: scale: beta needs the range of the weighted sum, and gradient changes its weights; use fixed",
        ),
        (
            ["advantage.centre=ema", "reward_weights.kind=gradient", "rewards=[ink, scene]"],
            "reward_weights.kind: gradient takes the gradient of each reward alone, which a critic or a history of totals cannot give; leave them out, or use "
            "fixed",
        ),
        (["kl={weight: 1, form: k3}"], "kl.form: k3 compares tokens; with likelihood: transition use fg_code, exact_mean, v_mse, x_mse or v_elbo"),
    ],
)
def test_advantages_that_cannot_be_taken_are_refused(tmp_path, overrides, line):
    with pytest.raises(UserError) as caught:
        load(tmp_path, *overrides, rollout=WINDOW)
    assert line in str(caught.value).splitlines()


def test_a_beta_scale_of_stored_pairs_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.pairs: stored pairs have no rewards with a range, which scale: beta needs; leave it out"):
        load(tmp_path, BETA, "data.pairs=pairs.jsonl", "rollout.group_size=2", "objective.name=dpo", rollout=ODE, **MATCHING)


@pytest.mark.parametrize(
    ("settings", "idle", "why"),
    [
        ("centre: group, scale: none", ["ddof", "eps"], "scale none"),
        ("centre: history, scale: history", ["ddof"], "scale history, which has ddof 0"),
        ("centre: virtual_max, scale: group_std", [], ""),
        ("centre: ema, scale: batch_std, decay: 0.5", [], ""),
        ("centre: group, scale: batch_std, virtual: 2, decay: 0.5", ["virtual", "decay"], "centre group"),
        ("centre: none, scale: batch_std, singleton: raw", ["singleton"], "centre none"),
    ],
)
def test_settings_of_an_advantage_that_change_nothing_are_named(tmp_path, settings, idle, why):
    found = list(settings_without_effect(load(tmp_path, f"advantage={{ddof: 1, eps: 0.5, {settings}}}", rollout=WINDOW)))
    assert [line for line in found if line.startswith("advantage.")] == [f"advantage.{name} has no effect with {why}" for name in idle]
