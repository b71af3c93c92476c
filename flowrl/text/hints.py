"""Help for prompts that no answer solves: they are asked again with part of a solution, and helped answers join or replace the group's.

Letters: P groups of this process.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch

from flowrl.core.hints import GHPO, GUIDE, SCAF, HintLadder, HintRule, unsolved_groups
from flowrl.seeds import generator
from flowrl.text.samples import HINTED, Pick, Samples, picked, sampling_tokens
from flowrl.text.sources import Added, Asked, Sampler, SourceBase
from flowrl.types import Completions, Prompt, UserError

__all__ = ["Hints", "hint_of", "hinted"]

_RULES = {"scaf": SCAF, "ghpo": GHPO, "guide": GUIDE}
_TEMPLATE = "{prompt}\n\nHint: {hint}"


def hint_of(prompt: Prompt, share: float) -> str | None:
    """The first ``share`` in (0, 1] of what the metadata knows: an entry of ``hints`` (a list, from little help to much), or words of ``solution``."""
    hints, solution = prompt.metadata.get("hints"), prompt.metadata.get("solution")
    if isinstance(hints, list | tuple) and hints and all(isinstance(hint, str) for hint in hints):
        return str(hints[max(1, math.ceil(share * len(hints) - 1e-9)) - 1])
    if isinstance(solution, str) and solution.strip():
        words = solution.split()
        return " ".join(words[: max(1, math.ceil(share * len(words) - 1e-9))])
    return None


def hinted(prompt: Prompt, hint: str, template: str) -> Prompt:
    """The prompt with a hint; in a conversation, in its last message."""
    text, metadata = template.format(prompt=prompt.text, hint=hint), dict(prompt.metadata)
    if metadata.get("messages"):
        *before, last = metadata["messages"]
        metadata["messages"] = [*before, {**last, "content": template.format(prompt=last["content"], hint=hint)}]
    return Prompt(text, metadata)


class Hints(SourceBase):
    """Scaf-GRPO, GHPO and Guide-GRPO, by the rules of core/hints.py.

    Args:
        rule: scaf, ghpo or guide. levels: steps of help, of scaf; null = 12. tries: answers with help at each level, of scaf and guide; null = the rule's.
        warmup: iterations without help; null = the rule's. threshold: a reward above it is a success.
        template: how the hint follows the prompt, with {prompt} and {hint}.
    """

    def __init__(
        self,
        rule: Literal["scaf", "ghpo", "guide"] = "ghpo",
        levels: int | None = None,
        tries: int | None = None,
        warmup: int | None = None,
        threshold: float = 0.0,
        template: str = _TEMPLATE,
    ) -> None:
        if rule not in _RULES:
            raise ValueError(f"unknown rule {rule}; known: {', '.join(_RULES)}")
        if "{prompt}" not in template or "{hint}" not in template:
            raise ValueError("template needs {prompt} and {hint}")
        if levels is not None and (rule != "scaf" or levels < 1):
            raise ValueError("levels belongs to scaf, and is at least 1")
        changes: dict[str, Any] = {} if warmup is None else {"warmup": warmup}
        if tries is not None:
            changes["tries"] = tries
        if rule == "scaf":
            count = levels or len(SCAF.levels)
            changes["levels"] = tuple((number + 1) / count for number in range(count))
        self.rule: HintRule = replace(_RULES[rule], **changes)
        self.threshold, self.template = threshold, template

    def check(self, sampler: Sampler) -> None:
        longest = []
        for number, prompt in enumerate(sampler.prompts, 1):
            hint = hint_of(prompt, max(self.rule.levels))
            if hint is None:
                raise UserError(f"allocation.samples: hints needs `hints` or `solution` with every prompt, and prompt {number} ('{prompt.text}') has neither")
            longest.append(hinted(prompt, hint, self.template))
        sampler.policy.encode(longest, sampler.config.generation)

    def __call__(self, samples: Samples, asked: Asked, sampler: Sampler) -> Added:
        total, rule, seed = samples.scores["total"], self.rule, sampler.config.seed
        num_groups = len(asked.prompts)
        unsolved = unsolved_groups(total.values, samples.group, total.valid, num_groups, threshold=self.threshold)
        ladder = HintLadder.start(rule, unsolved, asked.iteration)
        picks = [Pick(0, row, number) for row, number in enumerate(samples.group.tolist())]
        members = [[row for row, pick in enumerate(picks) if pick.group == number] for number in range(num_groups)]
        members = [sorted(rows, key=lambda row: bool(total.valid[row])) for rows in members]  # what has no reward goes first
        parts, tokens, answers, helped = [samples], 0, 0, set[int]()
        with sampler.phase():
            while requests := ladder.requests(rule, [len(rows) for rows in members]):
                prompts = [hinted(asked.prompts[r.group], hint_of(asked.prompts[r.group], rule.levels[r.level]) or "", self.template) for r in requests]
                generators = [generator(seed, "hints", asked.iteration, asked.numbers[r.group], r.level) for r in requests]
                completions = sampler.generate(prompts, [r.tries for r in requests], generators)
                tokens, answers = tokens + sampling_tokens(completions, sampler.rows_per_forward), answers + len(completions)
                new = self._trained(completions, [r.group for r in requests], asked, sampler)
                scored = new.scores["total"]
                solved = (scored.valid & (scored.values > self.threshold)).tolist()
                replacements, ladder = ladder.advance(rule, solved, members)
                parts.append(new)
                for one in replacements:
                    pick = Pick(len(parts) - 1, one.candidate, one.group)
                    helped.add(one.group)
                    if one.sample is None:
                        picks.append(pick)
                    else:
                        picks[one.sample] = pick
        metrics = {"groups/unsolved": float(unsolved.sum()), "groups/helped": float(len(helped))}
        return Added(picked(parts, picks) if helped else samples, answers, tokens, metrics)

    def _trained(self, completions: Completions, groups: list[int], asked: Asked, sampler: Sampler) -> Samples:
        """Answers with their scores: in the context of the hint, or in that of the prompt with the log-probabilities that they had with it."""
        group = torch.tensor(groups)[completions.group]
        new = Samples.of(completions, sampler.scored(asked.prompts, completions, group), origin=HINTED)
        if self.rule.trains_hinted:
            return new
        plain = replace(completions, prompt_tokens=tuple(sampler.policy.encode([asked.prompts[number] for number in groups])))
        return replace(new, completions=plain, old=completions.log_prob, known=torch.ones_like(new.known))
