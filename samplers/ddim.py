"""DDIM(eta): predict the clean latent and the noise, then put them together again at the next noise level with a part of the noise drawn anew.

    x = alpha x0 + sigma noise;   xh0, xh1 = the network's estimates of x0 and of the noise
    mean = alpha' xh0 + sqrt(sigma'^2 - tau^2) xh1
    tau  = eta sigma' sqrt(1 - rho^2),   rho = alpha sigma' / (alpha' sigma)

| prediction | alpha | xh0 | xh1 |
| --- | --- | --- | --- |
| flow: v, the estimate of noise - x0 | 1 - sigma | x - sigma v | x + (1 - sigma) v |
| epsilon: e, the estimate of the noise | sqrt(1 - sigma^2) | (x - sigma e) / alpha | e |
| v_prediction: v, the estimate of alpha noise - sigma x0 | sqrt(1 - sigma^2) | alpha x - sigma v | sigma x + alpha v |

For epsilon and v_prediction a step's sigma is sqrt(1 - alphabar) (`samplers.schedules.vp_grid`), and tau is DDIM's
eta sqrt((1 - alphabar') / (1 - alphabar)) sqrt(1 - alphabar / alphabar'). eta = 0 is deterministic (for flow the Euler step), eta = 1 has the posterior
variance of DDPM. A step to sigma' = 0 has std 0 and lands on xh0.

Source: DDIM, arXiv:2010.02502, equations 12 and 16; the log-probability of DDPO, arXiv:2305.13301. Verified: equal to diffusers' `DDIMScheduler.step`
with a given noise. Our reading: the flow row, which applies the same variance to the rectified flow's alpha = 1 - sigma; at eta = 1 it is
SDE-DPM-Solver++ of first order. Deviations: coefficients in float64; no clipping of xh0; no floor under tau: a step with std 0 has no density; DDPO's code
ends at the first alphabar of training, where a little noise is left and the last step has a density, ours at sigma' = 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from samplers.kernels import Step, Transition, expand, gaussian_log_prob

__all__ = ["Ddim"]


class _Coefficients(NamedTuple):
    """mean = keep x - slope output; std. Each float64 [N], slope > 0."""

    keep: Tensor
    slope: Tensor
    std: Tensor


class Ddim:
    """Noise parameter: ``eta`` = ``step.noise_level`` in [0, 1].

    Args:
        prediction: what the network predicts, "flow", "epsilon" or "v_prediction".
    Raises:
        ValueError: the kernel does not understand that prediction.
    """

    predictions = frozenset({"flow", "epsilon", "v_prediction"})
    largest_noise_level = 1.0
    noise_is_bounded = True

    def __init__(self, prediction: str = "flow") -> None:
        if prediction not in self.predictions:
            raise ValueError(f"{type(self).__name__} does not understand the prediction {prediction!r}; known: {', '.join(sorted(self.predictions))}")
        self.prediction = prediction

    def alpha(self, sigma: Tensor) -> Tensor:
        """Weight [N] of the clean latent in x."""
        return 1 - sigma if self.prediction == "flow" else ((1 - sigma) * (1 + sigma)).sqrt()

    def split(self, step: Step) -> tuple[Tensor, Tensor]:
        """The parts of sigma' that are new and predicted noise, [N] each: tau / sigma' and sqrt(sigma'^2 - tau^2) / sigma'; their squares add to 1."""
        eta, rho = step.noise_level, self.alpha(step.sigma) * step.sigma_next / (self.alpha(step.sigma_next) * step.sigma)
        return eta * ((1 - rho) * (1 + rho)).sqrt(), (1 - eta.square() + (eta * rho).square()).sqrt()

    def _coefficients(self, step: Step) -> _Coefficients:
        if not bool(((step.noise_level >= 0) & (step.noise_level <= self.largest_noise_level)).all()):
            levels = step.noise_level.unique().tolist()
            raise ValueError(f"a noise level of {type(self).__name__} lies in 0..{self.largest_noise_level:g}, got {levels}")
        alpha, alpha_next = self.alpha(step.sigma), self.alpha(step.sigma_next)
        new, predicted = self.split(step)
        noise = step.sigma_next * predicted
        if self.prediction == "flow":
            keep, slope = alpha_next + noise, alpha_next * step.sigma - noise * alpha
        elif self.prediction == "v_prediction":
            keep, slope = alpha_next * alpha + noise * step.sigma, alpha_next * step.sigma - noise * alpha
        else:
            if bool((alpha == 0).any()):
                raise ValueError("at sigma 1 a prediction of epsilon says nothing about the clean latent; start the grid below it")
            keep, slope = alpha_next / alpha, alpha_next / alpha * step.sigma - noise
        return _Coefficients(keep, slope, step.sigma_next * new)

    def grad_scale(self, step: Step) -> Tensor:
        """|d mean / d network output| [N]."""
        return self._coefficients(step).slope

    def moments(self, x: Tensor, output: Tensor, step: Step) -> Transition:
        """Transition of one step.

        Args:
            x, output: [N, L...], the latent and the network's output there.
        Returns:
            mean [N, L...] in the dtype of x, std [N] float64; 0 where sigma' or the noise level is 0.
        Raises:
            ValueError: a noise level outside [0, 1], or a prediction of epsilon at sigma = 1.
        """
        keep, slope, std = self._coefficients(step)
        return Transition(expand(keep, x) * x - expand(slope, x) * output, std)

    def log_prob(self, x_next: Tensor, transition: Transition, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Gaussian log-density [N] of the sampled next latent."""
        return gaussian_log_prob(x_next, transition, reduction)
