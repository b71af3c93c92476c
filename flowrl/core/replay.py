"""Samples that are used again: resampling an iteration by reward, and old successes for groups that failed.

On the host; draws come from a torch.Generator that is passed in; state in frozen dataclasses. Replayed samples are known here by handles: whatever the
caller finds them by, JSON-able.

Letters: B samples, P groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowrl.core.advantages import group_statistics
from flowrl.core.outcomes import draw

__all__ = ["ReplayBuffer", "Swap", "replay_swaps", "resample", "resample_weights"]


def resample_weights(rewards: Tensor, valid: Tensor, *, kind: Literal["power", "extremes", "best_or_any", "best"] = "power", power: float = 2.0) -> Tensor:
    """PF-PPO: how likely each sample is drawn again, up to a factor, [B] float64; 0 where not valid.

    | kind | weight | in the paper |
    | --- | --- | --- |
    | power | abs(R)^power | released as "pow" |
    | extremes | 1 for the best and the worst, else 0 | BW, "max_min" |
    | best_or_any | 0.4 for the best, else 0.1 | BR, "max_random" |
    | best | 1 for the best, else 0 | BoN |

    Best and worst are those of all samples given (of equals, all); call it on one prompt's samples to filter within the prompt.

    Args:
        rewards: [B] float. valid: [B] bool.
    Raises:
        ValueError: unknown kind.
    Source:
        arXiv:2409.06957; verified in verl (core_algos.compute_pf_ppo_reweight_data), but for ``best``, which is from the paper's description.
    """
    value = rewards.double()
    top = value == torch.where(valid, value, -torch.inf).amax()
    bottom = value == torch.where(valid, value, torch.inf).amin()
    match kind:
        case "power":
            weight = torch.where(valid, value, torch.zeros_like(value)).abs() ** power
        case "extremes":
            weight = (top | bottom).double()
        case "best_or_any":
            weight = torch.where(top, 0.4, 0.1).double()
        case "best":
            weight = top.double()
        case _:
            raise ValueError(f"unknown kind {kind!r} of resampling; known: power, extremes, best_or_any, best")
    return torch.where(valid, weight, torch.zeros_like(weight))


def resample(weights: Tensor, valid: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` samples drawn with replacement in proportion to their weights, [count] int64; equal weights are a bootstrap of the valid samples.

    Where all weights are 0 the valid samples are drawn equally; without a valid sample nothing is drawn.

    Args:
        weights: [B], see `resample_weights`. valid: [B] bool. count: PF-PPO draws as many as there are.
    """
    members = torch.nonzero(valid).squeeze(1)
    return members[draw(weights[members], count, generator, replacement=True)] if len(members) else members


class Swap(NamedTuple):
    """Sample number ``sample`` of the batch gives way to the stored success ``handle``."""

    sample: int
    handle: Any


@dataclass(frozen=True, slots=True)
class ReplayBuffer:
    """ARPO (GUI): the last successes of each task, oldest first.

    Attributes:
        capacity: successes kept per task. threshold: a reward above it is a success.
        stored: task -> handles. What a handle stands for must hold the log-probabilities under the policy that sampled it, for the ratio.
    Source:
        arXiv:2505.16282; verified in the released code (replay_buffer.py).
    """

    capacity: int = 8
    threshold: float = 0.1
    stored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def updated(self, tasks: Sequence[str], handles: Sequence[Any], rewards: Tensor, valid: Tensor) -> ReplayBuffer:
        """With the successes among new samples, in their order; a full task forgets its oldest. tasks, handles, rewards, valid: one per sample."""
        stored = dict(self.stored)
        for task, handle, success in zip(tasks, handles, (valid & (rewards > self.threshold)).tolist(), strict=True):
            if success:
                stored[task] = (*stored.get(task, ()), handle)[-self.capacity :]
        return ReplayBuffer(self.capacity, self.threshold, stored)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python; the samples behind the handles are the caller's to save."""
        return {"capacity": self.capacity, "threshold": self.threshold, "stored": {task: list(handles) for task, handles in self.stored.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ReplayBuffer:
        """The buffer that `state_dict` described."""
        return cls(state["capacity"], state["threshold"], {task: tuple(handles) for task, handles in state["stored"].items()})


def replay_swaps(
    buffer: ReplayBuffer,
    tasks: Sequence[str],
    rewards: Tensor,
    group: Tensor,
    valid: Tensor,
    generator: torch.Generator,
    *,
    max_std: float = 0.05,
    max_mean: float = 0.2,
) -> list[Swap]:
    """ARPO (GUI): in each group that failed as a whole one sample gives way to a random stored success of the task, if there is one.

    A group failed whose valid rewards have a standard deviation (ddof 0) below max_std and a mean below max_mean. The first sample that is not valid goes,
    or else the first. The success counts in the group's statistics. Update the buffer afterwards, with the samples as they were.

    Args:
        tasks: one per group. rewards: [B] float. group: [B] int64 in 0..P-1. valid: [B] bool; a group without a valid sample is left alone.
    Source:
        arXiv:2505.16282; verified in the released code (ray_trainer.apply_replay), which replaces the first sample.
    """
    mean, std, count = group_statistics(rewards, group, valid, len(tasks), 0)
    failed = (count > 0) & (std < max_std) & (mean < max_mean)
    swaps = []
    for number in torch.nonzero(failed).squeeze(1).tolist():
        handles = buffer.stored.get(tasks[number], ())
        if handles:
            members = torch.nonzero(group == number).squeeze(1)
            unscored = members[~valid[members]]
            choice = int(torch.randint(len(handles), (), generator=generator))
            swaps.append(Swap(int((unscored if len(unscored) else members)[0]), handles[choice]))
    return swaps
