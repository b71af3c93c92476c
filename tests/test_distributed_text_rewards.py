"""Several rewards, constraints, dropped groups and episodes on two processes (gloo on the CPU): what one process trains and logs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import build_language_model
from text_runs import text_config
from toys import run_two

from flowrl.config import load_config
from flowrl.trainer import Trainer

REWARDS = "rewards=[{name: 'letters:Even', label: a}, {name: 'letters:Vowels', label: b, weight: 0.5, minimum: 0.1}]"
COMMON = ["generation.max_new_tokens=6", "optimizer={eps: 0.01, learning_rate: 0.01}"]
SMALL = "rollout={groups_per_iteration: 3, group_size: 4}"
CASES = {
    # 3 groups on 2 processes: 8 answers and 4
    "gdpo": ["method=gdpo", REWARDS, SMALL, "allocation={name: drop}", "shaping={overlong: {max_length: 6, cache: 4}}"],
    # a process may have nothing but a group that keeps it in step and is no part of the batch
    "whitened": [
        REWARDS,
        "rollout={groups_per_iteration: 3, group_size: 2}",
        "allocation={name: dynamic, args: {max_rounds: 1}}",
        "token_credit.name=token_returns",
        "advantage={centre: batch, scale: batch_std, aggregate: advantages, std_floor: 0.1}",
    ],
    "episodes": ["rewards=[episode]", "environment={name: 'letter_game:Game', max_turns: 2, reply: ' {observation} '}", SMALL],
}
GAME = '''
from flowrl.environments import Step

class Game:
    """Two turns at most; an action with an even number of letters succeeds and ends the episode. The reward is the share of the prompt's letters in it."""

    def __init__(self):
        self.success = False

    def reset(self, prompt, seed):
        self.words = prompt.text
        return ""

    def step(self, action):
        self.success = len(action) % 2 == 0
        return Step("no", sum(letter in self.words for letter in action) / max(1, len(action)), self.success, 0)

    def copy(self):
        raise NotImplementedError
'''
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import test_distributed_text_rewards as cases
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
for name in cases.CASES:
    found = cases.trained(folder, name)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / f"{name}.pt")
"""


def trained(folder: Path, name: str) -> dict[str, Any]:
    """Two iterations of a case: metrics, and the weights before and after."""
    trainer = Trainer(load_config(folder / "run.yaml", [*CASES[name], *COMMON]))
    before = [p.detach().clone() for p in trainer.parameters]
    metrics = [trainer.iterate(iteration)[0] for iteration in (1, 2)]
    return {"metrics": json.dumps(metrics), "before": before, "after": [p.detach() for p in trainer.parameters]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what two processes have made of every case."""
    folder = tmp_path_factory.mktemp("two")
    text_config(folder)
    build_language_model(folder / "model", "llama", ends=range(5, 256, 4))  # answers of different lengths
    (folder / "letter_game.py").write_text(GAME)
    (folder / "script.py").write_text(SCRIPT)
    done = run_two([sys.executable, str(folder / "script.py"), str(folder)])
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_log_what_one_does(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    one, two = trained(folder, name), torch.load(folder / f"{name}.pt")
    for ours, theirs in zip(one["after"], two["after"], strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert max(float((ours - before).abs().max()) for ours, before in zip(one["after"], one["before"], strict=True)) > 1e-3
    for m, other in zip(json.loads(one["metrics"]), json.loads(two["metrics"]), strict=True):
        assert list(m) == list(other)
        for key, value in m.items():
            if not key.startswith("nfe/"):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert other["nfe/used"] == other["nfe/minimum"] >= m["nfe/used"] == m["nfe/minimum"]
        if name == "episodes":
            assert 0 < m["episode/success"] < 1 < m["episode/turns"] < 2
