"""Runs of a tiny random language model, for tests of text methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from language_models import build_language_model

from flowrl.config import Config, load_config
from flowrl.trainer import Trainer
from flowrl.types import Scores

__all__ = ["assert_trains", "assign_rewards", "text_config"]

PROMPTS = ("one and two", "three birds", "a number of apples", "five")
REWARD = '''
import torch
from flowrl.types import RewardInfo, Scores

class Vowels:
    """The share of vowels in an answer."""
    info = RewardInfo(name="vowels", description="share of vowels", low=0.0, high=1.0, reads=("texts",))

    def load(self, device, dtype):
        pass

    def score(self, batch):
        values = [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in batch.texts]
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))

class Even(Vowels):
    """1 where the number of letters is even, else 0: a verifier's score."""
    info = RewardInfo(name="even", description="even length", low=0.0, high=1.0, reads=("texts",))

    def score(self, batch):
        return Scores(torch.tensor([float(len(text) % 2 == 0) for text in batch.texts]), torch.ones(len(batch.texts), dtype=torch.bool))
'''


def text_config(folder: Path, *overrides: str, reward: str = "vowels") -> Config:
    """A run of a random Llama with 3 groups of 4 short answers, made in ``folder``, which must be on sys.path for its rewards."""
    model = folder / "model"
    if not model.exists():
        build_language_model(model, "llama")
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        (folder / "letters.py").write_text(REWARD)
    file = folder / "run.yaml"
    file.write_text(
        f"method: grpo\nrun_dir: {folder / 'run'}\nmodel: {{path: {model}, adapter: full}}\n"
        f"data: {{train: {folder / 'prompts.txt'}, eval: {{eval: {folder / 'prompts.txt'}}}}}\nrewards: ['letters:{reward.title()}']\n"
        "rollout: {groups_per_iteration: 3, group_size: 4}\ngeneration: {max_new_tokens: 8}\nema: null\n"
        "training: {iterations: 2, rows_per_backward: 5}\nevaluation: {num_images: 4, final_num_images: 4}\nlogging: {tensorboard: false}\n"
    )
    return load_config(file, list(overrides))


def assert_trains(config: Config, iterations: int = 2) -> tuple[Trainer, list[dict[str, Any]]]:
    """A few iterations move the weights and evaluate no token twice."""
    trainer = Trainer(config)
    before = [p.detach().clone() for p in trainer.parameters]
    found = []
    for iteration in range(1, iterations + 1):
        metrics, _ = trainer.iterate(iteration)
        found.append(metrics)
        assert metrics["nfe/used"] == metrics["nfe/minimum"], metrics
        assert all(value == value for value in metrics.values() if isinstance(value, float)), metrics
    assert any(not torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))
    return trainer, found


def assign_rewards(trainer: Trainer, rewards: Sequence[float], iteration: int = 1) -> Any:
    """Roll out an iteration, give its answers these rewards (NaN = none), and assign: the engine's `AssignedAnswers`."""
    indices = trainer.engine.groups(iteration)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    rolled_out, _ = trainer.engine.roll_out(prompts, indices, numbers, iteration)
    values = torch.tensor(rewards, dtype=torch.float32)
    assigned, _ = trainer.assign(rolled_out, {"total": Scores(values, ~values.isnan())}, prompts, numbers, iteration)
    return assigned
