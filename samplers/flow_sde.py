"""Flow-SDE, the kernel of Flow-GRPO, MixGRPO and G2RPO: the Euler-Maruyama step with

    s = a sqrt(sigma / (1 - sigma));  where sigma = 1, the denominator uses the grid's second sigma, the numerator does not

Consequences (tested): kap = 1 + a^2 / 2 on every step but the guarded first, where kap = 1; the first step's std is a; a = 0 is the Euler step.

Source: Flow-GRPO, arXiv:2505.05470; formulas verified in the released code (yifan123/flow_grpo, sd3_sde_with_logprob.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.euler_maruyama import EulerMaruyama
from samplers.kernels import Step

__all__ = ["FlowSde"]


class FlowSde(EulerMaruyama):
    """Noise parameter: ``a`` = ``step.noise_level`` >= 0 (0.7 for SD3, 0.8 to 0.9 for FLUX). Above 1 the paper reports destroyed images."""

    def diffusion(self, step: Step) -> Tensor:
        """s [N], the SDE's diffusion coefficient."""
        clean = torch.where(step.sigma < 1, 1 - step.sigma, 1 - step.sigma_guard)
        return step.noise_level * (step.sigma / clean).sqrt()
