"""Preference losses of whole groups, win rates for rewards, and the pull to the lagged policy of Nash-MP.

Letters: B answers, P groups, n answers of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from flowrl.core.list_losses import win_rates
from flowrl.core.regularizers import categorical_kl_estimate
from flowrl.core.shaping import preferences
from flowrl.objective_names import OBJECTIVE_NAMES, arguments, load_objective, parameters
from flowrl.text.answers import Answers, evaluate
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.text.parts import Stateless
from flowrl.types import Decisions, Objective

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["AnchorTerm", "ListObjective", "WinRate", "levels_of", "measure_lagged"]


def levels_of(rewards: Tensor, bounds: Sequence[float]) -> Tensor:
    """Preference levels [B] int64 from rewards [B]: 1 from the first bound upwards, 2 from the second, ..., one more than there are bounds below them all.

    Args:
        bounds: falling; compared in float32, which rewards come in.
    """
    return 1 + (rewards[:, None].float() < torch.tensor(list(bounds), dtype=torch.float32)[None]).sum(1)


class ListObjective(ObjectiveBase):
    """An objective of flowrl/core/list_losses.py, or `a_star_po`. A mean is over the pairs or lists of all processes, in whatever parts they are evaluated."""

    whole_groups: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.name = config.objective.name
        self.anchored = "ref_log_prob" in OBJECTIVE_NAMES[self.name].needs
        self.needs = frozenset({"reference"} if self.anchored else ())

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        trained = answers.mask.any(1) & answers.valid & answers.train
        level = levels_of(answers.rewards, self.config.pairing.levels)
        answers.extra["level"] = level
        parts, sequences = (answers.add(value) for value in _counts(self.name, trained, answers.group, level))
        answers.extra["sequences_a_part"] = sequences / parts if parts else None

    def __call__(self, batch: Batch) -> Objective:
        o, d, extra = self.config.objective, batch.decisions, batch.answers.extra
        args: dict[str, Any] = {"group": batch.group.to(d.mask.device), "num_groups": batch.num_groups, **arguments(o)}
        takes = OBJECTIVE_NAMES[self.name].needs
        args |= {"ref_log_prob": batch.token("reference")} if self.anchored else {}
        args |= {"beta": o.beta} if "beta" not in parameters(self.name) else {}  # one without a default is a key of the section
        args |= {"level": batch.of(extra["level"])} if "level" in takes else {}
        found: Objective = load_objective(self.name)(d, **args)
        if self.name not in _OF_PARTS or extra["sequences_a_part"] is None:
            return found
        parts, sequences = _counts(self.name, d.mask.any(1), args["group"], args.get("level"))
        scale = parts * extra["sequences_a_part"] / sequences if sequences else 0.0  # here a mean over the parts of this call alone
        return Objective(found.loss * scale, found.metrics)


_OF_PARTS = ("trpa", "lipo")
"""A mean over the pairs (lists) of a call; micro-batches have different numbers of them."""


def _counts(name: str, members: Tensor, group: Tensor, level: Tensor | None) -> tuple[float, float]:
    """Pairs of different levels (`trpa`) or lists (the others), and sequences."""
    if name == "trpa":
        assert level is not None
        better = (group[:, None] == group[None]) & members[:, None] & members[None] & (level[:, None] < level[None])
        return float(better.sum()), float(members.sum())
    return float(len(torch.unique(group[members]))), float(members.sum())


class WinRate(Stateless):
    """A shaper: how often an answer beats the others of its group (SPO, Nash-MP, SPPO, DNO), see `flowrl.core.shaping.win_rate`.

    An answer that is not in its group's statistics (an expert's) is compared with those that are, and they not with it: its reward is a win rate too. The
    comparisons of one group at a time are in memory, [n, n] float64 of its n answers.

    Args:
        temperature: >= 0. An answer beats another with probability sigmoid(difference of their rewards / temperature); 0: the higher reward wins.
    """

    def __init__(self, temperature: float = 0.0) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature:g}, and must be at least 0")
        self.temperature = temperature

    def rewards(self, answers: Answers) -> None:
        known = torch.where(answers.valid, answers.rewards, 0.0)
        rivals = answers.valid if answers.in_statistics is None else answers.valid & answers.in_statistics
        found = torch.zeros_like(known)
        for group in answers.group.unique():
            rows = torch.nonzero(answers.group == group).squeeze(1)
            others = rivals[rows] & ~torch.eye(len(rows), dtype=torch.bool)
            rate, met = win_rates(preferences(known[rows], temperature=self.temperature), others)
            found[rows] = torch.where(met, rate, 0.5)
        answers.rewards = torch.where(answers.valid, found, 0.0)

    def advantages(self, answers: Answers, advantages: Tensor) -> Tensor:
        return advantages


class AnchorTerm(Stateless):
    """`anchor.weight` times the divergence from the slow copy of the policy (`old_policy`), estimated as `kl.form` says: Nash-MP's second anchor."""

    columns: ClassVar[frozenset[str]] = frozenset()
    name: ClassVar[str] = "anchor/mean"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        d: Decisions = batch.decisions
        distance = categorical_kl_estimate(self.config.kl.form, d.log_prob, batch.token("lagged"))  # type: ignore[arg-type]
        return self.config.anchor.weight * distance, distance.detach()

    def finish(self, answers: Answers) -> None:
        pass


def measure_lagged(answers: Answers, applied: Callable[[], AbstractContextManager[None]]) -> None:
    """What the slow copy says of all answers, "lagged" of `Answers.token`, and its price in tokens."""
    with applied():
        evaluate(answers, {"log_prob": "lagged"})
    c = answers.completions
    prompt = torch.tensor([len(tokens) for tokens in c.prompt_tokens], dtype=torch.int64)
    answers.extra["measured_tokens"] = answers.extra.get("measured_tokens", 0) + int((prompt[c.group] + c.length - 1).sum())
