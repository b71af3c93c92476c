"""Deterministic steps: of the flow ODE, and of networks that predict epsilon or v, for which they are DDIM with eta 0 (samplers/ddim.py).

Euler: x' = x + (sigma' - sigma) v. The `step` of diffusers' flow-match Euler scheduler.
Heun (order 2): x' = x + (sigma' - sigma) / 2 (v(x, sigma) + v(x_e, sigma')), x_e the Euler step: the mean of x and of two Euler steps of that length.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from samplers.kernels import Kernel, Step, Transition, expand, load_kernel

__all__ = ["Ode", "heun_correction", "noiseless_kernel"]


class Ode:
    """First order; no noise and therefore no density."""

    predictions = frozenset({"flow"})
    largest_noise_level = 0.0
    noise_is_bounded = True

    def moments(self, x: Tensor, velocity: Tensor, step: Step) -> Transition:
        """mean [N, L...] = x + (sigma_next - sigma) velocity, std = 0."""
        return Transition(x + expand(step.sigma_next - step.sigma, x) * velocity, torch.zeros_like(step.sigma))

    def grad_scale(self, step: Step) -> Tensor:
        """sigma - sigma_next [N]."""
        return step.sigma - step.sigma_next

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"]) -> Tensor:
        """Raises ValueError: a deterministic step has no log-probability."""
        raise ValueError("the ode kernel is deterministic and has no log-probability; train with an SDE kernel such as flow_sde")


def heun_correction(x: Tensor, predicted: Tensor, velocity: Tensor, step: Step) -> Tensor:
    """Heun's latent at sigma_next, [N, L...] = (x + predicted + (sigma_next - sigma) velocity) / 2.

    Args:
        x: [N, L...] at sigma. predicted: [N, L...], the Euler step from there to sigma_next. velocity: [N, L...] of ``predicted`` at sigma_next.
    """
    return (x + Ode().moments(predicted, velocity, step).mean) / 2


def noiseless_kernel(prediction: str = "flow") -> Kernel:
    """The kernel of deterministic steps, all with noise level 0: Euler for flow networks, else DDIM.

    Raises:
        ValueError: the prediction is not in samplers.kernels.PREDICTIONS.
    """
    return load_kernel("ode") if prediction == "flow" else load_kernel("ddim", prediction)
