"""From scores to what decisions are trained with: every credit mode, selection, state and supervised target on small rollouts, by hand."""

import dataclasses
import math

import forests
import pytest
import torch

from flowrl.assignment import Assigner
from flowrl.config import Config
from flowrl.planning import build_plan
from flowrl.types import Scores, UserError
from samplers.schedules import shifted_grid

NAN = float("nan")
THREE, FOUR = shifted_grid(3, 3.0), shifted_grid(4, 3.0)
DEPTH_TWO = forests.tree({0: 2, 1: 2}, sigmas=THREE)
"""Decisions 0 1 | 2 3 (below 0) 4 5 (below 1), leaves 0..3 below 2..5; rows: 0 | 1 2."""
REWARDS = [1.0, 3.0, 2.0, 6.0]
"""Mean 3, variance 3.5. Of the nodes: 2, 4 | 1, 3, 2, 6. Siblings' means: 3 | 2, 4."""
STD = math.sqrt(3.5)
CLIP = 1e-3


def config_of(**sections):
    """The depth-two tree's run with an eps of 1e-12; sections are merged into it."""
    base = {
        "rollout": {"plan": "tree", "num_steps": 3, "group_size": 4, "tree": {"splits": [0, 1]}},
        "advantage": {"centre": "group", "scale": "group_std", "eps": 1e-12},
        "objective": {"clip_low": CLIP, "clip_high": CLIP},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections} - {"rewards"}}
    return Config.model_validate({"run_dir": "unused", "rewards": sections.get("rewards", ["scene"]), **merged})


def scores_of(values, **rewards):
    """Scores of the total, invalid where NaN, and of single rewards."""
    made = {name: torch.tensor(column, dtype=torch.float32).flatten() for name, column in {"total": values, **rewards}.items()}
    return {name: Scores(column, ~column.isnan()) for name, column in made.items()}


def rollout_of(plan, num_groups=1, **options):
    return forests.roll_out(plan, range(num_groups), keep_velocity=True, **options)


def assign(config, plan, values, *, assigner=None, rollout=None, num_groups=1, iteration=1, **rewards):
    rollout = rollout or rollout_of(plan, num_groups)
    scores, prompts = scores_of(values, **rewards), rollout.leaf_group
    numbers = list(range(num_groups))
    return (assigner or Assigner(config))(plan, rollout, scores, scores, prompts=(prompts, prompts), numbers=numbers, iteration=iteration)


def assert_values(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


# --- credit -------------------------------------------------------------------------------------------------------------------------------------


def test_advantages_of_leaves_are_averaged_over_the_leaves_below():
    found = assign(config_of(), DEPTH_TWO, REWARDS)
    assert_values(found.advantages, [-1 / STD, 1 / STD, -2 / STD, 0, -1 / STD, 3 / STD])
    assert_values(found.clip_low, [CLIP] * 6)
    assert_values(found.clip_high, [CLIP] * 6)
    assert (found.tuning, found.placeholder, found.rows) == (None, False, 3)
    assert {name: found.sums[name] for name in ("clamped", "all", "kept", "tuned", "rows")} == {"clamped": 0, "all": 6, "kept": 6, "tuned": 0, "rows": 3}
    assert found.sums["abs_advantage"] == pytest.approx(8 / STD)


def test_layer_compares_the_nodes_of_a_depth():
    # depth 1: 2 and 4 have mean 3 and std 1; depth 2 is the leaves
    assert_values(assign(config_of(credit={"normalize": "layer"}), DEPTH_TWO, REWARDS).advantages, [-1, 1, -2 / STD, 0, -1 / STD, 3 / STD])


def test_sibling_compares_the_children_of_a_node_on_the_scale_of_the_layer():
    # of 1, 3 with mean 2 and of 2, 6 with mean 4
    found = assign(config_of(credit={"normalize": "sibling"}), DEPTH_TWO, REWARDS).advantages
    assert_values(found, [-1, 1, -1 / STD, 1 / STD, -2 / STD, 2 / STD])


@pytest.mark.parametrize("kind", ["path", "level"])
def test_probable_children_weigh_more_in_path_and_level(kind):
    # weights of the children of 0: 3/4, 1/4; of 1: 1/5, 4/5, by the log-probabilities of the sampling policy
    rollout = dataclasses.replace(rollout_of(DEPTH_TWO), edge_old_log_prob=torch.tensor([0.1, 0.9, math.log(3), 0.0, 0.0, math.log(4)]))
    credit = {"backup": kind, "temperature": 1.0}
    leaf = assign(config_of(credit=credit), DEPTH_TWO, REWARDS, rollout=rollout).advantages
    assert_values(leaf, [-6 / 4 / STD, 11 / 5 / STD, -2 / STD, 0, -1 / STD, 3 / STD])  # -2 and 0; -1 and 3
    # of rewards 1, 9 and 2, 6 the means are 5 and 4, but 3/4 1 + 1/4 9 = 3 and 1/5 2 + 4/5 6 = 5.2: the second is the better one
    layer = assign(config_of(credit={**credit, "normalize": "layer"}), DEPTH_TWO, [1, 9, 2, 6], rollout=rollout).advantages
    assert_values(layer, [-1, 1, *(a / math.sqrt(10.25) for a in (-3.5, 4.5, -2.5, 1.5))])
    cold = assign(config_of(credit={"backup": kind, "temperature": 0.0}), DEPTH_TWO, REWARDS, rollout=rollout).advantages
    assert_values(cold, [-1 / STD, 1 / STD, -2 / STD, 0, -1 / STD, 3 / STD])


def test_the_prefix_counts_for_path_and_level_in_different_ways():
    # depth three below one child: path weighs leaves by whole paths, level by one decision at a time
    plan = forests.tree({0: 2, 1: 2, 2: 2}, sigmas=FOUR)
    log_prob = torch.zeros(14)
    log_prob[2], log_prob[6] = math.log(3), math.log(2)  # child 2 of 0; of its leaves the first
    rollout = dataclasses.replace(rollout_of(plan), edge_old_log_prob=log_prob)
    rewards = [8.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0]
    section = {"rollout": {"num_steps": 4, "group_size": 8, "tree": {"splits": [0, 1, 2]}}, "advantage": {"centre": "group", "scale": "none"}}
    for kind, value in (("path", (6 * 8 + 3 * 0 + 0 + 4) / (6 + 3 + 1 + 1)), ("level", (3 * (2 * 8 / 3) + 2) / 4)):
        found = assign(config_of(**section, credit={"backup": kind}), plan, rewards, rollout=rollout).advantages
        assert float(found[0]) == pytest.approx(value - 1.5, rel=1e-5)  # 1.5: the mean reward


def test_a_chain_gives_every_decision_its_own_samples_advantage():
    config = config_of(rollout={"plan": "chain", "tree": {}})
    plan = forests.chain(sigmas=THREE)
    assert_values(assign(config, plan, [REWARDS, REWARDS[::-1]], num_groups=2).advantages, [x / STD for x in [-2, 0, -1, 3] * 2 + [3, -1, 0, -2] * 2])


def test_plain_grpo_is_a_tree_of_depth_one_without_the_extras():
    # 4.4.5 of the method notes: d = 1, eta = 0, lambda = 0, beta_n = 0, layer
    window = {"size": 1, "low": 0, "high": 2, "schedule": "frozen"}
    common = {"num_steps": 3, "window": window, "noise_level": 0.7}
    for size in (2, 4):
        tree = config_of(
            rollout={"plan": "tree", "group_size": size, "tree": {"branching": size, "noise_growth": 0.0}, **common},
            credit={"normalize": "layer"},
            objective={"dynamic_clip": 0.0, "updates_per_iteration": 1},
            layer_tuning={"weight": 0.0},
        )
        plain = config_of(rollout={"plan": "window", "group_size": size, "same_noise": True, "tree": {}, **common})
        plans = [build_plan(c.rollout, THREE, shift=3.0, iteration=1, seed=0) for c in (tree, plain)]
        assert plans[0] == plans[1]
        ours, theirs = (assign(c, plans[0], REWARDS[:size]) for c in (tree, plain))
        for name in ("advantages", "clip_low", "clip_high"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
        torch.testing.assert_close(ours.rollout.edge_x_next, theirs.rollout.edge_x_next)
        assert (ours.tuning, ours.rows, ours.rollout.row_sigma.tolist()) == (None, 1, [1.0])


# --- granular plans, clamp ----------------------------------------------------------------------------------------------------------------------

GRANULAR = forests.granular((0,), (1, 2), group_size=2, sigmas=FOUR)
"""Decisions 0, 1; leaves: stride 1 of children 0, 1, then stride 2 of children 0, 1."""


def granular_config(**sections):
    rollout = {"plan": "granular", "num_steps": 4, "group_size": 2, "same_noise": True, "granularities": [1, 2], "tree": {}}
    rollout["window"] = {"size": 1, "low": 0, "high": 1, "schedule": "frozen"}
    return config_of(rollout=rollout, **sections)


@pytest.mark.parametrize(("integrate", "expected"), [("sum", [-2.0, 2.0]), ("mean", [-1.0, 1.0])])
def test_granularities_are_compared_apart_and_then_summed_or_averaged(integrate, expected):
    # within a stride the z-scores are -1, 1, whatever the stride's scale
    assert_values(assign(granular_config(credit={"integrate": integrate}), GRANULAR, [0, 1, 10, 30]).advantages, expected)
    assert_values(assign(granular_config(credit={"integrate": integrate}), GRANULAR, [0, 1, 30, 10]).advantages, [0.0, 0.0])


@pytest.mark.parametrize(("integrate", "clamped", "expected"), [("sum", 2, [-1.5, 1.5]), ("mean", 0, [-1.0, 1.0])])
def test_the_clamp_comes_after_the_sum_and_its_rate_is_counted(integrate, clamped, expected):
    found = assign(granular_config(credit={"integrate": integrate}, advantage={"clip": 1.5}), GRANULAR, [0, 1, 10, 30])
    assert_values(found.advantages, expected)
    assert (found.sums["clamped"], found.sums["all"], found.sums["abs_advantage"]) == (clamped, 2, pytest.approx(2 * expected[1]))


def test_granularities_and_rewards_are_summed_before_the_one_clamp():
    # 5.2 of the method notes: every (reward, stride) has its own z-score
    config = granular_config(
        rewards={"scene": 1.0, "jpeg": 2.0}, credit={"integrate": "sum"}, advantage={"aggregate": "advantages", "clip": 5.0}, objective={"clip_low": CLIP}
    )
    found = assign(config, GRANULAR, [0, 0, 0, 0], scene=[0, 1, 10, 30], jpeg=[0, 1, 5, 9])
    assert_values(found.advantages, [-5.0, 5.0])  # -1 - 1 + 2 (-1 - 1) = -6
    assert found.sums["clamped"] == 2
    found = assign(config, GRANULAR, [0, 0, 0, 0], scene=[0, 1, 10, 30], jpeg=[0, 1, 9, 5])
    assert_values(found.advantages, [-2.0, 2.0])


def test_equal_rewards_give_advantage_0_in_every_mode():
    for credit in ({}, {"normalize": "layer"}, {"normalize": "sibling"}, {"backup": "path"}, {"backup": "level"}):
        assert assign(config_of(credit=credit), DEPTH_TWO, [0.3] * 4).advantages.tolist() == [0] * 6
    assert assign(granular_config(credit={"integrate": "sum"}), GRANULAR, [0.3] * 4).advantages.tolist() == [0] * 2


# --- several rewards, other statistics ----------------------------------------------------------------------------------------------------------


def test_advantages_of_rewards_are_weighted_and_summed_and_a_reward_of_weight_0_is_not():
    config = config_of(rewards={"scene": 1.0, "jpeg": -0.5, "scene_exact": 0.0}, advantage={"aggregate": "advantages"})
    found = assign(config, DEPTH_TWO, [0] * 4, scene=REWARDS, jpeg=[0, 0, 2, 2], scene_exact=[NAN] * 4).advantages
    leaf = [-2 / STD + 0.5, 0 + 0.5, -1 / STD - 0.5, 3 / STD - 0.5]
    assert_values(found[2:], leaf)
    assert_values(found[:2], [sum(leaf[:2]) / 2, sum(leaf[2:]) / 2])


def test_a_floor_is_added_to_the_spread_of_each_group():
    config = config_of(rewards={"scene": 1.0, "jpeg": 2.0}, advantage={"aggregate": "advantages", "std_floor": 0.5})
    found = assign(config, DEPTH_TWO, [0] * 4, scene=REWARDS, jpeg=[0, 0, 2, 2]).advantages
    wide = 1.5 * STD  # one group: the spread of the iteration is the group's
    assert_values(found[2:], [-2 / wide - 2 / 1.5, 0 - 2 / 1.5, -1 / wide + 2 / 1.5, 3 / wide + 2 / 1.5])


def test_gdpo_standardises_the_sum_and_knows_no_scale_of_a_reward():
    leaf = [-2 / STD + 0.5, 0 + 0.5, -1 / STD - 0.5, 3 / STD - 0.5]
    spread = math.sqrt(sum(x * x for x in leaf) / 4)
    for scale in (1, 1000):
        config = config_of(rewards={"scene": 1.0, "jpeg": -0.5}, advantage={"aggregate": "gdpo"})
        found = assign(config, DEPTH_TWO, [0] * 4, scene=REWARDS, jpeg=[0, 0, 2 * scale, 2 * scale]).advantages
        assert_values(found[2:], [x / spread for x in leaf])
    # a weighted sum is ruled by the reward with the largest scale
    rewards = config_of(rewards={"scene": 1.0, "jpeg": -0.5})
    found = assign(rewards, DEPTH_TWO, [1, 3, 2 - 1000, 6 - 1000]).advantages
    torch.testing.assert_close(found[2:], torch.tensor([1.0, 1.0, -1.0, -1.0]), rtol=0, atol=0.01)


def test_gdpo_over_processes_adds_up_what_they_know():
    config, plan = config_of(advantage={"aggregate": "gdpo"}), DEPTH_TWO
    rollout = rollout_of(plan)
    here, there = scores_of(REWARDS, scene=REWARDS), scores_of([0, 0, 0, 0], scene=[0, 0, 0, 4.0])

    def run(scores, other):
        seen = []
        first = Assigner(config, lambda value: seen.append(value) or value)
        everywhere = {name: Scores(torch.cat([scores[name].values, other[name].values]), torch.ones(8, dtype=torch.bool)) for name in scores}
        first(plan, rollout, scores, everywhere, prompts=(rollout.leaf_group, torch.arange(8)), numbers=[0], iteration=1)
        return seen

    alone = [run(here, there), run(there, here)]
    sums = [torch.tensor(a, dtype=torch.float64) + torch.tensor(b, dtype=torch.float64) for a, b in zip(*alone, strict=True)]
    answers = iter([float(sums[0]), float(sums[1]), float(sums[2])])
    both = Assigner(config, lambda value: next(answers))
    everywhere = {name: Scores(torch.cat([here[name].values, there[name].values]), torch.ones(8, dtype=torch.bool)) for name in here}
    found = both(plan, rollout, here, everywhere, prompts=(rollout.leaf_group, torch.arange(8)), numbers=[0], iteration=1).advantages
    # both groups have z-scores of mean 0 and variance 1, so together too
    assert_values(found[2:], [-2 / STD, 0, -1 / STD, 3 / STD])


def test_a_reward_that_is_not_required_adds_nothing_where_it_cannot_score():
    rewards = [{"name": "scene", "weight": 1.0}, {"name": "jpeg", "weight": 1.0, "required": False}]
    config = config_of(rewards=rewards, advantage={"aggregate": "advantages"})
    found = assign(config, DEPTH_TWO, [0] * 4, scene=REWARDS, jpeg=[NAN, NAN, 0, 2]).advantages
    assert_values(found[2:], [-2 / STD, 0, -1 / STD - 1, 3 / STD + 1])
    found = assign(config, DEPTH_TWO, [0] * 4, scene=REWARDS, jpeg=[NAN] * 4).advantages
    assert_values(found[2:], [-2 / STD, 0, -1 / STD, 3 / STD])


@pytest.mark.parametrize("aggregate", ["rewards", "advantages"])
def test_a_sample_that_breaks_a_constraint_is_the_worst_of_its_group(aggregate):
    rewards = [{"name": "scene", "weight": 1.0}, {"name": "nsfw", "weight": 0.0, "minimum": -0.5}]
    config = config_of(rewards=rewards, advantage={"aggregate": aggregate})
    found = assign(config, DEPTH_TWO, REWARDS, scene=REWARDS, nsfw=[0, 0, -0.5, -0.6]).advantages[2:]
    if aggregate == "rewards":  # 1, 3, 2 keep it; 6 becomes 1 - 2
        values = torch.tensor([1.0, 3.0, 2.0, -1.0])
        assert_values(found, ((values - values.mean()) / values.std(correction=0)).tolist())
    else:
        assert_values(found, [-2 / STD, 0, -1 / STD, -2 / STD - 2 / STD])
    unknown = assign(config, DEPTH_TWO, REWARDS, scene=REWARDS, nsfw=[0, 0, 0, NAN]).advantages[2:]
    assert_values(unknown, [-2 / STD, 0, -1 / STD, 3 / STD])


def test_the_factor_of_the_weights_scales_clamped_advantages():
    config = config_of(advantage={"clip": 1.0})
    assigner = Assigner(config)
    assigner.rewards.factor = 0.5
    found = assign(config, DEPTH_TWO, REWARDS, assigner=assigner)
    assert_values(found.advantages[2:], [-0.5, 0, -0.5 / STD, 0.5])
    assert found.sums["clamped"] == 2


def test_the_global_spread_is_that_of_all_processes():
    config, plan = config_of(advantage={"centre": "group", "scale": "batch_std"}), DEPTH_TWO
    rollout, here = rollout_of(plan), scores_of(REWARDS)
    everywhere = scores_of([*REWARDS, 11.0, 13.0, 12.0, 16.0, NAN])
    prompts = rollout.leaf_group, torch.arange(9)
    found = Assigner(config)(plan, rollout, here, everywhere, prompts=prompts, numbers=[0], iteration=1).advantages
    spread = math.sqrt(3.5 + 25)  # two groups, 10 apart
    assert_values(found[2:], [-2 / spread, 0, -1 / spread, 3 / spread])


def test_a_reward_that_scored_nothing_is_the_users_mistake():
    config = config_of(rewards={"scene": 1.0, "jpeg": 1.0}, advantage={"aggregate": "advantages"})
    with pytest.raises(UserError, match="reward jpeg could score no sample of the iteration"):
        assign(config, DEPTH_TWO, [NAN] * 4, scene=REWARDS, jpeg=[NAN] * 4)


def test_a_prompt_is_compared_with_what_it_scored_before():
    config = config_of(
        rollout={"plan": "window", "group_size": 2, "same_noise": True, "tree": {}, "window": {"size": 1, "high": 1}},
        advantage={"centre": "history", "scale": "history", "history_size": 4, "history_least": 3},
    )
    plan, assigner = forests.window(0, 1, group_size=2, same_noise=True, sigmas=THREE), Assigner(config)
    rollout = rollout_of(plan, 2)

    def call(assigner, rewards, prompts):
        prompt = torch.tensor(prompts).repeat_interleave(2)
        scores = scores_of(rewards)
        return assigner(plan, rollout, scores, scores, prompts=(prompt, prompt), numbers=[0, 1], iteration=1).advantages

    # too few rewards of a prompt: mean 3 and std sqrt(3.5) of the iteration
    assert_values(call(assigner, REWARDS, [7, 8]), [-2 / STD, 0, -1 / STD, 3 / STD])
    state = assigner.state_dict()
    # prompt 7 now has 1, 3, 5, 7: mean 4, std sqrt(5); prompt 9 has two of its own, so the iteration's 5, 7, 0, 0: mean 3, std sqrt(9.5)
    second = [1 / math.sqrt(5), 3 / math.sqrt(5), -3 / math.sqrt(9.5), -3 / math.sqrt(9.5)]
    assert_values(call(assigner, [5, 7, 0, 0], [7, 9]), second)
    resumed = Assigner(config)
    resumed.load_state_dict(state)
    assert_values(call(resumed, [5, 7, 0, 0], [7, 9]), second)
    # an invalid sample is not remembered: 7 has 3, 5, 7, 9, mean 6
    assert_values(call(assigner, [9, NAN, 0, 0], [7, 9]), [3 / math.sqrt(5), 0, 0, 0])
    with pytest.raises(UserError, match="disagree on whether rewards are remembered"):
        Assigner(config).load_state_dict(None)
    with pytest.raises(UserError, match="disagree on whether rewards are remembered"):
        Assigner(config_of()).load_state_dict(state)
    assert Assigner(config_of()).state_dict() is None
    Assigner(config_of()).load_state_dict(None)


# --- samples that could not be scored -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credit", "expected"),
    [
        # valid rewards 3, 2, 7 have mean 4 and variance 14/3; an invalid leaf has advantage 0 and counts in the mean
        ({}, [-0.5, 0.5, 0, -1, -2, 3]),
        # and it does not count in rewards that are backed up: nodes 3, 4.5
        ({"backup": "level", "temperature": 0.0}, [-1, 0.5, 0, -1, -2, 3]),
        ({"backup": "path", "temperature": 0.0}, [-1, 0.5, 0, -1, -2, 3]),
    ],
)
def test_a_sample_without_a_reward_has_advantage_0(credit, expected):
    found = assign(config_of(credit=credit), DEPTH_TWO, [NAN, 3, 2, 7]).advantages
    assert_values(found, [a / math.sqrt(14 / 3) for a in expected])


def test_a_node_is_compared_by_the_leaves_that_have_a_reward():
    layer = assign(config_of(credit={"normalize": "layer"}), DEPTH_TWO, [NAN, 3, 2, 7]).advantages
    assert_values(layer, [-1, 1, *(a / math.sqrt(14 / 3) for a in (0, -1, -2, 3))])
    sibling = assign(config_of(credit={"normalize": "sibling"}), DEPTH_TWO, [NAN, 3, 2, 7]).advantages
    assert_values(sibling, [-1, 1, *(a / math.sqrt(14 / 3) for a in (0, 0, -2.5, 2.5))])


@pytest.mark.parametrize("credit", [{}, {"normalize": "layer"}, {"normalize": "sibling"}, {"backup": "path"}])
def test_a_group_without_rewards_moves_nothing_and_does_not_touch_the_others(credit):
    both = assign(config_of(credit=credit), DEPTH_TWO, [*REWARDS, NAN, NAN, NAN, NAN], num_groups=2).advantages
    assert both[6:].tolist() == [0] * 6
    torch.testing.assert_close(both[:6], assign(config_of(credit=credit), DEPTH_TWO, REWARDS).advantages)


# --- clip bounds --------------------------------------------------------------------------------------------------------------------------------


def test_the_clip_bounds_lean_with_a_nodes_place_in_its_layer():
    # places: 0, 1 | 0, 2/5, 1/5, 1; tilt 2 place - 1 = -1, 1 | -1, -1/5, -3/5, 1
    found = assign(config_of(objective={"dynamic_clip": 0.5, "clip_low": 1e-3, "clip_high": 2e-3}), DEPTH_TWO, REWARDS)
    tilt = torch.tensor([-1, 1, -1, -0.2, -0.6, 1])
    assert_values(found.clip_low, (1e-3 * (1 - 0.5 * tilt)).tolist())
    assert_values(found.clip_high, (2e-3 * (1 + 0.5 * tilt)).tolist())


def test_insensitive_clip_bounds_are_the_fixed_ones():
    fixed = assign(config_of(), DEPTH_TWO, REWARDS)
    tiny = assign(config_of(objective={"dynamic_clip": 1e-9}), DEPTH_TWO, REWARDS)
    for name in ("clip_low", "clip_high"):
        assert getattr(fixed, name).tolist() == pytest.approx([CLIP] * 6)
        torch.testing.assert_close(getattr(tiny, name), getattr(fixed, name))
    even = assign(config_of(objective={"dynamic_clip": 0.5}), DEPTH_TWO, [NAN, 2, 2, 2])
    assert_values(even.clip_high, [CLIP] * 6)


# --- selections ---------------------------------------------------------------------------------------------------------------------------------


def test_a_fraction_of_each_samples_steps():
    config = config_of(rollout={"plan": "chain", "num_steps": 6, "tree": {}}, selection={"fraction": 0.6})
    plan = forests.chain()
    rewards = [REWARDS, REWARDS[::-1]]
    found = assign(config, plan, rewards, num_groups=2)
    samples = found.rollout.leaf_edge[:, 1]
    assert torch.bincount(samples).tolist() == [3] * 8
    leaf = torch.tensor([-2, 0, -1, 3, 3, -1, 0, -2]) / STD
    torch.testing.assert_close(found.advantages[found.rollout.leaf_edge[:, 0]], leaf[samples])
    assert (found.sums["kept"], found.sums["all"], found.sums["rows"], found.rows) == (24, 40, 24, 24)
    again, later = (assign(config, plan, rewards, num_groups=2, iteration=i) for i in (1, 2))
    assert again.rollout.edge_step.tolist() == found.rollout.edge_step.tolist()
    assert later.rollout.edge_step.tolist() != found.rollout.edge_step.tolist()


def test_pruning_depths():
    # depths 2..2 first, after 10 iterations depths 1..1
    config = config_of(
        selection={"depth": {"first": 2, "last": 2, "slide_every": 10, "stop": 1}}, rollout={"num_steps": 4, "tree": {"splits": [0, 1, 2]}, "group_size": 8}
    )
    plan = forests.tree({0: 2, 1: 2, 2: 2}, sigmas=FOUR)
    rewards = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    whole = assign(config_of(rollout={"num_steps": 4, "tree": {"splits": [0, 1, 2]}, "group_size": 8}), plan, rewards).advantages
    for iteration, kept in ((1, [0, 1, *range(6, 14)]), (10, [0, 1, *range(6, 14)]), (11, range(2, 14)), (99, range(2, 14))):
        found = assign(config, plan, rewards, iteration=iteration)
        torch.testing.assert_close(found.advantages, whole[list(kept)])
        assert found.rows == len(found.rollout.row_sigma) == {10: 1 + 4, 12: 2 + 4}[len(kept)]


def test_pruning_widths():
    # below the last split, step 1: of 1, 3 the better one, of 2, 6 too, with the noisy step below them
    plan = forests.tree({0: 2, 1: 2}, noise={0: 0.5, 1: 0.5, 2: 0.5}, sigmas=FOUR)
    rollout = {"num_steps": 4, "tree": {"splits": [0, 1], "stochastic": "all"}}
    branch = assign(config_of(rollout=rollout, selection={"width": {"keep": 0.5, "mode": "branch"}}), plan, REWARDS)
    a = [-1 / STD, 1 / STD, -2 / STD, 0, -1 / STD, 3 / STD, -2 / STD, 0, -1 / STD, 3 / STD]
    assert_values(branch.advantages, [a[i] for i in (0, 1, 3, 5, 7, 9)])
    assert branch.rollout.edge_parent.tolist() == [-1, -1, 0, 1, 2, 3]
    assert (branch.rows, branch.sums["kept"], branch.sums["all"]) == (1 + 2 + 2, 6, 10)
    # over the whole tree the best and the worst: leaves 3 and 0
    extremes = assign(config_of(rollout=rollout, selection={"width": {"keep": 0.5, "mode": "extremes"}}), plan, REWARDS)
    assert_values(extremes.advantages, [a[i] for i in (0, 1, 2, 5, 6, 9)])
    # an unscored leaf is not trained below the split
    partly = assign(config_of(rollout=rollout, selection={"width": {"keep": 1.0, "mode": "branch"}}), plan, [NAN, 3, 2, 7])
    assert partly.sums["kept"] == 10 - 2


def contrast_config():
    rollout = {"plan": "window", "group_size": 4, "same_noise": True, "tree": {}, "window": {"size": 2, "low": 0, "high": 2}}
    return config_of(rollout=rollout, selection={"contrast": {"high": 0.5, "low": -0.5}})


CONTRAST = forests.window(0, 2, same_noise=True, sigmas=THREE)


def test_contrast_trains_the_best_and_the_worst_of_a_branch():
    # the samples of a branch set are compared with each other: the second group has no contrast, the third the best and worst at 8 and 10
    found = assign(contrast_config(), CONTRAST, [REWARDS, [2.0] * 4, [60.0, 20.0, 10.0, 30.0]], num_groups=3)
    third = math.sqrt(350)
    assert_values(found.advantages, [-2 / STD, 3 / STD, -2 / STD, 3 / STD, 30 / third, -20 / third, 30 / third, -20 / third])
    assert found.rollout.leaf_edge[:, 1].tolist() == [0, 0, 3, 3, 8, 8, 10, 10]
    assert found.rollout.row_group.tolist() == [0, 0, 0, 2, 2, 2]
    assert (found.placeholder, found.rows, found.sums["kept"], found.sums["all"]) == (False, 6, 8, 24)


def test_without_any_contrast_one_decision_stands_in_without_weight():
    found = assign(contrast_config(), CONTRAST, [[2.0] * 4, [5.0] * 4], num_groups=2)
    assert found.placeholder
    assert found.advantages.tolist() == [0]
    assert (len(found.rollout.row_sigma), found.rollout.row_group.tolist(), found.rows) == (1, [0], 0)
    assert (found.sums["kept"], found.sums["clamped"], found.sums["abs_advantage"]) == (0, 0, 0)


def test_the_clamp_rate_does_not_depend_on_what_is_selected():
    config = config_of(
        rollout=contrast_config().rollout.model_dump(), selection={"contrast": {"high": 9.0, "low": -9.0}}, advantage={"clip": 1.0, "eps": 1e-12}
    )
    found = assign(config, CONTRAST, REWARDS)
    assert found.placeholder
    assert (found.sums["clamped"], found.sums["all"]) == (4, 8)  # leaves 0 and 3 with two decisions each


def test_the_kept_rows_counted_from_the_plan_are_those_of_the_rollout():
    cases = [
        (config_of(rollout={"plan": "chain", "num_steps": 6, "tree": {}, "same_noise": True}, selection={"fraction": 0.4}), forests.chain(same_noise=True)),
        (contrast_config(), CONTRAST),
        (config_of(selection={"width": {"keep": 0.5}}), DEPTH_TWO),
        (config_of(), DEPTH_TWO),
    ]
    for config, plan in cases:
        found = assign(config, plan, [REWARDS, REWARDS[::-1], [4.0, 4.0, 5.0, 9.0]], num_groups=3)
        assert found.rows == len(found.rollout.row_sigma) == found.sums["rows"]
        assert len(found.advantages) == len(found.rollout.edge_row)


def test_the_rows_of_pruned_trees_are_those_of_the_docs():
    # BranchGRPO's tree of 203 rows: 202 decisions on 187 rows; see docs/nfe.md
    section = {"num_steps": 20, "group_size": 16, "tree": {"splits": [0, 3, 6, 9], "stochastic": "all"}}
    plan = forests.tree(dict.fromkeys((0, 3, 6, 9), 2), noise=dict.fromkeys(range(19), 0.7), sigmas=shifted_grid(20, 3.0))
    rollout = rollout_of(plan, shape=(1,))
    rewards = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [({}, 202, 187), ({"depth": {"first": 15, "last": 18}}, 138, 123), ({"width": {"keep": 0.5, "mode": "branch"}}, 122, 115)]
    for selection, edges, rows in expected:
        found = assign(config_of(rollout=section, selection=selection), plan, rewards, rollout=rollout)
        assert (found.sums["kept"], found.rows) == (edges, rows)
    # DanceGRPO: 9 of 15 steps of 12 samples with shared noise, 101.8 rows on average
    config = config_of(rollout={"plan": "chain", "num_steps": 16, "group_size": 12, "same_noise": True, "tree": {}}, selection={"fraction": 0.6})
    plan = forests.chain(same_noise=True, group_size=12, sigmas=shifted_grid(16, 3.0), fraction=1.0)
    rollout, samples = rollout_of(plan, 100, shape=(1,)), torch.randn(1200, generator=torch.Generator().manual_seed(0)).tolist()
    assert assign(config, plan, samples, rollout=rollout, num_groups=100).rows / 100 == pytest.approx(12 * 9 * 14 / 15 + 1 - 0.4**12, abs=0.6)


# --- the supervised term ------------------------------------------------------------------------------------------------------------------------


def tuning_config(target="best_velocity", guard=0.5, **sections):
    return config_of(layer_tuning={"weight": 0.1, "target": target, "guard": guard}, **sections)


def test_every_node_is_pulled_towards_the_best_path_as_far_as_it_is_behind():
    # nodes 3 | 2, 4 beside the best leaf's 6, of 1 .. 6: (6 - R) / 5
    rollout = rollout_of(DEPTH_TWO, 2)
    values = [REWARDS, [6.0, 3.0, 2.0, 1.0]]
    best = assign(tuning_config(), DEPTH_TWO, values, rollout=rollout, num_groups=2)
    assert_values(best.tuning.weight, [0.6, 0.8, 0.4, 0.6, 0.3, 0.9])
    # group 0: leaf 3 is below rows 0 and 2; group 1: leaf 0 of it is below rows 3 and 4
    torch.testing.assert_close(best.tuning.target, rollout.row_velocity[[0, 2, 2, 3, 4, 4]], rtol=0, atol=0)
    assert best.sums["tuned"] == 6
    straight = assign(tuning_config("to_best_x0"), DEPTH_TWO, values, rollout=rollout, num_groups=2)
    torch.testing.assert_close(straight.tuning.weight, best.tuning.weight)
    leaves = rollout.leaves[[3, 3, 3, 4, 4, 4]]
    torch.testing.assert_close(straight.tuning.target, (rollout.row_x - leaves) / rollout.row_sigma.float().view(-1, 1, 1, 1))


def test_the_best_of_a_bad_group_is_not_imitated():
    # 6 is 3 above the mean, 1.6 standard deviations
    for guard, tuned in ((1.5, 3), (1.7, 0)):
        assert assign(tuning_config(guard=guard), DEPTH_TWO, REWARDS).sums["tuned"] == tuned
    assert assign(tuning_config(), DEPTH_TWO, [2.0] * 4).sums["tuned"] == 0


@pytest.mark.parametrize("target", ["best_velocity", "to_best_x0"])
def test_samples_without_a_reward_are_neither_the_best_nor_behind(target):
    # leaf 3 is not known: best is leaf 1 with 3 of 3, 1, 2. Nodes 2 | 2, 2
    rollout = rollout_of(DEPTH_TWO, 2)
    found = assign(tuning_config(target), DEPTH_TWO, [[1, 3, 2, NAN], [NAN] * 4], rollout=rollout, num_groups=2).tuning
    assert_values(found.weight, [0.5, 0.5, 0.5, 0, 0, 0])
    expected = rollout.row_velocity[[0, 1, 1]]
    if target == "to_best_x0":
        expected = (rollout.row_x[:3] - rollout.leaves[1]) / rollout.row_sigma[:3].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(found.target[:3], expected)
    assert found.target.isfinite().all()


@pytest.mark.parametrize("target", ["best_velocity", "to_best_x0"])
@pytest.mark.parametrize("selection", [{"width": {"keep": 0.5, "mode": "branch"}}, {"depth": {"first": 1, "last": 1, "stop": 1}}])
def test_a_selection_drops_rows_of_the_supervised_term_and_changes_no_other(target, selection):
    # a node's reward is that of all leaves below it, and the best path is that of all samples, trained or not
    plan = forests.tree({0: 2, 1: 2}, noise={0: 0.5, 1: 0.5, 2: 0.5}, sigmas=FOUR)
    section = {"num_steps": 4, "tree": {"splits": [0, 1], "stochastic": "all"}}
    rollout = rollout_of(plan)
    whole, some = (assign(tuning_config(target, rollout=section, selection=s), plan, REWARDS, rollout=rollout) for s in ({}, selection))
    assert len(some.rollout.row_sigma) < len(whole.rollout.row_sigma)
    place = [next(j for j, x in enumerate(whole.rollout.row_x) if x.equal(row)) for row in some.rollout.row_x]
    torch.testing.assert_close(some.tuning.weight, whole.tuning.weight[place])
    torch.testing.assert_close(some.tuning.target, whole.tuning.target[place])


def test_old_velocities_are_kept_where_they_are_needed():
    assert not Assigner(config_of()).keep_velocity
    assert Assigner(tuning_config()).keep_velocity
    assert Assigner(config_of(objective={"ratio": "ratio_norm"})).keep_velocity
    assert not Assigner(tuning_config("to_best_x0")).keep_velocity


# --- whole samples ------------------------------------------------------------------------------------------------------------------------------

ODE_ROLLOUT = forests.roll_out(forests.ODE_PLANS[next(iter(forests.ODE_PLANS))], range(2))
SIZE = len(ODE_ROLLOUT.leaves) // 2


def matching_config(**sections):
    objective = {"name": "reinforce", **sections.pop("objective", {})}
    advantage = {"centre": "group", "scale": "group_std", "eps": 1e-12, **sections.pop("advantage", {})}
    base = {"run_dir": "unused", "rewards": ["scene"], "likelihood": "matching", "rollout": {"plan": "ode", "num_steps": 8}}
    return Config.model_validate({**base, "objective": objective, "advantage": advantage, **sections})


def samples_of(config, values, *, assigner=None, **rewards):
    """Two groups."""
    scores, prompts = scores_of(values, **rewards), ODE_ROLLOUT.leaf_group
    return (assigner or Assigner(config)).samples(ODE_ROLLOUT, scores, scores, prompts=(prompts, prompts))


def two_groups(*firsts):
    """Rewards of two groups, filled up with the mean of 0."""
    return [*firsts[0], *[0.0] * (SIZE - len(firsts[0])), *firsts[1], *[0.0] * (SIZE - len(firsts[1]))]


def test_samples_have_the_clamped_advantages_of_their_groups():
    values = two_groups([3.0, -3.0], [1.0, NAN])
    found = samples_of(matching_config(advantage={"clip": 0.9}), values)
    for g in range(2):
        mine = torch.tensor(values[g * SIZE : (g + 1) * SIZE], dtype=torch.float64)
        known = mine[~mine.isnan()]
        expected = ((mine - known.mean()) / known.std(correction=0)).nan_to_num(0.0).clamp(-0.9, 0.9)
        torch.testing.assert_close(found.advantages[g * SIZE : (g + 1) * SIZE], expected, rtol=1e-6, atol=1e-6)
    assert found.valid.tolist() == [not math.isnan(v) for v in values]
    assert (found.pairs, found.placeholder) == (None, False)
    assert found.sums["all"] == 2 * SIZE
    assert SIZE == 3
    assert found.sums["clamped"] == 4  # 3 and -3, and the 1 and the 0 of the second group, whose z-scores are 1 and -1
    assert found.sums["abs_advantage"] == pytest.approx(found.advantages.abs().sum().item())
    assert found.rewards[0] == 3.0
    assert found.rollout is ODE_ROLLOUT


def test_pair_objectives_get_the_best_and_the_worst_of_each_group():
    dpo = matching_config(objective={"name": "dpo", "updates_per_iteration": 1})
    found = samples_of(dpo, two_groups([-1.0, 0.0, 5.0], [2.0, 7.0, -0.5]))
    assert found.pairs is not None and found.pairs.tolist() == [[2, 0], [SIZE + 1, SIZE + 2]]
    assert not found.placeholder
    lonely = samples_of(dpo, two_groups([], [1.0]))
    assert lonely.pairs is not None and lonely.pairs.tolist() == [[SIZE, SIZE + 1]]


def test_without_a_preference_a_pair_keeps_the_process_in_step():
    found = samples_of(matching_config(objective={"name": "dpo", "updates_per_iteration": 1}), two_groups([], []))
    assert found.placeholder
    assert found.pairs is not None and found.pairs.tolist() == [[0, 1]]


def test_the_history_of_rewards_serves_samples_too():
    config = matching_config(advantage={"centre": "history", "scale": "history", "history_size": 4 * SIZE, "history_least": 2})
    assigner = Assigner(config)
    values = two_groups([3.0, -3.0], [1.0, NAN])
    samples_of(config, values, assigner=assigner)
    found = samples_of(config, [v + 10 for v in values], assigner=assigner)
    both = torch.tensor([*values[:SIZE], *[v + 10 for v in values[:SIZE]]], dtype=torch.float64)
    expected = (13 - both.mean()) / both.std(correction=0)
    assert found.advantages[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.advantages[SIZE + 1] == 0.0  # never scored


def test_a_raw_reward_is_not_clamped_whatever_its_scale():
    found = samples_of(matching_config(advantage={"centre": "none", "scale": "none", "clip": 5.0, "transform": "best"}), two_groups([20.0, 26.0], [-30.0]))
    assert found.advantages[:2].tolist() == [20.0, 26.0]
    assert found.advantages[SIZE] == -30.0
    assert found.sums["clamped"] == 0


# --- weights ------------------------------------------------------------------------------------------------------------------------------------


def weights_of(kind, advantages, valid, *, add=float, **advantage):
    config = matching_config(advantage={"transform": kind, **advantage})
    group = torch.tensor([0, 0, 1, 1])
    return Assigner(config, add).weights(torch.tensor(advantages, dtype=torch.float64), group, torch.tensor(valid))


ALL = [True] * 4


@pytest.mark.parametrize("kind", ["exp", "one_plus", "softmax", "best"])
def test_supervised_weights_have_mean_one_over_the_scored_samples(kind):
    weight = weights_of(kind, [0.5, -0.25, 1.5, -3.0], [True, True, True, False])
    assert weight[:3].mean().item() == pytest.approx(1.0)
    assert weight[3] == 0.0


def test_weights_by_hand():
    advantages = [1.0, -1.0, 0.5, 0.0]
    raw = [math.exp(a / 0.5) for a in advantages]
    assert weights_of("exp", advantages, ALL, temperature=0.5).tolist() == pytest.approx([4 * w / sum(raw) for w in raw])
    assert weights_of("one_plus", advantages, ALL).tolist() == pytest.approx([4 * w / 4.5 for w in (2.0, 0.0, 1.5, 1.0)])
    assert weights_of("best", advantages, ALL).tolist() == [2.0, 0.0, 2.0, 0.0]
    assert weights_of("identity", advantages, ALL).tolist() == advantages


def test_every_column_of_a_samples_advantages_is_weighted_on_its_own_and_all_have_one_mean():
    table = [[1.0, 0.0], [-1.0, 0.5], [0.5, 2.0], [0.0, 0.0]]
    found = weights_of("exp", table, ALL)
    raw = torch.tensor(table, dtype=torch.float64).exp()
    torch.testing.assert_close(found, raw / raw.mean())
    assert weights_of("best", table, ALL).tolist() == [[2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [0.0, 0.0]]


def test_weights_beyond_all_numbers_are_one_line():
    with pytest.raises(UserError, match="advantage.transform: exp of these advantages at temperature 0.1 is beyond all numbers; raise it"):
        weights_of("exp", [1000.0, 0.0, 0.0, 0.0], ALL, temperature=0.1)


def test_the_mean_runs_over_all_processes():
    elsewhere = iter([math.e * 3, 3.0])  # the sum of the weights of three more samples, and their number

    found = weights_of("exp", [1.0, 1.0, 0.0, 0.0], ALL, add=lambda value: value + next(elsewhere))
    mean = (2 * math.e + 2 + 3 * math.e) / 7
    assert found.tolist() == pytest.approx([math.e / mean, math.e / mean, 1 / mean, 1 / mean])


def test_weights_that_are_all_zero_stay_zero():
    assert weights_of("one_plus", [-2.0, -1.0, -1.5, -9.0], ALL).tolist() == [0.0] * 4
    assert weights_of("exp", [1.0] * 4, [False] * 4).tolist() == [0.0] * 4


def test_a_transform_reaches_every_decision_of_a_sample():
    plan = forests.PLANS["chain"]
    rollout = forests.roll_out(plan, range(1))
    size = len(rollout.leaves)
    config = config_of(rollout={"plan": "chain"}, advantage={"transform": "best", "clip": 0.1})
    found = assign(config, plan, [1.0, *[0.0] * (size - 1)], rollout=rollout)
    owner = torch.zeros(len(rollout.edge_row), dtype=torch.int64).scatter_(0, rollout.leaf_edge[:, 0], rollout.leaf_edge[:, 1])
    assert_values(found.advantages, [float(size) if leaf == 0 else 0.0 for leaf in owner.tolist()])  # beyond the clip: it bounds advantages, not weights
