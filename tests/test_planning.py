"""From the rollout section to plans: where windows start, by hand and by frequency, which tree a config means, and the least rows of any valid config."""

import collections
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flowrl.config import Config
from flowrl.planning import build_plan, kept_latents, minimum_rows, trained_rows, window_of
from flowrl.sections import RolloutConfig
from samplers.plans import chain_plan, compress_after, granular_plan, ode_plan, tree_plan, window_plan
from samplers.schedules import shifted_grid


def rollout(**values):
    return RolloutConfig.model_validate(values)


def whole_config(section):
    """A run with this rollout section; the plan `ode` needs the matching likelihood."""
    likelihood = {"likelihood": "matching", "matching": {"times": "uniform"}} if section["plan"] == "ode" else {}
    return Config.model_validate({"run_dir": "x", "rewards": ["scene"], "rollout": section} | likelihood)


def window_config(num_steps=25, **window):
    return rollout(plan="window", num_steps=num_steps, window=window)


def starts(config, iterations):
    return [window_of(config, i, seed=0)[0] for i in range(1, iterations + 1)]


def plan_of(config, iteration=1, seed=0):
    return build_plan(config, shifted_grid(config.num_steps, 3.0), shift=3.0, iteration=iteration, seed=seed)


# --- where the window starts --------------------------------------------------------------------------------------------------------------------


def test_mix_grpos_window_moves_every_25_iterations_from_0_to_20_and_starts_over():
    # 3.3.2 of the method notes: T = 25, w = 4, tau = 25, s = 1; with iterations from 1, l = (i - 1) // 25
    config = window_config(size=4, schedule="progressive", every=25)
    for i in range(1, 2 * 21 * 25 + 1):
        start, size = window_of(config, i, seed=i)
        assert (start, size) == ((i - 1) // 25 % 21, 4)
        assert range(start, start + size)[-1] <= 23  # never step 24, never empty
    assert starts(config, 526)[523:] == [20, 20, 0]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"size": 4, "low": 2, "high": 9, "every": 1}, [2, 3, 4, 5, 2, 3]),
        ({"size": 4, "low": 0, "high": 10, "every": 1, "stride": 3}, [0, 3, 6, 0]),
        ({"size": 4, "low": 0, "high": 9, "every": 1, "stride": 3}, [0, 3, 0]),
        ({"size": 9, "low": 0, "high": 9, "every": 2}, [0, 0, 0]),
        ({"size": 1, "low": 3, "high": 5, "every": 2}, [3, 3, 4, 4, 3]),
    ],
)
def test_a_progressive_window_stays_within_its_steps(window, expected):
    assert starts(window_config(10, schedule="progressive", **window), len(expected)) == expected


def test_a_decaying_window_stays_shorter_at_later_starts():
    # starts 0..4 of T = 8, w = 3: 10, 7.75, 5.5, 3.25, 1 iterations, rounded to even at the half: 10, 8, 6, 3, 1
    config = window_config(8, size=3, schedule="decay", every=10, every_least=1)
    assert list(collections.Counter(starts(config, 28)).items()) == [(0, 10), (1, 8), (2, 6), (3, 3), (4, 1)]
    assert starts(config, 29)[-1] == 0
    constant = window_config(8, size=3, schedule="decay", every=4, every_least=4)
    assert starts(constant, 40) == starts(window_config(8, size=3, schedule="progressive", every=4), 40)
    assert set(starts(window_config(8, size=6, schedule="decay", every=4), 9)) == {0, 1}
    assert set(starts(window_config(8, size=7, schedule="decay", every=4), 9)) == {0}


def test_an_exponentially_decaying_window_by_hand():
    # tau(l) = ceil(25 exp(-0.1 max(l - 13, 0))), l = 0..20: 25 up to 13, then 22.6, 20.5, 18.5, 16.8, 15.2, 13.7, 12.4
    config = window_config(size=4, schedule="exp_decay", every=25)
    stays = collections.Counter(starts(config, 14 * 25 + 23 + 21 + 19 + 17 + 16 + 14 + 13))
    assert [stays[start] for start in range(21)] == [25] * 14 + [23, 21, 19, 17, 16, 14, 13]
    assert stays[15] == math.ceil(25 * math.exp(-0.2))
    early = window_config(8, size=5, schedule="exp_decay", every=4, exp_rate=1.0, exp_after=0)
    assert starts(early, 9) == [0, 0, 0, 0, 1, 1, 2, 0, 0]  # ceil(4), ceil(1.47), ceil(0.54)


def test_a_frozen_window_stays():
    assert set(starts(window_config(8, size=3, low=2, schedule="frozen"), 50)) == {2}


def test_a_random_window_is_uniform_over_the_starts_that_fit_and_follows_from_the_seed():
    # by default within the first half of the steps: T = 10, size 2, starts 0..3
    config = window_config(10, size=2)
    draws = [window_of(config, 1, seed)[0] for seed in range(4000)]
    counts = collections.Counter(draws)
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(abs(n / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000) for n in counts.values())
    assert draws == [window_of(config, 9, seed)[0] for seed in range(4000)]


@pytest.mark.parametrize("low", [0, 2])
def test_tree_grpos_window_starts_early_with_the_probabilities_of_its_paper(low):
    # eq. 7: (1 - r) r^i / (1 - r^n), n starts; T = 10, w = 3, r = 0.5 from step 0: .504 .252 .126 .063 .031 .016 .008
    config = window_config(10, size=3, low=low, high=9, start_decay=0.5)
    n = 7 - low
    expected = [0.5 * 0.5**i / (1 - 0.5**n) for i in range(n)]
    if low == 0:
        assert expected == pytest.approx([0.504, 0.252, 0.126, 0.063, 0.031, 0.016, 0.008], abs=5e-4)
    draws = collections.Counter(window_of(config, 1, seed)[0] - low for seed in range(8000))
    assert sorted(draws) == list(range(n))
    for i, p in enumerate(expected):
        assert abs(draws[i] / 8000 - p) < 4 * math.sqrt(p * (1 - p) / 8000)


def test_a_backward_window_grows_from_the_last_14_steps_to_all_20():
    # 9.4.3 of the method notes: n_0 = 14, n_99 = 20, n_i = 14 + floor(7 i / 100); the last step is deterministic
    config = window_config(20, schedule="backward")
    for i in range(300):
        n = min(20, 14 + 7 * i // 100)
        assert window_of(config, i + 1, seed=0) == (20 - n, n - 1)
    assert window_of(config, 1, 0) == (6, 13)
    assert window_of(config, 100, 0) == (0, 19)
    assert [i for i in range(100) if window_of(config, i + 1, 0) != window_of(config, i, 0)][1:] == [15, 29, 43, 58, 72, 86]


def test_a_backward_window_of_all_steps_is_the_chain():
    # 9.4.1 of the method notes: without a selection n = T is DDPO
    plan = plan_of(window_config(6, schedule="backward", backward_first=6))
    assert plan == plan_of(rollout(plan="chain", num_steps=6, train_fraction=1.0))


# --- which plan a config means ------------------------------------------------------------------------------------------------------------------


def test_the_config_of_each_plan_reaches_it():
    sigmas = shifted_grid(8, 3.0)
    common = {"num_steps": 8, "group_size": 4}
    chain = rollout(plan="chain", noise_level=[0.7, 0.6, 0.5, 0.4], train_fraction=0.5, same_noise=True, kernel="dance_sde", **common)
    assert plan_of(chain) == chain_plan(sigmas, 4, noise_level=[0.7, 0.6, 0.5, 0.4], train_fraction=0.5, same_noise=True, kernel="dance_sde")
    after = {"solver": "dpm++", "compression": 0.5}
    window = rollout(plan="window", window={"size": 2, "low": 1, "schedule": "frozen"}, noise_level=[0.9, 0.8], after_window=after, kernel="cps", **common)
    short = compress_after(sigmas, 3, 0.5, 3.0)
    assert plan_of(window) == window_plan(short, 4, noise_level=[0.9, 0.8], start=1, size=2, same_noise=False, kernel="cps", solver="dpm++")
    granular = rollout(plan="granular", window={"size": 2, "low": 1, "schedule": "frozen"}, granularities=[1, 3], same_noise=True, **common)
    assert plan_of(granular) == granular_plan(sigmas, 4, noise_level=0.7, steps=(1, 2), granularities=(1, 3), kernel="flow_sde")


@pytest.mark.parametrize("solver", ["ode", "heun", "dpm++"])
def test_the_ode_plan_takes_its_solver_and_the_steps_that_are_kept(solver):
    section = {"plan": "ode", "solver": solver, "num_steps": 8, "group_size": 4}
    config, sigmas = rollout(**section), shifted_grid(8, 3.0)
    assert plan_of(config) == ode_plan(sigmas, 4, solver=solver)
    kept = build_plan(config, sigmas, shift=3.0, iteration=1, seed=0, kept_steps=(3, 7))
    assert kept == ode_plan(sigmas, 4, solver=solver, kept_steps=(3, 7))
    assert (kept.forward_rows, 0) == minimum_rows(config, iteration=1, seed=0) == (4 * (15 if solver == "heun" else 8), 0)
    whole = whole_config(section)
    assert kept_latents(whole, 1) == (4, 0, 0)
    assert kept_latents(whole, 1, kept_steps=(3, 7)) == (len(kept.leaves), len(kept.train_rows), 0) == (4, 8, 0)
    assert trained_rows(whole, 1) == 0


def test_only_the_ode_plan_keeps_steps():
    with pytest.raises(ValueError, match="kept_steps belong to the plan ode, not to window"):
        build_plan(rollout(plan="window"), shifted_grid(10, 3.0), shift=3.0, iteration=1, seed=0, kept_steps=(3,))


def tree_config(num_steps=8, group_size=4, window=None, **tree):
    return rollout(plan="tree", num_steps=num_steps, group_size=group_size, tree=tree, window=window or {"size": 2, "low": 1, "schedule": "frozen"})


def levels(plan):
    return {plan.nodes[node.parent].step: node.noise_level for node in plan.nodes if node.trained}


def test_a_tree_branches_at_every_step_of_its_window():
    plan = plan_of(tree_config())
    assert plan == tree_plan(shifted_grid(8, 3.0), roots=1, branching={1: 2, 2: 2}, noise_levels={1: 0.7, 2: 0.7}, kernel="flow_sde")
    assert len(plan_of(tree_config(group_size=12)).waves[0]) == 3  # as many trees as make up the group


def test_each_split_can_have_its_own_number_of_children():
    plan = plan_of(tree_config(group_size=12, splits=[0, 2, 5], branching=[2, 1, 3], sibling_scale=4.0))
    assert [len(wave) for wave in plan.waves] == [2, 4, 4, 4, 4, 4, 12, 12, 12]
    assert plan.sibling_scale == 4.0


def test_splits_may_be_listed_in_any_order():
    ordered, shuffled = (tree_config(group_size=6, splits=s, branching=b) for s, b in (([1, 4], [2, 3]), ([4, 1], [3, 2])))
    assert plan_of(shuffled) == plan_of(ordered)


@pytest.mark.parametrize(("stochastic", "steps"), [("splits", [0, 3]), ("window", [0, 1, 2, 3]), ("all", range(7))])
def test_noise_at_the_splits_or_the_window_or_everywhere(stochastic, steps):
    plan = plan_of(tree_config(splits=[0, 3], stochastic=stochastic))
    assert levels(plan) == dict.fromkeys(steps, 0.7)
    assert len(plan.leaves) == 4


def test_noise_grows_linearly_over_the_splits():
    # a (1 + beta j / (d - 1)), j = 0..d - 1; steps between the splits keep a
    config = tree_config(group_size=8, splits=[0, 2, 4], stochastic="all", noise_growth=0.5)
    assert levels(plan_of(config)) == pytest.approx({0: 0.7, 1: 0.7, 2: 0.7 * 1.25, 3: 0.7, 4: 0.7 * 1.5, 5: 0.7, 6: 0.7})
    single = tree_config(group_size=2, splits=[2], noise_growth=0.5)
    assert levels(plan_of(single)) == {2: 0.7}  # d = 1 has no growth
    own = rollout(plan="tree", num_steps=8, group_size=4, noise_level=[0.4, 0.6], tree={"splits": [0, 2], "noise_growth": 0.5})
    assert levels(plan_of(own)) == pytest.approx({0: 0.4, 2: 0.9})


def test_a_tree_compresses_and_solves_the_steps_after_its_last_noise():
    config = rollout(plan="tree", num_steps=8, group_size=4, tree={"splits": [0, 2]}, after_window={"solver": "dpm++", "compression": 0.4})
    plan = plan_of(config)
    assert len(plan.sigmas) - 1 == 3 + 2
    assert {node.step - 1: node.solver for node in plan.nodes if node.parent >= 0} == {0: "ode", 1: "ode", 2: "ode", 3: "dpm++", 4: "dpm++"}


@pytest.mark.parametrize("num_steps", [2, 3])
@pytest.mark.parametrize("schedule", ["random", "progressive", "decay", "exp_decay", "frozen"])
def test_a_tree_with_splits_of_its_own_needs_no_window(num_steps, schedule):
    # the window, here with a size that would not fit, plays no part
    config = tree_config(num_steps, group_size=2, splits=[0], window={"schedule": schedule, "size": 5})
    Config.model_validate({"run_dir": "x", "rewards": ["scene"], "rollout": config.model_dump(), "objective": {"updates_per_iteration": 1}})
    assert levels(plan_of(config)) == {0: 0.7}
    assert minimum_rows(config, iteration=1, seed=0) == (1 + 2 * (num_steps - 1), 1)


# --- any valid config ---------------------------------------------------------------------------------------------------------------------------


@st.composite
def rollout_sections(draw):
    """Rollout sections, most of them valid."""
    num_steps = draw(st.integers(2, 9))
    plan = draw(st.sampled_from(["chain", "window", "tree", "granular", "ode"]))
    size = draw(st.integers(1, max(1, num_steps - 1)))
    schedule = draw(st.sampled_from(["random", "progressive", "decay", "exp_decay", "frozen", "backward"] if plan == "window" else ["random", "progressive"]))
    window = {"size": size, "low": draw(st.integers(0, num_steps - 1 - size)), "schedule": schedule, "every": draw(st.integers(1, 3))}
    window |= {"high": num_steps - draw(st.integers(1, 3)) if plan != "granular" else window["low"] + size, "stride": draw(st.integers(1, 2))}
    window |= {"start_decay": draw(st.sampled_from([1.0, 0.5])), "backward_first": draw(st.integers(2, num_steps)), "backward_stages": draw(st.integers(1, 5))}
    section = {"plan": plan, "num_steps": num_steps, "window": window, "same_noise": plan == "granular" or (plan != "ode" and draw(st.booleans()))}
    section |= {"group_size": draw(st.integers(2, 4)), "train_fraction": draw(st.floats(0.3, 1.0))}
    section["granularities"] = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
    if plan == "ode":
        section["solver"] = draw(st.sampled_from(["ode", "heun", "dpm++"]))
    if plan in ("window", "tree"):
        section["after_window"] = {"solver": draw(st.sampled_from(["ode", "dpm++"])), "compression": draw(st.floats(0.05, 1.0))}
    if plan == "tree":
        given_splits = st.lists(st.integers(0, num_steps - 2), min_size=1, max_size=2, unique=True)
        splits = draw(st.none() | given_splits)
        branching = draw(st.lists(st.integers(1, 3), min_size=1, max_size=size if splits is None else len(splits)))
        children = branching * (size if splits is None else len(splits)) if len(branching) == 1 else branching
        assume(math.prod(children) <= 32)
        section["group_size"] = max(2, math.prod(children)) * draw(st.integers(1, 2))
        section["tree"] = {"splits": splits, "branching": branching, "stochastic": draw(st.sampled_from(["splits", "window", "all"]))}
        section["tree"]["noise_growth"] = draw(st.sampled_from([0.0, 0.3]))
    return section


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rollout_sections(), st.integers(1, 40), st.integers(0, 2**32))
def test_every_valid_config_has_a_plan_at_every_iteration_and_it_has_the_least_rows(section, iteration, seed):
    try:
        config = whole_config(section).rollout
    except ValidationError:
        assume(False)
    plan = plan_of(config, iteration, seed)
    assert (plan.forward_rows, len(plan.train_rows)) == minimum_rows(config, iteration=iteration, seed=seed)
    samples = config.group_size
    if config.plan == "granular":
        samples *= len(config.granularities) * window_of(config, iteration, seed)[1]
    assert len(plan.leaves) == samples
    assert bool(plan.train_rows) == (config.plan != "ode")
