"""`flowrl pairs` of a language model's config: groups as a run would sample them if its weights stayed as they are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from text_runs import text_config

from flowrl.pairing import sample_answers
from flowrl.run import train
from flowrl.trainer import Trainer


def sizes(file: Path) -> Counter[str]:
    """Answers of each prompt in a file of saved rollouts."""
    return Counter(json.loads(line)["prompt"] for line in file.read_text().splitlines())


def test_an_allocator_learns_from_the_rewards_as_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knapsack gives more answers to the prompts whose answers differ, from the second iteration on; so does a run that learns nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    kept: list[list[Counter[str]]] = []
    for name in ("pairs", "run"):
        more = ["allocation={name: knapsack, args: {warmup: 0, least: 2}}", "rollout={groups_per_iteration: 4, group_size: 4}", "logging.rollouts_every=1"]
        folder = tmp_path / name
        folder.mkdir()
        config = text_config(folder, *more, "optimizer={learning_rate: 1.0e-20, weight_decay: 0.0}", "rewards=['letters:Even']")
        monkeypatch.syspath_prepend(folder)
        if name == "pairs":
            (folder / "run").mkdir()
            sample_answers(Trainer(config), folder / "run", 8)
        else:
            train(config)
        kept.append([sizes(file) for file in sorted((folder / "run" / "rollouts").glob("*.jsonl"))])
    assert kept[0] == kept[1]
    first, second = kept[0]
    assert set(first.values()) == {4} and sum(second.values()) == 16 and len(set(second.values())) > 1
