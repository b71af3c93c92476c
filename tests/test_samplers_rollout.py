"""The executor: a rollout is what its plan says, groups are independent of each other, and walking every path alone gives the same latents."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from estimates import group_zscore
from forests import ODE_PLANS, PLANS, SHAPE, SIX, Counted, chain, granular, noise_of, ode, path_to, roll_out, tree, walk, window

from flowrl.likelihoods.transition import TransitionLikelihood, select_rows
from samplers.kernels import KERNELS, Step, expand
from samplers.ode import heun_correction
from samplers.plans import Node, Plan
from samplers.rollout import sample_ode
from samplers.schedules import diffusers_grid, shifted_grid

EXACT = {"rtol": 0.0, "atol": 0.0}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
every_plan = pytest.mark.parametrize("plan", (PLANS | ODE_PLANS).values(), ids=PLANS | ODE_PLANS)


def tensors(rollout):
    found = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


# --- what is recorded ---------------------------------------------------------------------------------------------------------------------------


@every_plan
def test_a_rollout_has_the_shapes_and_dtypes_of_its_plan(plan):
    rollout = roll_out(plan, range(2))
    leaves, rows, edges = len(plan.leaves), len(plan.train_rows), sum(node.trained for node in plan.nodes)
    assert rollout.leaves.shape == (2 * leaves, *SHAPE)
    assert rollout.row_x.shape == (2 * rows, *SHAPE)
    assert rollout.edge_x_next.shape == (2 * edges, *SHAPE)
    assert (rollout.leaves.dtype, rollout.edge_old_log_prob.dtype, rollout.edge_sigma.dtype) == (torch.float32, torch.float32, torch.float64)
    assert rollout.leaf_group.tolist() == [0] * leaves + [1] * leaves
    assert rollout.row_group.tolist() == [0] * rows + [1] * rows
    assert rollout.row_velocity is None
    assert rollout.kernel == plan.kernel


@every_plan
def test_every_decision_holds_its_own_step(plan):
    rollout = roll_out(plan, range(2))
    trained = [node for node in plan.nodes if node.trained] * 2
    starts = [plan.nodes[node.parent].step for node in trained]
    assert rollout.edge_step.tolist() == starts
    assert rollout.edge_sigma.tolist() == [plan.sigmas[k] for k in starts]
    assert rollout.edge_sigma_next.tolist() == [plan.sigmas[node.step] for node in trained]
    assert rollout.edge_noise_level.tolist() == [node.noise_level for node in trained]
    assert rollout.edge_sigma_guard.eq(plan.sigmas[1]).all()
    assert rollout.row_sigma[rollout.edge_row].tolist() == rollout.edge_sigma.tolist()
    assert rollout.row_step[rollout.edge_row].tolist() == starts


@every_plan
def test_kept_velocities_are_those_of_the_training_rows(plan):
    rollout = roll_out(plan, range(2), keep_velocity=True)
    prompt = torch.tensor([10, 11])[rollout.row_group]
    torch.testing.assert_close(rollout.row_velocity, Counted()(rollout.row_x, rollout.row_sigma, prompt))


def test_a_depth_two_tree_by_hand():
    # nodes: 0 | 1 2 | 3 4 5 6 | 7 8 9 10; decisions 0 1 | 2 3 (below 0) 4 5 (below 1)
    rollout = roll_out(tree({0: 2, 1: 2}, sigmas=shifted_grid(3, 3.0)), range(2))
    assert rollout.edge_row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rollout.edge_parent.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, 6, 6, 7, 7]
    pairs = [(0, 0), (2, 0), (0, 1), (3, 1), (1, 2), (4, 2), (1, 3), (5, 3)]
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == sorted([*pairs, *((edge + 6, leaf + 4) for edge, leaf in pairs)])
    assert rollout.leaf_set.tolist() == [0] * 4 + [1] * 4
    assert rollout.row_step.tolist() == [0, 1, 1] * 2


def test_the_parent_of_a_decision_is_the_nearest_trained_one_above_it():
    # step 1 is deterministic, step 2 is noisy without branching
    rollout = roll_out(tree({0: 2, 3: 2}, noise={0: 0.5, 2: 0.5, 3: 0.5}), range(1))
    assert rollout.edge_step.tolist() == [0, 0, 2, 2, 3, 3, 3, 3]
    assert rollout.edge_parent.tolist() == [-1, -1, 0, 1, 2, 2, 3, 3]
    assert rollout.edge_row.tolist() == [0, 0, 1, 2, 3, 3, 4, 4]


def test_a_noisy_step_that_is_not_trained_is_passed_over():
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(1, 2, 0.7), Node(2, 3, 0.7, True), Node(3, 4))
    rollout = roll_out(Plan(shifted_grid(4, 1.0), nodes, "flow_sde"), range(2))
    assert rollout.edge_step.tolist() == [0, 2, 0, 2]
    assert rollout.edge_parent.tolist() == [-1, 0, -1, 2]
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_a_granular_rollout_by_hand():
    # G = 2, steps 0 and 1, three strides: leaves in the order step, stride, child
    rollout = roll_out(granular((0, 1), (1, 2, 3), group_size=2), range(2))
    assert rollout.edge_row.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.edge_parent.tolist() == [-1] * 8  # a child of the anchor at step 1 does not come from a child at step 0
    assert rollout.leaf_set.tolist() == [s for s in range(12) for _ in range(2)]
    # leaf 6 step + 2 stride + child is below decision 2 step + child
    pairs = [(2 * k + i, 6 * k + 2 * j + i) for k in range(2) for j in range(3) for i in range(2)]
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == sorted([*pairs, *((edge + 4, leaf + 12) for edge, leaf in pairs)])


@every_plan
def test_a_decision_reaches_exactly_the_leaves_below_it(plan):
    rollout = roll_out(plan, range(2))
    number = {i: slot for slot, i in enumerate(i for i, node in enumerate(plan.nodes) if node.trained)}
    size = len(number), len(plan.leaves)
    expected = [(number[i] + g * size[0], j + g * size[1]) for g in range(2) for j, leaf in enumerate(plan.leaves) for i in path_to(plan, leaf) if i in number]
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == sorted(expected)


def test_a_decision_above_a_branch_reaches_all_leaves_below_it():
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(1, 2, 0.7, True), Node(1, 2, 0.7, True), Node(2, 3), Node(3, 3))
    rollout = roll_out(Plan(shifted_grid(3, 1.0), nodes, "flow_sde"), range(2))
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == [(0, 0), (0, 1), (1, 0), (2, 1), (3, 2), (3, 3), (4, 2), (5, 3)]


def test_a_rollout_carries_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    rollout = roll_out(tree({0: 2}), [0], lambda x, s, p: weight * x, keep_velocity=True)
    assert not any(value.requires_grad for value in tensors(rollout).values())


def test_latents_keep_the_dtype_that_was_asked_for():
    single, double = (roll_out(PLANS["tree, all steps"], [0], dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.leaves.dtype, double.leaves.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(double.leaves.float(), single.leaves, rtol=1e-4, atol=1e-5)  # the same noise


# --- the latents --------------------------------------------------------------------------------------------------------------------------------


@every_plan
def test_walking_every_path_alone_gives_the_same_latents(plan):
    together = roll_out(plan, [3, 4], dtype=torch.float64)
    for slot, number in enumerate((3, 4)):
        latents = walk(plan, number)
        edges = [i for i, node in enumerate(plan.nodes) if node.trained]
        for found, nodes in ((together.leaves, plan.leaves), (together.edge_x_next, edges), (together.row_x, plan.train_rows)):
            for mine, i in zip(found.view(2, len(nodes), *SHAPE)[slot], nodes, strict=True):
                torch.testing.assert_close(mine, latents[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "ode"])
def test_every_kernel_gives_the_latents_of_paths_walked_alone(kernel):
    plan = tree({1: 2, 2: 2}, noise={1: 0.5, 2: 0.8, 3: 0.3}, kernel=kernel, sibling_scale=2.0)
    latents = walk(plan, 3)
    torch.testing.assert_close(roll_out(plan, [3], dtype=torch.float64).leaves, torch.stack([latents[i] for i in plan.leaves]), rtol=1e-11, atol=1e-11)


def test_dpm_solver_remembers_the_clean_estimates_of_the_window():
    # its first step after the window is of second order, with the estimate at the window's last latent as history: unlike an Euler step there
    second, first = (roll_out(window(1, 2, group_size=2, solver=solver), [0], dtype=torch.float64) for solver in ("dpm++", "ode"))
    torch.testing.assert_close(second.edge_x_next, first.edge_x_next, **EXACT)
    assert (second.leaves - first.leaves).abs().max() > 1e-3
    # where one step remains, to sigma 0, it is the Euler step
    last, plain = (roll_out(window(1, 4, group_size=2, solver=solver), [0]) for solver in ("dpm++", "ode"))
    torch.testing.assert_close(last.leaves, plain.leaves)


def test_a_wave_may_mix_stochastic_and_deterministic_steps():
    # the anchor goes on beside its children; listed between them, so that the order in the plan is not the order by kind
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(0, 1), Node(0, 1, 0.5, True), Node(2, 2), Node(1, 2), Node(3, 2))
    plan = Plan((1.0, 0.6, 0.0), nodes, "flow_sde")
    velocity = Counted()
    rollout = roll_out(plan, [0, 5], velocity, dtype=torch.float64)
    assert velocity.calls == 2
    for slot, number in enumerate((0, 5)):
        latents = walk(plan, number)
        torch.testing.assert_close(rollout.leaves.view(2, 3, *SHAPE)[slot], torch.stack([latents[i] for i in (4, 5, 6)]))
        torch.testing.assert_close(rollout.edge_x_next.view(2, 2, *SHAPE)[slot], torch.stack([latents[1], latents[3]]))


def test_a_wave_of_two_solvers_is_refused():
    nodes = (Node(-1, 0), Node(0, 1), Node(0, 1, 0.7, True), Node(1, 2), Node(2, 2, solver="dpm++"))
    with pytest.raises(ValueError, match=r"a wave mixes Euler and DPM-Solver\+\+ steps"):
        roll_out(Plan((1.0, 0.6, 0.0), nodes, "flow_sde"), [0])


@pytest.mark.parametrize(("solver", "text"), [("ode", "Euler and Heun"), ("dpm++", r"Heun and DPM-Solver\+\+")])
def test_a_correction_shares_its_wave_with_no_other_solver(solver, text):
    # paths 0 2 4 6 and 1 3 5 7; in their second step the one corrects and the other goes on
    nodes = (Node(-1, 0), Node(-1, 0), Node(0, 1), Node(1, 1), Node(2, 1, solver="heun"), Node(3, 2, solver=solver), Node(4, 3), Node(5, 3))
    with pytest.raises(ValueError, match=f"a wave mixes {text} steps; give each its own wave"):
        roll_out(Plan((1.0, 0.6, 0.3, 0.0), nodes, "ode"), [0])


def test_children_start_from_their_own_parent_in_an_uneven_tree():
    # two branches; the second one branches again, and the children are listed across
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(0, 1, 0.7, True), Node(2, 2), Node(1, 2), Node(2, 2))
    rollout = roll_out(Plan((1.0, 0.6, 0.0), nodes, "flow_sde"), [0])
    left, right = (sample_ode(Counted(), x[None], (0.6, 0.0), torch.tensor([10])) for x in rollout.edge_x_next)
    torch.testing.assert_close(rollout.leaves, torch.cat([right, left, right]))
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == [(0, 1), (1, 0), (1, 2)]
    assert rollout.forward_rows == 3


def test_paths_of_different_lengths_end_in_their_own_wave():
    # the second child jumps from step 1 to the end: it is a leaf one wave before its sibling's child
    nodes = (Node(-1, 0), Node(0, 1), Node(1, 3), Node(1, 2), Node(3, 3))
    sigmas = shifted_grid(3, 1.0)
    velocity = Counted()
    rollout = roll_out(Plan(sigmas, nodes, "flow_sde"), [0], velocity)
    start = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(100))
    row = torch.tensor([10])
    long = sample_ode(Counted(), start, sigmas, row)
    x = sample_ode(Counted(), start, sigmas[:2], row)
    short = x - sigmas[1] * Counted()(x, torch.tensor([sigmas[1]]), row)
    torch.testing.assert_close(rollout.leaves, torch.cat([short, long]))
    assert len(velocity.rows) == 3
    assert len(rollout.edge_row) == 0


def test_the_children_of_an_anchor_leave_one_latent():
    # 5.4.1 of the method notes: bit by bit, and it is the latent of the Euler path
    rollout = roll_out(granular((0, 2), (1,), group_size=5), [0, 1])
    assert rollout.edge_row.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    anchors = [sample_ode(Counted(), noise_of(granular(), g)[0][None].float(), shifted_grid(8, 3.0)[:3], torch.tensor([10 + g])) for g in (0, 1)]
    torch.testing.assert_close(rollout.row_x[1::2], torch.cat(anchors), **EXACT)
    assert len(rollout.edge_x_next.flatten(1).unique(dim=0)) == 20


def test_one_granularity_of_one_step_is_fast_with_a_window_of_one_step():
    # 5.4.2 of the method notes: the same latents, decisions and comparisons
    ours, fast = (roll_out(plan, range(2)) for plan in (granular((2,), (1,), group_size=4, sigmas=SIX), window(2, 1, same_noise=True)))
    assert ours.forward_rows == fast.forward_rows
    for (name, mine), theirs in zip(tensors(ours).items(), tensors(fast).values(), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_a_tree_with_one_child_everywhere_walks_the_window_of_mix_grpo():
    # 4.4.4 of the method notes; sharing noise between siblings changes nothing where there are none
    levels = {1: 0.7, 2: 0.7}
    mix = roll_out(window(1, 2), range(2))
    for scale in (None, 4.0):
        lone = roll_out(tree({1: 1, 2: 1}, noise=levels, roots=4, sibling_scale=scale), range(2))
        for (name, mine), theirs in zip(tensors(lone).items(), tensors(mix).values(), strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_siblings_share_their_prefix_and_differ_after_it():
    rollout = roll_out(window(same_noise=True), range(2))
    first = rollout.edge_step == 2
    assert int(first.sum()) == 8
    assert rollout.edge_row[first].tolist() == [0, 0, 0, 0, 5, 5, 5, 5]  # one row per group, then four of their own
    assert len(rollout.edge_x_next[first].flatten(1).unique(dim=0)) == 8
    assert len(rollout.leaves.flatten(1).unique(dim=0)) == 8


def test_independent_start_noise_gives_each_sample_its_own_prefix():
    rollout = roll_out(window(), range(2))
    first = rollout.edge_step == 2
    assert len(rollout.row_x[rollout.edge_row[first]].flatten(1).unique(dim=0)) == 8


# --- siblings that share noise ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_noise_of_siblings_has_variance_one_and_the_covariance_of_its_scale(scale):
    # 4.4.2 of the method notes: covariance 1 / (1 + s^2). 40 000 elements: a standard error is 1 / 200 at most, sqrt(2) / 200 of a variance
    plan = tree({1: 3, 2: 2}, sibling_scale=scale)
    rollout = roll_out(plan, [0], shape=(40_000,), dtype=torch.float64)
    likelihood = TransitionLikelihood("flow_sde")
    transition = likelihood(Counted(), select_rows(rollout, torch.arange(4), torch.tensor([10]))).transition
    z = (rollout.edge_x_next - transition.mean) / transition.std[:, None]
    covariance = z @ z.T / 40_000
    shared = 1 / (1 + scale**2)
    expected = torch.eye(9, dtype=torch.float64)
    for family in ((0, 1, 2), (3, 4), (5, 6), (7, 8)):
        for i, j in itertools.permutations(family, 2):
            expected[i, j] = shared
    assert (covariance - expected).abs().max() < 5 * math.sqrt(2) / 200
    assert z.mean(1).abs().max() < 5 / 200


@pytest.mark.parametrize("scale", [None, 0.5, 4.0])
def test_every_leaf_has_the_distribution_of_a_path_walked_alone(scale):
    # v = c x: the mean of a step is A x, so a leaf's variance follows step by step: w <- A^2 w + std^2
    def velocity(x, sigma, prompt_row):
        return 0.3 * x

    rollout = roll_out(tree({1: 2, 3: 2}, sibling_scale=scale), [0], velocity, shape=(40_000,), dtype=torch.float64)
    variance = 1.0
    for k in range(6):
        sigma, after = SIX[k], SIX[k + 1]
        s = 0.7 * math.sqrt(sigma / (1 - sigma)) if k in (1, 3) else 0.0
        length = sigma - after
        gain = 1 - s**2 * length / (2 * sigma) - length * 0.3 * (1 + s**2 * (1 - sigma) / (2 * sigma))
        variance = gain**2 * variance + s**2 * length
    found = rollout.leaves.var(1, correction=0)
    assert ((found / variance - 1).abs() < 5 * math.sqrt(2) / 200).all()
    assert (rollout.leaves.mean(1).abs() < 5 * math.sqrt(variance) / 200).all()


# --- groups, chunks, replay ---------------------------------------------------------------------------------------------------------------------


@every_plan
def test_a_groups_samples_do_not_depend_on_its_neighbours(plan):
    alone = roll_out(plan, [5])
    among = roll_out(plan, [2, 9, 5, 1])
    size = len(plan.leaves)
    torch.testing.assert_close(among.leaves[2 * size : 3 * size], alone.leaves, **EXACT)
    torch.testing.assert_close(among.edge_old_log_prob.view(4, len(alone.edge_old_log_prob))[2], alone.edge_old_log_prob, **EXACT)


def log_prob_error(plan, reduction):
    rollout = roll_out(plan, range(3), reduction=reduction)
    output = TransitionLikelihood(plan.kernel, reduction)(Counted(), select_rows(rollout, torch.arange(len(rollout.row_sigma)), torch.tensor([10, 11, 12])))
    assert rollout.edge_old_log_prob.isfinite().all()
    assert rollout.edge_old_log_prob.std() > 0
    return (output.log_prob - rollout.edge_old_log_prob).abs().max()


@each_plan
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_replayed_log_probabilities_equal_the_rollouts_in_float32(plan, reduction):
    assert log_prob_error(plan, reduction) < 1e-6


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "ode"])
@pytest.mark.parametrize("grid", [shifted_grid, diffusers_grid])
def test_replayed_log_probabilities_equal_the_rollouts_for_every_kernel_and_noise_of_each_layer(kernel, grid):
    # 4.4.1 of the method notes: the noise level of each layer is stored with its decisions
    sigmas = grid(6, 3.0)
    growing = tree({0: 2, 1: 2, 3: 2}, noise={0: 0.3, 1: 0.5, 3: 0.9}, sigmas=sigmas, kernel=kernel, sibling_scale=4.0)
    assert log_prob_error(growing, "mean") < 1e-6
    assert log_prob_error(chain(noise_level=[0.9, 0.7, 0.5, 0.3, 0.2], sigmas=sigmas, kernel=kernel), "mean") < 1e-6
    assert log_prob_error(granular((0, 1), (1, 2), noise_level=[0.4, 0.8], sigmas=sigmas, kernel=kernel), "mean") < 1e-6


def test_the_log_probability_of_a_path_is_the_sum_over_its_decisions():
    # 4.4.1 of the method notes, against densities of the noise that was drawn: log N(mean + std z; mean, std) = log N(z; 0, 1) - log std
    plan = tree({0: 2, 1: 2, 3: 2}, noise={0: 0.3, 1: 0.5, 3: 0.9})
    rollout = roll_out(plan, [0], reduction="sum", dtype=torch.float64)
    noise, elements = noise_of(plan, 0), math.prod(SHAPE)
    path = torch.zeros(8, dtype=torch.float64).index_add_(0, rollout.leaf_edge[:, 1], rollout.edge_old_log_prob.double()[rollout.leaf_edge[:, 0]])
    for j, leaf in enumerate(plan.leaves):
        total = 0.0
        for i in path_to(plan, leaf):
            node = plan.nodes[i]
            if node.trained:
                sigma, after = plan.sigmas[plan.nodes[node.parent].step], plan.sigmas[node.step]
                s = node.noise_level * math.sqrt(sigma / (1 - (plan.sigmas[1] if sigma == 1 else sigma)))
                total -= float(noise[i].square().sum()) / 2 + elements * (math.log(s * math.sqrt(sigma - after)) + 0.5 * math.log(2 * math.pi))
        assert float(path[j]) == pytest.approx(total, rel=1e-5)


# --- deterministic plans ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ODE_PLANS.values(), ids=ODE_PLANS)
def test_a_plan_without_decisions_has_empty_edges_of_the_same_dtypes(plan):
    ours, theirs = (tensors(roll_out(p, range(2), keep_velocity=True)) for p in (plan, chain()))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.shape[1:] == theirs[name].shape[1:], name
        if name.startswith("edge_") or name == "leaf_edge":
            assert len(value) == 0, name
    assert ours["leaf_edge"].shape == (0, 2)


def test_the_euler_plan_is_the_ode_sampler():
    rollout = roll_out(ode(kept_steps=(0,)), [0, 1])
    noise = torch.stack([noise_of(ode(), number)[i] for number in (0, 1) for i in range(3)]).float()
    torch.testing.assert_close(rollout.row_x, noise, **EXACT)
    torch.testing.assert_close(rollout.leaves, sample_ode(Counted(), noise, SIX, torch.tensor([10, 10, 10, 11, 11, 11])), **EXACT)
    assert len(rollout.leaves.flatten(1).unique(dim=0)) == 6


def test_kept_steps_hold_the_latents_of_the_path_step_by_step():
    rollout = roll_out(ode(kept_steps=(0, 2, 5)), [0, 1])
    assert rollout.row_step.tolist() == [0, 0, 0, 2, 2, 2, 5, 5, 5] * 2
    assert rollout.row_sigma.tolist() == [SIX[k] for k in rollout.row_step]
    assert rollout.row_group.tolist() == [0] * 9 + [1] * 9
    start, second, last = (x.flatten(0, 1) for x in rollout.row_x.view(2, 3, 3, *SHAPE).unbind(1))
    rows = torch.tensor([10, 10, 10, 11, 11, 11])
    torch.testing.assert_close(second, sample_ode(Counted(), start, SIX[:3], rows), **EXACT)
    torch.testing.assert_close(rollout.leaves, sample_ode(Counted(), last, SIX[5:], rows), **EXACT)


@pytest.mark.parametrize("plan", [ode("heun"), ode("dpm++"), window(), PLANS["tree"]], ids=["heun", "dpm++", "window", "tree"])
def test_keeping_rows_changes_no_sample_and_costs_no_row(plan):
    ours, theirs = (roll_out(p, range(2)) for p in (dataclasses.replace(plan, kept_steps=(0, 3)), plan))
    for name in ("leaves", "edge_x_next", "edge_old_log_prob"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **EXACT)
    assert ours.forward_rows == theirs.forward_rows
    assert {0, 3} <= set(ours.row_step.tolist())
    assert ours.row_step[ours.edge_row].tolist() == ours.edge_step.tolist()


def test_heuns_step_by_hand():
    # from sigma 1 to 0.6, v = x + sigma, x = 2: v = 3, predicted 2 - 0.4 * 3 = 0.8, v = 1.4 there, corrected 2 - 0.4 * (3 + 1.4) / 2 = 1.12
    x = torch.full((2, 1), 2.0, dtype=torch.float64)
    step = Step(*(torch.full((2,), s, dtype=torch.float64) for s in (1.0, 0.6, 0.6, 0.0)))
    torch.testing.assert_close(heun_correction(x, torch.full_like(x, 0.8), torch.full_like(x, 1.4), step), torch.full_like(x, 1.12))
    # and on to sigma 0 by Euler
    rollout = roll_out(ode("heun", sigmas=(1.0, 0.6, 0.0), kept_steps=(0, 1)), [0], lambda x, s, p: x + expand(s, x), dtype=torch.float64)
    start, corrected = rollout.row_x.split(3)
    torch.testing.assert_close(corrected, start - 0.2 * (start + 1 + start - 0.4 * (start + 1) + 0.6))
    torch.testing.assert_close(rollout.leaves, corrected - 0.6 * (corrected + 0.6))


MEAN, STD = 1.5, 0.4


def gaussian_velocity(x, sigma, prompt_row):
    """E[noise - clean | x] where the data are Gaussian with MEAN and STD."""
    s = expand(sigma, x)
    variance = (1 - s) ** 2 * STD**2 + s**2
    return (s - (1 - s) * STD**2) / variance * (x - (1 - s) * MEAN) - MEAN


def largest_error(solver, num_steps):
    """Of the leaves, which the exact flow takes to MEAN + STD noise, on evenly spaced levels from pure noise to data."""
    plan = ode(solver, group_size=8, sigmas=shifted_grid(num_steps, 1.0), kept_steps=(0,))
    rollout = roll_out(plan, [0], gaussian_velocity, shape=(1,), dtype=torch.float64)
    return float((rollout.leaves - MEAN - STD * rollout.row_x).abs().max())


@pytest.mark.parametrize(("solver", "steepest", "flattest"), [("ode", -1.05, -0.95), ("heun", -2.05, -1.95), ("dpm++", -2.0, -1.75)])
def test_the_error_of_a_plan_falls_with_the_order_of_its_solver(solver, steepest, flattest):
    # DPM-Solver++ has a factor log T between pure noise and data, see its own tests
    counts = (80, 160, 320, 640)
    found = [largest_error(solver, count) for count in counts]
    assert steepest < np.polyfit(np.log(counts), np.log(found), 1)[0] < flattest


def test_heun_beats_euler_at_the_same_rows():
    assert ode("heun", sigmas=shifted_grid(10, 1.0)).forward_rows == ode(sigmas=shifted_grid(19, 1.0)).forward_rows
    assert largest_error("heun", 10) < largest_error("ode", 19) / 2


# --- the deterministic sampler ------------------------------------------------------------------------------------------------------------------


def test_the_ode_sampler_is_euler_on_the_grid():
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([0, 1, 2])
    x = noise
    for sigma, after in itertools.pairwise(SIX):
        x = x + (after - sigma) * Counted()(x, torch.full((3,), sigma), row)
    torch.testing.assert_close(sample_ode(Counted(), noise, SIX, row), x)


def test_without_noise_the_children_of_an_anchor_are_one_picture_with_nothing_to_compare():
    calm = roll_out(granular(noise_level=1e-12, group_size=4), [3], dtype=torch.float64)
    noisy = roll_out(granular(group_size=4), [3], dtype=torch.float64)
    for rollout, equal in ((calm, True), (noisy, False)):
        spread = torch.stack([rollout.leaves[rollout.leaf_set == s].std(0).max() for s in rollout.leaf_set.unique()])
        assert bool((spread < 1e-9).all()) == equal
        rewards = rollout.leaves.flatten(1).mean(1).float().double()  # what a reward in float32 can tell apart
        advantages = group_zscore(rewards, rollout.leaf_set, torch.ones(len(rewards), dtype=torch.bool), 6, eps=1e-8, ddof=1)
        assert bool((advantages == 0).all()) == equal


def test_a_tree_without_branches_is_mixgrpos_window_and_one_with_branches_is_not():
    straight = tree({2: 1, 3: 1}, noise={2: 0.7, 3: 0.7})
    alone = roll_out(window(2, 2, group_size=1), [5])
    assert torch.equal(roll_out(straight, [5]).leaves, alone.leaves)
    assert len(roll_out(tree({2: 2, 3: 1}, noise={2: 0.7, 3: 0.7}), [5]).leaves) == 2 * len(alone.leaves)
