"""Flow-SDE, the kernel of Flow-GRPO, MixGRPO and G2RPO: Euler-Maruyama on the SDE that has the flow ODE's marginals.

    s    = a sqrt(sigma / (1 - sigma));  where sigma = 1, the denominator uses the grid's second sigma, the numerator does not
    kap  = 1 + s^2 (1 - sigma) / (2 sigma)
    mean = x (1 - s^2 D / (2 sigma)) - D v kap,   D = sigma - sigma'
    std  = s sqrt(D)

Consequences (tested): kap = 1 + a^2 / 2 on every step but the guarded first, where kap = 1; the first step's std is a; a = 0 is the Euler step.

Source: Flow-GRPO, arXiv:2505.05470; formulas verified in the released code (yifan123/flow_grpo, sd3_sde_with_logprob.py). First order; the marginals
equal the ODE's as D -> 0. Deviation: the coefficients are computed in float64 and then cast to the latent's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from samplers.kernels import Step, Transition, expand, gaussian_log_prob

__all__ = ["FlowSde"]


class FlowSde:
    """Noise parameter: ``a`` = ``step.noise_level`` >= 0 (0.7 for SD3, 0.8 to 0.9 for FLUX)."""

    def diffusion(self, step: Step) -> Tensor:
        """s [N], the SDE's diffusion coefficient."""
        clean = torch.where(step.sigma < 1, 1 - step.sigma, 1 - step.sigma_guard)
        return step.noise_level * (step.sigma / clean).sqrt()

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
