"""Updates on finished samples through the matching likelihood: AWM, DiffusionNFT, AC-Flow, ORW-CFM-W2, supervised and reward-weighted regression.

Letters: N samples, S noise levels of a sample, L... latent axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.regularizers import velocity_penalty
from flowrl.likelihoods.matching import MatchingLikelihood, NoisedBatch, implicit_velocities
from flowrl.meters import Meters
from flowrl.objective_names import OBJECTIVE_NAMES, arguments, load_objective
from flowrl.policies.ema import OldPolicy
from flowrl.types import Decisions, Objective
from flowrl.updates.base import Weights, take, weights_of_units
from flowrl.updates.noised import NoisedSamples

if TYPE_CHECKING:
    from flowrl.policies.base import DiffusionPolicy

__all__ = ["MatchingUpdate", "needs_old_velocity", "takes_ratio"]


def takes_ratio(config: Config) -> bool:
    """Whether samples are compared with what the policy that sampled says of them."""
    return OBJECTIVE_NAMES[config.objective.name].takes_ratio


def needs_old_velocity(config: Config) -> bool:
    """Whether the old policy is evaluated at the training states: for an anchor, for the implicit policies, or for ratios to the policy that sampled."""
    return config.anchor.weight > 0 or config.objective.name == "nft" or _off_policy(config)


def _off_policy(config: Config) -> bool:
    return takes_ratio(config) and config.old_policy is not None and config.old_policy.rollout


class MatchingUpdate:
    """Units and decisions are samples at one noise level, or with `sum_first` samples with all of theirs. See `flowrl.updates.base.Update`.

    Args:
        noised: the states.
        weights: [N, S], advantages after the transform.
        valid: [N] bool.
        old_policy: None where the config has none.
    """

    placeholder = False

    def __init__(self, config: Config, policy: DiffusionPolicy, noised: NoisedSamples, weights: Tensor, valid: Tensor, old_policy: OldPolicy | None) -> None:
        self.config, self.policy, self.noised = config, policy, noised
        m = config.matching
        self.likelihood = MatchingLikelihood(m.weighting, m.power)
        self.rows_per_unit = 1 if m.combine == "exp_first" else m.num_times
        each = m.num_times // self.rows_per_unit  # units of a sample
        self.unit_group = noised.group.repeat_interleave(each)
        self.decision_unit = torch.arange(len(self.unit_group))
        self.advantages = weights.reshape(len(self.unit_group), -1).mean(1).to(policy.device)
        self.mask = valid.repeat_interleave(each).to(policy.device)
        velocity = policy.velocity(config.matching.guidance_scale)
        self.reference: Tensor | None = None
        if config.kl.weight > 0:
            with policy.reference():
                self.reference = noised.velocity(velocity)
        self.old: Tensor | None = None
        if needs_old_velocity(config):
            assert old_policy is not None  # the config's check
            with old_policy.applied():
                self.old = noised.velocity(velocity)
        o = config.objective
        self.is_ratio, self.objective, self.arguments = takes_ratio(config), load_objective(o.name), arguments(o)
        if o.name == "nft":
            self.arguments |= {"beta": o.beta}
        else:
            self.arguments |= {"clip_low": o.clip_low, "clip_high": o.clip_high}
        if o.name == "clipped_surrogate":
            self.arguments |= {"dual_clip": o.dual_clip, "ratio_max": o.ratio_max}
        self.old_log_prob = torch.zeros(len(self.unit_group), device=policy.device)
        self.known = torch.zeros(len(self.unit_group), dtype=torch.bool)
        self.meters = Meters(
            range(each if self.is_ratio else 0),
            kl=config.kl.weight > 0,
            ratio=self.is_ratio,
            at="time",
            extra=["matching/error", *(["anchor/mean"] if config.anchor.weight > 0 else [])],
        )

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Old log-probabilities: of the policy that sampled, or, where that is the trained one, of all units whose turn comes after the first update."""
        if not self.is_ratio:
            return
        off_policy = _off_policy(self.config)
        units = torch.arange(len(self.unit_group)) if off_policy else torch.cat([torch.zeros(0, dtype=torch.int64), *parts[1:]])
        policy = self.policy.velocity(self.config.matching.guidance_scale)
        with torch.no_grad():
            for chunk in units.split(max(1, self.policy.rows_per_forward // self.rows_per_unit)):
                if len(chunk):
                    rows = self._rows(chunk)
                    batch = self.noised.pick(rows)
                    velocity = self._of_old(rows) if off_policy else policy(batch.x, batch.sigma, batch.prompt_row)
                    self._remember(chunk, self._of_units(self.likelihood.log_prob(velocity, batch)))

    def _rows(self, units: Tensor) -> Tensor:
        return units if self.rows_per_unit == 1 else self.noised.rows_of(units)

    def _of_units(self, per_row: Tensor) -> Tensor:
        """Mean over the rows of each unit, [n]."""
        return per_row.view(-1, self.rows_per_unit).mean(1)

    def _of_old(self, rows: Tensor) -> Tensor:
        assert self.old is not None
        return take(self.old, rows, self.policy.device)

    def _remember(self, units: Tensor, log_prob: Tensor) -> None:
        self.old_log_prob[units.to(self.old_log_prob.device)] = log_prob.float()
        self.known[units] = True

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        return weights_of_units(self.config.objective.reduction, self.unit_group, self.decision_unit, units, num_groups)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        config, device = self.config, self.policy.device
        rows = self._rows(units)
        batch = self.noised.pick(rows)
        velocity = self.policy.velocity(config.matching.guidance_scale)(batch.x, batch.sigma, batch.prompt_row)
        objective, log_prob = self._objective(units, rows, batch, velocity)
        loss, extra, kl = objective.loss[:, 0], {"matching/error": -log_prob.detach()}, None
        if self.reference is not None:
            form = config.kl.form
            assert form in ("v_mse", "v_elbo")  # the config's check
            kl = self._of_units(velocity_penalty(form, velocity, take(self.reference, rows, device), batch.sigma))
            loss = loss + config.kl.weight * kl
        if config.anchor.weight > 0:
            anchor = self._of_units(velocity_penalty("v_mse", velocity, self._of_old(rows), batch.sigma))
            loss = loss + config.anchor.weight * anchor
            extra["anchor/mean"] = anchor
        if not idle:
            time = units % (self.noised.num_times // self.rows_per_unit)
            self.meters.add(objective.metrics, loss, time, first=first and not _off_policy(config), kl=kl, extra=extra)
        return (loss * weights.decision[units].to(device)).sum() * weights.scale

    def _objective(self, units: Tensor, rows: Tensor, batch: NoisedBatch, velocity: Tensor) -> tuple[Objective, Tensor]:
        """The objective of some units [n, 1], and their log-probabilities [n]; with nft those of the positive policy."""
        config, place = self.config, units.to(self.policy.device)
        advantages, mask = self.advantages[place, None].to(velocity), self.mask[place, None]
        if config.objective.name == "nft":
            implicit = implicit_velocities(velocity, self._of_old(rows), config.objective.beta)
            log_prob, mirrored = (self._of_units(self.likelihood.log_prob(v, batch)) for v in implicit)
            decisions = Decisions(log_prob[:, None], log_prob.detach()[:, None], advantages, mask, negative_log_prob=mirrored[:, None])
            return self.objective(decisions, **self.arguments), log_prob
        log_prob = self._of_units(self.likelihood.log_prob(velocity, batch))
        if self.is_ratio:
            if not bool(self.known[units].all()):  # the first update: the policy is still the one that sampled
                self._remember(units, log_prob.detach())
            old = self.old_log_prob[place]
        else:
            old = torch.zeros_like(log_prob)  # the loss is then A times the matching error
        decisions = Decisions(log_prob[:, None], old[:, None], advantages, mask)
        return self.objective(decisions, **self.arguments), log_prob
