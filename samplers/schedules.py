"""Sigma grids: the noise levels that a sampler visits, from 1 (noise) down to 0 (clean). Plain floats, made once on the CPU.

Sources: diffusers FlowMatchEulerDiscreteScheduler (the `diffusers` grid repeats what its `set_timesteps(N)` does, including shifting twice);
DanceGRPO and its family (`shifted`); the FLUX pipeline (`flux`); diffusers DDIMScheduler (`vp_grid`). Checked against diffusers in tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

__all__ = ["GRIDS", "diffusers_grid", "flux_grid", "flux_shift", "leading_timesteps", "shift_sigma", "shifted_grid", "sigma_grid", "vp_grid"]

Grid = tuple[float, ...]


def shift_sigma(u: float, shift: float) -> float:
    """SD3's time shift f(s, u) = s u / (1 + (s - 1) u); f(1, u) = u, and f keeps 0 and 1."""
    return shift * u / (1.0 + (shift - 1.0) * u)


def shifted_grid(num_steps: int, shift: float) -> Grid:
    """f(shift, linspace(1, 0, T + 1)): what diffusers makes when it is given ``sigmas=linspace(1, 1/T, T)``, followed by 0."""
    return tuple(shift_sigma(1.0 - k / num_steps, shift) for k in range(num_steps)) + (0.0,)


def diffusers_grid(num_steps: int, shift: float, num_train_timesteps: int = 1000) -> Grid:
    """The grid of diffusers' ``set_timesteps(T)`` with a static shift.

    Its constructor shifts the training grid and keeps the smallest sigma f(s, 1/1000); set_timesteps spaces T values from 1 to that sigma and
    shifts them a second time, then appends 0. For shift 3 and T = 10 the last step has length 0.0089.
    """
    smallest = shift_sigma(1.0 / num_train_timesteps, shift)
    if num_steps == 1:
        return (1.0, 0.0)
    spaced = (1.0 + k * (smallest - 1.0) / (num_steps - 1) for k in range(num_steps))
    return tuple(shift_sigma(u, shift) for u in spaced) + (0.0,)


def flux_shift(num_tokens: int) -> float:
    """exp(mu) with FLUX's mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (L - 256) for L packed image tokens."""
    return math.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (num_tokens - 256))


def flux_grid(num_steps: int, shift: float) -> Grid:
    """exp(mu) / (exp(mu) + 1/u - 1) at u = linspace(1, 1/T, T), then 0. Equal to `shifted_grid` with shift = exp(mu); see `flux_shift`."""
    return shifted_grid(num_steps, shift)


GRIDS: dict[str, Callable[[int, float], Grid]] = {"shifted": shifted_grid, "diffusers": diffusers_grid, "flux": flux_grid}


def sigma_grid(kind: str, num_steps: int, shift: float) -> Grid:
    """T + 1 strictly decreasing sigmas from 1 to 0.

    Raises:
        ValueError: unknown kind, num_steps < 1 or shift <= 0.
    """
    if kind not in GRIDS:
        raise ValueError(f"unknown sigma grid {kind!r}; known: {', '.join(GRIDS)}")
    if num_steps < 1 or not shift > 0:
        raise ValueError(f"a sigma grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    return GRIDS[kind](num_steps, shift)


def leading_timesteps(num_steps: int, num_train_timesteps: int = 1000, steps_offset: int = 0) -> tuple[int, ...]:
    """The T timesteps of diffusers' DDIMScheduler with "leading" spacing, falling: multiples of floor(num_train_timesteps / T), plus the offset.

    Args:
        steps_offset: of the model's scheduler config; 0 is diffusers' default, Stable Diffusion 1.5 has 1.
    Raises:
        ValueError: num_steps < 1, or a timestep that the training did not have.
    """
    ratio = num_train_timesteps // max(num_steps, 1)
    if num_steps < 1 or ratio < 1 or steps_offset < 0 or (num_steps - 1) * ratio + steps_offset >= num_train_timesteps:
        raise ValueError(f"{num_steps} steps with offset {steps_offset} do not fit into {num_train_timesteps} training timesteps")
    return tuple(k * ratio + steps_offset for k in reversed(range(num_steps)))


def vp_grid(alphas_cumprod: Sequence[float], num_steps: int, steps_offset: int = 0) -> Grid:
    """sigma = sqrt(1 - alphabar) at the `leading_timesteps`, then 0: T + 1 falling sigmas for networks that predict epsilon or v.

    The first sigma is below 1 unless the schedule ends in pure noise. Deviation: where the scheduler has ``set_alpha_to_one=False``, its last step ends at
    alphabar_0 (sigma 0.03 for Stable Diffusion 1.5); ours ends at 0, on the predicted clean latent.

    Args:
        alphas_cumprod: alphabar of each training timestep, falling, in [0, 1).
    Raises:
        ValueError: alphas_cumprod is something else, or the steps do not fit into it.
    """
    values = [float(alphas_cumprod[t]) for t in leading_timesteps(num_steps, len(alphas_cumprod), steps_offset)]
    if not all(a < b for a, b in itertools.pairwise([*values, 1.0])) or values[0] < 0:
        raise ValueError("alphas_cumprod must fall with the timestep, inside [0, 1)")
    return tuple(math.sqrt(1.0 - alpha_bar) for alpha_bar in values) + (0.0,)
