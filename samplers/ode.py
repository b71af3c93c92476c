"""The deterministic Euler step of the flow ODE: x' = x + (sigma' - sigma) v. The `step` of diffusers' flow-match Euler scheduler."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from samplers.kernels import Step, Transition, expand

__all__ = ["Ode"]


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
