"""Where answers come from beside the policy's own samples: what a source of a group's answers has to offer, and what it may ask for.

Letters: P groups of this process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.text.parts import Part, Stateless
from flowrl.text.samples import Samples
from flowrl.types import Completions, Prompt, Scores

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["Added", "Asked", "Sampler", "Source", "SourceBase", "written"]


class Sampler(Protocol):
    """What asks a policy and its rewards: the text engine. prompts: of the data set."""

    config: Config
    policy: CausalLmPolicy
    prompts: Sequence[Prompt]

    def phase(self) -> AbstractContextManager[Any]:
        """Around `generate`, of which processes may make different numbers of calls; all must enter it."""
        ...

    def generate(self, prompts: Sequence[Prompt], counts: Sequence[int], generators: Sequence[torch.Generator], **more: Any) -> Completions:
        """Answers on the CPU; further arguments as of `CausalLmPolicy.generate`."""
        ...

    def scored(self, prompts: Sequence[Prompt], completions: Completions, group: Tensor) -> dict[str, Scores]:
        """Scores of answers to prompts[group]."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes; every one must call it."""
        ...

    @property
    def rows_per_forward(self) -> int:
        """Most answers that are sampled at once."""
        ...

    @property
    def place(self) -> tuple[int, int]:
        """(number of this process, number of processes)."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """The groups of this process, length P each: prompts, their numbers in the data, the groups' numbers within the iteration (from 1)."""

    prompts: Sequence[Prompt]
    indices: Sequence[int]
    numbers: Sequence[int]
    iteration: int


@dataclass(frozen=True, slots=True)
class Added:
    """Answers after a source has had its say. answers: so many more were sampled. tokens: the least that a network reads for them."""

    samples: Samples
    answers: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Source(Part, Protocol):
    """Puts answers into groups, or in the place of others."""

    def check(self, sampler: Sampler) -> None:
        """Before the first iteration.

        Raises:
            UserError: a prompt lacks what is needed.
        """
        ...

    def own(self, count: int) -> int:
        """Of ``count`` answers of a group, those that the policy is asked for first."""
        ...

    def __call__(self, samples: Samples, asked: Asked, sampler: Sampler) -> Added: ...


class SourceBase(Stateless):
    """Leaves all to the policy."""

    def check(self, sampler: Sampler) -> None:
        pass

    def own(self, count: int) -> int:
        return count


def written(policy: CausalLmPolicy, text: str, limit: int, *, ended: bool) -> list[int]:
    """The tokens of a text that stands where an answer does, at most ``limit``; ``ended``: with the token that ends an answer, if the model has one."""
    numbers = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    if ended and policy.ends:
        numbers.append(policy.ending)
    return numbers[:limit]
