"""Updates on sampled SDE steps: the objective on the density of the next latent, a KL of the transitions, and LayerTuning-RL's supervised term.

Letters: E decisions, B sequences, S decisions of the longest one, n units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.assignment import Assignment
from flowrl.config import Config
from flowrl.core.layer_tuning import velocity_regression
from flowrl.core.ratio_levels import at_level
from flowrl.core.ratios import ratio_norm, step_weights
from flowrl.core.reductions import REDUCTIONS, sequence_weights
from flowrl.core.regularizers import gaussian_kl
from flowrl.likelihoods.transition import StepBatch, TransitionLikelihood, TransitionOutput, select_rows
from flowrl.meters import Meters
from flowrl.objective_agreement import trains_whole_samples
from flowrl.objective_names import arguments, load_objective
from flowrl.policies.base import DiffusionPolicy
from flowrl.types import Decisions, Objective
from flowrl.updates.base import Weights, take, weights_of_units
from samplers.plans import Plan

__all__ = ["TransitionUpdate"]


class TransitionUpdate:
    """Units are training rows, decisions the edges that leave them, see `flowrl.updates.base.Update`.

    The edges of a sample of the plans chain and window are a sequence, in the order of their steps; an edge of a tree is one of its own. Where an objective
    or a ratio needs all of a sequence at once, units are samples, or groups if the samples of a group share their first row (`same_noise`).

    Args:
        likelihood: of the run's kernel.
        plan: of the iteration; names the steps that are measured.
        assignment: what the iteration trains with on this process.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
    """

    def __init__(
        self, config: Config, policy: DiffusionPolicy, likelihood: TransitionLikelihood, plan: Plan, assignment: Assignment, prompt_rows: Tensor
    ) -> None:
        self.config, self.policy, self.likelihood, self.assignment, self.prompt_rows = config, policy, likelihood, assignment, prompt_rows
        rollout, o = assignment.rollout, config.objective
        self.objective, self.arguments, self.placeholder = load_objective(o.name), arguments(o), assignment.placeholder
        if o.name == "clipped_surrogate":
            self.arguments |= {"dual_clip": o.dual_clip, "ratio_max": o.ratio_max}
        steps = sorted({plan.nodes[node.parent].step for node in plan.nodes if node.trained})
        edges = torch.arange(len(rollout.edge_row))
        self.has_sequences, self.whole = config.rollout.plan in ("chain", "window"), trains_whole_samples(o)
        self.sequence, self.position, self.length = edges, torch.zeros_like(edges), 1.0  # of each edge; and of a sequence without a selection
        self.unit_group, self.decision_unit, self.rows_per_unit = rollout.row_group, rollout.edge_row, 1
        if self.has_sequences:
            sample = torch.empty_like(edges)
            sample[rollout.leaf_edge[:, 0]] = rollout.leaf_edge[:, 1]
            found, self.sequence = sample.unique(return_inverse=True)
            order = (self.sequence * (max(steps) + 1) + rollout.edge_step).argsort()
            counts = torch.bincount(self.sequence)
            self.position[order] = edges - (counts.cumsum(0) - counts).repeat_interleave(counts)
            self.length = float(len(steps))
            if self.whole:
                together = rollout.leaf_group[found] if config.rollout.same_noise else found
                units, number = together.unique(return_inverse=True)
                self.unit_group = units if config.rollout.same_noise else rollout.leaf_group[found]
                self.decision_unit = number[self.sequence]
                row_unit = torch.stack([self.decision_unit, rollout.edge_row]).unique(dim=1)[0]
                self.rows_per_unit = int(torch.bincount(row_unit).max())
        self.reference = self._reference_velocity()
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

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        o = self.config.objective
        if o.reduction in REDUCTIONS:
            return weights_of_units(o.reduction, self.unit_group, self.decision_unit, units, num_groups)
        member = torch.zeros(len(self.unit_group), dtype=torch.bool)
        member[units] = True
        mask = torch.zeros(int(self.sequence.max()) + 1, int(self.position.max()) + 1, dtype=torch.bool)
        mask[self.sequence, self.position] = member[self.decision_unit]
        weight, total = sequence_weights(o.reduction, mask, max_length=self.length if o.max_length is None else o.max_length)
        return weight[self.sequence, self.position], float(total)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        config, device, assignment, meters = self.config, self.policy.device, self.assignment, self.meters
        rollout = assignment.rollout
        rows = self._rows(units)
        batch = select_rows(rollout, rows, self.prompt_rows, device)
        out = self.likelihood(self.policy.velocity(config.rollout.guidance_scale), batch)
        objective = self._objective(batch, out, rows)
        loss = objective.loss
        if config.objective.step_weight != "none":
            length, grad_scale = batch.step.sigma - batch.step.sigma_next, self.likelihood.kernel.grad_scale(batch.step)
            loss = loss * step_weights(config.objective.step_weight, length=length, grad_scale=grad_scale).to(loss)
        kl = None
        if self.reference is not None:
            kl = self._kl(batch, out, take(self.reference, rows, device))
            loss = loss + config.kl.weight * kl
        total = (loss * weights.decision[batch.edge].to(device)).sum() * weights.scale
        if assignment.tuning is not None:
            tuned = velocity_regression(out.velocity, take(assignment.tuning.target, rows, device), assignment.tuning.weight[rows].to(device))
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
        assert form in ("fg_code", "exact_mean", "v_mse", "x_mse")  # the config's check
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

    def _rows(self, units: Tensor) -> Tensor:
        """The training rows of some units."""
        if not self.whole:
            return units
        member = torch.zeros(len(self.unit_group), dtype=torch.bool)
        member[units] = True
        return self.assignment.rollout.edge_row[member[self.decision_unit]].unique()

    def _objective(self, batch: StepBatch, out: TransitionOutput, rows: Tensor) -> Objective:
        """Loss and metrics of a micro-batch, [E] each: sequences of one decision, or whole ones. With `ratio_norm` the log-probability is the normalised
        log-ratio itself.
        """
        assignment, device, ratio = self.assignment, self.policy.device, self.config.objective.ratio
        log_prob, old_log_prob = out.log_prob, take(assignment.rollout.edge_old_log_prob, batch.edge, device)
        if ratio == "ratio_norm":
            assert assignment.rollout.row_velocity is not None
            _, old = self.likelihood.transition(batch, take(assignment.rollout.row_velocity, rows, device))
            reduction = self.config.rollout.log_prob_reduction
            log_prob = ratio_norm(batch.x_next, out.transition.mean, old.mean, out.transition.std, reduction).float()
            old_log_prob = torch.zeros_like(log_prob)
        number, position = torch.arange(len(batch.edge)), torch.zeros_like(batch.edge)
        if self.whole:
            number, position = self.sequence[batch.edge].unique(return_inverse=True)[1], self.position[batch.edge]
        at = (number.to(device), position.to(device))

        def laid_out(values: Tensor) -> Tensor:
            """[E] -> [B, S]."""
            return values.new_zeros(int(number.max()) + 1, int(position.max()) + 1).index_put(at, values) if self.whole else values[:, None]

        decisions = Decisions(
            log_prob=laid_out(log_prob),
            old_log_prob=laid_out(old_log_prob),
            advantages=laid_out(assignment.advantages[batch.edge].to(device)),
            mask=laid_out(torch.ones_like(log_prob, dtype=torch.bool)),
        )
        if ratio != "plain" and ratio != "ratio_norm":
            decisions = at_level(decisions, ratio)
        low, high = (laid_out(bound[batch.edge].to(device)) for bound in (assignment.clip_low, assignment.clip_high))
        found: Objective = self.objective(decisions, clip_low=low, clip_high=high, **self.arguments)
        return Objective(found.loss[at], {name: value[at] for name, value in found.metrics.items()})
