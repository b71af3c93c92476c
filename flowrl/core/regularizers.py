"""Divergences to a reference, entropy and supervised terms, per decision. Letters: N rows, L... latent axes, D step length, d latent elements.

For two Gaussians of one std tau the KL is exact: |mean - mean_ref|^2 / (2 tau^2). Published betas belong to particular forms of it:

| form | formula | scale |
| --- | --- | --- |
| exact_mean | <(mean - mean_ref)^2> / (2 tau^2) | the true KL divided by d: nats per latent element |
| fg_code | <(mean - mean_ref)^2> / (2 s^2), s = tau / sqrt(D) | what Flow-GRPO's released code computes; D times exact_mean |
| x_mse | <(mean - mean_ref)^2> | Flow-Factory, `x-based` |
| v_mse | <(v - v_ref)^2> | Flow-Factory, `v-based`; also AWM, DiffusionNFT, ORW-CFM-W2 |
| v_elbo | <(v - v_ref)^2> / (2 s^2), s = 0.7 sqrt(sigma / (1 - min(sigma, 0.99))) | AWM's `ELBO` option, of a sample at a noise level |

The last two need no step: `velocity_penalty`. v_elbo has no step's length, so it exists only there.

Sources: arXiv:2505.05470 and arXiv:2509.25050 and their released code; <.> is the mean over latent elements. Verified in code.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "EntropyController",
    "EntropyHistory",
    "KlController",
    "categorical_kl",
    "categorical_kl_estimate",
    "entropy_band",
    "entropy_bonus",
    "gaussian_kl",
    "kl_barrier",
    "kl_convex",
    "kl_convex_share",
    "kl_in_reward",
    "off_policy_kl",
    "sft_loss",
    "sft_share",
    "velocity_penalty",
]


def gaussian_kl(
    form: Literal["fg_code", "exact_mean", "v_mse", "x_mse", "v_elbo"],
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
        ValueError: unknown form, or v_elbo, which is of a noise level and not of a step.
    """
    if form == "v_mse":
        return velocity_penalty("v_mse", velocity, ref_velocity)
    if form == "v_elbo":
        raise ValueError("KL form 'v_elbo' belongs to the matching likelihood; for the transitions of steps: fg_code, exact_mean, v_mse, x_mse")
    square = (mean - ref_mean.detach()).square().flatten(1).mean(1)
    if form == "x_mse":
        return square
    variance = std.to(square).square()
    if form == "exact_mean":
        return square / (2 * variance)
    if form == "fg_code":
        return square * length.to(square) / (2 * variance)
    raise ValueError(f"unknown KL form {form!r}; known: fg_code, exact_mean, v_mse, x_mse")


def velocity_penalty(form: Literal["v_mse", "v_elbo"], velocity: Tensor, ref_velocity: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Distance of the velocity from the reference's, [N], >= 0, with the gradient of ``velocity``.

    Args:
        velocity, ref_velocity: [N, L...]; the reference one is a constant.
        sigma: [N] in (0, 1], the noise levels; v_elbo only, which weighs the square by about (1 - sigma) / sigma.
    Raises:
        ValueError: unknown form, or v_elbo without sigma.
    """
    square = (velocity - ref_velocity.detach()).square().flatten(1).mean(1)
    if form == "v_mse":
        return square
    if form != "v_elbo":
        raise ValueError(f"unknown velocity penalty {form!r}; known: v_mse, v_elbo")
    if sigma is None:
        raise ValueError("the velocity penalty v_elbo needs sigma")
    variance = 0.49 * sigma / (1 - sigma.clamp(max=0.99))  # s^2
    return square / (2 * variance.to(square))


KlKind = Literal["k1", "k2", "k3", "k3_k2", "abs"]


def categorical_kl_estimate(kind: KlKind, log_prob: Tensor, ref_log_prob: Tensor, *, limits: tuple[float, float] | None = None) -> Tensor:
    """Single-sample estimates of KL(policy || reference) from log-probabilities of what the policy sampled, elementwise.

    With d = ref_log_prob - log_prob:

    | kind | value | as a value | its gradient, averaged over samples |
    | --- | --- | --- | --- |
    | k1 | -d | unbiased | 0: no use as a loss |
    | k2 | d^2 / 2 | biased | of KL(policy || reference) |
    | k3 | exp(d) - 1 - d | unbiased, >= 0 | of KL(reference || policy) |
    | k3_k2 | that of k3 | unbiased, >= 0 | that of k2 |
    | abs | abs(d) | biased | |

    Args:
        log_prob: any shape, carries the gradient. ref_log_prob: the same shape, a constant.
        limits: clamps of d to +- the first, and of the estimate to +- the second, as verl's k3 has them: (20, 10). None = none (TRL).
    Raises:
        ValueError: unknown kind.
    Source:
        Schulman, "Approximating KL divergence" (2020); k3_k2 and limits: verl, kl_penalty, verified in code. The gradients are exact sums in the tests.
    """
    delta = ref_log_prob.detach() - log_prob
    if limits is not None:
        delta = delta.clamp(-limits[0], limits[0])
    match kind:
        case "k1":
            value = -delta
        case "k2":
            value = 0.5 * delta.square()
        case "k3":
            value = torch.expm1(delta) - delta
        case "k3_k2":
            square = 0.5 * delta.square()
            value = square + (torch.expm1(delta) - delta - square).detach()
        case "abs":
            value = delta.abs()
        case _:
            raise ValueError(f"unknown KL estimate {kind!r}; known: k1, k2, k3, k3_k2, abs")
    return value if limits is None else value.clamp(-limits[1], limits[1])


def off_policy_kl(kind: KlKind, log_prob: Tensor, ref_log_prob: Tensor, log_ratio: Tensor) -> Tensor:
    """The estimate times the importance ratio, exp(log_ratio), with the gradient of both: unbiased in value and, with k3, in gradient, off-policy too.

    Args:
        log_ratio: the shape of ``log_prob``, log_prob - old_log_prob or a sequence's, with gradient, see `ratio_levels.log_ratio`.
    Source:
        DeepSeek-V3.2, through TRL's paper index; verified in TRL 1.16 (use_bias_correction_kl).
    """
    return categorical_kl_estimate(kind, log_prob, ref_log_prob) * log_ratio.exp()


def categorical_kl(log_distribution: Tensor, ref_log_distribution: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, [...] >= 0, with the gradient of the policy: kind ``full``.

    Args:
        log_distribution, ref_log_distribution: [..., V], log-softmax; the reference one is a constant. A token of probability 0 adds 0.
    """
    p = log_distribution.exp()
    difference = log_distribution - ref_log_distribution.detach()
    return (p * torch.where(p > 0, difference, torch.zeros_like(difference))).sum(-1)


def kl_in_reward(rewards: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Rewards of decisions minus beta (old_log_prob - ref_log_prob), [B, S] without gradient; 0 where masked. REINFORCE++, RLOO and PPO.

    Args:
        rewards: [B, S], usually the sample's reward at its last decision and 0 before. Sum over S for the sequence form of RLOO.
    Source:
        verl, kl_penalty k1, verified in code.
    """
    held = rewards.detach() - beta * (old_log_prob - ref_log_prob).detach()
    return torch.where(mask, held, torch.zeros_like(held))


@dataclass(frozen=True, slots=True)
class KlController:
    """A KL weight that follows a target: beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) number / horizon).

    Attributes:
        beta: > 0, the weight now. target: > 0, nats. horizon: > 0, samples.
    Source:
        arXiv:1909.08593; verl's AdaptiveKLController, verified in code.
    """

    beta: float
    target: float
    horizon: float = 10000.0

    def updated(self, kl: float, number: int) -> KlController:
        """After ``number`` samples of all processes with the mean KL ``kl``; a KL that is not finite changes nothing."""
        if not math.isfinite(kl):
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, beta=self.beta * (1 + error * number / self.horizon))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def kl_convex(kind: KlKind, log_prob: Tensor, base_log_prob: Tensor, previous_log_prob: Tensor, *, share: float) -> Tensor:
    """ReMix's KL term, elementwise: share KL(policy || base) + (1 - share) KL(policy || previous policy). share 1 is the usual one.

    Source: arXiv:2507.06892, from a note on the paper, not verified in code; single-sample estimates are our choice.
    """
    to_base = categorical_kl_estimate(kind, log_prob, base_log_prob)
    return share * to_base + (1 - share) * categorical_kl_estimate(kind, log_prob, previous_log_prob)


def kl_convex_share(iteration: int, *, start: int = 50, every: int = 10, drop: float = 0.1, least: float = 0.5) -> float:
    """ReMix's schedule of the base's share: max(1 - drop ceil(max(iteration - start, 0) / every), least). Source: as `kl_convex`."""
    return max(1 - drop * math.ceil(max(iteration - start, 0) / every), least)


def kl_barrier(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor, *, mean_kl: Tensor, kappa: float = 1e3, least: float = 1e-4) -> Tensor:
    """DRPO's trust region, [B, S]: sg[max(kappa (mean_kl - least), 0)] (old_log_prob - log_prob); 0 where masked. Nothing while the KL is below ``least``.

    Args:
        mean_kl: [], the mean of old_log_prob - log_prob over all decisions of the update, all micro-batches and processes. Reduce this term with mean.
    Source:
        arXiv:2510.04474; verified in the released code (core_algos.py).
    """
    force = (kappa * (mean_kl.detach() - least)).clamp_min(0)
    return torch.where(mask, force * (old_log_prob.detach() - log_prob), torch.zeros_like(log_prob))


def entropy_bonus(entropy: Tensor, *, weight: float) -> Tensor:
    """-weight times the entropy, elementwise, with its gradient. weight 0 is none. Of distributions that can change: a Gaussian step's entropy is fixed."""
    return -weight * entropy


@dataclass(frozen=True, slots=True)
class EntropyController:
    """The weight of the entropy bonus, raised by ``step`` while the entropy is at most ``target`` and lowered while it is above; no bonus while it is above.

    Attributes:
        coefficient: >= 0, kept within low .. high. target: nats per decision. step: > 0. entropy: of the last update; None before the first.
    Source:
        Skywork-OR1, arXiv:2505.22312: coefficient 0.01, step 0.005; verified in TRL 1.16 (adaptive entropy).
    """

    target: float
    coefficient: float = 0.01
    step: float = 0.005
    low: float = 0.0
    high: float = math.inf
    entropy: float | None = None

    @property
    def weight(self) -> float:
        """For `entropy_bonus` in the next update."""
        return self.coefficient if self.entropy is None or self.entropy <= self.target else 0.0

    def updated(self, entropy: float) -> EntropyController:
        """After an update whose mean entropy over all decisions and processes was ``entropy``; one that is not finite changes nothing."""
        if not math.isfinite(entropy):
            return self
        moved = self.coefficient + (self.step if entropy <= self.target else -self.step)
        return replace(self, coefficient=min(max(moved, self.low), self.high), entropy=entropy)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class EntropyHistory:
    """Mean entropy of each environment step over all updates so far: what `entropy_band` compares with.

    Attributes:
        totals, counts: [K] float64, sum of entropies and number of decisions of each environment step.
    """

    totals: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, num_steps: int) -> EntropyHistory:
        return cls(torch.zeros(num_steps, dtype=torch.float64), torch.zeros(num_steps, dtype=torch.float64))

    def updated(self, entropy: Tensor, step: Tensor, mask: Tensor) -> EntropyHistory:
        """With the decisions of one update, of all processes. entropy: [B, S]. step: [B, S] int64 in 0..K-1. mask: [B, S] bool."""
        value = torch.where(mask, entropy.detach(), torch.zeros_like(entropy)).to(self.totals).flatten()
        place = torch.where(mask, step, torch.zeros_like(step)).flatten()
        return EntropyHistory(self.totals.index_add(0, place, value), self.counts.index_add(0, place, mask.to(self.counts).flatten()))

    def means(self) -> Tensor:
        """[K] float64; 0 for a step that was never seen, which `entropy_band` takes for no history."""
        return self.totals / self.counts.clamp_min(1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"totals": self.totals, "counts": self.counts}


def entropy_band(
    entropy: Tensor, mean: Tensor, *, low: float = 0.8, high: float = 1.2, weight: float = 0.1, form: Literal["hinge", "step"] = "hinge"
) -> Tensor:
    """EPO's penalty for an entropy outside of low mean .. high mean, elementwise; 0 where there is no history (mean 0). weight 0 is none.

    | form | penalty | gradient |
    | --- | --- | --- |
    | step | weight outside, 0 inside, as released | none: it only shifts the value of the loss |
    | hinge | weight (distance to the band) / mean | of the entropy outside of the band; ours |

    The loss term of the paper: `entropy_bonus` with weight lam, plus lam beta_s times this, beta_s rising over training.

    Args:
        entropy: [B, S] of tokens or [B, 1] of sequences. mean: the same shape, of `EntropyHistory.means` at each decision's environment step.
    Raises:
        ValueError: unknown form.
    Source:
        arXiv:2509.22576; verified in the released code (dp_actor.py), whose bounds are 0.8 and 1.2 by default, 0.5 and 1.5 in its script.
    """
    mean = mean.to(entropy)
    below, above = (low * mean - entropy).clamp_min(0), (entropy - high * mean).clamp_min(0)
    if form == "step":
        inside = (entropy > low * mean) & (entropy < high * mean)
        penalty = weight * (~inside).to(entropy)
    elif form == "hinge":
        penalty = weight * (below + above) / torch.where(mean > 0, mean, torch.ones_like(mean))
    else:
        raise ValueError(f"unknown form {form!r} of the entropy band; known: hinge, step")
    return torch.where(mean > 0, penalty, torch.zeros_like(penalty))


def sft_loss(log_prob: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of an expert's decisions, [B, S]; 0 where masked. weight: [B, S], a constant, as of `token_weights.chord_weights`."""
    zero = torch.zeros_like(log_prob)
    loss = torch.where(mask, -log_prob, zero)
    return loss if weight is None else torch.where(mask, weight.detach(), zero) * loss


def sft_share(iteration: int, *, warmup: int = 0, peak: float = 0.9, decay: int = 200, valley: float = 0.05) -> float:
    """CHORD's mu, the share of the supervised loss in (1 - mu) policy + mu supervised: linear from 0 to peak, then linear to valley, which stays.

    Without expert samples the share is 0, whatever the schedule says: then the caller uses the policy's loss alone.

    Source: arXiv:2508.11408, from ms-swift's documentation; the constants and the straight lines are our reading.
    """
    if iteration < warmup:
        return peak * iteration / warmup
    past = min((iteration - warmup) / decay, 1.0) if decay > 0 else 1.0
    return peak + (valley - peak) * past
