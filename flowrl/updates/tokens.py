"""Updates on the tokens of answers: the objective, its terms and factors, for every policy-gradient method of language models.

Letters: B answers, T tokens, U units, n answers of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.ratio_levels import importance_weights
from flowrl.core.reductions import sequence_weights
from flowrl.meters import Meters
from flowrl.text.answers import Answers
from flowrl.text.objectives import Batch, TokenObjective, renumbered
from flowrl.text.terms import Term
from flowrl.types import Decisions
from flowrl.updates.base import Weights

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["TokenUpdate"]


class TokenUpdate:
    """Units are answers, or groups where the objective couples their answers. See `flowrl.updates.base.Update`.

    Args:
        advantages: [B, T] float32. mask: [B, T] bool, the tokens that count. factor: [B, T] float32, of their losses; None = 1.
    """

    def __init__(
        self,
        config: Config,
        policy: CausalLmPolicy,
        answers: Answers,
        objective: TokenObjective,
        terms: Sequence[Term],
        *,
        advantages: Tensor,
        mask: Tensor,
        factor: Tensor | None,
    ) -> None:
        self.config, self.policy, self.answers, self.objective, self.terms = config, policy, answers, objective, terms
        self.advantages, self.mask, self.factor = advantages, mask, factor
        trained = torch.nonzero(mask.any(1)).squeeze(1)
        self.placeholder = not len(trained)
        if self.placeholder:
            trained = torch.zeros(1, dtype=torch.int64)
        group = answers.group[trained]
        if objective.whole_groups:
            numbers, sizes = torch.unique_consecutive(group, return_counts=True)
            self.members: tuple[Tensor, ...] = trained.split(sizes.tolist())
            self.unit_group, self.rows_per_unit = numbers, int(sizes.max())
        else:
            self.members, self.unit_group, self.rows_per_unit = trained.split(1), group, 1
        self.decision_unit = torch.arange(len(self.unit_group))
        answers.extra["first_unit"] = self.members[0]
        self.columns = sorted(objective.columns.union(*(term.columns for term in terms)))
        old = config.old_policy
        self.is_off_policy = old is not None and old.rollout
        self.old = torch.zeros(mask.shape, device=policy.device)
        self.known = torch.zeros(len(answers), dtype=torch.bool)
        if "log_prob" in answers.measured:
            self.old, self.known = answers.measured["log_prob"].to(policy.device), torch.ones_like(self.known)
        self.meters = Meters([], ratio=True, extra=[term.name for term in terms])

    def know(self, old: Tensor, known: Tensor) -> None:
        """Old log-probabilities [B, T] of answers [B] bool that another policy than the one at the start of this iteration has sampled."""
        self.old = torch.where(known[:, None].to(self.old.device), old.to(self.old.device), self.old)
        self.known = self.known | known

    def rows_of(self, units: Tensor) -> Tensor:
        """The answers of some units, [n] int64."""
        return torch.cat([self.members[unit] for unit in units.tolist()]) if len(units) else torch.zeros(0, dtype=torch.int64)

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """Old log-probabilities of all answers whose turn comes after the first update: until then the policy is still the one that sampled."""
        later = torch.cat([torch.zeros(0, dtype=torch.int64), *parts[1:]])
        rows = self.rows_of(later)
        rows = rows[~self.known[rows]]
        self.answers.extra["later"] = rows

        if len(rows):
            with torch.no_grad():
                self._remember(rows, self.policy.token_output(self.answers.completions, rows, temperature=self.config.generation.temperature).log_prob)

    def _remember(self, rows: Tensor, log_prob: Tensor) -> None:
        self.old[rows.to(self.old.device)] = log_prob.detach().float()
        self.known[rows] = True

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        o, rows = self.config.objective, self.rows_of(units)
        member = torch.zeros(len(self.answers), dtype=torch.bool)
        member[rows] = True
        limit = o.max_length or float(self.config.generation.max_new_tokens)
        weight, total = sequence_weights(o.reduction, self.mask & member[:, None], group=self.answers.group, num_groups=num_groups, max_length=limit)
        return weight, float(total)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        rows, answers = self.rows_of(units), self.answers
        out = self.policy.token_output(answers.completions, rows, columns=self.columns, temperature=self.config.generation.temperature)
        device = out.log_prob.device
        if not bool((known := self.known[rows]).all()):  # the first update: the policy is still the one that sampled
            self._remember(rows[~known], out.log_prob[~known])
        group, num_groups = renumbered(answers.group[rows])
        mask = torch.zeros_like(self.mask[rows]) if idle else self.mask[rows]  # what only keeps others company is in no statistic
        decisions = Decisions(out.log_prob, self.old[rows.to(device)], self.advantages[rows].to(device), mask.to(device))
        batch = Batch(answers, rows, out, decisions, group, num_groups, first)
        objective = self.objective(batch)
        loss, extra = objective.loss, {}
        for term in self.terms:
            added, measure = term(batch)
            loss, extra[term.name] = loss + added, measure
        factor = self._factors(rows)
        weight = weights.decision[rows] if factor is None else weights.decision[rows] * factor
        if not idle:
            where = torch.nonzero(self.mask[rows].flatten()).squeeze(1).to(device)
            picked = {name: values.flatten()[where] for name, values in objective.metrics.items()}
            kept = {name: values.flatten()[where] for name, values in extra.items()}
            self.meters.add(
                picked, loss.detach().flatten()[where], torch.zeros(len(where), dtype=torch.int64), first=first and not self.is_off_policy, extra=kept
            )
        weight = weight.to(device)
        return torch.where(weight != 0, loss * weight, 0.0).sum() * weights.scale

    def _factors(self, rows: Tensor) -> Tensor | None:
        """[n, T]: those of the method, times the weights that correct for an engine with other numerics."""
        g = self.config.generation
        kind = g.importance if g.importance is not None else ("truncated" if g.engine == "vllm" else "none")
        factor = None if self.factor is None else self.factor[rows]
        if kind == "none":
            return factor
        sampled = self.answers.completions.log_prob[rows]
        old, mask = self.old[rows.to(self.old.device)].cpu(), self.answers.mask[rows]
        weight = importance_weights(old, sampled, mask, kind, g.importance_level, low=g.importance_low, high=g.importance_high)
        return weight if factor is None else factor * weight
