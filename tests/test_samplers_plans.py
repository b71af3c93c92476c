"""Rollout plans: their shape by hand, their row counts in closed form, and refusals."""

import itertools

import pytest

from samplers.nfe import path_rows
from samplers.plans import Node, Plan, chain_plan, window_plan
from samplers.schedules import shifted_grid

SIX = shifted_grid(6, 3.0)


def window(start, size, *, group_size=3, same_noise=False, sigmas=SIX):
    return window_plan(sigmas, group_size, noise_level=0.7, start=start, size=size, same_noise=same_noise, kernel="flow_sde")


def chain(fraction, *, group_size=3, same_noise=False, sigmas=SIX):
    return chain_plan(sigmas, group_size, noise_level=0.7, train_fraction=fraction, same_noise=same_noise, kernel="flow_sde")


def noisy_steps(plan):
    """The steps of the grid whose edges are stochastic; asserts that exactly those are trained."""
    for node in plan.nodes:
        assert node.trained == (node.noise_level > 0)
    return sorted({plan.nodes[node.parent].step for node in plan.nodes if node.trained})


def test_a_window_with_shared_noise_is_one_path_until_its_first_step():
    plan = window(2, 2, group_size=2, same_noise=True, sigmas=shifted_grid(5, 1.0))
    trunk = [Node(-1, 0), Node(0, 1), Node(1, 2)]
    branches = [Node(2, 3, 0.7, True), Node(2, 3, 0.7, True), Node(3, 4, 0.7, True), Node(4, 4, 0.7, True), Node(5, 5), Node(6, 5)]
    assert list(plan.nodes) == trunk + branches
    assert plan.waves == ((0,), (1,), (2,), (3, 4), (5, 6), (7, 8))
    assert plan.leaves == (7, 8)
    assert plan.train_rows == (2, 3, 4)
    assert plan.forward_rows == 7


def test_a_window_with_independent_noise_is_one_path_per_sample():
    plan = window(1, 1, group_size=2, sigmas=shifted_grid(3, 1.0))
    assert list(plan.nodes) == [Node(-1, 0), Node(-1, 0), Node(0, 1), Node(1, 1), Node(2, 2, 0.7, True), Node(3, 2, 0.7, True), Node(4, 3), Node(5, 3)]
    assert plan.train_rows == (2, 3)


@pytest.mark.parametrize(
    ("num_steps", "fraction", "trained"),
    [(10, 0.99, 9), (6, 0.99, 5), (6, 1.0, 5), (6, 0.5, 3), (10, 0.6, 6), (4, 0.01, 1), (2, 1.0, 1)],
)
def test_a_chain_trains_its_first_steps_and_never_the_last(num_steps, fraction, trained):
    assert noisy_steps(chain(fraction, sigmas=shifted_grid(num_steps, 3.0))) == list(range(trained))


@pytest.mark.parametrize("same_noise", [False, True])
def test_a_window_trains_exactly_its_steps(same_noise):
    assert noisy_steps(window(1, 3, same_noise=same_noise)) == [1, 2, 3]


@pytest.mark.parametrize("same_noise", [False, True])
def test_every_sample_is_a_leaf_and_reaches_it_in_all_steps(same_noise):
    plan = window(2, 2, group_size=5, same_noise=same_noise)
    assert len(plan.leaves) == 5
    for leaf in plan.leaves:
        path = [leaf]
        while plan.nodes[path[-1]].parent >= 0:
            path.append(plan.nodes[path[-1]].parent)
        assert [plan.nodes[i].step for i in reversed(path)] == list(range(7))


@pytest.mark.parametrize("same_noise", [False, True])
def test_the_rows_of_every_plan_are_the_closed_formulas(same_noise):
    for num_steps, group_size in itertools.product((2, 3, 7), (1, 2, 5)):
        sigmas = shifted_grid(num_steps, 3.0)
        for start, size in itertools.product(range(num_steps), range(1, num_steps)):
            if start + size <= num_steps - 1:
                plan = window(start, size, group_size=group_size, same_noise=same_noise, sigmas=sigmas)
                assert (plan.forward_rows, len(plan.train_rows)) == path_rows(num_steps, group_size, first=start, count=size, same_noise=same_noise)
        for count in range(1, num_steps):
            plan = chain((count + 0.5) / num_steps, group_size=group_size, same_noise=same_noise, sigmas=sigmas)
            assert (plan.forward_rows, len(plan.train_rows)) == path_rows(num_steps, group_size, first=0, count=count, same_noise=same_noise)


def test_the_closed_formulas_have_the_values_worked_out_by_hand():
    # T = 10, G = 24. Flow-GRPO trains 9 steps; Fast with shared noise from step 1 one step: 2 + 24 * 8 forward, one training row
    assert path_rows(10, 24, first=0, count=9, same_noise=False) == (240, 216)
    assert path_rows(10, 24, first=1, count=1, same_noise=True) == (194, 1)
    assert path_rows(10, 24, first=2, count=3, same_noise=True) == (3 + 24 * 7, 1 + 24 * 2)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node(-1, 0), Node(2, 1), Node(0, 1)], "node 1: a parent comes before its child"),
        ([Node(-1, 1), Node(0, 3)], "node 0: a parent comes before its child, and exactly the start noises have step 0"),
        ([Node(-1, 0), Node(0, 0)], "node 1: a parent comes before its child, and exactly the start noises have step 0"),
        ([Node(-1, 0), Node(0, 2), Node(1, 1)], "node 2: steps must move towards sigma 0"),
        ([Node(-1, 0), Node(0, 2)], "every path of a plan must end at sigma 0"),
        ([Node(-1, 0), Node(0, 3), Node(1, 4)], "every path of a plan must end at sigma 0"),
        ([Node(-1, 0), Node(0, 3, 0.0, True)], "node 1: only a stochastic step can be trained"),
        ([Node(-1, 0), Node(0, 3, float("nan"), True)], "node 1: only a stochastic step can be trained"),
    ],
)
def test_a_malformed_plan_is_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Plan((1.0, 0.6, 0.3, 0.0), tuple(nodes), "flow_sde")


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0, 0), (0, 6), (4, 2), (6, 1)])
def test_a_window_outside_the_steps_is_refused(start, size):
    with pytest.raises(ValueError, match=rf"a window of {size} from step {start} does not fit into steps 0..4 \(the last step is deterministic\)"):
        window(start, size)


def test_a_chain_of_one_step_is_refused():
    with pytest.raises(ValueError, match="at least 2 steps"):
        chain(1.0, sigmas=(1.0, 0.0))


def test_noise_of_level_zero_is_refused():
    with pytest.raises(ValueError, match="only a stochastic step can be trained"):
        window_plan(SIX, 2, noise_level=0.0, start=0, size=1, same_noise=False, kernel="flow_sde")
    with pytest.raises(ValueError, match="same_noise with a deterministic plan makes G equal samples"):
        chain_plan(SIX, 2, noise_level=0.0, train_fraction=1.0, same_noise=True, kernel="flow_sde")
