"""Updates on pairs of answers: both of a pair in one micro-batch, compared with the reference, the policy of the iteration, or neither.

Letters: B answers, T tokens, N pairs, n of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.pair_tokens import sum_tokens
from flowrl.meters import Meters
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, renumbered
from flowrl.text.pairs import PairObjective, revisions
from flowrl.types import Completions, Decisions
from flowrl.updates.base import Weights, weights_of_units

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["AnswerPairUpdate"]

_MEASURED = ("margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio")


class AnswerPairUpdate:
    """Units and decisions are pairs. See `flowrl.updates.base.Update`.

    What is left for `TextEngine.minimum_nfe` in ``answers.extra``: ``trained_tokens`` of one epoch, both answers of every pair (with `srpo` four revisions
    more); ``measured_tokens`` of the reference, each answer that is in a pair once; ``later``, the answers that the policy of the iteration is asked for
    before the first update; ``first_unit``.

    Attributes:
        counts: numbers of this process for the metrics.
    Args:
        sampling: within it the policy is the one that sampled. is_old: that is not the one that an iteration begins with.
    """

    def __init__(
        self,
        config: Config,
        policy: CausalLmPolicy,
        answers: Answers,
        objective: PairObjective,
        sampling: Callable[[], AbstractContextManager[None]],
        *,
        is_old: bool,
    ) -> None:
        self.config, self.policy, self.answers, self.objective = config, policy, answers, objective
        self.sampling, self.is_old = sampling, is_old
        pairs: Tensor = answers.extra["pairs"]
        self.counts, self.placeholder = {"pair/count": float(len(pairs))}, not len(pairs)
        self.pairs = torch.zeros(1, 2, dtype=torch.int64) if self.placeholder else pairs
        self.unit_group = answers.group[self.pairs[:, 0]]
        self.decision_unit = torch.arange(len(self.pairs))
        self.revisions = revisions(answers, self.pairs, config.pairing.revision) if objective.revises else None
        self.rows_per_unit = 2 if self.revisions is None else 6
        self.previous = torch.zeros(answers.mask.shape)
        self.known = torch.full((len(answers),), "previous" not in objective.anchors)
        if "log_prob" in answers.measured:
            self.previous, self.known = answers.measured["log_prob"], torch.ones_like(self.known)
        self._ask_reference()
        self._leave_counts()
        names = (*_MEASURED, *(("clipped",) if config.objective.name == "p3o" else ()))
        self.meters = Meters([], ratio=False, extra=[f"pair/{name}" for name in names])

    def _evaluate(self, completions: Completions, rows: Tensor) -> Tensor:
        """Log-probabilities [len(rows), T] float32 on the CPU, of the policy as it is now."""
        with torch.no_grad():
            return self.policy.token_output(completions, rows, temperature=self.config.generation.temperature).log_prob.float().cpu()

    def _ask_reference(self) -> None:
        answers, asks = self.answers, "reference" in self.objective.anchors
        rows = torch.unique(self.pairs)[: 0 if self.placeholder else None]
        known = answers.measured.get("reference")
        reference = torch.zeros(answers.mask.shape) if known is None else known
        self.asked = rows if asks and known is None else rows[:0]
        self.revised_reference: Tensor | None = None if self.revisions is None else torch.zeros(self.revisions.mask.shape)
        if asks:
            with self.policy.reference():
                if len(self.asked):
                    reference[self.asked] = self._evaluate(answers.completions, self.asked)
                if self.revisions is not None and self.revised_reference is not None and not self.placeholder:
                    self.revised_reference = self._evaluate(self.revisions, torch.arange(len(self.revisions)))
        answers.extra["pair_reference"] = reference
        if (guide := self.objective.guide) is not None:
            answers.extra["guide"] = torch.zeros(answers.mask.shape)
            before = guide.tokens
            if len(rows):
                answers.extra["guide"][rows] = guide(answers.completions, rows)
            self.counts["pair/guide_tokens"] = float(guide.tokens - before)

    def _leave_counts(self) -> None:
        extra, whole = self.answers.extra, _whole(self.answers.completions)
        of_pairs = whole[self.pairs].sum(1)
        measured = int(whole[self.asked].sum())
        if self.revisions is not None:
            of_revisions = _whole(self.revisions).view(-1, 4).sum(1)
            of_pairs = of_pairs + of_revisions
            measured += 0 if self.placeholder else int(of_revisions.sum())
        extra["trained_tokens"] = 0 if self.placeholder else int(of_pairs.sum())
        extra["measured_tokens"] = extra.get("measured_tokens", 0) + measured
        extra["first_unit"] = self.pairs[0].repeat(self.rows_per_unit // 2)
        extra["first_unit_tokens"] = int(of_pairs[0])

    def prepare(self, parts: Sequence[Tensor]) -> None:
        """What the policy of the iteration says of pairs whose turn comes after the first update; that one's own forward serves as theirs."""
        rows = torch.unique(self.pairs[torch.cat([torch.zeros(0, dtype=torch.int64), *parts[0 if self.is_old else 1 :]])])
        if not self.is_old and len(parts):
            rows = rows[~torch.isin(rows, self.pairs[parts[0]])]
        rows = rows[~self.known[rows]][: 0 if self.placeholder else None]
        self.answers.extra["later"] = rows
        if "previous" in self.objective.anchors:
            with self.sampling():
                if len(rows):
                    self._remember(rows, self._evaluate(self.answers.completions, rows))

    def _remember(self, rows: Tensor, log_prob: Tensor) -> None:
        self.previous[rows] = log_prob.detach().float().cpu()
        self.known[rows] = True

    def weigh(self, units: Tensor, num_groups: int) -> tuple[Tensor, float]:
        return weights_of_units(self.config.objective.reduction, self.unit_group, self.decision_unit, units, num_groups)

    def loss(self, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> Tensor:
        answers, rows = self.answers, self.pairs[units].flatten()
        out = self.policy.token_output(answers.completions, rows, temperature=self.config.generation.temperature)
        if not bool((known := self.known[rows]).all()):  # the first update: the policy is still the one that the iteration began with
            self._remember(rows[~known], out.log_prob[~known])
        device = out.log_prob.device
        mask = answers.mask[rows].to(device)
        decisions = Decisions(out.log_prob, self.previous[rows].to(device), torch.zeros_like(out.log_prob), mask)
        batch = Batch(answers, rows, out, decisions, *renumbered(answers.group[rows]), first)
        objective = self.objective(batch, None if self.revisions is None else self._revising(self.revisions, units))
        loss = objective.loss[:, 0]
        if not idle:
            extra = {name: objective.metrics[name.removeprefix("pair/")].flatten() for name in self.meters.extra}
            self.meters.add({}, loss, torch.zeros_like(units), first=False, extra=extra)
        return (loss * weights.decision[units].to(device)).sum() * weights.scale

    def _revising(self, revisions: Completions, units: Tensor) -> Tensor:
        """[n, 2], with gradient: how much better than the reference the policy tells chosen from rejected, with the chosen (the rejected) one as a draft."""
        rows = (4 * units[:, None] + torch.arange(4)).flatten()
        out = self.policy.token_output(revisions, rows, temperature=self.config.generation.temperature).log_prob
        assert self.revised_reference is not None
        ratio = sum_tokens(out - self.revised_reference[rows].to(out.device), revisions.mask[rows].to(out.device)).view(-1, 2, 2)
        return ratio[..., 0] - ratio[..., 1]


def _whole(completions: Completions) -> Tensor:
    """[B] int64, positions that a network reads of an answer with its prompt: all but the last."""
    prompt = torch.tensor([len(tokens) for tokens in completions.prompt_tokens], dtype=torch.int64)
    return prompt[completions.group] + completions.length - 1
