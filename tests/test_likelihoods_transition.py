"""The likelihood of SDE steps: what a micro-batch selects, and that sharing rows changes no number and no gradient."""

import math

import forests
import pytest
import torch
from torch import nn

from flowrl.core.objectives import clipped_surrogate
from flowrl.core.regularizers import gaussian_kl
from flowrl.likelihoods.transition import TransitionLikelihood, select_rows
from flowrl.types import Decisions
from samplers.forest import select_edges
from samplers.rollout import execute
from samplers.schedules import shifted_grid

SIGMAS = shifted_grid(5, 3.0)
SHAPE = (2, 4)
PROMPT_ROWS = torch.tensor([4, 1, 3])
GROUPS, GROUP_SIZE = 3, 4


class Network(nn.Module):
    """A small network in float64 that counts its rows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(0.3 * torch.randn(8, 16, generator=generator, dtype=torch.float64))
        self.time = nn.Parameter(torch.randn(16, generator=generator, dtype=torch.float64))
        self.prompt = nn.Parameter(torch.randn(5, 16, generator=generator, dtype=torch.float64))
        self.last = nn.Parameter(0.3 * torch.randn(16, 8, generator=generator, dtype=torch.float64))
        self.rows = 0

    def forward(self, x, sigma, prompt_row):
        self.rows += len(x)
        hidden = torch.tanh(x.flatten(1) @ self.first + sigma[:, None] * self.time + self.prompt[prompt_row])
        return (hidden @ self.last).view_as(x)


PLANS = {
    "chain": forests.chain(sigmas=SIGMAS),
    "chain, shared noise": forests.chain(sigmas=SIGMAS, same_noise=True),
    "window": forests.window(1, 2, sigmas=SIGMAS),
    "window, shared noise": forests.window(1, 2, sigmas=SIGMAS, same_noise=True),
    "tree": forests.tree({0: 2, 2: 2}, noise={0: 0.5, 1: 0.6, 2: 0.9}, sigmas=SIGMAS, sibling_scale=4.0),
    "granular": forests.granular((0, 1), (1, 2), group_size=4, sigmas=SIGMAS, noise_level=[0.7, 0.5]),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def roll_out(network, plan, dtype=torch.float64):
    generators = [torch.Generator().manual_seed(g) for g in range(GROUPS)]
    return execute(network, plan, PROMPT_ROWS, generators, SHAPE, device=torch.device("cpu"), dtype=dtype)


def moved(network):
    """The network after an update, so that ratios differ from 1 and some are clipped."""
    other = Network()
    other.load_state_dict(network.state_dict())
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return other


def shared_gradient(network, reference, rollout, advantages, chunk):
    """Gradient of the update as the trainer forms it: one row for all siblings, rows in micro-batches."""
    likelihood = TransitionLikelihood("flow_sde")
    network.zero_grad()
    for rows in torch.arange(len(rollout.row_sigma)).split(chunk):
        batch = select_rows(rollout, rows, PROMPT_ROWS)
        out = likelihood(network, batch)
        with torch.no_grad():
            ref = reference(batch.x, batch.sigma, batch.prompt_row)
        ref_velocity, ref_transition = likelihood.transition(batch, ref)
        columns = (out.log_prob, rollout.edge_old_log_prob[batch.edge], advantages[batch.edge], torch.ones(len(batch.edge), dtype=torch.bool))
        loss = clipped_surrogate(Decisions(*(column[:, None] for column in columns)), clip_low=1e-3, clip_high=1e-3).loss[:, 0]
        kl = gaussian_kl(
            "exact_mean",
            mean=out.transition.mean,
            ref_mean=ref_transition.mean,
            velocity=out.edge_velocity,
            ref_velocity=ref_velocity,
            std=out.transition.std,
            length=batch.step.sigma - batch.step.sigma_next,
        )
        (loss + 0.1 * kl).sum().backward()
    return [p.grad.clone() for p in network.parameters()]


def naive_gradient(network, reference, rollout, advantages, edges=None):
    """One forward and one backward of one row for every decision (or for some), in float64, from the formulas."""
    network.zero_grad()
    for e in range(len(rollout.edge_row)) if edges is None else edges:
        a = float(rollout.edge_noise_level[e])
        row = int(rollout.edge_row[e])
        x, sigma, sigma_next = rollout.row_x[row][None], float(rollout.edge_sigma[e]), float(rollout.edge_sigma_next[e])
        arguments = (x, torch.tensor([sigma], dtype=torch.float64), PROMPT_ROWS[rollout.row_group[row]][None])
        s = a * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
        length = sigma - sigma_next

        def mean(v, x=x, s=s, sigma=sigma, length=length):
            return x * (1 - s**2 * length / (2 * sigma)) - length * v * (1 + s**2 * (1 - sigma) / (2 * sigma))

        std = s * math.sqrt(length)
        ours, theirs = mean(network(*arguments)), mean(reference(*arguments).detach())
        log_prob = (-((rollout.edge_x_next[e] - ours) ** 2) / (2 * std**2)).mean() - math.log(std) - 0.5 * math.log(2 * math.pi)
        ratio = torch.exp(log_prob - rollout.edge_old_log_prob[e])
        loss = torch.maximum(-advantages[e] * ratio, -advantages[e] * ratio.clamp(1 - 1e-3, 1 + 1e-3))
        (loss + 0.1 * (ours - theirs).square().mean() / (2 * std**2)).backward()
    return [p.grad.clone() for p in network.parameters()]


def assert_equal_gradients(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        scale = other.abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(mine / scale, other / scale, rtol=0, atol=1e-6)


@each_plan
def test_the_gradient_of_shared_rows_is_that_of_one_row_per_decision(plan):
    behaviour = Network()
    rollout = roll_out(behaviour, plan)
    advantages = torch.randn(len(rollout.edge_row), generator=torch.Generator().manual_seed(1))
    network = moved(behaviour)
    naive = naive_gradient(network, behaviour, rollout, advantages)
    for chunk in (1, 5, 1000):
        network.rows = 0
        shared = shared_gradient(network, behaviour, rollout, advantages, chunk)
        assert network.rows == len(rollout.row_sigma)
        assert_equal_gradients(shared, naive)


@each_plan
def test_the_gradient_of_selected_decisions_is_that_of_one_row_for_each_of_them(plan):
    behaviour = Network()
    rollout = roll_out(behaviour, plan)
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(len(rollout.edge_row), generator=generator) < 0.4
    advantages = torch.randn(len(rollout.edge_row), generator=generator)
    network = moved(behaviour)
    naive = naive_gradient(network, behaviour, rollout, advantages, [e for e in range(len(keep)) if keep[e]])
    chosen = select_edges(rollout, keep)
    network.rows = 0
    shared = shared_gradient(network, behaviour, chosen, advantages[keep], 5)
    assert network.rows == len(rollout.edge_row[keep].unique())
    assert_equal_gradients(shared, naive)
    nothing = torch.where(keep, advantages, 0.0)  # a decision that is left out is not one with advantage 0: that one keeps its KL
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(shared, shared_gradient(network, behaviour, rollout, nothing, 5), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_plan
def test_the_ratio_after_a_replay_is_one(plan, dtype):
    network = Network().to(dtype)

    def velocity(x, sigma, prompt_row):
        return network(x, sigma.to(dtype), prompt_row)

    rollout = roll_out(velocity, plan, dtype)
    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), PROMPT_ROWS)
    log_prob = TransitionLikelihood("flow_sde")(velocity, batch).log_prob
    assert log_prob.dtype == torch.float32
    assert (log_prob - rollout.edge_old_log_prob).abs().max() < 1e-6


def test_siblings_come_with_their_shared_row():
    rollout = roll_out(Network(), PLANS["window, shared noise"])  # 5 rows a group: the branching one with 4 decisions, then 4 with one each
    batch = select_rows(rollout, torch.tensor([5]), PROMPT_ROWS)
    assert batch.edge.tolist() == [8, 9, 10, 11]
    assert batch.edge_row.tolist() == [0, 0, 0, 0]
    assert batch.prompt_row.tolist() == [1]
    torch.testing.assert_close(batch.x[0], rollout.row_x[5])
    torch.testing.assert_close(batch.x_next, rollout.edge_x_next[8:12])
    assert batch.sigma.tolist() == [SIGMAS[1]]
    assert batch.step.sigma.tolist() == [SIGMAS[1]] * 4
    assert batch.step.sigma_next.tolist() == [SIGMAS[2]] * 4
    assert batch.step.sigma_guard.tolist() == [SIGMAS[1]] * 4
    assert batch.step.noise_level.tolist() == [0.7] * 4


@each_plan
def test_rows_in_any_order_give_each_decision_the_same_log_probability(plan):
    rollout = roll_out(Network(), plan)
    network, likelihood = moved(Network()), TransitionLikelihood("flow_sde", "sum")
    everything = torch.arange(len(rollout.row_sigma))
    ordered = likelihood(network, select_rows(rollout, everything, PROMPT_ROWS)).log_prob
    found = torch.full_like(ordered, math.nan)
    for rows in everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(2))].split(4):
        batch = select_rows(rollout, rows, PROMPT_ROWS)
        found[batch.edge] = likelihood(network, batch).log_prob
    torch.testing.assert_close(found, ordered, rtol=1e-6, atol=1e-6)


@each_plan
def test_micro_batches_cover_every_decision_once(plan):
    rollout = roll_out(Network(), plan)
    edges = torch.cat([select_rows(rollout, rows, PROMPT_ROWS).edge for rows in torch.arange(len(rollout.row_sigma)).split(7)])
    assert edges.sort().values.tolist() == list(range(len(rollout.edge_row)))


def test_the_output_holds_a_velocity_for_each_row_and_for_each_decision():
    rollout = roll_out(Network(), PLANS["window, shared noise"])
    network = Network()
    batch = select_rows(rollout, torch.arange(5), PROMPT_ROWS)
    out = TransitionLikelihood("flow_sde")(network, batch)
    assert out.velocity.shape == (5, *SHAPE)
    torch.testing.assert_close(out.edge_velocity, out.velocity[[0, 0, 0, 0, 1, 2, 3, 4]])
    assert out.transition.mean.shape == (8, *SHAPE)
    assert out.transition.mean.requires_grad
    assert not out.transition.std.requires_grad


def test_the_sum_reduction_is_the_number_of_elements_times_the_mean():
    rollout = roll_out(Network(), PLANS["chain"])
    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), PROMPT_ROWS)
    total, average = (TransitionLikelihood("flow_sde", reduction)(Network(), batch).log_prob for reduction in ("sum", "mean"))
    torch.testing.assert_close(total, 8 * average, rtol=1e-5, atol=1e-5)
