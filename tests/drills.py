"""One iteration of a toy trainer, taken apart: what its updates train on, their gradients, the network rows they take, and the same by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowrl.assignment import Assignment, Samples
from flowrl.config import Config
from flowrl.engines.diffusion import Sampled
from flowrl.likelihoods.matching import NoisedBatch
from flowrl.reward_metrics import join_scores
from flowrl.trainer import Trainer
from flowrl.types import Prompt, Rollout, Scores
from flowrl.updates.base import Update
from samplers.plans import Plan

ODE = "rollout={plan: ode, num_steps: 4, group_size: 4, groups_per_iteration: 3}"
"""3 groups of 4 samples in 4 steps."""
LARGE_EPS = "optimizer.eps=0.01"


@dataclasses.dataclass
class Drill:
    """An iteration up to its updates."""

    trainer: Trainer
    iteration: int
    plan: Plan
    rollout: Rollout
    assignment: Assignment | Samples
    prompts: list[Prompt]

    @property
    def sampled(self) -> Sampled:
        return Sampled(self.plan, self.rollout, len(self.rollout.leaves))

    @property
    def numbers(self) -> list[int]:
        return list(range(len(self.prompts)))

    def material(self) -> Update:
        update, _ = self.trainer.engine.update(self.sampled, self.assignment, self.prompts, self.numbers, self.iteration)
        assert update is not None
        return update

    def update(self) -> dict[str, Any]:
        return self.trainer.update(self.sampled, self.assignment, self.prompts, self.numbers, self.iteration)

    def gradients(self) -> list[list[Tensor]]:
        """Of every update, before clipping. The weights are put back."""
        trainer, seen, before = self.trainer, [], weights(self.trainer)
        apply = trainer._apply_gradients

        def record(meters: Any) -> None:
            seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.parameters])
            apply(meters)

        trainer._apply_gradients = record
        try:
            self.update()
        finally:
            trainer._apply_gradients = apply
        put(trainer, before)
        return seen

    def gradient(self) -> list[Tensor]:
        """Of the only update."""
        (found,) = self.gradients()
        return found

    def with_advantages(self, advantages: Sequence[float] | Tensor) -> Drill:
        values = torch.as_tensor(advantages, dtype=torch.float64)
        return dataclasses.replace(self, assignment=dataclasses.replace(self.assignment, advantages=values))


def begin(trainer: Trainer, iteration: int = 1, *, rewards: Sequence[float] | None = None, rollout: Rollout | None = None) -> Drill:
    """Roll out, score and assign. ``rewards``: instead of the scores, NaN where there is none; ``rollout``: instead of one of the trainer's."""
    indices = trainer.engine.groups(iteration)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    plan = trainer.engine.plan(iteration)
    sampled, pending = trainer.engine.sample(plan, prompts, numbers, iteration)
    scores = join_scores([part.result() for part in pending])
    if rewards is not None:
        values = torch.tensor(rewards, dtype=torch.float32)
        scores = {"total": Scores(values, ~values.isnan())}
    assignment, _ = trainer.assign(Sampled(plan, rollout or sampled, 0), scores, prompts, numbers, iteration)
    return Drill(trainer, iteration, plan, rollout or sampled, assignment, prompts)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def put(trainer: Trainer, values: Sequence[Tensor]) -> None:
    for p, value in zip(trainer.parameters, values, strict=True):
        p.data.copy_(value)


def move(trainer: Trainer, seed: int = 3, size: float = 0.05) -> Trainer:
    """Random weights, another policy than the one before training; an old policy stays behind."""
    generator = torch.Generator().manual_seed(seed)
    for p in trainer.parameters:
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=size)
    return trainer


def twin(drill: Drill, config: Config) -> Trainer:
    """Another trainer, with the weights from before training, which calls the drill's prompts by the same numbers."""
    trainer = Trainer(config)
    trainer.policy.prompt_rows([p.text for p in drill.prompts])
    return trainer


def errors(trainer: Trainer, batch: NoisedBatch) -> tuple[Tensor, Tensor]:
    """Mean squared velocity errors [R] and velocities [R, L...], with gradient."""
    velocity = trainer.policy.velocity(trainer.config.matching.guidance_scale)(batch.x, batch.sigma, batch.prompt_row)
    return (velocity - batch.target).square().flatten(1).mean(1), velocity


def by_hand(trainer: Trainer, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trainer.parameters, retain_graph=True))


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def assert_same_gradient(found: Sequence[Tensor], expected: Sequence[Tensor], *, rtol: float = 1e-4) -> None:
    scale = max(g.abs().max().item() for g in expected)
    assert scale > 1e-6
    assert difference(found, expected) < rtol * scale


class RowCount:
    """Rows that really go through a trainer's transformer and its frozen copy, whatever its policy says."""

    def __init__(self, trainer: Trainer) -> None:
        self.forward = self.backward = 0
        for network in (trainer.policy.network, trainer.policy.reference_network):
            if network is not None:
                network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(kwargs["hidden_states"])
        self.forward += rows
        self.backward += rows if torch.is_grad_enabled() else 0
