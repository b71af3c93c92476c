"""CPS, coefficients-preserving sampling: a DDIM step for flow networks whose new noise is a fixed part of sigma'.

    mean = (1 - sigma') xh0 + sqrt(sigma'^2 - tau^2) xh1,   tau = sigma' sin(eta pi / 2)
    log_prob = -(x' - mean)^2, averaged or summed over latent elements

The noise in x' amounts to sigma' whatever eta is, so the picture stays clean at any eta. It is of order 1 per step, not sqrt(D): there is no limiting SDE,
and the marginals are not the ODE's. A step to sigma' = 0 has std 0 and lands on xh0.

Source: arXiv:2509.05952; both formulas verified in public copies of the released code (`sde_type == "cps"`). Its log-probability leaves out the constants
AND the factor 1 / (2 tau^2); clip ranges published for CPS fit this scale, on which a log-ratio is 2 tau^2 times the Gaussian one.
Deviation: coefficients in float64, sqrt(sigma'^2 - tau^2) written as sigma' cos(eta pi / 2), which cannot go below 0.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from samplers.ddim import Ddim
from samplers.kernels import Step, Transition, check_std, reduce_elements

__all__ = ["Cps"]


class Cps(Ddim):
    """Noise parameter: ``eta`` = ``step.noise_level`` in [0, 1] (0.8 for SD3 and FLUX); 0 is the Euler step."""

    predictions = frozenset({"flow"})

    def split(self, step: Step) -> tuple[Tensor, Tensor]:
        """sin and cos [N] of eta pi / 2."""
        angle = step.noise_level * (math.pi / 2)
        return angle.sin(), angle.cos()

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """-(x_next - mean)^2, reduced to [N]: no log-density, see the file's docstring.

        Args:
            x_next: [N, L...], treated as a constant.
            reduction: "mean" (as published) or "sum" over latent elements.
        Raises:
            ValueError: a std is 0.
        """
        check_std(transition.std)
        return -reduce_elements((x_next.detach() - transition.mean).square(), reduction)
