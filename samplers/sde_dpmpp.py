"""SDE-DPM-Solver++ of first order for flow networks, the stochastic step of MixGRPO's DPM mode.

    e^-h = (1 - sigma) sigma' / ((1 - sigma') sigma)
    mean = (sigma' / sigma) e^-h x + (1 - sigma') (1 - e^-2h) xh0
    std  = sigma' sqrt(1 - e^-2h)

This is DDIM(eta = 1) with a flow prediction, term by term (rho there is e^-h; tested to 1e-12), hence CPS with cos(eta pi / 2) = e^-h. The noise shrinks
with the step, so unlike CPS it has a small-step limit. sigma = 1 is the limit e^-h = 0: x' is drawn afresh around (1 - sigma') xh0.

Source: DPM-Solver++, arXiv:2211.01095; formulas verified in the released code of MixGRPO, arXiv:2507.21802 (`dpm_solver_first_order_update`), and equal to
diffusers' `sde-dpmsolver++`. The published kernel has no noise parameter. Our reading: the noise level is DDIM's eta, and 1 is the published kernel.
"""

from __future__ import annotations

from samplers.ddim import Ddim

__all__ = ["SdeDpmpp"]


class SdeDpmpp(Ddim):
    """Noise parameter: ``eta`` = ``step.noise_level`` in [0, 1]; 1 is the published kernel, 0 the Euler step."""

    predictions = frozenset({"flow"})
