"""Serial exits of one trace (S-GRPO): a full answer, and answers that leave it early and must answer at once.

Letters: P groups of this process.
"""

from __future__ import annotations

import torch

from flowrl.seeds import generator
from flowrl.text.samples import Pick, Samples, picked
from flowrl.text.sources import Added, Asked, Sampler, SourceBase, written
from flowrl.types import UserError

__all__ = ["Exits"]


class Exits(SourceBase):
    """The policy gives one full answer; each further one of the group begins with the first tokens of it, up to a place drawn uniformly, and ``inducer``, and
    goes on from there. Tokens before that are not trained. The column ``exit`` is where the trace was left; see `exit_decay`.

    Args:
        inducer: text that ends the thinking.
        until: text that ends the thinking of the full answer; exits are before it. Empty, or not there = exits are anywhere in the answer.
    """

    def __init__(self, inducer: str = "\n</think>\n\n", until: str = "</think>") -> None:
        self.inducer, self.until = inducer, until

    def check(self, sampler: Sampler) -> None:
        sampler.policy.check_generation(sampler.config.generation, given="allocation.samples: exits")
        room = sampler.config.generation.max_new_tokens
        needed = len(written(sampler.policy, self.inducer, room, ended=False)) + 2
        if room <= needed:
            raise UserError(f"allocation.samples: exits have no room in generation.max_new_tokens, {room}: the inducer and two tokens need {needed}")
        if sampler.config.rollout.group_size < 2:
            raise UserError("allocation.samples: exits need a full answer and another one; set rollout.group_size: 2 or more")

    def own(self, count: int) -> int:
        return 1

    def __call__(self, samples: Samples, asked: Asked, sampler: Sampler) -> Added:
        c, config = samples.completions, sampler.config
        limit, exits = config.generation.max_new_tokens, config.rollout.group_size - 1
        inducer = written(sampler.policy, self.inducer, limit, ended=False)
        prefixes, places = [], []
        for row, number in zip(range(len(c)), asked.numbers, strict=True):
            said = c.tokens[row, : int(c.length[row])].tolist()
            most = max(1, min(self._thinking(said, sampler), limit - len(inducer) - 1))
            drawn = torch.randint(1, most + 1, (exits,), generator=generator(config.seed, "exits", asked.iteration, number))
            for place in drawn.sort().values.tolist():
                prefixes.append(torch.tensor(said[:place] + inducer))
                places.append(place)
        generators = [generator(config.seed, "after exits", asked.iteration, number) for number in asked.numbers]
        with sampler.phase():
            found = sampler.generate(asked.prompts, [exits] * len(asked.prompts), generators, prefix=prefixes)
        new = Samples.of(found, sampler.scored(asked.prompts, found, found.group))
        new = new.with_columns(exit=torch.tensor(places, dtype=torch.int64))
        full = samples.with_columns(exit=torch.full((len(samples),), limit + 1))  # the full trace is the last one
        picks = [Pick(1, row, number) for row, number in enumerate(found.group.tolist())] + [Pick(0, row, row) for row in range(len(samples))]
        read = {(number, tuple(prefix.tolist())): len(prefix) for number, prefix in zip(found.group.tolist(), prefixes, strict=True)}
        started = torch.tensor([len(prefix) for prefix in prefixes], dtype=torch.int64)
        tokens = sum(map(len, found.prompt_tokens)) + sum(read.values()) + int((found.length - started - 1).sum())
        return Added(picked([full, new], picks), len(found), tokens)

    def _thinking(self, said: list[int], sampler: Sampler) -> int:
        """Tokens of an answer before its thinking ends."""
        if self.until and self.until in sampler.policy.decode([said])[0]:
            low, high = 0, len(said)  # the shortest beginning with the text in it
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if self.until in sampler.policy.decode([said[:middle]])[0] else (middle + 1, high)
            return max(1, low - 1)
        return max(1, len(said) - 1)
