"""What every transition kernel shares: a Gaussian step density, and the table of kernels by name.

Letters: N rows, L... latent axes. Scalars of a step are tensors [N]; they broadcast over L... .
"""

from __future__ import annotations

import importlib
import math
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["KERNELS", "Kernel", "Step", "Transition", "expand", "gaussian_log_prob", "load_kernel"]


class Step(NamedTuple):
    """Where a step starts and ends. Each field is float64 [N].

    Attributes:
        sigma, sigma_next: noise level before and after, sigma > sigma_next >= 0.
        sigma_guard: the grid's second sigma, used where 1 - sigma would be 0.
        noise_level: the kernel's own noise parameter; 0 makes the step deterministic.
    """

    sigma: Tensor
    sigma_next: Tensor
    sigma_guard: Tensor
    noise_level: Tensor


class Transition(NamedTuple):
    """Density of the next latent given this one.

    Attributes:
        mean: [N, L...], carries the gradient of the velocity.
        std: [N], without gradient; 0 for a deterministic step, which has no density.
    """

    mean: Tensor
    std: Tensor


class Kernel(Protocol):
    """One file, one kernel: ``moments`` turns a velocity into a transition, ``grad_scale`` is |d mean / d velocity| per row [N]."""

    def moments(self, x: Tensor, velocity: Tensor, step: Step) -> Transition: ...

    def grad_scale(self, step: Step) -> Tensor: ...

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"]) -> Tensor: ...


KERNELS: dict[str, str] = {"ode": "samplers.ode:Ode", "flow_sde": "samplers.flow_sde:FlowSde"}


def load_kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        ValueError: the name is not in KERNELS.
    """
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    module, attribute = KERNELS[name].split(":")
    kernel: Kernel = getattr(importlib.import_module(module), attribute)()
    return kernel


def expand(scalar: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] in the dtype and on the device of ``like`` [N, L...]."""
    return scalar.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def gaussian_log_prob(x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """log N(x_next; mean, std^2) per row.

    Args:
        x_next: [N, L...], treated as a constant.
        reduction: "mean" over latent elements (nats per element, the unit of all published clip ranges) or "sum" (nats; the true density).
    Returns:
        [N], the dtype of ``mean``.
    Raises:
        ValueError: a std is 0: a deterministic step has no density.
    """
    mean, std = transition
    if not bool((std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no log-probability; train stochastic steps only")
    tau = expand(std, mean)
    squares = ((x_next.detach() - mean) / tau).square().flatten(1)
    size = 1 if reduction == "mean" else squares.shape[1]
    constant = torch.log(std.to(mean)) + 0.5 * math.log(2 * math.pi)
    return -0.5 * (squares.mean(1) if reduction == "mean" else squares.sum(1)) - size * constant
