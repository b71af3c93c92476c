"""Updates that differentiate the reward through the picture: ReFL, DRaFT, AlignProp and SRPO's direct alignment. The reward must be differentiable.

| objective | from | to the clean latent |
| --- | --- | --- |
| refl | the sampled latent of a late step, drawn for each iteration | one prediction |
| draft | the sampled latent K steps before the end; with `renoise`, the finished sample with fresh noise of the last step's level | K Euler steps |
| direct_align | the finished sample with known noise of a level a | one step to level b, then the known noise is taken away |

Loss per sample: -scale R, or scale relu(threshold - R). With `inversion`, every second sample of direct_align steps towards noise (b > a) and has its reward
pushed down, -R in place of R. With prefixes the reward is that of "positive_text prompt" minus that of "negative_text prompt".

Sources: ReFL arXiv:2304.05977, DRaFT arXiv:2309.17400, AlignProp arXiv:2310.03739 (constants not verified); SRPO arXiv:2509.06942, direct alignment verified in
its released code. Deviations from SRPO: no relative scale (1 + k) between the two prefixes and no schedule of it over the noise levels; branches alternate
by sample, not by accumulation step.

Letters: U units, B samples, L... latent axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.likelihood_agreement import DIRECT_NAMES
from flowrl.likelihoods.matching import add_noise
from flowrl.meters import Meters
from flowrl.seeds import derive_seed, generator
from flowrl.types import Prompt, Rollout, SampleBatch, UserError
from flowrl.updates.base import Weights, take, weights_of_units
from rewards.composite import WeightedRewards
from samplers.direct import clean_estimate, denoise, direct_align

if TYPE_CHECKING:
    from flowrl.policies.base import DiffusionPolicy

__all__ = ["DIRECT_OBJECTIVES", "DirectUpdate", "kept_steps", "steps_with_gradient"]

DIRECT_OBJECTIVES = frozenset(DIRECT_NAMES)


def steps_with_gradient(config: Config, iteration: int) -> int:
    """Network rows with gradient of a sample in an iteration (>= 1)."""
    d = config.direct
    if config.objective.name != "draft":
        return 1
    return 1 + derive_seed(config.seed, "last steps", iteration) % d.last_steps if d.random_steps else d.last_steps


def kept_steps(config: Config, iteration: int) -> tuple[int, ...]:
    """The step of the grid whose latents an iteration starts from; empty where it starts from finished samples."""
    d, num_steps = config.direct, config.rollout.num_steps
    if config.objective.name == "refl":
        high = num_steps if d.high is None else d.high
        return (d.low + derive_seed(config.seed, "late step", iteration) % (high - d.low),)
    if config.objective.name == "draft" and not d.renoise:
        return (num_steps - steps_with_gradient(config, iteration),)
    return ()


class DirectUpdate:
    """Units and decisions are latents to start from. See `flowrl.updates.base.Update`.

    Args:
        rollout: its rows are the latents at `kept_steps`, or there are none.
        prompts: [P] of this process's groups. prompt_rows: [P] int64, what the policy calls them. numbers: [P], which seed the noise.
        sigmas: the rollout's grid.
    """

    placeholder = False

    def __init__(
        self,
        config: Config,
        policy: DiffusionPolicy,
        rewards: WeightedRewards,
        rollout: Rollout,
        *,
        prompts: Sequence[Prompt],
        prompt_rows: Tensor,
        numbers: Sequence[int],
        iteration: int,
        sigmas: tuple[float, ...],
    ) -> None:
        self.config, self.policy, self.rewards, self.sigmas, self.prompts = config, policy, rewards, sigmas, prompts
        self.rows_per_unit = 1 if config.direct.recompute else steps_with_gradient(config, iteration)
        kept, d = kept_steps(config, iteration), config.direct
        self.step = kept[0] if kept else len(sigmas) - 2
        count = len(rollout.leaves) // len(prompts)
        self.noise: Tensor | None = None
        if kept:
            self.x, self.unit_group, self.sigma = rollout.row_x, rollout.row_group, rollout.row_sigma
        else:
            repeat = max(1, d.renoise) if config.objective.name == "draft" else 1
            self.x, self.unit_group = rollout.leaves.repeat_interleave(repeat, 0), rollout.leaf_group.repeat_interleave(repeat)
            sources = [generator(config.seed, "noising", iteration, g) for g in numbers]
            self.noise = torch.cat([torch.randn(count * repeat, *policy.latent_shape, generator=g) for g in sources]).to(self.x)
            levels = torch.cat([torch.rand(count * repeat, generator=g, dtype=torch.float64) for g in sources])
            self.sigma = d.sigma_low + (d.sigma_high - d.sigma_low) * levels
            if config.objective.name == "draft":
                self.sigma = torch.full_like(self.sigma, sigmas[-2])
                self.x = add_noise(self.x, self.noise, self.sigma)
        self.prompt_row = prompt_rows[self.unit_group]
        self.decision_unit = torch.arange(len(self.x))
        self.upside_down = torch.zeros(len(self.x), dtype=torch.bool)
        if config.objective.name == "direct_align" and d.inversion:  # every second sample of the iteration, on however many processes
            self.upside_down = (torch.tensor(list(numbers))[:, None] * count + torch.arange(count)).flatten() % 2 == 1
        self.meters = Meters([], ratio=False, extra=["direct/reward"])

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Nothing: there is no old policy."""

    def _clean(self, units: Tensor) -> Tensor:
        """[n, L...] clean latents with gradient."""
        velocity, device = self.policy.velocity(self.config.rollout.guidance_scale), self.policy.device
        x, sigma, prompt_row = take(self.x, units, device), self.sigma[units], self.prompt_row[units]
        if self.config.objective.name == "refl" or (self.config.objective.name == "draft" and self.noise is not None):
            return clean_estimate(velocity, x, sigma, prompt_row)
        if self.config.objective.name == "draft":
            return denoise(velocity, x, self.step, self.sigmas, prompt_row, checkpoint=self.config.direct.recompute)
        assert self.noise is not None
        jump = torch.full_like(sigma, self.config.direct.sigma_jump)
        jump = torch.where(self.upside_down[units], jump, -jump)
        return direct_align(velocity, x, take(self.noise, units, device), sigma, (sigma + jump).clamp_min(0), prompt_row)

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        return weights_of_units(self.config.objective.reduction, self.unit_group, self.decision_unit, units, num_groups)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        d, device = self.config.direct, self.policy.device
        images = self.policy.decode_with_grad(self._clean(units))
        shown = [self.prompts[g] for g in self.unit_group[units].tolist()]
        reward = self._reward(images, shown, d.positive_text)
        if d.positive_text or d.negative_text:
            reward = reward - self._reward(images, shown, d.negative_text)
        if not bool(torch.isfinite(reward).all()):
            raise UserError("a reward could not score a picture that it must differentiate; see the reward's own messages")
        signed = torch.where(self.upside_down[units].to(device), -reward, reward)
        loss = d.scale * (-signed if d.threshold is None else torch.relu(d.threshold - signed))
        if not idle:
            self.meters.add({}, loss, torch.zeros(len(units), dtype=torch.int64), first=False, extra={"direct/reward": reward})
        return (loss * weights.decision[units].to(device)).sum() * weights.scale

    def _reward(self, images: Tensor, prompts: list[Prompt], prefix: str) -> Tensor:
        shown = [Prompt(f"{prefix} {p.text}", p.metadata) for p in prompts] if prefix else prompts
        return self.rewards.differentiable_total(SampleBatch(shown, images=images))
