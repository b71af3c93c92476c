"""BAPO on tokens: clip bounds that are searched before the updates of an iteration.

Letters: K candidates, B answers, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.bounds import bound_candidates, bound_statistics, choose_bounds
from flowrl.core.objectives import clipped_surrogate
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.types import Objective

__all__ = ["Bapo"]


class Bapo(ObjectiveBase):
    """The clipped surrogate with searched bounds, see `flowrl.core.bounds`, without a pass of its own through the network.

    A search asks how much positive and negative weight each candidate leaves. At the first update all ratios are 1 and every candidate leaves all of it; what
    later updates will do is not known before them. So the share that each candidate left in the later updates of the iteration before is kept, and multiplied
    with the positive and negative advantages of this iteration, which are known: these carry most of the imbalance (long wrong answers). Before there were any
    later updates all shares are 1. The bounds hold for all updates of the iteration, on all processes.

    State: statistics [K, 2] of the last iteration's later updates, and what they would be without bounds, [2].
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.candidates = bound_candidates(**self.args(bound_candidates))
        self.kept = torch.zeros(len(self.candidates), 2, dtype=torch.float64)
        self.all = torch.zeros(2, dtype=torch.float64)
        self.low, self.high = (float(value) for value in self.candidates[0])
        self._seen: list[Tensor] = []

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        now = torch.tensor([answers.add(float(part.double().sum())) for part in (advantages.clamp_min(0), -advantages.clamp_max(0))], dtype=torch.float64)
        left = torch.where(self.all > 0, self.kept / torch.where(self.all > 0, self.all, 1.0), 1.0)
        low, high = choose_bounds(self.candidates, left * now, **self.args(choose_bounds))
        self.low, self.high = float(low), float(high)

    def __call__(self, batch: Batch) -> Objective:
        decisions = self.leveled(batch.decisions)
        if not batch.first:
            log_ratio, advantages, mask = (decisions.log_prob - decisions.old_log_prob).detach(), decisions.advantages, decisions.mask
            candidates = torch.cat([self.candidates, torch.tensor([[0.0, torch.inf]], dtype=torch.float64)])
            self._seen.append(bound_statistics(log_ratio, advantages, mask, candidates, **self.args(bound_statistics)).double())
        return clipped_surrogate(decisions, **(self.bounds() | {"clip_low": 1 - self.low, "clip_high": self.high - 1}))

    def finish(self, answers: Answers) -> None:
        """Statistics of all processes: [K + 1, 2], those of the later updates, the last without bounds."""
        none = torch.zeros(len(self.candidates) + 1, 2, dtype=torch.float64)
        here = torch.stack([none, *(part.cpu() for part in self._seen)]).sum(0)
        found = torch.tensor([answers.add(float(value)) for value in here.flatten()], dtype=torch.float64).view_as(here)
        self.kept, self.all, self._seen = found[:-1], found[-1], []

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "all": self.all}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.all = state["kept"], state["all"]
