"""Finished samples with noise put back on: the states at which the matching likelihood compares policies.

Noise and noise levels are drawn once an iteration, from generators that follow from the group's number, and serve every policy that is evaluated at them.

Letters: N samples, S noise levels of a sample, L... latent axes, P groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.likelihoods.matching import NoisedBatch, add_noise, draw_times
from flowrl.seeds import generator
from flowrl.types import Rollout, Velocity
from flowrl.updates.base import take

if TYPE_CHECKING:
    from flowrl.policies.base import DiffusionPolicy

__all__ = ["NoisedSamples"]


class NoisedSamples:
    """S noisings of some leaves.

    Args:
        leaves: [N] int64 into the rollout's leaves.
        slots: [N] int64; samples of one slot share their noise and their noise levels. A slot lies within one group; slots are numbered group by group.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
        numbers: [P] the groups' numbers within the iteration, which seed the draws.
        sigmas, shift: the rollout's grid and its time shift.
    """

    def __init__(
        self,
        config: Config,
        policy: DiffusionPolicy,
        rollout: Rollout,
        leaves: Tensor,
        slots: Tensor,
        *,
        prompt_rows: Tensor,
        numbers: Sequence[int],
        iteration: int,
        sigmas: tuple[float, ...],
        shift: float,
    ) -> None:
        self.policy, self.num_times = policy, config.matching.num_times
        self.group, self.slots = rollout.leaf_group[leaves], slots
        self.x0 = rollout.leaves[leaves.to(rollout.leaves.device)]
        self.prompt_row = prompt_rows[self.group]
        count = int(slots.max()) + 1
        group_of_slot = torch.empty(count, dtype=torch.int64)
        group_of_slot[slots] = self.group
        per_group = torch.bincount(group_of_slot, minlength=len(numbers)).tolist()
        shape = (self.num_times, *policy.latent_shape)
        drawn = [torch.randn(n, *shape, generator=generator(config.seed, "noising", iteration, g)) for g, n in zip(numbers, per_group, strict=True)]
        self.noise = torch.cat(drawn).to(self.x0)
        m = config.matching

        def times(rows: int, source: torch.Generator) -> Tensor:
            return draw_times(
                m.times,
                num_times=m.num_times,
                count=rows,
                generator=source,
                sigmas=sigmas,
                first=m.first_time,
                include_first=m.include_first,
                fraction=m.time_fraction,
                low=m.low,
                high=m.high,
                shift=shift if m.shift is None else m.shift,
            )

        if m.shared_times:
            self.sigma = times(1, generator(config.seed, "times", iteration)).expand(count, -1)
        else:
            self.sigma = torch.cat([times(n, generator(config.seed, "times", iteration, g)) for g, n in zip(numbers, per_group, strict=True)])

    def rows_of(self, samples: Tensor) -> Tensor:
        """All rows of some samples [n]: [n S], sample by sample."""
        return (samples[:, None] * self.num_times + torch.arange(self.num_times)).flatten()

    def batch(self, samples: Tensor) -> NoisedBatch:
        """All rows of some samples."""
        return self.pick(self.rows_of(samples))

    def pick(self, rows: Tensor) -> NoisedBatch:
        """Some rows [n]; row s of sample i has the number i S + s."""
        sample, time = rows // self.num_times, rows % self.num_times
        slot = self.slots[sample]
        device = self.policy.device
        noise = self.noise[slot.to(self.noise.device), time.to(self.noise.device)].to(device)
        x0 = take(self.x0, sample, device)
        sigma = self.sigma[slot, time]
        return NoisedBatch(add_noise(x0, noise, sigma), sigma, self.prompt_row[sample], noise - x0)

    def states(self) -> Tensor:
        """[N S, L...], the noised latents alone, without a second copy of all noise."""
        return torch.cat([self.pick(chunk).x for chunk in self.chunks(torch.arange(self.num_rows))])

    def chunks(self, rows: Tensor) -> list[Tensor]:
        """Rows in parts that fit into one forward without gradient."""
        return [chunk for chunk in rows.split(self.policy.rows_per_forward) if len(chunk)]

    @property
    def num_rows(self) -> int:
        """N S."""
        return len(self.x0) * self.num_times

    @torch.no_grad()
    def velocity(self, velocity: Velocity) -> Tensor:
        """[N S, L...], a policy's velocity at every state; it waits where the samples do."""
        found = []
        for chunk in self.chunks(torch.arange(self.num_rows)):
            batch = self.pick(chunk)
            found.append(velocity(batch.x, batch.sigma, batch.prompt_row).to(self.x0.device))
        return torch.cat(found)
