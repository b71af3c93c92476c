"""Dance-SDE, the kernel of DanceGRPO: the Euler-Maruyama step with a constant diffusion coefficient s = eta.

Consequences (tested): std = eta sqrt(D); kap = 1 + eta^2 (1 - sigma) / (2 sigma) grows without bound as sigma -> 0 (1 at sigma = 1, where no guard is
needed; 5.995 on the last step of SD3's 10-step grid at eta = 0.3).

Source: DanceGRPO, arXiv:2505.07818; the drift verified in copies of the released function (`dance_grpo_step`), which writes the same mean with
score = -(x - (1 - sigma) xh0) / sigma^2. Deviation: one of those copies, MixGRPO's, has no normalisation constants in its log-probability; ours has.
"""

from __future__ import annotations

from torch import Tensor

from samplers.euler_maruyama import EulerMaruyama
from samplers.kernels import Step

__all__ = ["DanceSde"]


class DanceSde(EulerMaruyama):
    """Noise parameter: ``eta`` = ``step.noise_level`` >= 0 (0.3 for FLUX)."""

    def diffusion(self, step: Step) -> Tensor:
        """s [N] = eta."""
        return step.noise_level
