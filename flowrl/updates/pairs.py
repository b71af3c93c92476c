"""Updates on preferences: a chosen and a rejected sample of one prompt, compared at the same noise and noise levels (Diffusion-DPO and its kin).

Letters: N pairs, S noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.preference import NEEDS_REFERENCE, PAIR_OBJECTIVES
from flowrl.core.regularizers import velocity_penalty
from flowrl.likelihoods.matching import MatchingLikelihood
from flowrl.meters import Meters
from flowrl.objective_names import arguments
from flowrl.policies.base import DiffusionPolicy
from flowrl.types import Pairs
from flowrl.updates.base import Weights, take, weights_of_units
from flowrl.updates.noised import NoisedSamples

__all__ = ["PairUpdate", "needs_reference"]

_MEASURED = ("margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio")


def needs_reference(config: Config) -> bool:
    """Whether a run evaluates the model as it was before training."""
    return config.kl.weight > 0 or config.objective.name in NEEDS_REFERENCE


class PairUpdate:
    """Units and decisions are pairs at one noise level, or with `sum_first` pairs at all of theirs. See `flowrl.updates.base.Update`.

    Args:
        noised: 2 N samples, chosen and rejected in turn; the two of a pair share a slot.
        placeholder: there is no pair; the one that is left only keeps this process in step.
    """

    def __init__(self, config: Config, policy: DiffusionPolicy, noised: NoisedSamples, *, placeholder: bool) -> None:
        self.config, self.policy, self.noised, self.placeholder = config, policy, noised, placeholder
        m = config.matching
        self.likelihood = MatchingLikelihood(m.weighting, m.power)
        self.span = 1 if m.combine == "exp_first" else m.num_times  # noise levels of a unit
        self.rows_per_unit = 2 * self.span
        self.unit_group = noised.group[::2].repeat_interleave(m.num_times // self.span)
        self.decision_unit = torch.arange(len(self.unit_group))
        self.reference: Tensor | None = None
        self.reference_log_prob: Tensor | None = None
        if needs_reference(config):
            self._evaluate_reference()
        self.meters = Meters([], kl=config.kl.weight > 0, ratio=False, extra=[f"pair/{name}" for name in _MEASURED])

    def _evaluate_reference(self) -> None:
        """Log-probabilities [2 N S] of the reference, and its velocities only where a penalty needs them."""
        velocity, found = self.policy.velocity(self.config.matching.guidance_scale), []
        kept: list[Tensor] = []
        with self.policy.reference():
            for chunk in self.noised.chunks(torch.arange(self.noised.num_rows)):
                out = self.likelihood(velocity, self.noised.pick(chunk))
                found.append(out.log_prob)
                if self.config.kl.weight > 0:
                    kept.append(out.velocity)
        self.reference_log_prob = torch.cat(found)
        self.reference = torch.cat(kept) if kept else None

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Nothing: a pair loss compares with the reference, not with the policy before the update."""

    def _rows(self, units: Tensor) -> Tensor:
        """[n, 2, span] rows of some units: chosen, rejected."""
        times = self.noised.num_times
        pair, time = (units, torch.arange(times).expand(len(units), -1)) if self.span > 1 else (units // times, (units % times)[:, None])
        return torch.stack([(2 * pair + side)[:, None] * times + time for side in (0, 1)], 1)

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        return weights_of_units(self.config.objective.reduction, self.unit_group, self.decision_unit, units, num_groups)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        config, device = self.config, self.policy.device
        rows = self._rows(units)
        flat = rows.flatten()
        batch = self.noised.pick(flat)
        out = self.likelihood(self.policy.velocity(config.matching.guidance_scale), batch)

        def sides(per_row: Tensor) -> tuple[Tensor, Tensor]:
            table = per_row.view(rows.shape).mean(2)
            return table[:, :1], table[:, 1:]

        chosen, rejected = sides(out.log_prob)
        reference = None if self.reference_log_prob is None else sides(take(self.reference_log_prob, flat, device))
        pairs = Pairs(
            chosen=chosen,
            rejected=rejected,
            reference_chosen=None if reference is None else reference[0],
            reference_rejected=None if reference is None else reference[1],
            mask=torch.ones_like(chosen, dtype=torch.bool),
        )
        o = config.objective
        settings = {"beta": o.beta, "margin": o.margin, "sft_weight": o.sft_weight, "label_smoothing": o.label_smoothing}
        objective = PAIR_OBJECTIVES[o.name](pairs, **settings, **arguments(o))
        loss, kl = objective.loss[:, 0], None
        if self.reference is not None:
            form = config.kl.form
            assert form in ("v_mse", "v_elbo")  # the config's check
            kl = velocity_penalty(form, out.velocity, take(self.reference, flat, device), batch.sigma).view(len(units), -1).mean(1)
            loss = loss + config.kl.weight * kl
        if not idle:
            extra = {f"pair/{name}": objective.metrics[name].flatten() for name in _MEASURED}
            self.meters.add({}, loss, torch.zeros_like(units), first=False, kl=kl, extra=extra)
        return (loss * weights.decision[units].to(device)).sum() * weights.scale
