"""Likelihood, objective, plan and regularisers that do not go together: one line each, and what is fine stays fine."""

import pytest
import yaml

from flowrl.agreement import settings_without_effect
from flowrl.config import load_config
from flowrl.core.preference import NEEDS_REFERENCE, PAIR_OBJECTIVES
from flowrl.likelihood_agreement import DIRECT_NAMES, PAIR_NAMES
from flowrl.types import UserError
from flowrl.updates.direct import DIRECT_OBJECTIVES


def load(tmp_path, method, *overrides):
    """A method's config with 8 steps, 4 groups of 4."""
    path = tmp_path / "run.yaml"
    rollout = {"num_steps": 8, "groups_per_iteration": 4, "group_size": 4}
    direct = {"direct": {"low": 4, "high": 8}} if method == "refl" else {}
    path.write_text(yaml.safe_dump({"method": method, "run_dir": "r", "rewards": ["ink"], "rollout": rollout, "matching": {"num_times": 4}, **direct}))
    return load_config(path, overrides)


def lines(tmp_path, method, *overrides):
    with pytest.raises(UserError) as caught:
        load(tmp_path, method, *overrides)
    return str(caught.value).splitlines()


def test_the_names_are_those_of_the_objectives():
    assert set(PAIR_NAMES) == {"dpo", "ipo", "simpo", "rpo"} < set(PAIR_OBJECTIVES)
    assert set(PAIR_NAMES) & NEEDS_REFERENCE == {"dpo", "ipo", "rpo"}
    assert set(DIRECT_NAMES) == DIRECT_OBJECTIVES


WRONG = [
    # the transition likelihood
    ("flow_grpo", ["objective.name=nft"], "objective.name: nft judges finished samples; set likelihood: matching"),
    ("flow_grpo", ["objective.name=dpo"], "objective.name: dpo judges finished samples; set likelihood: matching"),
    ("flow_grpo", ["rollout.plan=ode"], "rollout.plan: ode has no random step that could be trained; set likelihood: matching, or another plan"),
    (
        "flow_grpo",
        ["kl={weight: 0.1, form: v_elbo}"],
        "kl.form: v_elbo belongs to the matching likelihood; use fg_code, exact_mean, v_mse or x_mse",
    ),
    (
        "flow_grpo",
        ["anchor.weight=1", "old_policy={}"],
        "anchor.weight: the old policy anchors velocities at noised samples; set likelihood: matching, or leave it out",
    ),
    ("flow_grpo", ["critic={}"], "critic: it judges noised samples; set likelihood: matching, or critic: null"),
    # the matching likelihood
    ("awm", ["kl={weight: 1, form: fg_code}"], "kl.form: fg_code compares SDE steps; with likelihood: matching use v_mse or v_elbo"),
    (
        "awm",
        ["rollout={plan: granular, same_noise: true, window: {high: 3}}"],
        "rollout.plan: the samples of a granular plan differ in their steps, not only in their noise; with likelihood: matching use another plan",
    ),
    ("awm", ["old_policy=null"], "anchor.weight: there is no old policy to anchor to; give old_policy, or weight 0"),
    ("awm", ["anchor.weight=0"], "old_policy: it is kept and never used; set old_policy.rollout: true or anchor.weight, or old_policy: null"),
    ("awm", ["objective.ratio=ratio_norm"], "objective.ratio: ratio_norm belongs to SDE steps; with likelihood: matching leave it out"),
    ("awm", ["objective.step_weight=inv_dt"], "objective.step_weight: inv_dt belongs to SDE steps; with likelihood: matching leave it out"),
    ("awm", ["objective.dynamic_clip=0.5"], "objective.dynamic_clip: 0.5 belongs to SDE steps; with likelihood: matching leave it out"),
    ("awm", ["credit.backup=level"], "credit: decisions within a rollout are not trained with likelihood: matching; leave it out"),
    ("awm", ["selection.fraction=0.5"], "selection: decisions within a rollout are not trained with likelihood: matching; leave it out"),
    ("awm", ["layer_tuning.weight=1"], "layer_tuning.weight: the supervised term belongs to SDE steps; with likelihood: matching leave it out"),
    (
        "awm",
        ["matching.num_times=7"],
        "matching.num_times: 7 noise levels do not fit into the 6 of the grid from step 1 to below 7 (matching.time_fraction of rollout.num_steps); use fewer, "
        "more steps, or matching.times: uniform",
    ),
    (
        "awm",
        ["matching={num_times: 3, first_time: 6, time_fraction: 1, include_first: true}", "matching.first_time=7"],
        "matching.num_times: 3 noise levels do not fit into the 1 of the grid from step 7 to below 8 (matching.time_fraction of rollout.num_steps); use fewer, "
        "more steps, or matching.times: uniform",
    ),
    ("awm", ["matching={times: uniform, low: 0.5, high: 0.5}"], "matching.low: 0.5 is not below matching.high = 0.5"),
    (
        "awm",
        ["training.rows_per_backward=3", "matching.combine=sum_first"],
        "training.rows_per_backward: 3 is less than the 4 rows of a sample, which are trained together; use at least 4, a smaller matching.num_times, or "
        "matching.combine: exp_first",
    ),
    (
        "flow_dpo",
        ["training.rows_per_backward=1"],
        "training.rows_per_backward: 1 is less than the 2 rows of a pair, which are trained together; use at least 2",
    ),
    # nft
    ("diffusion_nft", ["advantage.transform=exp"], "advantage.transform: nft takes probabilities in [0, 1]; use unit_interval"),
    ("diffusion_nft", ["old_policy=null"], "old_policy: nft mirrors the policy about the old one; give it, for example old_policy: {rollout: true}"),
    (
        "awm",
        ["advantage.transform=unit_interval"],
        "advantage.transform: unit_interval makes the probabilities that objective nft takes; with clipped_surrogate use another one",
    ),
    # transforms
    ("orw_cfm_w2", ["advantage={temperature: 0.01}"], "advantage.temperature: exp(3 / 0.01) is beyond all numbers; raise it, or lower advantage.clip"),
    (
        "flow_grpo",
        ["rollout={plan: tree, window: {size: 2, high: 4}}", "advantage={centre: group, scale: group_std, transform: softmax}", "credit.normalize=layer"],
        "advantage.transform: softmax weighs whole samples, and credit.normalize: layer compares nodes; use identity, or leaf",
    ),
    # pairs
    (
        "flow_dpo",
        ["anchor.weight=1"],
        "anchor: dpo compares the best and the worst sample of a group, there is no anchor; leave it out",
    ),
    ("flow_simpo", ["critic={}"], "critic: simpo compares the best and the worst sample of a group, there is no critic; leave it out"),
    (
        "flow_dpo",
        ["objective.updates_per_iteration=5", "matching.combine=sum_first"],
        "objective.updates_per_iteration: 5 is more than the 4 pairs of an iteration; use fewer",
    ),
    (
        "ac_flow",
        ["advantage.history_size=4"],
        "advantage.history_least: 8 rewards are never reached with history_size 4; use at most 4",
    ),
    (
        "ac_flow",
        ["advantage.aggregate=advantages"],
        "advantage.aggregate: centre history remembers the weighted sum of the rewards; use aggregate: rewards",
    ),
    (
        "awm",
        ["rollout={plan: window, window: {schedule: frozen}, after_window: {compression: 0.5}}"],
        "rollout.after_window.compression: the sampler then leaves the grid that matching.times: grid draws from; use uniform times, or compression 1",
    ),
    (
        "draft",
        ["direct={renoise: 0, last_steps: 2}", "rollout.solver=heun"],
        "rollout.solver: draft differentiates Euler steps from the sampled latent, and heun takes others; use ode, or direct.renoise",
    ),
    (
        "draft",
        ["direct={renoise: 2, recompute: true}"],
        "direct.recompute: from a sample with fresh noise there is one step, which keeps no more than itself; use recompute: false",
    ),
    # stored pairs
    (
        "flow_dpo",
        ["data.pairs=p.jsonl", "old_policy=null"],
        "rollout.group_size: a stored pair is a group of 2, not of 4; set rollout.group_size: 2",
    ),
    ("flow_dpo", ["data.pairs=p.jsonl", "rollout.group_size=2"], "old_policy.rollout: stored pairs are not sampled; leave it out"),
    (
        "flow_grpo",
        ["data.pairs=p.jsonl", "rollout.group_size=2"],
        "data.pairs: stored samples have no SDE steps; set likelihood: matching",
    ),
    ("ac_flow", ["data.pairs=p.jsonl", "rollout.group_size=2"], "critic: stored pairs have no rewards that a critic could learn; set critic: null"),
    (
        "flow_sft",
        ["data.pairs=p.jsonl", "rollout.group_size=2", "logging.rollouts_every=1"],
        "logging.rollouts_every: stored pairs are not sampled; leave it out",
    ),
    (
        "flow_sft",
        ["data.pairs=p.jsonl", "rollout.group_size=2", "advantage.aggregate=advantages"],
        "advantage.aggregate: stored pairs have no rewards of which each could have an advantage; use aggregate: rewards",
    ),
    # direct gradients
    ("refl", ["rollout={plan: chain}"], "rollout.plan: refl differentiates deterministic steps; use plan: ode"),
    ("refl", ["kl={weight: 1, form: v_mse}"], "kl.weight: refl follows the reward's gradient alone; leave it out"),
    ("srpo", ["anchor.weight=1", "old_policy={}"], "anchor.weight: direct_align follows the reward's gradient alone; leave it out"),
    ("draft", ["critic={}"], "critic: draft follows the reward's gradient alone; leave it out"),
    ("draft", ["data.pairs=p.jsonl"], "data.pairs: draft needs its own samples; leave data.pairs out"),
    ("draft", ["credit.backup=level"], "credit: decisions within a rollout are not trained with objective draft; leave it out"),
    ("refl", ["direct={low: 8, high: null}"], "direct.low: steps 8..7 are not within 0..7; lower direct.low or direct.high"),
    ("refl", ["direct={low: 4, high: 9}"], "direct.low: steps 4..8 are not within 0..7; lower direct.low or direct.high"),
    ("draft", ["direct={renoise: 0, last_steps: 9}"], "direct.last_steps: 9 is more than the 8 steps of the rollout"),
    (
        "draft",
        ["direct={renoise: 1, last_steps: 2}"],
        "direct.renoise: a sample with fresh noise takes one step to the picture; use last_steps: 1 and random_steps: false",
    ),
    ("srpo", ["direct={sigma_low: 0.5, sigma_high: 0.4}"], "direct.sigma_low: 0.5 is above direct.sigma_high = 0.4"),
    (
        "srpo",
        ["direct.sigma_jump=0.2"],
        "direct.sigma_jump: a step of 0.2 from direct.sigma_low = 0.1 would end below 0; lower it, or raise sigma_low",
    ),
    (
        "srpo",
        ["direct.sigma_high=0.95"],
        "direct.sigma_high: 0.95 and a step of 0.1 towards noise leave nothing of the picture; keep their sum below 1",
    ),
]


@pytest.mark.parametrize(("method", "overrides", "line"), WRONG, ids=[f"{method} {' '.join(overrides)}" for method, overrides, _ in WRONG])
def test_what_cannot_work_is_one_line(tmp_path, method, overrides, line):
    load(tmp_path, method)
    assert line in lines(tmp_path, method, *overrides)


def test_stored_pairs_and_a_direct_objective_give_no_advice_that_contradicts_itself(tmp_path):
    found = lines(tmp_path, "draft", "data.pairs=p.jsonl", "rollout.group_size=2")
    assert found == ["data.pairs: draft needs its own samples; leave data.pairs out"]


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("awm", ["rollout.plan=chain"]),
        ("awm", ["rollout={plan: tree, window: {size: 2, high: 4}}"]),
        ("awm", ["matching.num_times=6"]),
        ("awm", ["matching={num_times: 2, first_time: 7, time_fraction: 1, include_first: true}"]),
        ("awm", ["kl.form=fg_code", "kl.weight=0"]),
        ("awm", ["objective.name=reinforce"]),
        ("awm", ["training.rows_per_backward=4"]),
        ("diffusion_nft", ["old_policy.rollout=false"]),
        ("diffusion_nft", ["critic={}"]),
        ("flow_grpo", ["old_policy={rollout: true}"]),
        ("flow_grpo", ["advantage.transform=exp"]),
        ("flow_sft", ["data.pairs=p.jsonl", "rollout.group_size=2"]),
        ("flow_dpo", ["data.pairs=p.jsonl", "rollout.group_size=2", "old_policy=null"]),
        ("flow_dpo", ["objective.updates_per_iteration=4"]),
        ("srpo", ["direct={inversion: false, sigma_high: 0.99}"]),
        ("draft", ["old_policy={rollout: true}"]),
        ("refl", ["direct={low: 7, high: null}"]),
    ],
    ids=str,
)
def test_what_works_is_accepted(tmp_path, method, overrides):
    assert load(tmp_path, method, *overrides).method == method


def test_settings_of_another_likelihood_or_objective_are_named(tmp_path):
    def idle(method, *overrides):
        return [line for line in settings_without_effect(load(tmp_path, method, *overrides)) if not line.startswith("rollout.")]

    assert idle("flow_grpo", "matching.weighting=t") == [f"matching.{key} has no effect with likelihood transition" for key in ("weighting", "num_times")]
    assert idle("draft") == ["matching.num_times has no effect with objective draft"]
    assert idle("awm") == []
    assert idle("awm", "matching={low: 0.1, high: 0.9, shift: 2, power: 0.5}") == [
        f"matching.{key} has no effect with weighting ghuber and times grid" for key in ("low", "high", "shift")
    ]
    assert idle("awm", "matching={weighting: t, power: 0.5, times: logit_normal, first_time: 2, include_first: true, time_fraction: 0.5, low: 0.1}") == [
        f"matching.{key} has no effect with weighting t and times logit_normal" for key in ("power", "first_time", "include_first", "time_fraction", "low")
    ]
    assert idle("awm", "matching={times: uniform, low: 0.1, shift: 2}") == []
    assert idle("awm", "direct.scale=2", "objective={beta: 2, margin: 1, sft_weight: 1, label_smoothing: 0.1}", "advantage.temperature=2") == [
        "direct.scale has no effect with objective clipped_surrogate",
        "advantage.temperature has no effect with transform identity",
        *(f"objective.{key} has no effect with objective clipped_surrogate" for key in ("beta", "margin", "sft_weight", "label_smoothing")),
    ]
    assert idle("flow_dpo", "advantage={transform: exp, temperature: 2}", "objective={margin: 1, sft_weight: 1, label_smoothing: 0.1}") == [
        *(f"advantage.{key} has no effect with objective dpo" for key in ("transform", "temperature")),
        *(f"objective.{key} has no effect with objective dpo" for key in ("margin", "sft_weight")),
    ]
    assert idle("flow_rpo", "objective={sft_weight: 1, label_smoothing: 0.1}") == []
    assert idle("flow_simpo", "objective={margin: 1, label_smoothing: 0.1}") == ["objective.label_smoothing has no effect with objective simpo"]
    assert idle("diffusion_nft", "objective.beta=0.1") == []


@pytest.mark.parametrize(
    ("method", "own"),
    [("refl", {"low", "high"}), ("draft", {"last_steps", "random_steps"}), ("srpo", {"sigma_low", "sigma_high", "sigma_jump", "inversion"})],
)
def test_a_direct_objective_names_the_settings_of_the_others(tmp_path, method, own):
    values = {"low": 5, "high": 7, "last_steps": 2, "random_steps": "true", "sigma_low": 0.2, "sigma_high": 0.7, "sigma_jump": 0.15, "inversion": "true"}
    settings = ", ".join(f"{key}: {value}" for key, value in values.items())
    config = load(tmp_path, method, f"direct={{{settings}, renoise: 0, positive_text: a, negative_text: b, threshold: 1, scale: 2}}")
    found = {line.split()[0].removeprefix("direct.") for line in settings_without_effect(config) if line.startswith("direct.")}
    assert found == set(values) - own
