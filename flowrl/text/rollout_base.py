"""What the ways of sampling answers have in common: trees, segments with probes, answers that go on later, episodes.

Letters: B answers, T tokens, P groups of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowrl.text.parts import Part
from flowrl.text.sources import Asked
from flowrl.types import Completions, Prompt

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["Path", "Rolled", "Rollout", "collected", "continuation_tokens"]


@dataclass(frozen=True, slots=True)
class Rolled:
    """Answers of this process's groups, on any device.

    Attributes:
        shown: the prompt of each answer, as rewards see it; None = the group's.
        sampled: tokens that went through the network, in closed form from lengths.
        extra: what the credit reads, see `Answers.extra`. means: sums and counts, see `Answers.means`.
    """

    completions: Completions
    sampled: int
    shown: Sequence[Prompt] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)


class Rollout(Part, Protocol):
    """How answers of an iteration are sampled, where that is not once for each member of each group."""

    def groups(self, fresh: list[int]) -> list[int]:
        """Prompt numbers of an iteration's groups, the same on every process. fresh: those whose turn it is."""
        ...

    def __call__(self, asked: Asked, counts: Sequence[int]) -> Rolled:
        """Sample so many answers for each group of this process. The policy is in step, and no other process is met."""
        ...

    def meet(self, gather: Callable[[Any], list[Any]]) -> None:
        """After sampling, outside of the policy's step: every process calls it. gather: a value -> those of all processes, in their order."""
        ...


@dataclass(slots=True)
class Path:
    """An answer that grows: the tokens so far, their log-probabilities, the tree's nodes that it passes."""

    tokens: list[int]
    log_prob: list[float]
    nodes: list[int]
    is_finished: bool = False

    @classmethod
    def of(cls, completions: Completions, row: int, nodes: list[int]) -> Path:
        """A row of sampled answers, whose prefixes the policy sampled too."""
        length = int(completions.length[row])
        return cls(completions.tokens[row, :length].tolist(), completions.log_prob[row, :length].tolist(), nodes, bool(completions.finished[row]))


def continuation_tokens(prompts: Sequence[Tensor], group: Sequence[int], prefix: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """What one call of `generate` evaluates: each prompt that is asked, each different prefix of a prompt, and each further token but an answer's last.

    Args:
        group: length B, of each answer. lengths: length B, with the prefix.
    """
    asked = sum(len(prompts[number]) for number in set(group))
    begun = sum(len(start) for _, start in {(number, tuple(start)) for number, start in zip(group, prefix, strict=True)})
    return asked + begun + sum(length - len(start) - 1 for start, length in zip(prefix, lengths, strict=True))


def collected(policy: CausalLmPolicy, prompts: Sequence[Tensor], paths: Sequence[Sequence[Path]], *, ancestors: bool = False) -> Completions:
    """Completions of the paths of each group, on the CPU; all their tokens were sampled. ``ancestors``: from ``nodes``, -1 where a path has none."""
    rows = [path for group in paths for path in group]
    width, depth = max(1, *(len(path.tokens) for path in rows)), max(len(path.nodes) for path in rows)
    length = torch.tensor([len(path.tokens) for path in rows])
    return Completions(
        prompt_tokens=tuple(prompts),
        tokens=torch.tensor([path.tokens + [policy.pad] * (width - len(path.tokens)) for path in rows], dtype=torch.int64),
        mask=torch.arange(width) < length[:, None],
        length=length,
        group=torch.tensor([number for number, group in enumerate(paths) for _ in group]),
        finished=torch.tensor([path.is_finished for path in rows]),
        log_prob=torch.tensor([path.log_prob + [0.0] * (width - len(path.log_prob)) for path in rows], dtype=torch.float32),
        texts=tuple(policy.decode([path.tokens for path in rows])),
        ancestors=torch.tensor([path.nodes + [-1] * (depth - len(path.nodes)) for path in rows]) if ancestors else None,
    )
