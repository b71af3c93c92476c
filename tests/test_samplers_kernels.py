"""Transition kernels against an independent float64 rewrite of the published formulas, the analytic Gaussian toy, and diffusers' schedulers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from samplers.cps import Cps
from samplers.dance_sde import DanceSde
from samplers.ddim import Ddim
from samplers.flow_sde import FlowSde
from samplers.kernels import KERNELS, PREDICTIONS, Step, Transition, check_noise_level, expand, gaussian_log_prob, load_kernel
from samplers.ode import Ode
from samplers.plans import chain_plan
from samplers.rollout import execute, sample_ode
from samplers.schedules import diffusers_grid, flux_grid, flux_shift, shifted_grid, vp_grid
from samplers.sde_dpmpp import SdeDpmpp

FP64 = {"rtol": 1e-12, "atol": 1e-12}
FP32 = {"rtol": 0.0, "atol": 1e-6}
SD3_TEN = diffusers_grid(10, 3.0)
GRIDS = {"sd3": SD3_TEN, "dance": shifted_grid(16, 3.0), "flux": flux_grid(6, flux_shift(1024)), "uniform": shifted_grid(5, 1.0)}
DATA_MEAN, DATA_STD = 1.5, 0.4  # the toy of clean data N(1.5, 0.4^2)
STOCHASTIC = [name for name in KERNELS if name != "ode"]
GAUSSIAN = [name for name in STOCHASTIC if name != "cps"]  # kernels whose log_prob is a density
SDES = {"flow_sde": (FlowSde, [0.3, 0.7, 1.1]), "dance_sde": (DanceSde, [0.3, 0.8])}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def steps(grid, noise_level):
    """All steps of a grid, one row each."""
    sigma = torch.tensor(grid, dtype=torch.float64)
    return Step(sigma[:-1], sigma[1:], torch.full_like(sigma[1:], grid[1]), torch.full_like(sigma[1:], noise_level))


def one_step(sigma, sigma_next, noise_level, guard=0.9):
    return Step(*(torch.tensor([value], dtype=torch.float64) for value in (sigma, sigma_next, guard, noise_level)))


def latents(count, shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def by_hand(x, v, x_next, sigma, sigma_next, second, a, kernel):
    """The SDE step written from its drift, with Python floats: x - D (v - s^2 / 2 score); Flow-SDE and Dance-SDE each with its paper's score."""
    length = sigma - sigma_next
    if kernel == "flow_sde":
        s = a * math.sqrt(sigma / (1 - (second if sigma == 1 else sigma)))
        score = -(x + (1 - sigma) * v) / sigma
    else:
        s = a
        score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
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
@pytest.mark.parametrize(("name", "a"), [(name, a) for name, (_, levels) in SDES.items() for a in levels])
def test_the_sdes_agree_with_the_published_formulas_in_float64(grid, name, a):
    x, v, x_next = latents(3, (len(grid) - 1, 2, 3), 0)
    kernel, step = load_kernel(name), steps(grid, a)
    transition = kernel.moments(x, v, step)
    log_prob = kernel.log_prob(x_next, transition, "mean")
    for k in range(len(grid) - 1):
        columns = zip(x[k].flatten().tolist(), v[k].flatten().tolist(), x_next[k].flatten().tolist(), strict=True)
        rows = [by_hand(*numbers, grid[k], grid[k + 1], grid[1], a, name) for numbers in columns]
        mean, std, density = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        torch.testing.assert_close(transition.mean[k].flatten(), mean, **FP64)
        torch.testing.assert_close(transition.std[k].expand(6), std, **FP64)
        torch.testing.assert_close(log_prob[k], density.mean(), rtol=1e-10, atol=1e-12)


def test_flow_sde_and_dance_sde_are_one_step_with_different_diffusions():
    assert all(getattr(FlowSde, part) is getattr(DanceSde, part) for part in ("moments", "grad_scale", "log_prob"))
    x, v = latents(2, (10, 3), 1)
    step = steps(SD3_TEN, 0.7)
    flow = FlowSde().moments(x, v, step)
    dance = DanceSde().moments(x, v, step._replace(noise_level=FlowSde().diffusion(step)))
    assert torch.equal(flow.mean, dance.mean)
    assert torch.equal(flow.std, dance.std)


def test_dance_sdes_velocity_factor_and_std_have_the_published_values():
    step = steps(SD3_TEN, 0.3)
    kap = DanceSde().grad_scale(step) / (step.sigma - step.sigma_next)
    assert kap[0].item() == pytest.approx(1.0, rel=1e-12)
    assert kap[-1].item() == pytest.approx(5.995, abs=2e-3)  # published with sigma rounded to 0.00893
    zero = torch.zeros(10, 1, dtype=torch.float64)
    torch.testing.assert_close(DanceSde().moments(zero, zero, step).std, 0.3 * (step.sigma - step.sigma_next).sqrt(), **FP64)


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


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_mean_log_probability_of_draws_is_minus_the_entropy_per_element(name):
    x, v, z = latents(3, (9, 40_000), 4)
    step = Step(*(column[:9] for column in steps(SD3_TEN, 0.7)))
    kernel = load_kernel(name)
    transition = kernel.moments(x, v, step)
    log_prob = kernel.log_prob(transition.mean + expand(transition.std, z) * z, transition, "mean")
    expected = -transition.std.log() - 0.5 * math.log(2 * math.pi) - 0.5
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=4 * math.sqrt(0.5 / 40_000))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_sum_of_every_kernel_is_the_number_of_elements_times_its_mean(name):
    x, v, x_next = latents(3, (9, 2, 3, 5), 5)
    kernel = load_kernel(name)
    transition = kernel.moments(x, v, Step(*(column[:9] for column in steps(SD3_TEN, 0.7))))
    total, average = (kernel.log_prob(x_next, transition, reduction) for reduction in ("sum", "mean"))
    torch.testing.assert_close(total, 30 * average, **FP64)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_log_probability_computed_again_in_another_batch_agrees_to_a_millionth(name):
    x, v, z = latents(3, (9, 4, 8, 8), 6, torch.float32)
    step = Step(*(column[:9] for column in steps(SD3_TEN, 0.7)))
    kernel = load_kernel(name)
    transition = kernel.moments(x, v, step)
    x_next = transition.mean + expand(transition.std, z) * z
    old = kernel.log_prob(x_next, transition, "mean")
    assert torch.equal(old, kernel.log_prob(x_next, kernel.moments(x, v, step), "mean"))
    for k in range(9):
        row = slice(k, k + 1)
        again = kernel.log_prob(x_next[row], kernel.moments(x[row], v[row], Step(*(column[row] for column in step))), "mean")
        torch.testing.assert_close(again, old[row], rtol=0, atol=1e-6)


def test_the_sum_is_the_number_of_elements_times_the_mean_and_the_true_density():
    generator = torch.Generator().manual_seed(5)
    mean, x_next = (torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    transition = Transition(mean, torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64))
    total, average = (gaussian_log_prob(x_next, transition, reduction) for reduction in ("sum", "mean"))
    torch.testing.assert_close(total, 30 * average, **FP64)
    normal = torch.distributions.Normal(mean, transition.std.view(4, 1, 1, 1))
    torch.testing.assert_close(total, normal.log_prob(x_next).sum((1, 2, 3)), **FP64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_gradient_of_the_log_probability_in_the_velocity_matches_finite_differences(name, reduction):
    x, v, x_next = latents(3, (4, 2, 2), 6)
    kernel, step = load_kernel(name), steps(GRIDS["uniform"][:5], 0.7)

    def log_prob(velocity):
        return kernel.log_prob(x_next, kernel.moments(x, velocity, step), reduction)

    assert torch.autograd.gradcheck(log_prob, v.requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_sampled_latent_is_a_constant_of_the_density():
    x_next = torch.ones(2, 3, requires_grad=True)
    mean = torch.zeros(2, 3, requires_grad=True)
    gaussian_log_prob(x_next, Transition(mean, torch.ones(2))).sum().backward()
    assert x_next.grad is None
    torch.testing.assert_close(mean.grad, torch.full((2, 3), 1 / 3))


def test_the_sampled_latent_is_a_constant_of_the_cps_score():
    x_next = torch.ones(2, 3, requires_grad=True)
    mean = torch.zeros(2, 3, requires_grad=True)
    Cps().log_prob(x_next, Transition(mean, torch.ones(2))).sum().backward()
    assert x_next.grad is None
    torch.testing.assert_close(mean.grad, torch.full((2, 3), 2 / 3))


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


def exact_toy_moments(name, num_steps, noise_level):
    """Mean and std of a kernel's samples of the toy without sampling: its mean is affine in x, its noise Gaussian. The last step is deterministic."""
    kernel, grid, mean, std = load_kernel(name), shifted_grid(num_steps, 1.0), 0.0, 1.0
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for k, sigma in enumerate(grid[:-1]):
        step = one_step(sigma, grid[k + 1], noise_level if k < num_steps - 1 else 0.0, grid[1])
        step = Step(*(column.repeat(2) for column in step))
        transition = kernel.moments(points, toy_velocity(points, step.sigma, None), step)
        offset, slope = transition.mean[0].item(), (transition.mean[1] - transition.mean[0]).item()
        mean, std = offset + slope * mean, math.hypot(slope * std, transition.std[0].item())
    return mean, std


@pytest.mark.parametrize(("name", "noise_level"), [("flow_sde", 0.7), ("dance_sde", 0.3), ("ddim", 1.0), ("sde_dpm++", 1.0)])
def test_kernels_with_a_small_step_limit_have_the_toys_moments_within_one_percent_at_four_hundred_steps(name, noise_level):
    mean, std = exact_toy_moments(name, 400, noise_level)
    assert mean == pytest.approx(DATA_MEAN, rel=0.01)
    assert std == pytest.approx(DATA_STD, rel=0.01)


@pytest.mark.parametrize(
    ("name", "noise_level", "published"),
    [
        ("ode", 0.0, [0.340, 0.387, 0.399]),
        ("flow_sde", 0.7, [0.381, 0.398, 0.400]),
        ("dance_sde", 0.3, [0.351, 0.391, 0.399]),
        ("cps", 0.8, [0.277, 0.309, 0.321]),  # coefficients-preserving is not marginal-preserving
    ],
)
def test_the_exact_stds_of_the_toy_have_the_published_values_at_10_50_and_400_steps(name, noise_level, published):
    stds = [exact_toy_moments(name, num_steps, noise_level)[1] for num_steps in (10, 50, 400)]
    assert stds == pytest.approx(published, abs=2e-3)  # published as sampled figures of three digits


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


# CPS


def test_a_cps_step_has_the_value_by_hand():
    # sin(pi / 6) = 1/2: std = 0.125; xh0 = 1 - 0.5 * 2 = 0, xh1 = 1 + 0.5 * 2 = 2; mean = 2 sqrt(0.25^2 - 0.125^2) = 0.25 sqrt(3)
    x, v = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
    mean, std = Cps().moments(x, v, one_step(0.5, 0.25, 1 / 3))
    assert std.item() == pytest.approx(0.125, rel=1e-12)
    assert mean.item() == pytest.approx(0.25 * math.sqrt(3), rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("eta", [0.1, 0.8, 1.0])
def test_cps_agrees_with_the_published_formula(grid, eta):
    x, v, x_next = latents(3, (len(grid) - 2, 2, 3), 10)
    step = Step(*(column[:-1] for column in steps(grid, eta)))
    s, after = (expand(column, x) for column in (step.sigma, step.sigma_next))
    tau = after * math.sin(eta * math.pi / 2)
    mean = (1 - after) * (x - s * v) + (after**2 - tau**2).sqrt() * (x + (1 - s) * v)
    transition = Cps().moments(x, v, step)
    torch.testing.assert_close(transition.mean, mean, **FP64)
    torch.testing.assert_close(transition.std, tau.flatten(), **FP64)
    torch.testing.assert_close(Cps().log_prob(x_next, transition), -((x_next - mean) ** 2).mean((1, 2)), **FP64)
    torch.testing.assert_close(Cps().log_prob(x_next, transition, "sum"), -((x_next - mean) ** 2).sum((1, 2)), **FP64)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
def test_cps_keeps_the_amount_of_noise_of_a_single_known_picture(eta):
    picture, noise = latents(2, (9, 4), 11)
    step = Step(*(column[:-1] for column in steps(SD3_TEN, eta)))
    s, after = expand(step.sigma, picture), expand(step.sigma_next, picture)
    mean, std = Cps().moments((1 - s) * picture + s * noise, noise - picture, step)
    kept = (mean - (1 - after) * picture) / noise  # the old noise's weight in the next latent
    torch.testing.assert_close((kept**2 + expand(std, picture) ** 2).sqrt(), after.expand(9, 4), rtol=1e-9, atol=1e-9)


def test_a_cps_log_ratio_is_two_variances_times_the_gaussian_one():
    mean, other, x_next = latents(3, (3, 5), 12)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    cps = Cps().log_prob(x_next, Transition(mean, std)) - Cps().log_prob(x_next, Transition(other, std))
    gaussian = gaussian_log_prob(x_next, Transition(mean, std)) - gaussian_log_prob(x_next, Transition(other, std))
    torch.testing.assert_close(cps, 2 * std**2 * gaussian, **FP64)


# DDIM and SDE-DPM-Solver++


def published_ddim(prediction, x, output, sigma, sigma_next, eta):
    """One step, from the clean latent and the noise, with tau^2 = eta^2 sigma'^2 / sigma^2 (sigma^2 - (alpha / alpha')^2 sigma'^2)."""
    alpha, alpha_next = (1 - s if prediction == "flow" else math.sqrt(1 - s**2) for s in (sigma, sigma_next))
    if prediction == "epsilon":
        noise = output
        clean = (x - sigma * noise) / alpha
    else:
        clean = x - sigma * output if prediction == "flow" else alpha * x - sigma * output
        noise = (x - alpha * clean) / sigma
    tau = eta * sigma_next / sigma * math.sqrt(sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2)
    return alpha_next * clean + math.sqrt(sigma_next**2 - tau**2) * noise, tau


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("eta", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.99, 0.9), (0.9, 0.2), (0.5, 0.4), (0.1, 0.01), (0.05, 0.0)])
def test_ddim_agrees_with_the_published_formula(prediction, eta, sigma, sigma_next):
    x, output = latents(2, (1, 2, 3), 13)
    mean, tau = published_ddim(prediction, x, output, sigma, sigma_next, eta)
    transition = Ddim(prediction).moments(x, output, one_step(sigma, sigma_next, eta))
    torch.testing.assert_close(transition.mean, mean, **FP64)
    assert transition.std.item() == pytest.approx(tau, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("sigma", [0.99, 0.5])
def test_ddims_variance_is_that_of_its_paper(sigma):
    after = 0.3
    bar, bar_next = 1 - sigma**2, 1 - after**2
    tau = 0.7 * math.sqrt((1 - bar_next) / (1 - bar)) * math.sqrt(1 - bar / bar_next)
    x = torch.zeros(1, 1, dtype=torch.float64)
    assert Ddim("epsilon").moments(x, x, one_step(sigma, after, 0.7)).std.item() == pytest.approx(tau, rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_ddim_step_equals_diffusers_scheduler(prediction, eta, dtype):
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, prediction_type=prediction)
    scheduler.set_timesteps(20)
    grid = vp_grid(scheduler.alphas_cumprod.tolist(), 20)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = scheduler.alphas_cumprod.to(dtype), scheduler.final_alpha_cumprod.to(dtype)
    x, output, z = latents(3, (20, 4, 4, 4), 14, dtype)
    mean, std = Ddim(prediction).moments(x, output, steps(grid, eta))
    ours = mean + expand(std, z) * z
    for k, timestep in enumerate(scheduler.timesteps.tolist()):
        theirs = scheduler.step(output[k], timestep, x[k], eta=eta, variance_noise=z[k] if eta else None).prev_sample
        torch.testing.assert_close(ours[k], theirs, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}))


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddims_gradient_scale_is_the_slope_of_the_mean_in_the_networks_output(prediction, eta):
    kernel, step = Ddim(prediction), steps((0.99, 0.7, 0.4, 0.1, 0.0), eta)
    x = torch.ones(4, 3, dtype=torch.float64)
    slope = kernel.moments(x, torch.zeros_like(x), step).mean - kernel.moments(x, torch.ones_like(x), step).mean
    torch.testing.assert_close(slope, kernel.grad_scale(step)[:, None].expand(4, 3), **FP64)
    assert kernel.grad_scale(step).gt(0).all()


def published_sde_dpmpp(x, clean, sigma, sigma_next):
    h = math.log((1 - sigma_next) / sigma_next) - math.log((1 - sigma) / sigma)
    mean = sigma_next / sigma * math.exp(-h) * x + (1 - sigma_next) * (1 - math.exp(-2 * h)) * clean
    return mean, sigma_next * math.sqrt(1 - math.exp(-2 * h)), h


@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.99, 0.9), (0.9, 0.2), (0.5, 0.4), (0.1, 0.01)])
def test_sde_dpmpp_is_the_published_step_and_ddim_and_cps_with_the_matching_noise(sigma, sigma_next):
    x, v = latents(2, (1, 2, 3), 15)
    mean, std, h = published_sde_dpmpp(x, x - sigma * v, sigma, sigma_next)
    same = one_step(sigma, sigma_next, 2 / math.pi * math.acos(math.exp(-h)))
    full = one_step(sigma, sigma_next, 1.0)
    for transition in (SdeDpmpp().moments(x, v, full), Ddim("flow").moments(x, v, full), Cps().moments(x, v, same)):
        torch.testing.assert_close(transition.mean, mean, **FP64)
        assert transition.std.item() == pytest.approx(std, rel=1e-12)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside diffusers
def test_every_sde_dpmpp_step_equals_diffusers_scheduler():
    grid = shifted_grid(12, 3.0)
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(12)
    scheduler.sigmas = torch.tensor(grid)  # our sigmas, which start at 1
    x, v, z = latents(3, (12, 4, 4, 4), 16, torch.float32)
    mean, std = SdeDpmpp().moments(x, v, steps(grid, 1.0))
    ours = mean + expand(std, z) * z
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(v[k], timestep, x[k], variance_noise=z[k], return_dict=False)[0]
        torch.testing.assert_close(ours[k], theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "sde_dpm++"])
def test_from_pure_noise_a_full_step_draws_all_noise_afresh(name):
    x, v = latents(2, (1, 5), 17)
    mean, std = load_kernel(name).moments(x, v, one_step(1.0, 0.8, 1.0))
    torch.testing.assert_close(mean, 0.2 * (x - v), **FP64)
    assert std.item() == pytest.approx(0.8, rel=1e-12)


def test_a_prediction_of_v_works_from_pure_noise_and_one_of_epsilon_is_refused_there():
    x, v = latents(2, (1, 5), 18)
    mean, std = Ddim("v_prediction").moments(x, v, one_step(1.0, 0.8, 1.0))
    torch.testing.assert_close(mean, -0.6 * v, **FP64)  # xh0 = -v, alpha' = 0.6
    assert std.item() == pytest.approx(0.8, rel=1e-12)
    for call in (lambda step: Ddim("epsilon").moments(x, v, step), lambda step: Ddim("epsilon").grad_scale(step)):
        with pytest.raises(ValueError, match="at sigma 1 a prediction of epsilon says nothing"):
            call(one_step(1.0, 0.8, 1.0))


# all kernels


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.0])
def test_no_step_of_any_grid_is_infinite_or_undefined(name, grid, noise_level):
    x, v = latents(2, (len(grid) - 1, 4), 19)
    kernel, step = load_kernel(name), steps(grid, noise_level)
    mean, std = kernel.moments(x, v, step)
    assert mean.isfinite().all()
    assert std.isfinite().all()
    assert kernel.grad_scale(step).isfinite().all()
    assert (std[:-1] > 0).all() == (noise_level > 0 and name != "ode")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_a_last_step_without_noise_lands_on_the_predicted_clean_latent(name, grid):
    x, v = latents(2, (1, 4), 20)
    mean, std = load_kernel(name).moments(x, v, one_step(grid[-2], 0.0, 0.0, grid[1]))
    torch.testing.assert_close(mean, x - grid[-2] * v, **FP64)
    assert std.item() == 0


@pytest.mark.parametrize("name", ["cps", "ddim", "sde_dpm++"])
def test_kernels_whose_noise_is_a_part_of_the_next_sigma_are_deterministic_on_the_last_step_at_any_noise_level(name):
    x, v = latents(2, (1, 4), 21)
    kernel = load_kernel(name)
    transition = kernel.moments(x, v, one_step(0.3, 0.0, 0.9))
    torch.testing.assert_close(transition.mean, x - 0.3 * v, **FP64)
    with pytest.raises(ValueError, match="no log-probability"):
        kernel.log_prob(x, transition, "mean")


@pytest.mark.parametrize("name", KERNELS)
def test_a_step_without_noise_is_the_euler_step_in_float64(name):
    x, v = latents(2, (10, 4), 22)
    torch.testing.assert_close(load_kernel(name).moments(x, v, steps(SD3_TEN, 0.0)).mean, Ode().moments(x, v, steps(SD3_TEN, 0.0)).mean, **FP64)


@pytest.mark.parametrize("name", ["cps", "ddim", "sde_dpm++"])
@pytest.mark.parametrize("noise_level", [-0.1, 1.0001, 2.0, float("nan")])
def test_a_noise_level_that_does_not_exist_is_refused_by_the_step(name, noise_level):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"lies in 0\.\.1, got"):
        load_kernel(name).moments(x, x, one_step(0.5, 0.2, noise_level))


def test_kernels_are_loaded_by_name():
    classes = {"ode": Ode, "flow_sde": FlowSde, "dance_sde": DanceSde, "cps": Cps, "ddim": Ddim, "sde_dpm++": SdeDpmpp}
    assert {name: type(load_kernel(name)) for name in KERNELS} == classes
    with pytest.raises(ValueError, match=r"unknown kernel 'euler'; known: ode, flow_sde, dance_sde, cps, ddim, sde_dpm\+\+"):
        load_kernel("euler")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_fits_every_prediction(prediction):
    assert load_kernel("ddim", prediction).prediction == prediction


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "ddim"])
@pytest.mark.parametrize(("prediction", "words"), [("epsilon", "epsilon"), ("v_prediction", r"v \(v_prediction\)")])
def test_a_kernel_for_flow_networks_refuses_others_and_names_one_that_fits(name, prediction, words):
    with pytest.raises(ValueError, match=rf"^kernel {name.replace('+', '.')} fits networks that predict a flow velocity; this one predicts {words}: use ddim$"):
        load_kernel(name, prediction)


def test_a_prediction_that_nothing_fits_is_refused():
    with pytest.raises(ValueError, match="unknown prediction 'sample'; known: flow, epsilon, v_prediction"):
        load_kernel("ddim", "sample")
    with pytest.raises(ValueError, match="Cps does not understand the prediction 'epsilon'; known: flow"):
        Cps("epsilon")


@pytest.mark.parametrize(
    ("name", "level"), [("ode", 0.0), ("flow_sde", 0.7), ("flow_sde", 1.0), ("dance_sde", 0.3), ("cps", 1.0), ("ddim", 0.01), ("sde_dpm++", 1.0)]
)
def test_a_sound_noise_level_passes_without_a_word(name, level):
    assert check_noise_level(name, level) is None


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_a_noise_level_above_one_of_the_sdes_is_a_warning(name):
    assert check_noise_level(name, 1.2) == f"noise level 1.2 of kernel {name}: levels above 1 tend to destroy the images"


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("cps", 1.5, "the noise level of kernel cps must be above 0 and at most 1, got 1.5"),
        ("ddim", 1.01, "of kernel ddim must be above 0 and at most 1, got 1.01"),
        ("sde_dpm++", 2.0, "at most 1, got 2"),
        ("ddim", 0.0, "above 0 and at most 1, got 0"),
        ("flow_sde", 0.0, "the noise level of kernel flow_sde must be above 0, got 0"),
        ("flow_sde", -0.7, "above 0, got -0.7"),
        ("dance_sde", float("inf"), "above 0, got inf"),
        ("flow_sde", float("nan"), "above 0, got nan"),
        ("ode", 0.7, "kernel ode is deterministic: its noise level is 0, got 0.7"),
        ("euler", 0.7, "unknown kernel 'euler'"),
    ],
)
def test_an_impossible_noise_level_is_refused(name, level, message):
    with pytest.raises(ValueError, match=message):
        check_noise_level(name, level)
