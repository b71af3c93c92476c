"""DPM-Solver++ (2M), midpoint form, for flow networks: a deterministic multistep solver of the flow ODE. It has no density.

    lam = ln((1 - sigma) / sigma),   h = lam' - lam,   D1 = h / (lam - lam_previous) (m0 - m1)
    x' = (sigma' / sigma) x + (1 - sigma' / sigma) (m0 + D1 / 2),   m0, m1 = xh0 here and at the previous latent

(1 - sigma') (1 - e^-h) is 1 - sigma' / sigma for alpha = 1 - sigma. Without the D1 term the step is the Euler step, and it is one where there is no
history; where sigma' = 0 (lam' infinite; x' = m0); where sigma = 1, before which there is nothing; where sigma_previous = 1 (lam_previous infinite, so
D1 = 0). Order 2 inside 0 < sigma < 1; from 1 to 0 the steps beside the ends leave a factor log T (fitted on a Gaussian in the tests).

Source: arXiv:2211.01095; verified in the released code of MixGRPO, arXiv:2507.21802, and equal to diffusers' `DPMSolverMultistepScheduler` on flow sigmas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.kernels import expand

__all__ = ["dpmpp_2m_step"]


def dpmpp_2m_step(
    x: Tensor,
    denoised: Tensor,
    previous_denoised: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_previous: Tensor | None,
    *,
    has_history: Tensor | None = None,
) -> Tensor:
    """The latent at sigma_next.

    Args:
        x: [N, L...] at sigma. denoised: [N, L...], x - sigma v there.
        previous_denoised: [N, L...], the same of the latent one step before; None = no row has a history.
        sigma, sigma_next, sigma_previous: [N] float64, 1 >= sigma_previous > sigma > sigma_next >= 0; sigma_previous is None without a history.
        has_history: [N] bool, True = this row's previous_denoised and sigma_previous count, others may hold anything; None = all rows.
    Returns:
        [N, L...] in the dtype of x.
    Raises:
        ValueError: previous_denoised without sigma_previous, or the reverse.
    """
    if (previous_denoised is None) != (sigma_previous is None):
        raise ValueError("previous_denoised and sigma_previous come together")
    ratio = sigma_next / sigma
    first = expand(ratio, x) * x + expand(1 - ratio, x) * denoised
    if previous_denoised is None or sigma_previous is None:
        return first
    second = (sigma_next > 0) & (sigma_previous < 1)
    if has_history is not None:
        second = second & has_history.to(second.device)
    before, here, after = (-torch.logit(s) for s in (sigma_previous, sigma, sigma_next))
    weight = torch.where(second, (1 - ratio) * (after - here) / (2 * (here - before)), 0.0)
    rows = second.to(x.device).view(-1, *[1] * (x.ndim - 1))
    return first + expand(weight, x) * torch.where(rows, denoised - previous_denoised, 0.0)
