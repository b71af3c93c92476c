"""The groups of an iteration of pictures: which prompts are asked, how many samples each gets, and which groups are trained, as an allocator says.

Letters: B samples, P groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.allocation import ALLOCATORS, Budget, Order, Outcomes
from flowrl.config import Config
from flowrl.prompt_rates import Knapsack
from flowrl.text.parts import make_part
from flowrl.types import Scores, UserError

__all__ = ["PictureGroups"]


class PictureGroups:
    """The `allocation` section of a run of pictures. The same on every process.

    Args:
        bounds: lowest and highest total reward, may be infinite.
    Raises:
        UserError: the allocator cannot work with this run.
    """

    def __init__(self, config: Config, num_prompts: int, bounds: tuple[float, float]) -> None:
        r, a = config.rollout, config.allocation
        self.config, self.name = config, a.name
        self.allocator = make_part("allocation", ALLOCATORS, a.name, a.args)
        self.allocator.begin(Budget(num_prompts, r.groups_per_iteration, r.group_size, config.seed, *bounds))
        self._order = Order()

    @property
    def plain(self) -> bool:
        """All prompts in turn, equally many samples each, and all groups trained."""
        return self.name == "uniform"

    def ask(self, iteration: int) -> list[int]:
        """Prompt numbers of the groups of an iteration; parts of a group stand side by side, each as a group of its own."""
        self._order = self.allocator.ask(iteration, 0, ())
        return [index for index in self._order.prompts for _ in range(self.config.rollout.group_shards)]

    def sizes(self, numbers: Sequence[int]) -> list[int]:
        """Samples of some groups of the iteration that was last asked for."""
        r = self.config.rollout
        if self.plain:
            return [r.group_size // r.group_shards] * len(numbers)
        return [self._order.counts[number] for number in numbers] if self._order.counts else [r.group_size] * len(numbers)

    def most_samples(self, groups: int) -> int:
        """The most samples that so many groups of an iteration may have together."""
        r, a = self.config.rollout, self.allocator
        if isinstance(a, Knapsack):
            return min(groups * a.most, r.groups_per_iteration * r.group_size - (r.groups_per_iteration - groups) * a.least)
        return groups * (r.group_size // r.group_shards)

    def observe(
        self, group: Tensor, numbers: Sequence[int], total: Scores, everywhere: Scores, gather: Callable[[Tensor], list[Tensor]], add: Callable[[float], float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Tell the allocator what became of an iteration; every process must call it.

        Args:
            group: [B] int64 in 0..P-1, of this process's samples. numbers: [P], of its groups within the iteration.
            total: [B], before shaping; ``everywhere``: of all processes, one after the other.
            gather: a tensor of every process. add: a number summed over processes.
        Returns:
            The groups that are trained, [P] bool, and metrics over all processes.
        """
        num_groups = len(numbers)
        keeps = self.allocator.keeps(total.values.double(), group, total.valid, num_groups)
        singletons = float((torch.bincount(group, minlength=num_groups) == 1).sum())
        counted = {"groups/trained": int(add(float(keeps.sum()))), "groups/singletons": int(add(singletons)), "groups/largest": max(self._order.counts)}
        metrics = counted | self.allocator.metrics()
        prompt = torch.tensor([self._order.prompts[number] for number in numbers], dtype=torch.int64)[group]
        self.allocator.observe(Outcomes(torch.cat(gather(prompt)), everywhere.values.double(), everywhere.valid))
        return keeps, metrics

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "allocator": self.allocator.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """
        Args:
            state: None = of a run from before there were allocators of pictures.
        Raises:
            UserError: the checkpoint is of another allocator.
        """
        name = "uniform" if state is None else state["name"]
        if name != self.name:
            raise UserError(f"allocation.name: the checkpoint was written with {name}, and the config says {self.name}; go on with the same")
        if state is not None:
            self.allocator.load_state_dict(state["allocator"])
