"""Sigma grids: equal to what diffusers' scheduler makes, values by hand, and refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from samplers.schedules import GRIDS, diffusers_grid, flux_grid, flux_shift, leading_timesteps, shift_sigma, shifted_grid, sigma_grid, vp_grid

EXACT = {"rel": 1e-12, "abs": 1e-12}
FP32 = {"rtol": 1e-6, "atol": 2e-7}  # diffusers keeps sigmas in float32


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_diffusers_grid_is_what_set_timesteps_makes(num_steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(torch.tensor(diffusers_grid(num_steps, shift)), scheduler.sigmas, **FP32)


@pytest.mark.parametrize("num_steps", [1, 2, 6, 16, 40])
def test_the_shifted_grid_is_what_set_timesteps_makes_of_a_linspace(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    torch.testing.assert_close(torch.tensor(shifted_grid(num_steps, 3.0)), scheduler.sigmas, **FP32)


@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_the_flux_grid_is_what_a_dynamic_shift_makes(num_tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=math.log(flux_shift(num_tokens)))
    torch.testing.assert_close(torch.tensor(flux_grid(6, flux_shift(num_tokens))), scheduler.sigmas, **FP32)


def test_grids_have_the_published_values():
    sd3 = [1, 0.96013, 0.91335, 0.85769, 0.79037, 0.70728, 0.60215, 0.46488, 0.27805, 0.00893, 0]
    dance = [1, 0.978, 0.955, 0.929, 0.9, 0.868, 0.833, 0.794, 0.75, 0.7, 0.643, 0.577, 0.5, 0.409, 0.3, 0.167, 0]
    flux = [1, 0.904, 0.790, 0.652, 0.484, 0.273, 0]
    assert diffusers_grid(10, 3.0) == pytest.approx(sd3, abs=5.1e-6)
    assert shifted_grid(16, 3.0) == pytest.approx(dance, abs=5.1e-4)
    assert flux_grid(6, flux_shift(1024)) == pytest.approx(flux, abs=1e-3)  # 512 px; the table's entries are rounded
    assert math.log(flux_shift(256)) == pytest.approx(0.5, **EXACT)
    assert math.log(flux_shift(4096)) == pytest.approx(1.15, **EXACT)


def test_the_shift_keeps_its_ends_and_a_shift_of_one_changes_nothing():
    assert [shift_sigma(u, 3.0) for u in (0.0, 1.0)] == [0.0, 1.0]
    assert shift_sigma(0.5, 3.0) == pytest.approx(0.75, **EXACT)
    assert shifted_grid(4, 1.0) == pytest.approx((1, 0.75, 0.5, 0.25, 0), **EXACT)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_every_grid_falls_strictly_from_one_to_zero(kind, num_steps, shift):
    grid = sigma_grid(kind, num_steps, shift)
    assert len(grid) == num_steps + 1
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in itertools.pairwise(grid))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("karras", 10, 3.0), "unknown sigma grid 'karras'; known: shifted, diffusers, flux"),
        (("shifted", 0, 3.0), "num_steps >= 1 and shift > 0, got 0 and 3.0"),
        (("shifted", 4, 0.0), "num_steps >= 1 and shift > 0, got 4 and 0.0"),
        (("shifted", 4, float("nan")), "got 4 and nan"),
    ],
)
def test_a_wrong_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sigma_grid(*arguments)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 20, 50, 999])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_vp_grid_is_what_diffusers_ddim_visits(num_steps, offset):
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    assert list(leading_timesteps(num_steps, steps_offset=offset)) == scheduler.timesteps.tolist()
    bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]]).double()
    grid = vp_grid(scheduler.alphas_cumprod.tolist(), num_steps, offset)
    torch.testing.assert_close(torch.tensor(grid, dtype=torch.float64), (1 - bars).sqrt(), rtol=1e-12, atol=1e-12)
    assert all(a > b for a, b in itertools.pairwise(grid))


def test_the_vp_grid_has_the_value_by_hand():
    # alphabar 0.96, 0.84, 0.64, 0.36 at timesteps 0 to 3; two steps visit timesteps 2 and 0, with an offset of 1 timesteps 3 and 1
    bars = [0.96, 0.84, 0.64, 0.36]
    assert vp_grid(bars, 2) == pytest.approx((0.6, 0.2, 0.0), **EXACT)
    assert vp_grid(bars, 2, steps_offset=1) == pytest.approx((0.8, 0.4, 0.0), **EXACT)


@pytest.mark.parametrize(
    ("bars", "num_steps", "offset", "message"),
    [
        ([0.9, 0.5], 0, 0, "0 steps with offset 0 do not fit into 2 training timesteps"),
        ([0.9, 0.5], 3, 0, "3 steps with offset 0 do not fit into 2"),
        ([0.9, 0.5], 2, 1, "2 steps with offset 1 do not fit into 2"),
        ([0.9, 0.5], 1, -1, "offset -1"),
        ([0.5, 0.9], 2, 0, r"alphas_cumprod must fall with the timestep, inside \[0, 1\)"),
        ([1.0, 0.5], 2, 0, "alphas_cumprod must fall"),
        ([0.9, -0.5], 2, 0, "alphas_cumprod must fall"),
        ([0.9, float("nan")], 2, 0, "alphas_cumprod must fall"),
    ],
)
def test_a_wrong_vp_grid_is_refused(bars, num_steps, offset, message):
    with pytest.raises(ValueError, match=message):
        vp_grid(bars, num_steps, offset)
