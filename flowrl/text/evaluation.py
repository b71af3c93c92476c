"""Evaluation of language models: fixed prompts and fixed random numbers, rewards with 95 % confidence intervals, a few answers kept to be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.sections import GenerationConfig
from flowrl.seeds import derive_seed, generator
from flowrl.statistics import mean_ci95
from flowrl.tracking import replace_file
from flowrl.types import Completions, Prompt, SampleBatch, UserError
from rewards.composite import WeightedRewards

if TYPE_CHECKING:
    from accelerate import Accelerator

    from flowrl.policies.causal_lm import CausalLmPolicy
    from flowrl.text.agents import EpisodeRollout

__all__ = ["TextEvaluation", "TextEvaluator", "on_cpu"]


@dataclass(frozen=True, slots=True)
class TextEvaluation:
    """Scores of one prompt set: prompts and texts length n, reward -> [n] float32, NaN where invalid; the first ``kept`` are written."""

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    scores: Mapping[str, Tensor]
    kept: int
    optional: frozenset[str] = frozenset()
    problems: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def summary(self, num_prompts: int) -> dict[str, tuple[float, float, int]]:
        """See `flowrl.engines.base.Evaluated`.

        Raises:
            UserError: a required reward could score no answer.
        """
        out = {}
        for name, values in self.scores.items():
            valid = torch.isfinite(values)
            if not bool(valid.any()):
                if name in self.optional:
                    continue
                reason = self.problems.get(name, {}).get(0, "it gave no reason")
                raise UserError(f"reward {name} could not score any answer of the evaluation; the first, to '{self.prompts[0].text}': {reason}")
            clusters = (torch.arange(len(values)) % num_prompts)[valid]
            out[name] = (*mean_ci95(values[valid], clusters), int(valid.sum()))
        return out

    def save(self, folder: Path, split: str) -> None:
        """Write ``<split>.jsonl``: prompts, answers and scores of the first ones."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(min(self.kept, len(self.texts))):
            scores = {name: round(v, 6) if math.isfinite(v := values[i].item()) else None for name, values in self.scores.items()}
            lines.append(json.dumps({"prompt": self.prompts[i].text, "answer": self.texts[i], "scores": scores}, ensure_ascii=False) + "\n")
        replace_file(folder / f"{split}.jsonl", "".join(lines).encode())


class TextEvaluator:
    """Answers the prompts of a set and scores them; on several processes each takes a share."""

    def __init__(
        self,
        policy: CausalLmPolicy,
        splits: Mapping[str, Sequence[Prompt]],
        rewards: WeightedRewards,
        generation: GenerationConfig,
        *,
        greedy: bool,
        seed: int,
        accelerator: Accelerator,
        episodes: EpisodeRollout | None = None,
    ) -> None:
        self.policy, self.splits, self.rewards, self.generation = policy, splits, rewards, generation
        self.greedy, self.seed, self.accelerator, self.episodes = greedy, seed, accelerator, episodes

    def __call__(self, split: str, number: int, guidance_scale: float, keep: int) -> TextEvaluation:
        """Answer i always has prompt i mod (number of prompts) and the same random numbers, whatever the policy, batch size and number of processes.

        ``guidance_scale`` is of pictures and has no effect.
        """
        every = self.splits[split]
        prompts = [every[i % len(every)] for i in range(number)]
        mine = range(self.accelerator.process_index, number, self.accelerator.num_processes)
        size = self.policy.rows_per_forward
        chunks = [list(mine[start : start + size]) for start in range(0, len(mine), size)]
        found: list[tuple[int, str, dict[str, float], dict[str, str]]] = []
        for chunk in self.policy.in_step_through(chunks):
            asked = [prompts[i] for i in chunk]
            answers, shown = self._answers(asked, split, chunk)
            scores = self.rewards.score(SampleBatch(shown, texts=answers.texts, group=torch.tensor(chunk) % len(every)))
            for j, i in enumerate(chunk):
                values = {name: scores[name].values[j].item() for name in self.rewards.names}
                problems = {name: scores[name].problems[j] for name in self.rewards.names if j in scores[name].problems}
                found.append((i, answers.texts[j], values, problems))
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object  # a config is checked without it

            found = gather_object(found)
        found.sort(key=lambda item: item[0])
        self.rewards.rest()
        columns = {name: torch.tensor([row[2][name] for row in found]) for name in self.rewards.names}
        reasons = {name: {row[0]: row[3][name] for row in found if name in row[3]} for name in columns}
        return TextEvaluation(prompts, [row[1] for row in found], columns, keep, self.rewards.optional, reasons)

    def _answers(self, asked: Sequence[Prompt], split: str, numbers: Sequence[int]) -> tuple[Completions, Sequence[Prompt]]:
        """Answers to prompts, and what rewards see of the prompts."""

        def draw(place: int, member: int | None = None, turn: int = 0) -> torch.Generator:
            return generator("eval", self.seed, split, numbers[place], *([turn] if turn else []))

        counts = [1] * len(asked)
        if self.episodes is None:
            draws = [draw(place) for place in range(len(asked))]
            return self.policy.generate(self.policy.encode(asked), counts, self.generation, draws, greedy=self.greedy), asked
        seeds = [derive_seed("eval", self.seed, "environment", split, i) for i in numbers]
        rolled = self.episodes.play(asked, counts, seeds, draw, greedy=self.greedy)
        return rolled.completions, asked if rolled.shown is None else rolled.shown


def on_cpu(completions: Completions) -> Completions:
    """Where rewards are, and what the trainer keeps."""
    c = completions
    return Completions(
        prompt_tokens=tuple(tokens.cpu() for tokens in c.prompt_tokens),
        tokens=c.tokens.cpu(),
        mask=c.mask.cpu(),
        length=c.length.cpu(),
        group=c.group.cpu(),
        finished=c.finished.cpu(),
        log_prob=c.log_prob.cpu(),
        texts=c.texts,
        turn=None if c.turn is None else c.turn.cpu(),
        ancestors=None if c.ancestors is None else c.ancestors.cpu(),
    )
