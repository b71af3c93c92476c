"""The likelihood of SDE steps: the density of the sampled next latent under the policy's transition.

A micro-batch is a set of rows (latents whose velocity is needed) and the edges that leave them. Siblings share a row: one forward and one backward
for all of them.

Letters: R rows, E edges, L... latent axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowrl.types import Rollout, Velocity
from samplers.kernels import Step, Transition, load_kernel

__all__ = ["StepBatch", "TransitionLikelihood", "TransitionOutput", "select_rows"]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows and their edges, ready for one forward.

    Attributes:
        x: [R, L...]. sigma: [R] float64. prompt_row: [R] int64.
        edge_row: [E] int64 into the rows here. x_next: [E, L...]. step: fields [E]. edge: [E] int64, the edges' numbers in the rollout.
    """

    x: Tensor
    sigma: Tensor
    prompt_row: Tensor
    edge_row: Tensor
    x_next: Tensor
    step: Step
    edge: Tensor


class TransitionOutput(NamedTuple):
    """log_prob [E] float32; velocity [R, L...]; velocity and transition of each edge, for regularisers."""

    log_prob: Tensor
    velocity: Tensor
    edge_velocity: Tensor
    transition: Transition


def select_rows(rollout: Rollout, rows: Tensor, prompt_rows: Tensor, device: torch.device | None = None) -> StepBatch:
    """The micro-batch of some training rows and all trained edges that leave them; its latents on ``device`` (None = where they are).

    Args:
        rows: [R] int64 into the rollout's rows, in any order, no repeats.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
    """
    place = torch.full((len(rollout.row_sigma),), -1, dtype=torch.int64)
    place[rows] = torch.arange(len(rows))
    edge = torch.nonzero(place[rollout.edge_row] >= 0).squeeze(1)
    return StepBatch(
        x=rollout.row_x[rows.to(rollout.row_x.device)].to(device),
        sigma=rollout.row_sigma[rows],
        prompt_row=prompt_rows[rollout.row_group[rows]],
        edge_row=place[rollout.edge_row[edge]],
        x_next=rollout.edge_x_next[edge.to(rollout.edge_x_next.device)].to(device),
        step=Step(rollout.edge_sigma[edge], rollout.edge_sigma_next[edge], rollout.edge_sigma_guard[edge], rollout.edge_noise_level[edge]),
        edge=edge,
    )


class TransitionLikelihood:
    """log p(x_next | x, prompt) under a kernel's Gaussian.

    Args:
        kernel: name in samplers.kernels.KERNELS.
        reduction: "mean" (nats per latent element, published clip ranges) or "sum" (nats).
        prediction: of the network, a key of samplers.kernels.PREDICTIONS.
    """

    def __init__(self, kernel: str, reduction: Literal["mean", "sum"] = "mean", prediction: str = "flow") -> None:
        self.kernel = load_kernel(kernel, prediction)
        self.reduction: Literal["mean", "sum"] = reduction

    def transition(self, batch: StepBatch, velocity: Tensor) -> tuple[Tensor, Transition]:
        """Each edge's velocity [E, L...] and transition, from the rows' velocities [R, L...]."""
        identity = len(batch.edge_row) == len(batch.x) and bool((batch.edge_row == torch.arange(len(batch.edge_row))).all())
        index = batch.edge_row.to(velocity.device)
        edge_velocity, x = (velocity, batch.x) if identity else (velocity[index], batch.x[index])
        return edge_velocity, self.kernel.moments(x, edge_velocity, batch.step)

    def __call__(self, velocity: Velocity, batch: StepBatch) -> TransitionOutput:
        """Evaluate the policy on the rows, and the edges' log-probabilities from it; carries the gradient."""
        v = velocity(batch.x, batch.sigma, batch.prompt_row)
        edge_velocity, transition = self.transition(batch, v)
        log_prob = self.kernel.log_prob(batch.x_next, transition, self.reduction).float()
        return TransitionOutput(log_prob, v, edge_velocity, transition)
