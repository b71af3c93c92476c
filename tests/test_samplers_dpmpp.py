"""DPM-Solver++ (2M) against its formula in exp and log, diffusers' scheduler, Euler, and the exact flow of a Gaussian."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from samplers.dpmpp import dpmpp_2m_step
from samplers.kernels import Step, expand
from samplers.ode import Ode
from samplers.schedules import diffusers_grid, shifted_grid

FP64 = {"rtol": 1e-12, "atol": 1e-12}
FP32 = {"rtol": 1e-5, "atol": 1e-5}
DATA_MEAN, DATA_STD = 1.5, 0.4  # the toy of clean data N(1.5, 0.4^2)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def latents(count, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, 3, generator=generator, dtype=torch.float64) for _ in range(count)]


def toy_denoised(x, sigma):
    """E[clean | x] where clean ~ N(DATA_MEAN, DATA_STD^2), exactly."""
    gain = (1 - sigma) * DATA_STD**2 / ((1 - sigma) ** 2 * DATA_STD**2 + sigma**2)
    return DATA_MEAN + gain * (x - (1 - sigma) * DATA_MEAN)


def solve(x, grid, denoise, order=2):
    """The whole grid, with history from the second step on."""
    previous = before = None
    for sigma, sigma_next in itertools.pairwise(grid):
        here, after = (torch.full((len(x),), s, dtype=torch.float64) for s in (sigma, sigma_next))
        denoised = denoise(x, sigma)
        x = dpmpp_2m_step(x, denoised, previous, here, after, before)
        if order == 2:
            previous, before = denoised, here
    return x


def test_a_second_order_step_has_the_value_by_hand():
    # sigma 0.8 -> 0.5 -> 0.2: lam = -ln 4, 0, ln 4, so h / (lam - lam_previous) = 1 and D1 = m0 - m1 = 2
    # x' = 0.4 * 1 + 0.6 * (3 + 2 / 2) = 2.8
    x, m0, m1 = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 3.0, 1.0))
    torch.testing.assert_close(dpmpp_2m_step(x, m0, m1, column(0.5), column(0.2), column(0.8)), torch.full((1, 1), 2.8, dtype=torch.float64), **FP64)


@pytest.mark.parametrize("sigmas", [(0.9, 0.7, 0.3), (0.99, 0.98, 0.5), (0.5, 0.01, 0.001)])
def test_a_second_order_step_agrees_with_the_published_formula(sigmas):
    before, here, after = sigmas
    x, m0, m1 = latents(3, 1, 0)
    lam = [math.log((1 - s) / s) for s in sigmas]
    h, r0 = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1])
    gain = (1 - after) * (math.exp(-h) - 1)
    expected = after / here * x - gain * m0 - 0.5 * gain * (m0 - m1) / r0
    torch.testing.assert_close(dpmpp_2m_step(x, m0, m1, column(here), column(after), column(before)), expected, **FP64)


@pytest.mark.parametrize("grid", [diffusers_grid(10, 3.0), shifted_grid(16, 3.0)], ids=["sd3", "dance"])
def test_without_history_every_step_is_the_euler_step(grid):
    sigma, sigma_next = column(*grid[:-1]), column(*grid[1:])
    x, v = latents(2, len(sigma), 1)
    step = Step(sigma, sigma_next, torch.full_like(sigma, grid[1]), torch.zeros_like(sigma))
    ours = dpmpp_2m_step(x, x - expand(sigma, x) * v, None, sigma, sigma_next, None)
    torch.testing.assert_close(ours, Ode().moments(x, v, step).mean, **FP64)


@pytest.mark.parametrize("history", [True, False])
def test_a_step_to_sigma_zero_returns_the_denoised_latent(history):
    x, m0, m1 = latents(3, 2, 2)
    sigma, zero, before = column(0.3, 0.9), column(0.0, 0.0), column(0.6, 1.0)
    ours = dpmpp_2m_step(x, m0, m1 if history else None, sigma, zero, before if history else None)
    assert torch.equal(ours, m0)


@pytest.mark.parametrize(("before", "here", "after"), [(1.0, 1.0, 0.9), (1.0, 0.9, 0.5), (1.0, 0.5, 0.0), (0.7, 0.5, 0.0), (1.0, 1.0, 0.0)])
def test_where_lambda_is_infinite_the_step_is_of_first_order(before, here, after):
    x, m0, m1 = latents(3, 1, 3)
    ours = dpmpp_2m_step(x, m0, m1, column(here), column(after), column(before))
    assert torch.equal(ours, dpmpp_2m_step(x, m0, None, column(here), column(after), None))
    assert ours.isfinite().all()


def test_rows_without_history_ignore_whatever_stands_in_its_place():
    x, m0, m1 = latents(3, 3, 4)
    sigma, after, before = column(0.5, 0.5, 0.5), column(0.2, 0.2, 0.2), column(0.8, float("nan"), 0.8)
    m1[1] = float("nan")
    m1[2] = float("inf")
    ours = dpmpp_2m_step(x, m0, m1, sigma, after, before, has_history=torch.tensor([True, False, False]))
    torch.testing.assert_close(ours[:1], dpmpp_2m_step(x[:1], m0[:1], m1[:1], sigma[:1], after[:1], before[:1]), **FP64)
    assert torch.equal(ours[1:], dpmpp_2m_step(x[1:], m0[1:], None, sigma[1:], after[1:], None))
    assert not torch.allclose(ours[0], dpmpp_2m_step(x, m0, None, sigma, after, None)[0])


def test_a_history_without_its_sigma_is_refused():
    x, m0, m1 = latents(3, 1, 5)
    with pytest.raises(ValueError, match="come together"):
        dpmpp_2m_step(x, m0, m1, column(0.5), column(0.2), None)
    with pytest.raises(ValueError, match="come together"):
        dpmpp_2m_step(x, m0, None, column(0.5), column(0.2), column(0.8))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("grid", [shifted_grid(8, 3.0), diffusers_grid(10, 3.0)], ids=["shifted", "sd3"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_whole_path_equals_diffusers_scheduler(grid, order):
    scheduler = DPMSolverMultistepScheduler(solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = torch.tensor(grid)  # our sigmas, which start at 1
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(6))
    x = noise
    for k, timestep in enumerate(scheduler.timesteps):
        velocity = (x - toy_denoised(x, grid[k])) / grid[k]
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    ours = solve(noise, grid, toy_denoised, order)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, x, **FP32)


def exact(noise, sigma):
    """Where the flow of the toy takes each noise."""
    return (1 - sigma) * DATA_MEAN + math.sqrt((1 - sigma) ** 2 * DATA_STD**2 + sigma**2) * noise


def errors(counts, order, first=1.0, last=0.0):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    grids = [[first + (last - first) * k / n for k in range(n)] + [last] for n in counts]
    return [(solve(exact(noise, first), grid, toy_denoised, order) - exact(noise, last)).abs().max().item() for grid in grids]


def slope(counts, values):
    return np.polyfit(np.log(counts), np.log(values), 1)[0]


@pytest.mark.parametrize(("order", "expected", "tolerance"), [(1, -1.0, 0.05), (2, -2.0, 0.1)])
def test_the_error_on_the_toy_falls_with_the_order_of_the_solver(order, expected, tolerance):
    counts = [20, 40, 80, 160, 320]
    assert slope(counts, errors(counts, order, 0.9, 0.1)) == pytest.approx(expected, abs=tolerance)


def test_between_pure_noise_and_data_the_order_is_almost_two():
    # lambda is infinite at both ends: the steps beside them are of lower order and leave a factor log T
    counts = [160, 320, 640, 1280]
    euler, ours = errors(counts, 1), errors(counts, 2)
    assert slope(counts, euler) == pytest.approx(-1.0, abs=0.05)
    assert -2.0 < slope(counts, ours) < -1.75
    assert all(b < a / 8 for a, b in zip(euler, ours, strict=True))
