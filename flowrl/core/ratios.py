"""Ratios other than exp(log_prob - old_log_prob), and the weight of each step's loss: GRPO-Guard.

Letters: E edges, L... latent axes, D step length, tau the transition's std, kap = |d mean / d velocity| / D, <.> mean over latent elements.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["ratio_norm", "step_weights"]


def ratio_norm(x_next: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """GRPO-Guard's centred log-ratio, log r_hat = <z delta>, delta = mean - old_mean, z = (x_next - old_mean) / tau, [E].

    The plain log-ratio of two Gaussians is <z delta> / tau - <delta^2> / (2 tau^2): left of 0 on average, and with a spread that depends on the step.
    Subtracting its mean and multiplying by tau leaves <z delta>: mean 0 and variance <delta^2> / d under the old policy, whatever tau. Its gradient is
    <z grad mean>, linear in the mean at every update. At the first update it is exactly 0 with tau times the plain gradient. Formulas of the papers:

    | form | equal to <z delta> |
    | --- | --- |
    | GRPO-Guard | tau (log r + <delta^2> / (2 tau^2)), both terms with gradient |
    | Flow-Factory | tau log r + <delta^2> / (2 tau) |
    | log-probability -<(x_next - mean)^2> (CPS) | (log r + <delta^2>) / (2 tau) |

    It needs no log-probability, so it holds for every Gaussian kernel. Clip ranges are on its scale: GRPO-Guard uses 2e-6.

    Args:
        x_next: [E, L...], the sampled next latent, a constant. mean: [E, L...], carries the gradient. old_mean: [E, L...], of the sampling policy, a constant.
        std: [E], tau > 0.
        reduction: "mean" over latent elements, or "sum".
    Returns:
        [E], the dtype of ``mean``. To be used as a log-probability whose old value is 0.
    Raises:
        ValueError: a std is 0: a deterministic step has no ratio.
    Source:
        GRPO-Guard, arXiv:2510.22319; verified in the released code (train_sd3_GRPO_Guard.py of flow_grpo) and in Flow-Factory; the CPS row is derived.
        Deviation: the released code averages <delta^2> over the micro-batch too (its axes come from the log-probability's shape); ours is per sample.
    """
    if not bool((std > 0).all()):
        raise ValueError("a deterministic step (std 0) has no ratio; train stochastic steps only")
    x_next, old_mean = x_next.detach(), old_mean.detach()
    products = ((x_next - old_mean) * (mean - old_mean)).flatten(1)
    return (products.mean(1) if reduction == "mean" else products.sum(1)) / std.to(mean)


def step_weights(kind: Literal["none", "inv_dt", "inv_kap_dt", "kap_over_dt"], *, length: Tensor, grad_scale: Tensor) -> Tensor:
    """Weight of each edge's policy loss, [E], not normalised. The gradient of `ratio_norm` in the velocity is -D kap <z grad v>.

    | kind | weight | use |
    | --- | --- | --- |
    | none | 1 | |
    | inv_dt | 1 / D | GRPO-Guard's released code; equal steps for Flow-SDE, whose kap is constant after the first step |
    | inv_kap_dt | 1 / (D kap) | equal steps for every kernel; derived, our reading for Dance-SDE |
    | kap_over_dt | kap / D | GRPO-Guard for DanceGRPO as third parties print it, from notes that cite its eq. 12; not verified |

    Args:
        length: [E], D > 0. grad_scale: [E], D kap = |d mean / d velocity| > 0, `grad_scale` of the kernel.
    Raises:
        ValueError: unknown kind.
    Source:
        GRPO-Guard, arXiv:2510.22319; inv_dt verified in the released code (which divides by the square of the mean of sqrt(D)).
    """
    if kind == "none":
        return torch.ones_like(length)
    if kind == "inv_dt":
        return 1 / length
    if kind == "inv_kap_dt":
        return 1 / grad_scale
    if kind == "kap_over_dt":
        return grad_scale / length.square()
    raise ValueError(f"unknown step weight {kind!r}; known: none, inv_dt, inv_kap_dt, kap_over_dt")
