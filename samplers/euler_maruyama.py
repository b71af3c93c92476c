"""Euler-Maruyama on the reverse SDE that has the flow ODE's marginals, for any diffusion coefficient s(sigma) >= 0.

    kap  = 1 + s^2 (1 - sigma) / (2 sigma)
    mean = x (1 - s^2 D / (2 sigma)) - D v kap,   D = sigma - sigma'
    std  = s sqrt(D)

The drift is v - s^2 / 2 score with score = -(x + (1 - sigma) v) / sigma. s = 0 is the Euler step of the ODE. First order; the marginals equal the
ODE's as D -> 0 (tested on a Gaussian at 400 steps). Deviation from all released code: the coefficients are computed in float64 and then cast to
the latent's dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from samplers.kernels import Step, Transition, expand, gaussian_log_prob

__all__ = ["EulerMaruyama"]


class EulerMaruyama(ABC):
    """A subclass says what s is; the step, its gradient scale and its density are the same for all."""

    predictions = frozenset({"flow"})
    largest_noise_level = 1.0
    noise_is_bounded = False

    @abstractmethod
    def diffusion(self, step: Step) -> Tensor:
        """s [N] float64, the SDE's diffusion coefficient; proportional to ``step.noise_level``."""

    def grad_scale(self, step: Step) -> Tensor:
        """D kap [N]."""
        kap = 1 + self.diffusion(step).square() * (1 - step.sigma) / (2 * step.sigma)
        return (step.sigma - step.sigma_next) * kap

    def moments(self, x: Tensor, velocity: Tensor, step: Step) -> Transition:
        """Transition of one step.

        Args:
            x, velocity: [N, L...], the latent and the model's estimate of noise - clean there.
        Returns:
            mean [N, L...] in the dtype of x, std [N] float64.
        """
        s, length = self.diffusion(step), step.sigma - step.sigma_next
        keep = 1 - s.square() * length / (2 * step.sigma)
        mean = expand(keep, x) * x - expand(self.grad_scale(step), x) * velocity
        return Transition(mean, s * length.sqrt())

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Gaussian log-density [N] of the sampled next latent."""
        return gaussian_log_prob(x_next, transition, reduction)
