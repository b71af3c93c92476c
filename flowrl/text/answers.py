"""What an iteration knows of its answers: samples, rewards, and what the policy and the reference say of every token, evaluated once and only where asked.

Letters: B answers, T tokens of the longest, P groups of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.reward_weights import RewardWeights
from flowrl.types import Completions, Prompt, Scores

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["Answers", "evaluate", "measure"]


@dataclass
class Answers:
    """An iteration's answers on this process; parts of a method read and change it in turn: shaping, credit, factors, objective, terms.

    Attributes:
        completions: the tokens. prompts: of each group. indices: [P] int64, their numbers in the data. numbers: of the groups within the iteration.
        scores: of each reward, "total" among them. everywhere: of all processes.
        prompt_key: [B] int64, equal for equal prompts in every run; here and everywhere.
        rewards: [B] float64, the total, as shaping leaves it; anything where not valid.
        valid: [B] bool, False where an answer has no reward. train: [B] bool, False where an answer is not trained.
        in_statistics: [B] bool, False for answers put in from elsewhere that are compared with the others and not they with it; None = all.
        batch: [B] bool, here and everywhere, the answers that statistics are of: those of groups that are trained, without those that are not in_statistics;
            None = all. Known when the rewards are shaped.
        compared: [B] int64 in 0..P-1, the group of each answer; None = that of the completions, which say in whose context an answer is trained.
        origin: [B] int64, where each answer comes from, see flowrl/text/samples.py; None = the policy has given all of them now.
        gather: values of all processes as a list; every process must call it.
        sampling: within it the policy is the one that sampled, where a slow copy does (`old_policy.rollout`).
        measured: what policies say of every token, [B, T] float32 on the CPU, by name: "log_prob", "entropy", ..., and "reference" for the reference's
            log-probabilities; see `measure`.
        extra: what parts leave for each other, such as success rates or turn rewards.
        metrics: numbers to be logged; the mean over processes is. means: sums and counts of this process; what is logged is the sum over the count of all.
        add: a number summed over processes.
        reward_weights: the current weights of the rewards.
    """

    config: Config
    completions: Completions
    prompts: Sequence[Prompt]
    indices: Tensor
    numbers: Sequence[int]
    iteration: int
    scores: dict[str, Scores]
    everywhere: dict[str, Scores]
    prompt_key: tuple[Tensor, Tensor]
    rewards: Tensor
    valid: Tensor
    train: Tensor
    policy: CausalLmPolicy
    add: Callable[[float], float]
    reward_weights: RewardWeights
    in_statistics: Tensor | None = None
    batch: tuple[Tensor, Tensor] | None = None
    compared: Tensor | None = None
    origin: Tensor | None = None
    gather: Callable[[Any], list[Any]] = field(default=lambda value: [value])
    sampling: Callable[[], AbstractContextManager[None]] = nullcontext
    measured: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def group(self) -> Tensor:
        """[B] int64 in 0..P-1."""
        return self.completions.group if self.compared is None else self.compared

    @property
    def num_groups(self) -> int:
        return len(self.prompts)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: the sampled tokens."""
        return self.completions.mask

    @property
    def in_batch(self) -> Tensor:
        """[B] bool: answers with a reward that statistics over the iteration are of."""
        return self.valid if self.batch is None else self.valid & self.batch[0]

    @property
    def lengths(self) -> Tensor:
        """[B] int64: sampled tokens."""
        return self.mask.sum(1)

    def shaped(self) -> Scores:
        """The shaped rewards as scores."""
        return Scores(self.rewards, self.valid)

    def shaped_everywhere(self) -> Scores:
        """Those of all processes, in the order of `everywhere`."""
        if "everywhere" not in self.extra:
            return self.everywhere["total"]
        found: Scores = self.extra["everywhere"]
        return found

    def token(self, name: str) -> Tensor:
        """[B, T] float32, what the policy that sampled says of every token: "log_prob", "entropy", ...; evaluated with all that `measure` was asked for."""
        if name not in self.measured:
            measure(self, [name])
        return self.measured[name]


def measure(answers: Answers, names: Sequence[str]) -> None:
    """Evaluate what is missing of ``names`` for all answers, in one pass of the policy and one of the reference at most."""
    missing = [name for name in dict.fromkeys(names) if name not in answers.measured]
    own = [name for name in missing if name != "reference"]
    if own:
        with answers.sampling():
            evaluate(answers, {name: name for name in own} | {"log_prob": "log_prob"})
    if "reference" in missing:
        with answers.policy.reference():
            evaluate(answers, {"log_prob": "reference"})


@torch.no_grad()
def evaluate(answers: Answers, names: dict[str, str]) -> None:
    """One forward of every answer by the policy as it is now; ``names``: column -> its name in `Answers.measured`."""
    policy, completions = answers.policy, answers.completions
    columns = [name for name in names if name != "log_prob"]
    with policy.in_step():
        temperature = answers.config.generation.temperature
        out = policy.token_output(completions, torch.arange(len(completions)), columns=columns, temperature=temperature, on_host=True)
    for name, kept in names.items():
        answers.measured[kept] = (out.log_prob if name == "log_prob" else out.columns[name]).float().cpu()
