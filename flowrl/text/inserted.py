"""Answers that the policy does not give now: an expert's from the data, and its own successes of earlier iterations.

Letters: P groups of this process.
"""

from __future__ import annotations

from typing import Any

import torch

from flowrl.core.replay import ReplayBuffer, replay_swaps
from flowrl.seeds import generator
from flowrl.text.samples import EXPERT, FRESH, Pick, Samples, picked
from flowrl.text.sources import Added, Asked, Sampler, SourceBase, written
from flowrl.types import Completions, UserError

__all__ = ["Expert", "Replay"]


class Expert(SourceBase):
    """One answer of each group is the data's: the metadata ``solution``, in the policy's tokens, scored like the others. What the policy learns from it is
    the objective's: `rl_plus`, `chord`, or like any other answer.

    Args:
        key: of the metadata. within: it is one of rollout.group_size; false = it comes on top. statistics: it counts in the statistics of its group.
    """

    def __init__(self, key: str = "solution", within: bool = False, statistics: bool = False) -> None:
        self.key, self.within, self.statistics = key, within, statistics

    def check(self, sampler: Sampler) -> None:
        for number, prompt in enumerate(sampler.prompts, 1):
            text = prompt.metadata.get(self.key)
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"allocation.samples: expert needs a text under `{self.key}` with every prompt, and prompt {number} ('{prompt.text}') has none")
        if self.within and sampler.config.rollout.group_size < 2:
            raise UserError("allocation.samples: expert takes the place of one of the group's answers, and rollout.group_size is 1; use 2 or more")

    def own(self, count: int) -> int:
        return max(1, count - 1) if self.within else count

    def __call__(self, samples: Samples, asked: Asked, sampler: Sampler) -> Added:
        if not asked.prompts:
            return Added(samples)
        policy, limit = sampler.policy, sampler.config.generation.max_new_tokens
        said = [written(policy, str(prompt.metadata[self.key]), limit, ended=True) for prompt in asked.prompts]
        length = torch.tensor([len(row) for row in said])
        longest = int(length.max())
        place = torch.arange(longest)
        group = torch.arange(len(said))
        completions = Completions(
            prompt_tokens=tuple(policy.encode(asked.prompts)),
            tokens=torch.tensor([row + [policy.pad] * (longest - len(row)) for row in said]),
            mask=place < length[:, None],
            length=length,
            group=group,
            finished=torch.tensor([row[-1] in policy.ends for row in said]),
            log_prob=torch.zeros(len(said), longest),
            texts=tuple(policy.decode(said)),
        )
        experts = Samples.of(completions, sampler.scored(asked.prompts, completions, group), origin=EXPERT, compared=self.statistics)
        picks = [Pick(0, row, number) for row, number in enumerate(samples.group.tolist())] + [Pick(1, row, row) for row in range(len(said))]
        return Added(picked([samples, experts], picks))


class Replay(SourceBase):
    """ARPO (GUI): a success of an earlier iteration takes a failed answer's place where all of a group have failed; see `replay_swaps`. It has the
    log-probabilities that it was sampled with, and counts in its group's statistics.

    Args:
        capacity, threshold: see `ReplayBuffer`. max_std, max_mean: see `replay_swaps`.
    """

    def __init__(self, capacity: int = 8, threshold: float = 0.1, max_std: float = 0.05, max_mean: float = 0.2) -> None:
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self.buffer, self.max_std, self.max_mean = ReplayBuffer(capacity, threshold), max_std, max_mean
        self.stored: dict[int, Samples] = {}
        self.next = 0

    def __call__(self, samples: Samples, asked: Asked, sampler: Sampler) -> Added:
        total, tasks = samples.scores["total"], [str(index) for index in asked.indices]
        picks = [Pick(0, row, number) for row, number in enumerate(samples.group.tolist())]
        parts, swapped = [samples], 0
        for place, number in enumerate(asked.numbers):  # a generator for each group, so that nothing depends on the number of processes
            here = samples.group == place
            source = generator(sampler.config.seed, "replay", asked.iteration, number)
            rows = torch.nonzero(here).squeeze(1)
            alone = (total.values[rows].double(), torch.zeros_like(rows), total.valid[rows])
            for swap in replay_swaps(self.buffer, [tasks[place]], *alone, source, max_std=self.max_std, max_mean=self.max_mean):
                parts.append(self.stored[swap.handle].aged())
                picks[int(rows[swap.sample])] = Pick(len(parts) - 1, 0, place)
                swapped += 1
        self._remember(samples, asked, sampler)
        return Added(picked(parts, picks) if swapped else samples, metrics={"answer/replayed": float(swapped)})

    def _remember(self, samples: Samples, asked: Asked, sampler: Sampler) -> None:
        """The fresh successes of all processes, in the order of their groups."""
        total = samples.scores["total"]
        good = total.valid & (total.values > self.buffer.threshold) & (samples.column("origin") == FRESH)
        found = []
        for row in torch.nonzero(good).squeeze(1).tolist():
            place = int(samples.group[row])
            found.append((asked.numbers[place], row, str(asked.indices[place]), picked([samples], [Pick(0, row, 0)])))
        for _, _, task, one in sorted((item for part in sampler.gather(found) for item in part), key=lambda item: item[:2]):
            self.stored[self.next] = one
            self.buffer = self.buffer.updated([task], [self.next], one.scores["total"].values, one.scores["total"].valid)
            self.next += 1
        kept = {handle for handles in self.buffer.stored.values() for handle in handles}
        self.stored = {handle: one for handle, one in self.stored.items() if handle in kept}

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict(), "next": self.next, "stored": {handle: one.state_dict() for handle, one in self.stored.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer, self.next = ReplayBuffer.from_state(state["buffer"]), state["next"]
        self.stored = {handle: Samples.from_state(one) for handle, one in state["stored"].items()}
