"""What every transition kernel shares: a Gaussian step density, and the table of kernels by name.

Letters: N rows, L... latent axes. Scalars of a step are tensors [N]; they broadcast over L... .
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "KERNELS",
    "PREDICTIONS",
    "Kernel",
    "Step",
    "Transition",
    "check_noise_level",
    "check_std",
    "expand",
    "gaussian_log_prob",
    "load_kernel",
    "reduce_elements",
]


class Step(NamedTuple):
    """Where a step starts and ends. Each field is float64 [N].

    Attributes:
        sigma, sigma_next: noise level before and after, sigma > sigma_next >= 0; flow time, or sqrt(1 - alphabar) of epsilon and v_prediction networks.
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
        mean: [N, L...], carries the gradient of the network.
        std: [N], without gradient; 0 for a deterministic step, which has no density.
    """

    mean: Tensor
    std: Tensor


class Kernel(Protocol):
    """One file, one kernel: ``moments`` turns a network's output into a transition, ``grad_scale`` is |d mean / d output| per row [N].

    Attributes:
        predictions: the network outputs that it understands, keys of PREDICTIONS.
        largest_noise_level: the noise levels from 0 up to here are sound.
        noise_is_bounded: True = there is no step with a larger noise level; False = there is, but it spoils the picture.
    """

    predictions: frozenset[str]
    largest_noise_level: float
    noise_is_bounded: bool

    def moments(self, x: Tensor, output: Tensor, step: Step, /) -> Transition: ...

    def grad_scale(self, step: Step) -> Tensor: ...

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"]) -> Tensor: ...


KERNELS: dict[str, str] = {
    "ode": "samplers.ode:Ode",
    "flow_sde": "samplers.flow_sde:FlowSde",
    "dance_sde": "samplers.dance_sde:DanceSde",
    "cps": "samplers.cps:Cps",
    "ddim": "samplers.ddim:Ddim",
    "sde_dpm++": "samplers.sde_dpmpp:SdeDpmpp",
}
PREDICTIONS: dict[str, str] = {"flow": "a flow velocity", "epsilon": "epsilon", "v_prediction": "v (v_prediction)"}  # key -> in words


def _kernel_class(name: str) -> Any:
    if name not in KERNELS:
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(KERNELS)}")
    module, attribute = KERNELS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def load_kernel(name: str, prediction: str = "flow") -> Kernel:
    """The kernel of that name, for a network with that output.

    Raises:
        ValueError: the name is not in KERNELS, the prediction not in PREDICTIONS, or the kernel does not understand the prediction.
    """
    cls = _kernel_class(name)
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    if prediction not in cls.predictions:
        fits = " or ".join(PREDICTIONS[known] for known in PREDICTIONS if known in cls.predictions)
        others = " or ".join(other for other in KERNELS if prediction in _kernel_class(other).predictions)
        raise ValueError(f"kernel {name} fits networks that predict {fits}; this one predicts {PREDICTIONS[prediction]}: use {others}")
    kernel: Kernel = cls(prediction) if len(cls.predictions) > 1 else cls()
    return kernel


def check_noise_level(name: str, level: float) -> str | None:
    """Whether a kernel can take stochastic steps with this noise level.

    Returns:
        None, or a warning where the level is possible but above what the kernel is good for. Flow-GRPO (arXiv:2505.05470) reports destroyed images, reward
        0, above 1 for Flow-SDE; that the same bound serves Dance-SDE is our reading.
    Raises:
        ValueError: unknown kernel, or a level that it cannot have.
    """
    kernel = _kernel_class(name)
    largest: float = kernel.largest_noise_level
    if largest == 0 and level != 0:
        raise ValueError(f"kernel {name} is deterministic: its noise level is 0, got {level:g}")
    if not math.isfinite(level) or level < 0 or (level == 0 and largest > 0) or (level > largest and kernel.noise_is_bounded):
        bound = f" and at most {largest:g}" if kernel.noise_is_bounded else ""
        raise ValueError(f"the noise level of kernel {name} must be above 0{bound}, got {level:g}")
    return f"noise level {level:g} of kernel {name}: levels above {largest:g} tend to destroy the images" if level > largest else None


def expand(scalar: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] in the dtype and on the device of ``like`` [N, L...]."""
    return scalar.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def reduce_elements(values: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """[N, L...] -> [N], mean or sum over latent elements."""
    return values.flatten(1).mean(1) if reduction == "mean" else values.flatten(1).sum(1)


def check_std(std: Tensor) -> None:
    """Raises ValueError unless every std [N] is above 0: a deterministic step has no density."""
    if not bool((std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no log-probability; train stochastic steps only")


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
    check_std(std)
    squares = ((x_next.detach() - mean) / expand(std, mean)).square()
    size = 1 if reduction == "mean" else math.prod(mean.shape[1:])
    constant = torch.log(std.to(mean)) + 0.5 * math.log(2 * math.pi)
    return -0.5 * reduce_elements(squares, reduction) - size * constant
