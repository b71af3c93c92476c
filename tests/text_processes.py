"""Text runs of every kind that several processes must make as one does: what they are, and their iterations without a run directory."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import PROMPTS, text_config

from flowrl.config import load_config
from flowrl.engines.text import TextEngine
from flowrl.text import pieces
from flowrl.trainer import Trainer

__all__ = ["METHODS", "PLACES", "Sent", "build_cases", "iterated", "sent"]

ITERATIONS = 2
PLACES = '''
import torch
from letters import Vowels
from flowrl.environments import Step
from flowrl.types import Scores

class Letters:
    """Three turns at most; each gives what its letters say, and a turn with an "e" ends the episode."""

    def __init__(self):
        self.success, self.answer = False, "oo"

    def reset(self, prompt, seed):
        self.turn, self.words, self.number = 0, prompt.text, seed % 1000
        return ""

    def step(self, action):
        self.turn += 1
        self.success = "e" in action
        reward = sum(map(ord, action)) % 7 / 7
        return Step(f"no {self.number}", reward, self.turn == 3 or self.success, self.turn)

    def copy(self):
        raise NotImplementedError

class Varied(Vowels):
    """What the letters say, from 0 to 1."""

    def score(self, batch):
        values = [sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 97 / 97 for text in batch.texts]
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))

class Seldom(Vowels):
    """1 for about one answer in eight, by a sum over its letters."""

    def score(self, batch):
        values = [float(sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 8 == 0) for text in batch.texts]
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))
'''
EVEN, SELDOM, VARIED = "rewards=['letters:Even']", "rewards=['places:Seldom']", "rewards=['places:Varied']"
TWICE = "objective.updates_per_iteration=2"
METHODS: dict[str, tuple[str, ...]] = {
    # one answer a group: whole groups are single units, which the updates share out
    "ppo": ("rollout={groups_per_iteration: 6, group_size: 1}", TWICE, "kl={weight: 0.05, place: reward}"),
    "t_ppo": ("partial.window=3", TWICE),
    "risk_po": ("token_credit.args.bundle=1",),
    "empg": ("token_credit.args.step=2",),
    "gigpo": ("rewards=[episode]", "environment={name: 'places:Letters', max_turns: 3, reply: ' {observation} '}", "generation.max_new_tokens=6"),
    # the first iteration leaves useful groups to the second
    "dapo": (EVEN, "allocation.args={carry: true, factor: 3}", "shaping={overlong: {max_length: 8, cache: 2}}", TWICE),
    # groups of one, two and three answers, some of which joined in a second round
    "xrpo": ("rollout.group_size=2", "allocation.args={first: 1, rounds: 3, exploration: 0.0}"),
    "remix": (EVEN, "allocation.args={share: 0.5, window: 2}", TWICE),
    "guide_grpo": (SELDOM, TWICE),
    "rl_plus": (TWICE,),
    "chord": ("shaping=[win_rate]",),
    "lp_reg": ("objective.args={share: 0.3, weight: 200.0}", "generation={min_new_tokens: 6, temperature: 2.0}", TWICE),
    "knapsack_rl": (EVEN, "rollout.groups_per_iteration=4", "allocation.args={least: 1, most: 10, warmup: 1}"),
    "vade": (EVEN,),
    "hapo": (EVEN, "shaping=[{name: history_length, args: {mode: mean}}]", "allocation.samples=[expert]"),
    # pairs and lists, one of each group
    "dpo": ("rollout.groups_per_iteration=4", TWICE),
    "lipo": ("rollout.groups_per_iteration=4", TWICE),
}
"""Method -> what makes a run of it small, beside `COMMON`."""
COMMON = (VARIED, "rollout={groups_per_iteration: 3, group_size: 4}", "generation.max_new_tokens=8", "optimizer={eps: 0.01, learning_rate: 0.01}")


def build_cases(folder: Path) -> None:
    """A model of which every second token ends an answer, prompts with solutions, rewards and an environment; ``folder`` must be on sys.path."""
    text_config(folder)
    build_language_model(folder / "model", "llama", ends=range(5, 256, 2))
    rows = [{"prompt": text, "solution": f"it is {number} really"} for number, text in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "places.py").write_text(PLACES)


def iterated(folder: Path, method: str) -> dict[str, Any]:
    """Some iterations of a case: its metrics, the weights before and after, the engine's state, and what this process has sent to others for them."""
    data = f"data.train={folder / 'prompts.jsonl'}"
    trainer = Trainer(load_config(folder / "run.yaml", [f"method={method}", data, *COMMON, *METHODS[method]]))
    before = [p.detach().clone() for p in trainer.parameters]
    with sent() as told:
        metrics = [trainer.iterate(iteration)[0] for iteration in range(1, ITERATIONS + 1)]
    return {"metrics": metrics, "before": before, "after": [p.detach() for p in trainer.parameters], "engine": trainer.engine.state_dict(), "sent": told}


@dataclass
class Sent:
    """What a process tells to others. gathered: objects for all of them, in bytes each. groups: numbers of those whose answers went to one of them."""

    gathered: list[bytes] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


@contextmanager
def sent() -> Iterator[Sent]:
    """Listen to the text engine and its rounds."""
    told, gather, exchange = Sent(), TextEngine.gather, pieces.exchanged

    def gathered(engine: TextEngine, value: Any) -> list[Any]:
        told.gathered.append(pickle.dumps(value))
        return gather(engine, value)

    def exchanged(parcels: Sequence[Any], device: torch.device) -> list[Any]:
        told.groups += sorted(number for parcel in parcels for number, _ in parcel)
        return exchange(parcels, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEngine, "gather", gathered)
        patch.setattr(pieces, "exchanged", exchanged)
        yield told
