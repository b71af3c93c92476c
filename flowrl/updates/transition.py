"""Updates on sampled SDE steps: the objective on the density of the next latent, a KL of the transitions, and LayerTuning-RL's supervised term."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.assignment import Assignment
from flowrl.config import Config
from flowrl.core.layer_tuning import velocity_regression
from flowrl.core.objectives import OBJECTIVES
from flowrl.core.ratios import ratio_norm, step_weights
from flowrl.core.regularizers import gaussian_kl
from flowrl.likelihoods.transition import StepBatch, TransitionLikelihood, TransitionOutput, select_rows
from flowrl.meters import Meters
from flowrl.policies.base import DiffusionPolicy
from flowrl.types import Decisions
from flowrl.updates.base import Weights, take
from samplers.plans import Plan

__all__ = ["TransitionUpdate"]


class TransitionUpdate:
    """Units are training rows, decisions the edges that leave them, see `flowrl.updates.base.Update`.

    Args:
        likelihood: of the run's kernel.
        plan: of the iteration; names the steps that are measured.
        assignment: what the iteration trains with on this process.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
    """

    rows_per_unit = 1

    def __init__(
        self, config: Config, policy: DiffusionPolicy, likelihood: TransitionLikelihood, plan: Plan, assignment: Assignment, prompt_rows: Tensor
    ) -> None:
        self.config, self.policy, self.likelihood, self.assignment, self.prompt_rows = config, policy, likelihood, assignment, prompt_rows
        rollout = assignment.rollout
        self.unit_group, self.decision_unit, self.placeholder = rollout.row_group, rollout.edge_row, assignment.placeholder
        self.reference = self._reference_velocity()
        steps = sorted({plan.nodes[node.parent].step for node in plan.nodes if node.trained})
        self.meters = Meters(steps, kl=self.reference is not None, tuning=assignment.tuning is not None, normalised=config.objective.ratio != "plain")

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Nothing: the rollout has measured the old log-probabilities."""

    def _reference_velocity(self) -> Tensor | None:
        """The reference's velocities [R, L...] on all training rows, once per iteration; None without KL."""
        if self.config.kl.weight == 0:
            return None
        rollout = self.assignment.rollout
        with self.policy.reference():
            velocity = self.policy.velocity(self.config.rollout.guidance_scale)
            return velocity(rollout.row_x, rollout.row_sigma, self.prompt_rows[rollout.row_group])

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        config, device, assignment, meters = self.config, self.policy.device, self.assignment, self.meters
        rollout = assignment.rollout
        batch = select_rows(rollout, units, self.prompt_rows, device)
        out = self.likelihood(self.policy.velocity(config.rollout.guidance_scale), batch)
        objective = OBJECTIVES[config.objective.name](
            self._decisions(batch, out, units),
            clip_low=assignment.clip_low[batch.edge].to(device)[:, None],
            clip_high=assignment.clip_high[batch.edge].to(device)[:, None],
        )
        loss = objective.loss[:, 0]
        if config.objective.step_weight != "none":
            length, grad_scale = batch.step.sigma - batch.step.sigma_next, self.likelihood.kernel.grad_scale(batch.step)
            loss = loss * step_weights(config.objective.step_weight, length=length, grad_scale=grad_scale).to(loss)
        kl = None
        if self.reference is not None:
            kl = self._kl(batch, out, take(self.reference, units, device))
            loss = loss + config.kl.weight * kl
        total = (loss * weights.decision[batch.edge].to(device)).sum() * weights.scale
        if assignment.tuning is not None:
            tuned = velocity_regression(out.velocity, take(assignment.tuning.target, units, device), assignment.tuning.weight[units].to(device))
            tuning_loss = config.layer_tuning.weight * tuned.sum() * weights.unit_scale
            if not idle:
                meters.add_tuning(tuned.detach(), total, tuning_loss, out.velocity)
            total = total + tuning_loss
        if not idle:
            plain = None if config.objective.ratio == "plain" else out.log_prob.detach() - take(rollout.edge_old_log_prob, batch.edge, device)
            on_policy = first and not (config.old_policy is not None and config.old_policy.rollout)
            meters.add(objective.metrics, loss.detach(), rollout.edge_step[batch.edge], first=on_policy, plain=plain, kl=kl)
        return total

    def _kl(self, batch: StepBatch, out: TransitionOutput, reference: Tensor) -> Tensor:
        form = self.config.kl.form
        ref_velocity, ref_transition = self.likelihood.transition(batch, reference)
        return gaussian_kl(
            form,
            mean=out.transition.mean,
            ref_mean=ref_transition.mean,
            velocity=out.edge_velocity,
            ref_velocity=ref_velocity,
            std=out.transition.std,
            length=batch.step.sigma - batch.step.sigma_next,
        )

    def _decisions(self, batch: StepBatch, out: TransitionOutput, units: Tensor) -> Decisions:
        """The edges of a micro-batch as the objective sees them, [E, 1]; with `ratio_norm` the log-probability is the normalised log-ratio itself."""
        rollout, device = self.assignment.rollout, self.policy.device
        log_prob, old_log_prob = out.log_prob, take(rollout.edge_old_log_prob, batch.edge, device)
        if self.config.objective.ratio == "ratio_norm":
            assert rollout.row_velocity is not None
            _, old = self.likelihood.transition(batch, take(rollout.row_velocity, units, device))
            reduction = self.config.rollout.log_prob_reduction
            log_prob = ratio_norm(batch.x_next, out.transition.mean, old.mean, out.transition.std, reduction).float()
            old_log_prob = torch.zeros_like(log_prob)
        return Decisions(
            log_prob=log_prob[:, None],
            old_log_prob=old_log_prob[:, None],
            advantages=self.assignment.advantages[batch.edge].to(device)[:, None],
            mask=torch.ones_like(log_prob, dtype=torch.bool)[:, None],
        )
