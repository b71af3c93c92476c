"""What is logged of the answers of an iteration: of what the policy has said, and, where that is not the same, of what it is trained with.

Letters: B answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.reward_metrics import join_scores, reward_metrics
from flowrl.reward_weights import RewardWeights
from flowrl.types import Completions, Scores

__all__ = ["Facts", "answer_metrics", "metrics_of_samples"]


@dataclass(frozen=True, slots=True)
class Facts:
    """Answers without their tokens. scores: of each reward [B], and "total". length: [B] int64, tokens that were sampled. finished: [B] bool. empty: [B] bool,
    nothing but white space was said before the end.
    """

    scores: Mapping[str, Scores]
    length: Tensor
    finished: Tensor
    empty: Tensor

    @classmethod
    def of(cls, completions: Completions, scores: Mapping[str, Scores]) -> Facts:
        empty = torch.tensor([not text.strip() for text in completions.texts], dtype=torch.bool)
        return cls(scores, completions.mask.sum(1), completions.finished, empty)

    def only(self, rows: Tensor) -> Facts:
        """Some of them. rows: [B] bool."""
        scores = {
            name: Scores(one.values[rows], one.valid[rows], {column: values[rows] for column, values in one.raw.items()}) for name, one in self.scores.items()
        }
        return Facts(scores, self.length[rows], self.finished[rows], self.empty[rows])

    @classmethod
    def join(cls, parts: Sequence[Facts]) -> Facts:
        """Those of several processes; at least one part."""
        scores = join_scores([dict(part.scores) for part in parts])
        length, finished, empty = (torch.cat([getattr(part, name) for part in parts]) for name in ("length", "finished", "empty"))
        return cls(scores, length, finished, empty)


def answer_metrics(facts: Facts) -> dict[str, Any]:
    """Mean length, the share that was cut, and the number of empty answers; None of no answer."""
    count = len(facts.length)
    return {
        "answer/length": float(facts.length.sum()) / count if count else None,
        "answer/unfinished": float((~facts.finished).sum()) / count if count else None,
        "answer/empty": int(facts.empty.sum()),
    }


def metrics_of_samples(config: Config, weights: RewardWeights, own: Facts, trained: Facts) -> dict[str, Any]:
    """Where an allocator chooses what is trained, or answers come from elsewhere: `reward_metrics` of what the policy itself has said in this iteration, all of
    it, and under ``trained/`` what the answers that it is trained with are like, if there are any.

    Args:
        own, trained: of all processes.
    """
    found = reward_metrics(config, own.scores, weights)
    every = reward_metrics(config, trained.scores, weights) | answer_metrics(trained)
    wanted = [key for key in every if key.endswith(("/mean", "/std")) or key in ("answer/length", "answer/unfinished")]
    return found | {f"trained/{key}": every[key] for key in wanted if every[key] is not None}
