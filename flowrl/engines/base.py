"""What a trainer asks of what it trains.

Letters: P groups of this process, B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flowrl.config import Config
from flowrl.policies.ema import OldPolicy
from flowrl.reward_metrics import join_scores
from flowrl.reward_weights import RewardWeights
from flowrl.types import Prompt, Scores
from flowrl.updates.base import Update
from rewards.composite import WeightedRewards

__all__ = ["Assigned", "Awaited", "Data", "Engine", "Evaluated", "Known", "RolledOut", "Setting", "gathered_samples", "reward_bounds"]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Data:
    """What a run reads: prompts to train on, prompt sets to evaluate, and stored preferences (None = it samples)."""

    prompts: Sequence[Prompt]
    splits: Mapping[str, Sequence[Prompt]]
    pairs: Any = None


@dataclass(frozen=True, slots=True)
class Setting:
    """What a trainer gives its engine.

    Attributes:
        policy: a `DiffusionPolicy` or a `CausalLmPolicy`, as the engine. parameters: that learn.
        add: a number summed over processes.
        old_policy: None where the config has none.
    """

    config: Config
    accelerator: Accelerator
    policy: Any
    data: Data
    rewards: WeightedRewards
    eval_rewards: WeightedRewards
    reward_weights: RewardWeights
    parameters: Sequence[nn.Parameter]
    old_policy: OldPolicy | None
    add: Callable[[float], float]

    @property
    def samples_with_old_policy(self) -> bool:
        """Whether a slow copy samples, and not the policy itself."""
        return self.config.old_policy is not None and self.config.old_policy.rollout

    def sampling(self) -> AbstractContextManager[None]:
        """Within it, the weights are those that sample."""
        return self.old_policy.applied() if self.old_policy is not None and self.samples_with_old_policy else nullcontext()


class Awaited(Protocol):
    """Scores that may still be under way."""

    def result(self) -> dict[str, Scores]: ...


@dataclass(frozen=True, slots=True)
class Known:
    """Scores that are there: `Awaited` of stored samples."""

    scores: dict[str, Scores]

    def result(self) -> dict[str, Scores]:
        return self.scores


class RolledOut(Protocol):
    """Samples of this process's groups.

    Attributes:
        group: [B] int64 in 0..P-1. compared: [B] int64; samples of one set are compared with each other.
        num_sampled: B, or 0 for stored samples.
    """

    @property
    def group(self) -> Tensor: ...
    @property
    def compared(self) -> Tensor: ...
    @property
    def num_sampled(self) -> int: ...


class Assigned(Protocol):
    """What an iteration trains with on this process.

    Attributes:
        placeholder: there is nothing to train here.
        sums: numbers to be added over processes, among them abs_advantage, clamped and all, the number of advantages.
    """

    @property
    def placeholder(self) -> bool: ...
    @property
    def sums(self) -> dict[str, float]: ...


class Evaluated(Protocol):
    """Scores of one prompt set."""

    def summary(self, num_prompts: int) -> dict[str, tuple[float, float, int]]:
        """Reward -> (mean, half width of the 95 % interval clustered by prompt, number of valid samples)."""
        ...

    def save(self, folder: Path, split: str) -> None:
        """Write the samples that were kept."""
        ...


class Engine(Protocol):
    """Sampling, credit, updates and evaluation of one medium. Its state is what `state_dict` gives.

    Attributes:
        counted: what its samples are called in metrics.
    """

    counted: ClassVar[str]

    @staticmethod
    def load_data(config: Config) -> Data:
        """Read prompts and pairs, before the model is loaded."""
        ...

    def __init__(self, setting: Setting) -> None: ...

    @staticmethod
    def needs_reference(config: Config) -> bool:
        """Whether a run evaluates the model as it was before training."""
        ...

    def groups(self, iteration: int) -> list[int]:
        """Prompt numbers of the groups of an iteration (>= 1), the same on every process."""
        ...

    def roll_out(self, prompts: list[Prompt], indices: list[int], numbers: list[int], iteration: int) -> tuple[Any, Sequence[Awaited]]:
        """Sample groups, and let their rewards be computed meanwhile; or read stored samples, whose scores are known.

        Args:
            indices: prompt numbers of this process's groups. numbers: of the groups within the iteration.
        Returns:
            `RolledOut`, and its scores, part by part in the order of its samples.
        """
        ...

    def keep(self, iteration: int, rolled_out: Any, scores: dict[str, Scores], prompts: Sequence[Prompt], numbers: Sequence[int]) -> Any:
        """The samples of all processes, for `save_rollout`; every process must call it."""
        ...

    def save_rollout(self, run_dir: Path, kept: Any) -> None: ...

    def assign(
        self,
        rolled_out: Any,
        scores: dict[str, Scores],
        everywhere: dict[str, Scores],
        *,
        prompts: tuple[Tensor, Tensor],
        numbers: Sequence[int],
        iteration: int,
    ) -> tuple[Any, dict[str, Any]]:
        """`Assigned` of this process and metrics over all; arguments as of `flowrl.assignment.Assigner`."""
        ...

    def assign_alone(self, rolled_out: Any, scores: dict[str, Scores], everywhere: dict[str, Scores], numbers: Sequence[int], iteration: int) -> Any:
        """What one reward alone would train with, for weights of rewards that follow gradients; leaves no trace."""
        ...

    def update(self, rolled_out: Any, assigned: Any, prompts: list[Prompt], numbers: list[int], iteration: int) -> tuple[Update | None, dict[str, Any]]:
        """What the updates train on, and metrics of it; None = nothing is trained in this iteration."""
        ...

    def finish(self, assigned: Any) -> None:
        """After the updates of an iteration; every process calls it."""
        ...

    def minimum_nfe(self, assigned: Any, num_groups: int, iteration: int, idle_rows: int, all_valid: bool) -> int:
        """The least network evaluations of the iteration over all processes, without those of sharded company."""
        ...

    @staticmethod
    def make_evaluator(
        config: Config, policy: Any, splits: Mapping[str, Sequence[Prompt]], rewards: WeightedRewards, accelerator: Accelerator, num_steps: int, seed: int
    ) -> Callable[[str, int, float, int], Evaluated]:
        """What `evaluate` calls; also for a policy that is not trained. ``num_steps``: of pictures."""
        ...

    def evaluate(self, split: str, number: int, guidance_scale: float, keep: int) -> Evaluated: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def reward_bounds(config: Config, rewards: WeightedRewards) -> tuple[float, float]:
    """The lowest and the highest total reward that there can be; infinite where a reward has no bound."""
    low = high = 0.0
    for entry in config.rewards:
        info = rewards.entry_of(entry.key).reward.info
        if entry.weight != 0:
            ends = sorted((entry.weight * info.low, entry.weight * info.high))
            low, high = low + ends[0], high + ends[1]
    return low, high


def gathered_samples(
    accelerator: Accelerator, prompts: Sequence[Prompt], samples: Sequence[T], group: Tensor, scores: dict[str, Scores]
) -> tuple[list[Prompt], list[T], Tensor, dict[str, Scores]]:
    """Prompts, samples, group numbers and scores of all processes, in the order of their groups."""
    part = (list(prompts), list(samples), group, scores)
    parts = gather_object([part]) if accelerator.num_processes > 1 else [part]
    numbers = torch.cat([p[2] for p in parts])
    order = numbers.argsort(stable=True)
    shown, made = ([item for p in parts for item in p[k]] for k in (0, 1))
    joined = {name: Scores(s.values[order], s.valid[order]) for name, s in join_scores([p[3] for p in parts]).items()}
    return [shown[i] for i in order.tolist()], [made[i] for i in order.tolist()], numbers[order], joined
