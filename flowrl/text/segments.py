"""SPO: segments of an answer are judged by fresh continuations from where they begin. See `SegmentRollout` and `SegmentCredit`.

Letters: B answers, T tokens, C segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.token_advantages import segment_advantages, segment_ids
from flowrl.estimation import Estimator
from flowrl.seeds import generator
from flowrl.text.answers import Answers
from flowrl.text.parts import Stateless
from flowrl.text.rollout_base import Rolled, continuation_tokens
from flowrl.text.sources import Asked
from flowrl.types import Completions, Prompt, Scores

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["SegmentCredit", "SegmentRollout"]


class SegmentCredit(Stateless):
    """SPO of segments (arXiv:2505.23564): what each segment adds to the expected reward, see `flowrl.core.token_advantages.segment_advantages`.

    An answer is cut before every ``interval``-th token that the policy was not sure of. The value of a cut is the mean reward of ``continuations`` fresh
    answers from there, of the prompt likewise; they are rewarded as they are, without `shaping`.

    Args:
        interval: >= 1. threshold: in (0, 1], probability from which a token is sure. continuations: >= 1.
    """

    def __init__(self, interval: int = 5, threshold: float = 0.9, continuations: int = 9) -> None:
        if interval < 1 or continuations < 1:
            raise ValueError(f"interval is {interval} and continuations {continuations}; both must be at least 1")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold:g}; it is a probability above 0")
        self.interval, self.threshold, self.continuations = interval, threshold, continuations

    def segments(self, completions: Completions) -> Tensor:
        """[B, T] int64 from 0, none left out."""
        found = segment_ids(completions.log_prob, completions.mask, interval=self.interval, threshold=self.threshold)
        return found - found[:, :1]

    def __call__(self, answers: Answers, estimator: Estimator) -> Tensor:
        segment, cut_values = answers.extra["segments"]
        answers.valid = answers.valid & cut_values.isfinite().all(1)
        found = segment_advantages(cut_values, answers.rewards, segment, answers.mask)
        return torch.where(answers.valid[:, None], found, 0.0)


class SegmentRollout(Stateless):
    """Answers, and then continuations from each of their cuts.

    Args:
        score: rewards answers (their prompts, the answers), at once.
    Raises:
        UserError: the model cannot go on from tokens that are given.
    """

    def __init__(self, config: Config, policy: CausalLmPolicy, credit: SegmentCredit, score: Callable[[Sequence[Prompt], Completions], Scores]) -> None:
        self.config, self.policy, self.credit, self.score = config, policy, credit, score
        policy.check_generation(config.generation, given="token_credit: segments")

    def groups(self, fresh: list[int]) -> list[int]:
        """As they come."""
        return fresh

    def meet(self, gather: Callable[[Any], list[Any]]) -> None:
        """Nothing is shared."""

    def __call__(self, asked: Asked, counts: Sequence[int]) -> Rolled:
        prompts, numbers, iteration = asked.prompts, asked.numbers, asked.iteration
        config, encoded = self.config, self.policy.encode(prompts)
        draws = [generator(config.seed, "tokens", iteration, number) for number in numbers]
        answers = self.policy.generate(encoded, counts, config.generation, draws)
        group, lengths = answers.group.tolist(), answers.length.tolist()
        sampled = continuation_tokens(encoded, group, [[] for _ in group], lengths)
        segment = self.credit.segments(answers).cpu()
        tokens = answers.tokens.tolist()
        starts = [[row.index(number) for number in range(1, row[length - 1] + 1)] for row, length in zip(segment.tolist(), lengths, strict=True)]

        probes: list[list[tuple[int, int, list[int]]]] = [[(-1, 0, [])] for _ in prompts]  # (answer, number of the cut, tokens before it) of each group
        for answer, number in enumerate(group):
            probes[number] += [(answer, cut, tokens[answer][:start]) for cut, start in enumerate(starts[answer], start=1)]
        rows = [(number, *probe) for number, group_probes in enumerate(probes) for probe in group_probes for _ in range(self.credit.continuations)]
        prefix, owner = [row[3] for row in rows], [row[0] for row in rows]
        draws = [generator(config.seed, "segments", iteration, number) for number in numbers]
        each = [len(group_probes) * self.credit.continuations for group_probes in probes]
        starting = [torch.tensor(start, dtype=torch.int64) for start in prefix]
        found = self.policy.generate(encoded, each, config.generation, draws, prefix=starting)
        sampled += continuation_tokens(encoded, owner, prefix, found.length.tolist())

        score = self.score([prompts[number] for number in owner], found)
        width = 1 + max(map(len, starts))
        values = torch.zeros(len(group), width, dtype=torch.float64)
        parts = (column.split(self.credit.continuations) for column in (score.values.double(), score.valid))
        for place, (rewards, valid) in enumerate(zip(*parts, strict=True)):
            number, answer, cut, _ = rows[place * self.credit.continuations]
            mean = rewards[valid].mean()  # NaN without any
            if answer < 0:
                values[torch.tensor(group) == number, 0] = mean
            else:
                values[answer, cut] = mean
        return Rolled(answers, sampled, extra={"segments": (segment, values)})
