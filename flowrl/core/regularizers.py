"""Divergences to a reference, per decision. Letters: N rows, L... latent axes, D step length, d latent elements.

For two Gaussians of one std tau the KL is exact: |mean - mean_ref|^2 / (2 tau^2). Published betas belong to particular forms of it:

| form | formula | scale |
| --- | --- | --- |
| exact_mean | <(mean - mean_ref)^2> / (2 tau^2) | the true KL divided by d: nats per latent element |
| fg_code | <(mean - mean_ref)^2> / (2 s^2), s = tau / sqrt(D) | what Flow-GRPO's released code computes; D times exact_mean |
| x_mse | <(mean - mean_ref)^2> | Flow-Factory, `x-based` |
| v_mse | <(v - v_ref)^2> | Flow-Factory, `v-based`; also AWM |

Source: arXiv:2505.05470 and the released code; <.> is the mean over latent elements. Verified in code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["categorical_kl_estimate", "gaussian_kl"]


def gaussian_kl(
    form: Literal["fg_code", "exact_mean", "v_mse", "x_mse"],
    *,
    mean: Tensor,
    ref_mean: Tensor,
    velocity: Tensor,
    ref_velocity: Tensor,
    std: Tensor,
    length: Tensor,
) -> Tensor:
    """Divergence of one step's transition from the reference's, [N], >= 0, with the gradient of ``mean`` and ``velocity``.

    Args:
        mean, ref_mean, velocity, ref_velocity: [N, L...]; the reference ones are constants.
        std: [N], tau > 0. length: [N], D > 0.
    Raises:
        ValueError: unknown form.
    """
    if form == "v_mse":
        return (velocity - ref_velocity.detach()).square().flatten(1).mean(1)
    square = (mean - ref_mean.detach()).square().flatten(1).mean(1)
    if form == "x_mse":
        return square
    variance = std.to(square).square()
    if form == "exact_mean":
        return square / (2 * variance)
    if form == "fg_code":
        return square * length.to(square) / (2 * variance)
    raise ValueError(f"unknown KL form {form!r}; known: fg_code, exact_mean, v_mse, x_mse")


def categorical_kl_estimate(kind: Literal["k1", "k2", "k3"], log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Single-sample estimates of KL(policy || reference) from log-probabilities of what the policy sampled, elementwise.

    With d = ref_log_prob - log_prob: k1 = -d (unbiased), k2 = d^2 / 2, k3 = exp(d) - 1 - d (unbiased, >= 0).
    Source: Schulman, "Approximating KL divergence" (2020).

    Raises:
        ValueError: unknown kind.
    """
    delta = ref_log_prob.detach() - log_prob
    if kind == "k1":
        return -delta
    if kind == "k2":
        return 0.5 * delta.square()
    if kind == "k3":
        return torch.expm1(delta) - delta
    raise ValueError(f"unknown KL estimate {kind!r}; known: k1, k2, k3")
