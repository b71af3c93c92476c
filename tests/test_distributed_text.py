"""Language models on two processes (gloo on the CPU) train as on one, whole or sharded; checkpoints fit any number; a killed run ends with the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import last_state, remains
from test_distributed import read
from text_runs import text_config
from toys import Launcher, run_two

from flowrl.checkpoint import find_checkpoints, load_checkpoint, model_identity
from flowrl.config import Config, load_config
from flowrl.policies.families import make_policy
from flowrl.run import train
from flowrl.sharding import SHARDS, fit_state
from flowrl.trainer import Trainer

ITERATIONS = 2
LONGER = f"training.iterations={ITERATIONS + 1}"
SETTINGS = [f"training={{iterations: {ITERATIONS}, checkpoint_every: {ITERATIONS}}}", "evaluation={every: 100, final_num_images: 3}"]
COMMON = ["optimizer={eps: 0.01, learning_rate: 0.01}"]  # a large eps keeps AdamW's step a smooth function of the gradient
# 3 groups on 2 processes: 8 answers and 4, so different numbers of forwards and micro-batches, and of tokens
FSDP2 = "training.sharding=fsdp2"
LORA = ["model.adapter=lora", "kl={weight: 0.05, form: k3}", "objective.updates_per_iteration=2", "training.rows_per_forward=4", "ema={every: 1}"]
FULL = ["kl={weight: 0.05, form: k3}", "objective={updates_per_iteration: 3, reduction: mean, inner_epochs: 2}", "training.rows_per_forward=8"]
CASES = {
    "lora": LORA,
    "full": FULL,
    # groups that taught nothing are sampled again, so that a process may have nothing to train
    "dynamic": ["rewards=[letters:Even]", "allocation={name: dynamic, args: {max_rounds: 2, factor: 1}}", "objective.updates_per_iteration=2"],
    "lora sharded": [*LORA, FSDP2],
    "full sharded": [*FULL, FSDP2, "optimizer.max_grad_norm=0.05"],
    "dynamic sharded": ["rewards=[letters:Even]", "allocation={name: dynamic, args: {max_rounds: 2, factor: 1}}", FSDP2],
}
SCRIPT = """
import json, sys
from pathlib import Path
from text_runs import text_config
from flowrl.run import train
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
for name, overrides in json.loads(sys.argv[2]).items():
    train(text_config(folder / name, *overrides))
"""


def overrides(name: str, shared: Path, *more: str) -> list[str]:
    return [*SETTINGS, *COMMON, *CASES[name], f"model.path={shared / 'model'}", *more]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, with the run that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    for name in CASES:
        prepare(folder / name, folder)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(folder), json.dumps({name: overrides(name, folder) for name in CASES})]
    done = run_two(command)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder


def prepare(folder: Path, shared: Path) -> None:
    """A folder whose model and rewards are those of ``shared``."""
    folder.mkdir(exist_ok=True)
    if not (shared / "model").exists():
        text_config(shared)
    for name in ("model", "prompts.txt", "letters.py"):
        (folder / name).symlink_to(shared / name)


@pytest.fixture
def alone(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for runs of this process."""
    monkeypatch.syspath_prepend(str(two))
    prepare(tmp_path, two)
    yield tmp_path
    sys.modules.pop("letters", None)


def newest(run: Path, config: Config) -> dict[str, Any]:
    """The whole state of a run's newest checkpoint, on one process."""
    trainer = Trainer(config)
    loaded = load_checkpoint(run, model_identity(trainer.policy))
    assert loaded is not None
    return fit_state(loaded[1], trainer.parameters)


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max((a.detach() - b.detach()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(two: Path, alone: Path, name: str) -> None:
    config, run = text_config(alone, *overrides(name, two)), two / name / "run"
    one = train(config)
    ours, theirs = newest(one, config), newest(run, config)
    assert (find_checkpoints(run)[0] / SHARDS).is_dir() == ("sharded" in name)
    assert distance(ours["parameters"], theirs["parameters"]) < 1e-5
    assert distance(ours["parameters"], list(Trainer(config).parameters)) > 1e-3
    for x, y in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert distance([x["exp_avg"]], [y["exp_avg"]]) < 1e-5 and x["step"] == y["step"]
    metrics, others = (read(folder / "metrics.jsonl") for folder in (one, run))
    assert [m["iteration"] for m in others] == list(range(1, ITERATIONS + 1))
    for m, other in zip(metrics, others, strict=True):
        assert list(m) == list(other)
        for key, value in m.items():
            if not key.startswith("nfe/"):
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert m["nfe/used"] == m["nfe/minimum"] <= other["nfe/used"] == other["nfe/minimum"]
        if name in ("lora", "full"):  # nobody is idle, and nobody keeps company
            assert m["nfe/used"] == other["nfe/used"]
    for e, other in zip(read(one / "evals.jsonl"), read(run / "evals.jsonl"), strict=True):
        assert other == pytest.approx(e, abs=1e-5)
    for iteration in (0, ITERATIONS):
        answers = Path("samples") / f"iteration_{iteration:06d}" / "eval.jsonl"
        assert (one / answers).read_bytes() == (run / answers).read_bytes()


@pytest.mark.parametrize("name", ["lora", "lora sharded"])
def test_a_run_of_two_processes_can_be_resumed_by_one(two: Path, alone: Path, name: str) -> None:
    whole = train(text_config(alone, *overrides(name, two, LONGER)))
    run = shutil.copytree(two / name / "run", alone / "copy")
    train(load_config(run / "config.yaml", [f"run_dir={run}", LONGER]), resume=run)
    config = load_config(run / "config.yaml")
    assert distance(newest(whole, config)["parameters"], newest(run, config)["parameters"]) < 1e-5
    for m, other in zip(read(whole / "metrics.jsonl"), read(run / "metrics.jsonl"), strict=True):
        assert other["reward/total/mean"] == pytest.approx(m["reward/total/mean"], abs=1e-5)
        assert other["answers"] == m["answers"]


def test_the_export_of_a_sharded_network_is_whole(two: Path, alone: Path) -> None:
    run = two / "full sharded" / "run"
    config = load_config(run / "config.yaml")
    policy = make_policy(config.model, torch.device("cpu"))
    policy.load_export(run / "export")
    assert distance(policy.trainable(), newest(run, config)["parameters"]) == 0


# everything that has a state: an average, adapters, old policy, an allocator that remembers
STATES = {
    "lora": ["model.adapter=lora", "ema={every: 1}", "kl={weight: 0.05, form: k3}", "objective.updates_per_iteration=2", "logging.rollouts_every=1"],
    "full": ["allocation={name: dynamic, args: {max_rounds: 2, factor: 1}}", "old_policy={rollout: true, decay_slope: 0.1}"],
}


@pytest.mark.parametrize("name", STATES)
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path, launcher: Launcher, name: str) -> None:
    settings = ["training={iterations: 4, checkpoint_every: 2}", "evaluation={every: 2, final_num_images: 4}", *COMMON, *STATES[name]]
    reward = f"rewards=['{tmp_path / 'letters.py'}:Vowels']"
    text_config(tmp_path)
    start = ["train", str(tmp_path / "run.yaml"), *settings, reward]
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    assert launcher.run([*start, f"run_dir={whole}"], log) == 0, log.read_text()
    # the lines of metrics, timings and evaluations: the first of the evaluation, then two an iteration; this one is in the third
    assert launcher.run([*start, f"run_dir={killed}"], log, die_at="half a line:7") == -signal.SIGKILL, log.read_text()
    assert [folder.name for folder in find_checkpoints(killed)] == ["step_000002"]
    assert launcher.run(["train", "--resume", str(killed)], log) == 0, log.read_text()
    expected, found = remains(whole), remains(killed)
    found["config.yaml"] = found["config.yaml"].replace(str(killed).encode(), str(whole).encode())
    assert sorted(expected) == sorted(found)
    assert [file for file in found if found[file] != expected[file]] == []
    assert last_state(killed) == last_state(whole)
    assert list(killed.rglob(".*")) == []  # no unfinished file is left
