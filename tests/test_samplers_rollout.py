"""The executor: every distinct latent is one network row, groups are independent of each other, and a rollout is what its plan says."""

import dataclasses
import itertools

import pytest
import torch

from flowrl.likelihoods.transition import TransitionLikelihood, select_rows
from flowrl.types import Rollout
from samplers.kernels import Step, expand, load_kernel
from samplers.nfe import path_rows
from samplers.plans import Node, Plan, chain_plan, window_plan
from samplers.rollout import concatenate, execute, sample_ode
from samplers.schedules import diffusers_grid, shifted_grid

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)
SIGMAS = shifted_grid(6, 3.0)
EXACT = {"rtol": 0.0, "atol": 0.0}


def plan_of(kind, same_noise, group_size=4, sigmas=SIGMAS):
    common = {"noise_level": 0.7, "same_noise": same_noise, "kernel": "flow_sde"}
    if kind == "chain":
        return chain_plan(sigmas, group_size, train_fraction=0.99, **common)
    return window_plan(sigmas, group_size, start=2, size=2, **common)


PLANS = [("chain", False), ("chain", True), ("window", False), ("window", True)]
each_plan = pytest.mark.parametrize(("kind", "same_noise"), PLANS, ids=[f"{k}-{'shared' if s else 'independent'}" for k, s in PLANS])


class Counted:
    """An elementwise velocity that depends on all of its inputs, and remembers every row that it was asked for."""

    def __init__(self):
        self.rows = []
        self.calls = 0

    def __call__(self, x, sigma, prompt_row):
        assert len(x) == len(sigma) == len(prompt_row)
        self.calls += 1
        self.rows += [(s, p, tuple(row.flatten().tolist())) for s, p, row in zip(sigma.tolist(), prompt_row.tolist(), x, strict=True)]
        return torch.tanh(x) * (0.5 + expand(sigma, x)) + 0.1 * expand(prompt_row, x)


def roll_out(plan, numbers, velocity=None, **options):
    """Groups by number: group n has prompt row 10 + n and its own seed."""
    generators = [torch.Generator().manual_seed(100 + n) for n in numbers]
    prompt_rows = torch.tensor([10 + n for n in numbers])
    return execute(velocity or Counted(), plan, prompt_rows, generators, SHAPE, device=CPU, **options)


def assert_same(a, b, **tolerance):
    for field in dataclasses.fields(Rollout):
        first, second = getattr(a, field.name), getattr(b, field.name)
        if isinstance(first, torch.Tensor):
            torch.testing.assert_close(first, second, **tolerance, msg=lambda text, name=field.name: f"{name}: {text}")
        else:
            assert first == second, field.name


@each_plan
def test_the_rows_asked_for_are_the_minimum(kind, same_noise):
    velocity = Counted()
    rollout = roll_out(plan_of(kind, same_noise), range(3), velocity)
    first, count = (0, 5) if kind == "chain" else (2, 2)
    forward, train = path_rows(6, 4, first=first, count=count, same_noise=same_noise)
    assert len(velocity.rows) == rollout.forward_rows == 3 * forward
    assert len(rollout.row_sigma) == 3 * train
    assert velocity.calls == 6  # a wave is one batch


@each_plan
def test_no_state_is_evaluated_twice(kind, same_noise):
    velocity = Counted()
    roll_out(plan_of(kind, same_noise), range(3), velocity)
    assert len(set(velocity.rows)) == len(velocity.rows)
    without_prompt = {(sigma, x) for sigma, _, x in velocity.rows}
    assert len(without_prompt) == len(velocity.rows)  # and no two groups share a state


@each_plan
def test_a_rollout_has_the_shapes_and_dtypes_of_its_plan(kind, same_noise):
    plan = plan_of(kind, same_noise)
    rollout = roll_out(plan, range(2))
    rows, edges = 2 * len(plan.train_rows), 2 * sum(node.trained for node in plan.nodes)
    assert rollout.leaves.shape == (8, *SHAPE)
    assert rollout.row_x.shape == (rows, *SHAPE)
    assert rollout.edge_x_next.shape == (edges, *SHAPE)
    assert (rollout.leaves.dtype, rollout.edge_old_log_prob.dtype, rollout.edge_sigma.dtype) == (torch.float32, torch.float32, torch.float64)
    assert rollout.leaf_group.tolist() == [0] * 4 + [1] * 4
    assert rollout.row_group.tolist() == [0] * (rows // 2) + [1] * (rows // 2)
    assert rollout.edge_sigma_guard.eq(SIGMAS[1]).all()
    assert rollout.edge_noise_level.eq(0.7).all()
    assert rollout.edge_sigma.tolist() == rollout.row_sigma[rollout.edge_row].tolist()
    assert rollout.edge_sigma.tolist() == [SIGMAS[k] for k in rollout.edge_step]
    assert rollout.edge_sigma_next.tolist() == [SIGMAS[k + 1] for k in rollout.edge_step]


@each_plan
def test_walking_the_recorded_edges_gives_the_leaves(kind, same_noise):
    # one group: replay each leaf's path with naive one-row steps from the last recorded decision
    rollout = roll_out(plan_of(kind, same_noise), [7])
    velocity, row = Counted(), torch.tensor([17])
    for leaf in range(4):
        below = rollout.leaf_edge[rollout.leaf_edge[:, 1] == leaf, 0]
        last = below[rollout.edge_step[below].argmax()]
        x = rollout.edge_x_next[last][None]
        rest = SIGMAS[int(rollout.edge_step[last]) + 1 :]
        torch.testing.assert_close(sample_ode(velocity, x, rest, row)[0], rollout.leaves[leaf])


@each_plan
def test_a_naive_path_per_sample_gives_the_same_latents(kind, same_noise):
    # rebuild the plan's noise in its order, then sample each path alone, step by step
    plan = plan_of(kind, same_noise)
    rollout = roll_out(plan, [3])
    generator = torch.Generator().manual_seed(103)
    kernel, euler, velocity, row = load_kernel("flow_sde"), load_kernel("ode"), Counted(), torch.tensor([13])
    active = set(rollout.edge_step.tolist())
    paths = torch.randn(1 if same_noise else 4, *SHAPE, generator=generator)
    for k in range(6):
        if same_noise and k == min(active):
            paths = paths.repeat(4, 1, 1, 1)
        z = torch.randn(len(paths), *SHAPE, generator=generator) if k in active else torch.zeros_like(paths)
        new = []
        for x, noise in zip(paths, z, strict=True):
            step = Step(*(torch.tensor([value], dtype=torch.float64) for value in (SIGMAS[k], SIGMAS[k + 1], SIGMAS[1], 0.7)))
            v = velocity(x[None], step.sigma, row)
            mean, std = (kernel if k in active else euler).moments(x[None], v, step)
            new.append(mean[0] + std.float() * noise)
        paths = torch.stack(new)
    torch.testing.assert_close(rollout.leaves, paths)


def test_siblings_share_their_prefix_and_differ_after_it():
    rollout = roll_out(plan_of("window", True), range(2))
    first = rollout.edge_step == 2
    assert int(first.sum()) == 8
    assert rollout.edge_row[first].tolist() == [0, 0, 0, 0, 5, 5, 5, 5]  # one row per group, then four of their own
    assert len(rollout.edge_x_next[first].flatten(1).unique(dim=0)) == 8
    assert len(rollout.leaves.flatten(1).unique(dim=0)) == 8


def test_independent_start_noise_gives_each_sample_its_own_prefix():
    rollout = roll_out(plan_of("window", False), range(2))
    first = rollout.edge_step == 2
    assert len(rollout.row_x[rollout.edge_row[first]].flatten(1).unique(dim=0)) == 8


@each_plan
def test_a_decision_reaches_exactly_the_leaves_below_it(kind, same_noise):
    plan = plan_of(kind, same_noise)
    rollout = roll_out(plan, range(2))
    steps = len(rollout.edge_step.unique())
    assert len(rollout.leaf_edge) == 2 * 4 * steps  # G paths of W decisions each
    for edge, leaf in rollout.leaf_edge.tolist():
        assert rollout.row_group[rollout.edge_row[edge]] == rollout.leaf_group[leaf]
    for leaf in range(8):
        mine = rollout.leaf_edge[rollout.leaf_edge[:, 1] == leaf, 0]
        assert rollout.edge_step[mine].sort().values.tolist() == rollout.edge_step.unique().tolist()


def test_a_decision_above_a_branch_reaches_all_leaves_below_it():
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(1, 2, 0.7, True), Node(1, 2, 0.7, True), Node(2, 3), Node(3, 3))
    rollout = roll_out(Plan(shifted_grid(3, 1.0), nodes, "flow_sde"), range(2))
    assert sorted(map(tuple, rollout.leaf_edge.tolist())) == [(0, 0), (0, 1), (1, 0), (2, 1), (3, 2), (3, 3), (4, 2), (5, 3)]


def test_children_start_from_their_own_parent_in_an_uneven_tree():
    # two branches; the second one branches again, and the children are listed across
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(0, 1, 0.7, True), Node(2, 2), Node(1, 2), Node(2, 2))
    sigmas = (1.0, 0.6, 0.0)
    rollout = roll_out(Plan(sigmas, nodes, "flow_sde"), [0])
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


def test_a_wave_of_mixed_steps_is_refused():
    nodes = (Node(-1, 0), Node(0, 1, 0.7, True), Node(0, 1))
    with pytest.raises(ValueError, match="a wave mixes stochastic and deterministic steps"):
        roll_out(Plan((1.0, 0.0), nodes, "flow_sde"), [0])


@each_plan
def test_a_groups_samples_do_not_depend_on_its_neighbours(kind, same_noise):
    plan = plan_of(kind, same_noise)
    alone = roll_out(plan, [5])
    among = roll_out(plan, [2, 9, 5, 1])
    torch.testing.assert_close(among.leaves[8:12], alone.leaves, **EXACT)
    torch.testing.assert_close(among.edge_old_log_prob.view(4, -1)[2], alone.edge_old_log_prob, **EXACT)


@each_plan
def test_concatenated_chunks_equal_all_groups_together(kind, same_noise):
    plan = plan_of(kind, same_noise)
    together = roll_out(plan, range(5))
    assert_same(concatenate([roll_out(plan, [0, 1]), roll_out(plan, [2]), roll_out(plan, [3, 4])]), together, **EXACT)
    assert concatenate([together]) is together


def test_nothing_cannot_be_concatenated():
    with pytest.raises(ValueError, match="nothing to concatenate"):
        concatenate([])


@each_plan
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_replayed_log_probabilities_equal_the_rollouts_in_float32(kind, same_noise, reduction):
    rollout = roll_out(plan_of(kind, same_noise, sigmas=diffusers_grid(6, 3.0)), range(3), reduction=reduction)
    likelihood = TransitionLikelihood("flow_sde", reduction)
    output = likelihood(Counted(), select_rows(rollout, torch.arange(len(rollout.row_sigma)), torch.tensor([10, 11, 12])))
    assert (output.log_prob - rollout.edge_old_log_prob).abs().max() < 1e-6
    assert rollout.edge_old_log_prob.isfinite().all()


def test_latents_keep_the_dtype_that_was_asked_for():
    single, double = (roll_out(plan_of("chain", False), [0], dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert (single.leaves.dtype, double.leaves.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(double.leaves.float(), single.leaves, rtol=1e-4, atol=1e-5)  # the same noise


def test_a_rollout_carries_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    rollout = roll_out(plan_of("window", False), [0], lambda x, s, p: weight * x)
    assert not any(getattr(rollout, f.name).requires_grad for f in dataclasses.fields(rollout) if isinstance(getattr(rollout, f.name), torch.Tensor))


def test_the_ode_sampler_is_euler_on_the_grid():
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([0, 1, 2])
    x = noise
    for sigma, after in itertools.pairwise(SIGMAS):
        x = x + (after - sigma) * Counted()(x, torch.full((3,), sigma), row)
    torch.testing.assert_close(sample_ode(Counted(), noise, SIGMAS, row), x)
