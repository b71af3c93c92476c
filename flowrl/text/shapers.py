"""Shaping of rewards and advantages of answers: by length, rank, history, likelihood and constraints. The formulas are in core/{shaping,length_shaping,
advantage_shaping}.py.

Letters: B answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.core.advantage_shaping import anchor_inserted, compress, downscale_inserted, novelty, position_bonus
from flowrl.core.length_shaping import LengthHistory, history_length, length_rank, relative_length
from flowrl.core.shaping import constraint_gate, exit_decay, gate_product, rank_unlikely
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless
from flowrl.text.samples import EXPERT, FRESH
from flowrl.types import UserError

__all__ = [
    "ConstraintGate",
    "ExitDecay",
    "GateProduct",
    "HistoryLength",
    "Inserted",
    "LengthRank",
    "Novelty",
    "PositionBonus",
    "RankUnlikely",
    "RelativeLength",
    "ShaperBase",
]


def right(answers: Answers, threshold: float) -> Tensor:
    """[B] bool: answers whose reward, as the verifier gave it, is above the threshold."""
    total = answers.scores["total"]
    return total.valid & (total.values > threshold)


def sampled_likelihood(answers: Answers) -> Tensor:
    """[B] float64, mean log-probability of the sampled tokens under the policy that sampled them, as the engine said it."""
    log_prob = torch.where(answers.mask, answers.completions.log_prob.double(), 0.0)
    return log_prob.sum(1) / answers.lengths.clamp_min(1)


def own_answers(answers: Answers) -> Tensor:
    """[B] bool: what the policy has said by itself and no earlier iteration has trained; not an expert's, not with a hint, not replayed."""
    if answers.origin is None:
        return torch.ones(len(answers), dtype=torch.bool)
    fresh, carried = answers.origin == FRESH, answers.extra.get("carried")
    return fresh if carried is None else fresh | (carried > 0)


class ShaperBase(Stateless):
    """Changes nothing."""

    def rewards(self, answers: Answers) -> None:
        pass

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        return advantages


class LengthRank(ShaperBase):
    """GRPO-lambda (arXiv:2505.18086): rewards by `length_rank`, over the groups of all processes.

    Args:
        share, strength: see `length_rank`. threshold: a reward above it is a right answer.
    """

    def __init__(self, share: float = 0.2, strength: float = 0.6, threshold: float = 0.5) -> None:
        if not 0 <= share <= 1 or not 0 <= strength <= 1:
            raise ValueError("share and strength must be in [0, 1]")
        self.share, self.strength, self.threshold = share, strength, threshold

    def rewards(self, answers: Answers) -> None:
        numbers = torch.tensor(list(answers.numbers), dtype=torch.int64)
        here = (right(answers, self.threshold), answers.lengths.double(), numbers[answers.group], answers.valid)
        correct, length, group, valid = (torch.cat(column) for column in zip(*answers.gather(here), strict=True))
        shaped = length_rank(correct, length, group, valid, int(group.max()) + 1, share=self.share, strength=self.strength)
        answers.rewards = shaped[torch.isin(group, numbers)]  # a group is whole on one process


class HistoryLength(ShaperBase):
    """HAPO (arXiv:2505.11225): `history_length` is added, from what right answers to the prompt have needed on all processes.

    All answers are shaped; the history learns from the policy's own alone, from each once, see `own_answers`.

    Args:
        weight, floor: see `history_length`. mode: see `LengthHistory.target`. threshold: a reward above it is a right answer.
    """

    def __init__(self, weight: float = 1.0, floor: float = -0.7, mode: Literal["min", "mean"] = "min", threshold: float = 0.5) -> None:
        if mode not in ("min", "mean"):
            raise ValueError(f"unknown mode {mode}; known: min, mean")
        nothing = torch.zeros(0)
        history_length(nothing, nothing.bool(), nothing, weight=weight, floor=floor)
        self.weight, self.floor, self.mode, self.threshold = weight, floor, mode, threshold
        self.history = LengthHistory.empty(0)

    def rewards(self, answers: Answers) -> None:
        correct, length, prompt = right(answers, self.threshold), answers.lengths.double(), answers.indices[answers.group]
        learned = answers.valid & own_answers(answers)
        every = (torch.cat(column) for column in zip(*answers.gather((prompt, length, correct, learned)), strict=True))
        prompts, lengths, corrects, known = every
        missing = int(prompts.max()) + 1 - len(self.history.count)
        if missing > 0:
            more = LengthHistory.empty(missing)
            self.history = LengthHistory(*(torch.cat([getattr(self.history, name), getattr(more, name)]) for name in ("shortest", "total", "count")))
        target = self.history.target(self.mode)[prompt]
        answers.rewards = answers.rewards + history_length(length, correct, target, weight=self.weight, floor=self.floor)
        self.history = self.history.updated(prompts, lengths, corrects, known)

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = LengthHistory.from_state(state)


class RelativeLength(ShaperBase):
    """Kimi k1.5 (arXiv:2501.12599): `relative_length` is added.

    Args:
        weight: of it. warmup: iterations without it. threshold: a reward above it is a right answer.
    """

    def __init__(self, weight: float = 1.0, warmup: int = 0, threshold: float = 0.5) -> None:
        if weight < 0 or warmup < 0:
            raise ValueError("weight and warmup must not be negative")
        self.weight, self.warmup, self.threshold = weight, warmup, threshold

    def rewards(self, answers: Answers) -> None:
        if answers.iteration > self.warmup:
            length = answers.lengths.double()
            added = relative_length(length, right(answers, self.threshold), answers.group, answers.valid, answers.num_groups)
            answers.rewards = answers.rewards + self.weight * added


class ExitDecay(ShaperBase):
    """S-GRPO (arXiv:2505.07686): rewards by `exit_decay`, of answers from the source `exits`.

    Args:
        decay: of the next right exit. threshold: a reward above it is a right answer.
    """

    def __init__(self, decay: float = 0.5, threshold: float = 0.5) -> None:
        if not 0 <= decay <= 1:
            raise ValueError("decay must be in [0, 1]")
        self.decay, self.threshold = decay, threshold

    def rewards(self, answers: Answers) -> None:
        place = answers.extra["exit"].double()
        answers.rewards = exit_decay(right(answers, self.threshold), place, answers.group, answers.valid, answers.num_groups, decay=self.decay)


def column(answers: Answers, name: str) -> Tensor:
    """[B] float64: a reward, or one of its raw columns as ``reward/column``.

    Raises:
        UserError: there is none of that name.
    """
    reward, _, raw = name.partition("/")
    scores = answers.scores.get(reward)
    if scores is None or (raw and raw not in scores.raw):
        known = [key for key in answers.scores if key != "total"]
        known += [f"{key}/{part}" for key, one in answers.scores.items() for part in one.raw]
        raise UserError(f"shaping: there is no reward or column {name}; there are {', '.join(known)}")
    return (scores.raw[raw] if raw else scores.values).double()


class GateProduct(ShaperBase):
    """Posterior-GRPO (arXiv:2508.05170): the reward is `gate_product`, whatever the rewards' weights say.

    Args:
        form, outcome, quality: a reward, or a column as ``reward/column``; form null = always 1.
    """

    def __init__(self, outcome: str, quality: str, form: str | None = None) -> None:
        self.outcome, self.quality, self.form = outcome, quality, form

    def rewards(self, answers: Answers) -> None:
        outcome, quality = column(answers, self.outcome), column(answers, self.quality)
        form = torch.ones_like(outcome) if self.form is None else column(answers, self.form)
        value = gate_product(form, outcome, quality)
        answers.valid = answers.valid & value.isfinite()
        answers.rewards = torch.where(value.isfinite(), value, 0.0)


class RankUnlikely(ShaperBase):
    """Unlikeliness reward (arXiv:2506.02355), see `rank_unlikely`.

    Args:
        strength: in [0, 1].
    """

    def __init__(self, strength: float = 0.25) -> None:
        if not 0 <= strength <= 1:
            raise ValueError("strength must be in [0, 1]")
        self.strength = strength

    def rewards(self, answers: Answers) -> None:
        rewards = torch.where(answers.valid, answers.rewards, 0.0)
        answers.rewards = rank_unlikely(rewards, sampled_likelihood(answers), answers.group, answers.valid, answers.num_groups, strength=self.strength)


class Novelty(ShaperBase):
    """XRPO's sharpening (arXiv:2510.06672), see `novelty`.

    Args:
        scale, cap: >= 0. threshold: a reward above it is a right answer.
    """

    def __init__(self, scale: float = 1.0, cap: float = 1.0, threshold: float = 0.5) -> None:
        if scale < 0 or cap < 0:
            raise ValueError("scale and cap must not be negative")
        self.scale, self.cap, self.threshold = scale, cap, threshold

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        correct = right(answers, self.threshold)
        likelihood = sampled_likelihood(answers)
        return novelty(advantages, likelihood, correct, answers.group, answers.valid, answers.num_groups, scale=self.scale, cap=self.cap)


class PositionBonus(ShaperBase):
    """ASPO (arXiv:2508.19201): right answers that called a tool early gain, see `position_bonus`.

    Args:
        marker: the text that a call begins with; null = where the environment first speaks. strength, cap: see `position_bonus`.
        threshold: a reward above it is a right answer.
    """

    def __init__(self, marker: str | None = None, strength: float = -2.0, cap: float = 0.7, threshold: float = 0.5) -> None:
        if cap < 0 or marker == "":
            raise ValueError("cap must not be negative, marker not empty")
        self.marker, self.strength, self.cap, self.threshold = marker, strength, cap, threshold

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        position = self._positions(answers)
        eligible = right(answers, self.threshold) & (position >= 0)
        place, length = position.clamp_min(0).double(), answers.lengths.double()
        sizes = (answers.group, answers.valid, answers.num_groups)
        return position_bonus(advantages, place, length, eligible, *sizes, strength=self.strength, cap=self.cap)

    def _positions(self, answers: Answers) -> Tensor:
        """[B] int64: tokens before the first call; -1 = there is none."""
        c = answers.completions
        if self.marker is None:
            said = torch.arange(c.tokens.shape[1]) < c.length[:, None]
            spoken = said & ~c.mask
            return torch.where(spoken.any(1), spoken.int().argmax(1), -1)
        found = [self._first(answers, row) if self.marker in text else -1 for row, text in enumerate(c.texts)]
        return torch.tensor(found, dtype=torch.int64)

    def _first(self, answers: Answers, row: int) -> int:
        said = answers.completions.tokens[row, : int(answers.completions.length[row])].tolist()
        low, high = 1, len(said)  # the shortest beginning with the marker in it
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if str(self.marker) in answers.policy.decode([said[:middle]])[0] else (middle + 1, high)
        return low - 1


class Inserted(ShaperBase):
    """TempSamp-R1 (arXiv:2509.18056): how a group lives with the answer from the source `expert`.

    Args:
        kind: downscale: its reward is ``factor`` times the highest; anchor: its advantage is ``scale`` times the best of the others (source with
            ``statistics: false``); compress: all rewards go through `compress`.
        factor, highest: of downscale. scale: of anchor. threshold, above, below: of compress.
    """

    def __init__(
        self,
        kind: Literal["downscale", "anchor", "compress"] = "compress",
        factor: float = 0.8,
        highest: float = 1.0,
        scale: float = 1.2,
        threshold: float = 0.8,
        above: float = 0.01,
        below: float = 1.0,
    ) -> None:
        if kind not in ("downscale", "anchor", "compress"):
            raise ValueError(f"unknown kind {kind}; known: downscale, anchor, compress")
        compress(torch.zeros(1), threshold=threshold, above=above, below=below)
        self.kind, self.factor, self.highest, self.scale, self.threshold, self.above, self.below = kind, factor, highest, scale, threshold, above, below

    @staticmethod
    def _inserted(answers: Answers) -> Tensor:
        return torch.zeros(len(answers), dtype=torch.bool) if answers.origin is None else answers.origin == EXPERT

    def rewards(self, answers: Answers) -> None:
        if self.kind == "downscale":
            answers.rewards = downscale_inserted(answers.rewards, self._inserted(answers), factor=self.factor, highest=self.highest)
        elif self.kind == "compress":
            answers.rewards = compress(answers.rewards, threshold=self.threshold, above=self.above, below=self.below)

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        if self.kind != "anchor":
            return advantages
        return anchor_inserted(advantages, self._inserted(answers), answers.group, answers.valid, answers.num_groups, scale=self.scale)


class ConstraintGate(ShaperBase):
    """CGPO's calibrated, regularised and gated reward (arXiv:2409.20370), see `constraint_gate`. The baseline is the answer from the source `expert`, which
    is not trained.

    Args:
        constraints: reward -> the least value with which it counts as satisfied. kl_max: null = no term of the divergence.
    """

    def __init__(self, constraints: Mapping[str, float] | None = None, kl_max: float | None = None) -> None:
        if kl_max is not None and kl_max <= 0:
            raise ValueError("kl_max must be above 0")
        self.constraints, self.kl_max = dict(constraints or {}), kl_max
        self.needs = frozenset() if kl_max is None else frozenset({"log_prob", "reference"})

    def rewards(self, answers: Answers) -> None:
        expert = torch.zeros(len(answers), dtype=torch.bool) if answers.origin is None else answers.origin == EXPERT
        baseline = torch.full((answers.num_groups,), torch.nan, dtype=torch.float64)
        baseline[answers.group[expert & answers.valid]] = answers.rewards[expert & answers.valid]
        held = torch.zeros(len(answers), 0, dtype=torch.bool)
        if self.constraints:
            held = torch.stack([column(answers, name) >= least for name, least in self.constraints.items()], 1)
        away = torch.zeros(len(answers), dtype=torch.float64)
        if self.kl_max is not None:
            away = torch.where(answers.mask, (answers.token("log_prob") - answers.token("reference")).double(), 0.0).sum(1)
        limit = torch.inf if self.kl_max is None else self.kl_max
        value = constraint_gate(answers.rewards, baseline[answers.group], held, away, kl_max=limit)
        answers.valid = answers.valid & value.isfinite()
        answers.rewards = torch.where(value.isfinite(), value, 0.0)
        answers.train = answers.train & ~expert
