"""Transition kernels against an independent float64 rewrite of the published formulas, the analytic Gaussian toy, and diffusers' Euler step."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from samplers.flow_sde import FlowSde
from samplers.kernels import KERNELS, Step, Transition, expand, gaussian_log_prob, load_kernel
from samplers.ode import Ode
from samplers.plans import chain_plan
from samplers.rollout import execute, sample_ode
from samplers.schedules import diffusers_grid, flux_grid, flux_shift, shifted_grid

FP64 = {"rtol": 1e-12, "atol": 1e-12}
FP32 = {"rtol": 0.0, "atol": 1e-6}
SD3_TEN = diffusers_grid(10, 3.0)
GRIDS = {"sd3": SD3_TEN, "dance": shifted_grid(16, 3.0), "flux": flux_grid(6, flux_shift(1024)), "uniform": shifted_grid(5, 1.0)}
DATA_MEAN, DATA_STD = 1.5, 0.4  # the toy of clean data N(1.5, 0.4^2)


def steps(grid, noise_level):
    """All steps of a grid, one row each."""
    sigma = torch.tensor(grid, dtype=torch.float64)
    return Step(sigma[:-1], sigma[1:], torch.full_like(sigma[1:], grid[1]), torch.full_like(sigma[1:], noise_level))


def by_hand(x, v, x_next, sigma, sigma_next, second, a):
    """The SDE step written from its drift, with Python floats: x - D (v + s^2 / (2 sigma) (x + (1 - sigma) v))."""
    length = sigma - sigma_next
    s = a * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
    score = -(x + (1 - sigma) * v) / sigma
    mean = x - length * (v - s**2 / 2 * score)
    std = s * math.sqrt(length)
    log_prob = -((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return mean, std, log_prob


def toy_velocity(x, sigma, prompt_row):
    """E[noise - clean | x] where clean ~ N(DATA_MEAN, DATA_STD^2), exactly."""
    s = expand(sigma, x)
    residual = x - (1 - s) * DATA_MEAN
    gain = (s - (1 - s) * DATA_STD**2) / ((1 - s) ** 2 * DATA_STD**2 + s**2)
    return gain * residual - DATA_MEAN


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("a", [0.3, 0.7, 1.1])
def test_flow_sde_agrees_with_the_published_formulas_in_float64(grid, a):
    generator = torch.Generator().manual_seed(0)
    x, v, x_next = (torch.randn(len(grid) - 1, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    kernel, step = FlowSde(), steps(grid, a)
    transition = kernel.moments(x, v, step)
    log_prob = kernel.log_prob(x_next, transition, "mean")
    for k in range(len(grid) - 1):
        columns = zip(x[k].flatten().tolist(), v[k].flatten().tolist(), x_next[k].flatten().tolist(), strict=True)
        rows = [by_hand(*numbers, grid[k], grid[k + 1], grid[1], a) for numbers in columns]
        mean, std, density = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        torch.testing.assert_close(transition.mean[k].flatten(), mean, **FP64)
        torch.testing.assert_close(transition.std[k].expand(6), std, **FP64)
        torch.testing.assert_close(log_prob[k], density.mean(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_first_std_is_a_on_every_grid(grid):
    step = steps(grid, 0.7)
    zero = torch.zeros(len(grid) - 1, 1, dtype=torch.float64)
    assert FlowSde().moments(zero, zero, step).std[0].item() == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_velocity_factor_is_one_plus_half_a_squared_after_the_guarded_first_step(grid):
    step = steps(grid, 0.8)
    kap = FlowSde().grad_scale(step) / (step.sigma - step.sigma_next)
    assert kap[0].item() == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(kap[1:], torch.full_like(kap[1:], 1.32), **FP64)


def test_a_first_step_over_several_grid_points_is_still_guarded_by_the_second():
    step = Step(*(torch.tensor([value], dtype=torch.float64) for value in (1.0, 0.5, 0.9, 0.7)))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert FlowSde().moments(zero, zero, step).std.item() == pytest.approx(0.7 * math.sqrt(0.5 / 0.1), rel=1e-12)


def test_the_stds_on_sd3s_grid_have_the_published_values():
    zero = torch.zeros(10, 1, dtype=torch.float64)
    std = FlowSde().moments(zero, zero, steps(SD3_TEN, 0.7)).std
    assert std.tolist() == pytest.approx([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063], abs=5.1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_scale_is_the_slope_of_the_mean_in_the_velocity(kernel):
    step = steps(SD3_TEN, 0.7)
    x = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loaded = load_kernel(kernel)
    slope = loaded.moments(x, torch.zeros_like(x), step).mean - loaded.moments(x, torch.ones_like(x), step).mean
    torch.testing.assert_close(slope, loaded.grad_scale(step)[:, None].expand(10, 3), **FP64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_without_noise_equals_diffusers_euler_step(kernel):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(2)
    x, v = torch.randn(10, 4, 4, 4, generator=generator), torch.randn(10, 4, 4, 4, generator=generator)
    transition = load_kernel(kernel).moments(x, v, steps(SD3_TEN, 0.0))
    for k, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(v[k], timestep, x[k]).prev_sample
        torch.testing.assert_close(transition.mean[k], expected, **FP32)
    assert transition.std.eq(0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_deterministic_step_has_no_log_probability(kernel):
    x = torch.zeros(10, 2)
    loaded = load_kernel(kernel)
    with pytest.raises(ValueError, match="no log-probability"):
        loaded.log_prob(x, loaded.moments(x, x, steps(SD3_TEN, 0.0)), "mean")


def test_one_deterministic_row_among_stochastic_ones_is_refused():
    with pytest.raises(ValueError, match="std 0"):
        gaussian_log_prob(torch.zeros(2, 3), Transition(torch.zeros(2, 3), torch.tensor([0.5, 0.0])))


def test_twenty_thousand_draws_of_the_executor_have_the_declared_mean_and_std():
    count = 20_000
    sigmas = (1.0, 0.6, 0.3)
    plan = chain_plan(sigmas, 1, noise_level=0.5, train_fraction=0.5, same_noise=False, kernel="flow_sde")
    rollout = execute(
        lambda x, s, p: x * 0.25, plan, torch.zeros(1, dtype=torch.int64), [torch.Generator().manual_seed(3)], (count,), device=torch.device("cpu")
    )
    step = Step(rollout.edge_sigma, rollout.edge_sigma_next, rollout.edge_sigma_guard, rollout.edge_noise_level)
    mean, std = FlowSde().moments(rollout.row_x, rollout.row_x * 0.25, step)
    z = (rollout.edge_x_next - mean) / std.item()
    assert z.mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(count))
    assert z.std().item() == pytest.approx(1.0, abs=4 / math.sqrt(2 * count))
    assert (z * rollout.row_x).mean().item() == pytest.approx(0.0, abs=4 / math.sqrt(count))  # independent of the state


def test_the_mean_log_probability_of_draws_is_minus_the_entropy_per_element():
    generator = torch.Generator().manual_seed(4)
    x, v, z = (torch.randn(9, 40_000, generator=generator, dtype=torch.float64) for _ in range(3))
    step = Step(*(column[:9] for column in steps(SD3_TEN, 0.7)))
    transition = FlowSde().moments(x, v, step)
    log_prob = FlowSde().log_prob(transition.mean + expand(transition.std, z) * z, transition, "mean")
    expected = -transition.std.log() - 0.5 * math.log(2 * math.pi) - 0.5
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=4 * math.sqrt(0.5 / 40_000))


def test_the_sum_is_the_number_of_elements_times_the_mean_and_the_true_density():
    generator = torch.Generator().manual_seed(5)
    mean, x_next = (torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    transition = Transition(mean, torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64))
    total, average = (gaussian_log_prob(x_next, transition, reduction) for reduction in ("sum", "mean"))
    torch.testing.assert_close(total, 30 * average, **FP64)
    normal = torch.distributions.Normal(mean, transition.std.view(4, 1, 1, 1))
    torch.testing.assert_close(total, normal.log_prob(x_next).sum((1, 2, 3)), **FP64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_the_log_probability_in_the_velocity_matches_finite_differences(reduction):
    generator = torch.Generator().manual_seed(6)
    x, v, x_next = (torch.randn(4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    kernel, step = FlowSde(), steps(GRIDS["uniform"][:5], 0.7)

    def log_prob(velocity):
        return kernel.log_prob(x_next, kernel.moments(x, velocity, step), reduction)

    assert torch.autograd.gradcheck(log_prob, v.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_sampled_latent_is_a_constant_of_the_density():
    x_next = torch.ones(2, 3, requires_grad=True)
    mean = torch.zeros(2, 3, requires_grad=True)
    gaussian_log_prob(x_next, Transition(mean, torch.ones(2))).sum().backward()
    assert x_next.grad is None
    torch.testing.assert_close(mean.grad, torch.full((2, 3), 1 / 3))


def sample_toy(num_steps, noise_level, count, seed):
    """Moments of Flow-SDE samples of the toy; the elements of one latent are independent samples."""
    plan = chain_plan(shifted_grid(num_steps, 1.0), 1, noise_level=noise_level, train_fraction=1.0, same_noise=False, kernel="flow_sde")
    generators = [torch.Generator().manual_seed(seed)]
    rollout = execute(toy_velocity, plan, torch.zeros(1, dtype=torch.int64), generators, (count,), device=torch.device("cpu"), dtype=torch.float64)
    return rollout.leaves.mean().item(), rollout.leaves.std().item()


def test_flow_sde_samples_the_toys_moments_within_one_percent_at_four_hundred_steps():
    # standard errors with 100,000 samples: mean 0.0013 (0.08 %), std 0.0009 (0.22 %)
    mean, std = sample_toy(400, 0.7, 100_000, 7)
    assert mean == pytest.approx(DATA_MEAN, rel=0.01)
    assert std == pytest.approx(DATA_STD, rel=0.01)


@pytest.mark.parametrize(("num_steps", "published"), [(10, 0.381), (50, 0.398)])
def test_the_toys_std_at_few_steps_has_the_published_value(num_steps, published):
    assert sample_toy(num_steps, 0.7, 100_000, 8)[1] == pytest.approx(published, abs=0.004)


def test_euler_converges_with_order_one_on_the_toy():
    # the exact flow maps noise z to DATA_MEAN + DATA_STD z
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    row = torch.zeros(9, dtype=torch.int64)
    counts = [20, 40, 80, 160, 320]
    errors = [(sample_ode(toy_velocity, noise, shifted_grid(n, 1.0), row) - (DATA_MEAN + DATA_STD * noise)).abs().max().item() for n in counts]
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.05)
    assert errors[-1] < 0.01


@pytest.mark.parametrize(("num_steps", "published"), [(10, 0.340), (50, 0.387), (400, 0.399)])
def test_eulers_std_on_the_toy_has_the_published_value(num_steps, published):
    # Euler on the toy is affine in the noise: its std is the slope
    ends = sample_ode(toy_velocity, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), shifted_grid(num_steps, 1.0), torch.zeros(2, dtype=torch.int64))
    assert ((ends[1] - ends[0]) / 2).item() == pytest.approx(published, abs=1.1e-3)  # published as a sampled figure of three digits


def test_kernels_are_loaded_by_name():
    assert isinstance(load_kernel("ode"), Ode)
    assert isinstance(load_kernel("flow_sde"), FlowSde)
    with pytest.raises(ValueError, match="unknown kernel 'euler'; known: ode, flow_sde"):
        load_kernel("euler")
