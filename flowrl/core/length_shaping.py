"""Shaping by length: punish long samples, near a limit, against their group, or against what their prompt once needed.

Lengths are floats: tokens of text, or any cost of a sample. Rewards from texts themselves, cosine and repetition among them, are `rewards.text_form`. Nothing
here has a gradient. A sample that is not valid gets 0 and is in no statistic.

Letters: B samples, P groups, N prompts of the data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.shaping import group_rank

__all__ = ["LengthHistory", "history_length", "length_rank", "overlong", "relative_length"]


def overlong(length: Tensor, *, max_length: float = 20480, cache: float = 4096) -> Tensor:
    """DAPO's soft punishment: 0 up to max_length - cache, then falling linearly to -1 at max_length and beyond; the shape of ``length``, to be added.

    Args:
        length: float. cache: in (0, max_length], width of the slope.
    Raises:
        ValueError: cache is outside that range.
    Source:
        arXiv:2503.14476, from TRL's documentation. To drop truncated samples instead: `token_weights.overlong_filter`.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong: cache {cache} must be above 0 and at most max_length {max_length}")
    return ((max_length - cache - length) / cache).clamp(-1, 0)


def length_rank(
    correct: Tensor, length: Tensor, group: Tensor, valid: Tensor, num_groups: int, *, share: float = 0.2, strength: float = 0.6, min_std: float = 1e-4
) -> Tensor:
    """GRPO-lambda: the groups that are best at their prompt learn to be short, the others to be right. [B], 0 for a wrong answer.

    In the ceil(share P') groups of the highest accuracy a right answer gets 1 - strength sigmoid((n - mean) / max(std, min_std)), with mean and standard
    deviation (ddof 0) of the lengths of the group's right answers; in the others it gets 1. P' counts the groups with a valid sample; of equally
    accurate groups the earlier one goes first. share 0 is 0/1 rewards, share 1 the length penalty everywhere. Rank the groups of all processes together.

    Args:
        correct, valid: [B] bool. length: [B] float, whose dtype the result has. group: [B] int64 in 0..P-1.
        share: lambda in [0, 1]. strength: alpha in [0, 1].
    Source:
        arXiv:2505.18086, from a secondary write-up with code; strength 0.6 is a third party's, the length term Arora and Zanette's form. Another method of
        that name (arXiv:2510.00194) has lambda-returns.
    """
    right = correct & valid
    accuracy, _, members = group_statistics(correct.to(length.dtype), group, valid, num_groups, 0)
    known, one = members > 0, torch.zeros_like(members, dtype=torch.int64)
    place = group_rank(-accuracy, one, known, 1)
    chosen = known & (place < (share * known.sum().double() - 1e-9).ceil())  # 1e-9: 0.07 * 100 is 7.000000000000001
    mean, std, _ = group_statistics(length, group, right, num_groups, 0)
    excess = torch.where(right, length - mean[group], torch.zeros_like(length)) / std.clamp_min(min_std)[group]
    shaped = 1 - strength * torch.sigmoid(excess)
    return torch.where(right, torch.where(chosen[group], shaped, torch.ones_like(shaped)), torch.zeros_like(shaped))


def relative_length(length: Tensor, correct: Tensor, group: Tensor, valid: Tensor, num_groups: int) -> Tensor:
    """Kimi k1.5: 1/2 - (n - min n) / (max n - min n) within the group, of a wrong answer only what is below 0. [B] in [-1/2, 1/2], to be added.

    0 where all lengths of a group are equal. Published with a warm-up without it.

    Args:
        length: [B] float. correct, valid: [B] bool. group: [B] int64 in 0..P-1.
    Source:
        arXiv:2501.12599, from secondary write-ups; the same form is in the released code of MMR1 (openr1_rewards.py).
    """
    low = length.new_full((num_groups,), torch.inf).scatter_reduce_(0, group, torch.where(valid, length, torch.inf), "amin")
    high = length.new_full((num_groups,), -torch.inf).scatter_reduce_(0, group, torch.where(valid, length, -torch.inf), "amax")
    differ = high > low
    spread = torch.where(differ, high - low, torch.ones_like(low))
    value = 0.5 - (length - low[group]) / spread[group]
    value = torch.where(correct, value, value.clamp_max(0))
    return torch.where(valid & differ[group], value, torch.zeros_like(value))


@dataclass(frozen=True, slots=True)
class LengthHistory:
    """What right answers to each prompt have needed so far. Each process may keep its own; `merge` of all is what rewards should read.

    Attributes:
        shortest: [N] float64, inf for a prompt that was never solved. total: [N] float64, sum of the lengths. count: [N] float64, their number.
    Source:
        HAPO, arXiv:2505.11225; verified in the released code (grpo_trainer.py), which gathers the histories of all processes in the same way.
    """

    shortest: Tensor
    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, num_prompts: int) -> LengthHistory:
        """Nothing solved yet."""
        zero = torch.zeros(num_prompts, dtype=torch.float64)
        return cls(torch.full_like(zero, torch.inf), zero, zero.clone())

    def updated(self, prompt: Tensor, length: Tensor, correct: Tensor, valid: Tensor) -> LengthHistory:
        """With the right answers of an iteration. prompt: [B] int64 in 0..N-1. length: [B]. correct, valid: [B] bool."""
        right = correct & valid
        length, there = length[right].double(), prompt[right]
        return LengthHistory(
            self.shortest.scatter_reduce(0, there, length, "amin"),
            self.total.index_add(0, there, length),
            self.count.index_add(0, there, torch.ones_like(length)),
        )

    @staticmethod
    def merge(*parts: LengthHistory) -> LengthHistory:
        """One history of all that the parts, which must have seen different answers, have seen; their order does not matter."""
        return LengthHistory(
            torch.stack([part.shortest for part in parts]).amin(0),
            torch.stack([part.total for part in parts]).sum(0),
            torch.stack([part.count for part in parts]).sum(0),
        )

    def target(self, mode: Literal["min", "mean"] = "min") -> Tensor:
        """The length to compare with, [N] float64: the shortest right answer, or the mean of all; NaN for a prompt that was never solved."""
        if mode not in ("min", "mean"):
            raise ValueError(f"unknown mode {mode!r} of the length history; known: min, mean")
        return torch.where(self.count > 0, self.shortest if mode == "min" else self.total / self.count.clamp_min(1), torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python, fit for JSON: only the prompts that were solved."""
        solved = torch.nonzero(self.count > 0).squeeze(1)
        columns = {"shortest": self.shortest, "total": self.total, "count": self.count}
        return {"num_prompts": len(self.count), "prompt": solved.tolist(), **{name: column[solved].tolist() for name, column in columns.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LengthHistory:
        """The history that `state_dict` described."""
        history, solved = cls.empty(state["num_prompts"]), torch.tensor(state["prompt"], dtype=torch.int64)
        for name in ("shortest", "total", "count"):
            getattr(history, name)[solved] = torch.tensor(state[name], dtype=torch.float64)
        return history


def history_length(length: Tensor, correct: Tensor, target: Tensor, *, weight: float = 1.0, floor: float = -0.7) -> Tensor:
    """HAPO: reward for being shorter than the prompt's history h, punishment for being longer; the shape of ``length``, to be added to a reward of 0 or 1.

    f = cos(pi / 2 n / h) below n = 2 h, else -1. weight max(f, floor) for a right answer, weight min(f, 0) for a wrong one, 0 without a history. The
    floor keeps every right answer above every wrong one.

    Args:
        length: float. correct: bool. target: the prompt's h, see `LengthHistory.target`; NaN, or not above 0, = none. floor: in [-1, 0].
    Raises:
        ValueError: weight is negative or so large that a right answer could fall to a wrong one's reward.
    Source:
        arXiv:2505.11225; verified in the released code (utils.py). Its repetition penalty, off there, is `rewards.text_form`'s.
    """
    if weight < 0 or weight * -floor >= 1:
        raise ValueError(
            f"history_length: with weight {weight} and floor {floor} right answers would not stay above wrong ones; weight must be in [0, 1 / -floor)"
        )
    known = target > 0
    times = (length / torch.where(known, target, torch.ones_like(target)).to(length.dtype)).clamp_max(2)
    f = torch.cos(math.pi / 2 * times)
    value = weight * torch.where(correct, f.clamp_min(floor), f.clamp_max(0))
    return torch.where(known, value, torch.zeros_like(value))
