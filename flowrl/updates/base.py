"""What the trainer asks of an update: units that may be dealt out to micro-batches in any way, and the loss of some of them.

A *unit* is what must stay together: a training row with the decisions that leave it (`transition`), a sample at a noise level (`matching`), a pair of samples
at one (`pairs`), a sample whose reward is differentiated (`direct`). A *decision* is what a reduction gives a weight.

Letters: U units, E decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flowrl.core.reductions import REDUCTIONS
from flowrl.meters import Meters

__all__ = ["Update", "Weights", "take", "weights_of_units"]


def take(values: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """values[index] on ``device``, wherever the two are: rollouts may wait in host memory."""
    return values[index.to(values.device)].to(device)


class Weights(NamedTuple):
    """How losses become one number: sum(decision * loss) * scale, and of losses per unit sum(loss) * unit_scale.

    Attributes:
        decision: [E] float32 (of tokens [B, T]), the reduction's weight of every decision of the iteration; 0 for those that this update does not train.
        scale, unit_scale: one over the sum of weights, and of units, of all processes, times the number of processes (whose gradients are averaged).
    """

    decision: Tensor
    scale: float
    unit_scale: float


def weights_of_units(reduction: str, unit_group: Tensor, decision_unit: Tensor, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
    """`Update.weigh` for decisions that stand alone, by a reduction of core/reductions.py: the weights [E] float32, and their sum."""
    member = torch.zeros(len(unit_group), dtype=torch.bool)
    member[units] = True
    chosen = member[decision_unit]
    weight = torch.zeros(len(decision_unit))
    if len(units):
        weight[chosen] = REDUCTIONS[reduction](unit_group[decision_unit[chosen]], num_groups)
    return weight, float(weight.sum())


class Update(Protocol):
    """The material of an iteration on one process.

    Attributes:
        unit_group: [U] int64, the group of each unit, rising.
        decision_unit: [E] int64, the unit of each decision.
        rows_per_unit: network rows with gradient of a unit.
        placeholder: True = there is nothing to train here; unit 0 exists all the same, to keep this process in step with the others.
        meters: what is measured on the way.
    """

    unit_group: Tensor
    decision_unit: Tensor
    rows_per_unit: int
    placeholder: bool
    meters: Meters

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Evaluate what later updates must not change, before the first one. ``parts``: the units of each update of the first epoch."""

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        """The reduction's weight of every decision, 0 for those that do not belong to these units, and this process's part of what their sum is divided by.

        Args:
            num_groups: of this process.
        """
        ...

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        """The scalar loss of some units; one forward with gradient.

        Args:
            units: [n] int64.
            first: within the first update of the iteration.
            idle: the weights are all 0 and nothing is to be measured.
        """
        ...
