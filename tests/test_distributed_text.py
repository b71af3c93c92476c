"""Language models on two processes (gloo on the CPU) train as on one, whole or sharded; checkpoints fit any number; a killed run ends with the same bytes."""

from __future__ import annotations

import json
import pickle
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
from text_processes import METHODS, build_cases, iterated
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
import torch
from text_processes import METHODS, iterated
sys.path.insert(0, str(folder / "methods"))
for name in METHODS:
    torch.save(iterated(folder / "methods", name), folder / f"{name}.{torch.distributed.get_rank()}.pt")
"""


def overrides(name: str, shared: Path, *more: str) -> list[str]:
    return [*SETTINGS, *COMMON, *CASES[name], f"model.path={shared / 'model'}", *more]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, with the run that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    for name in CASES:
        prepare(folder / name, folder)
    (folder / "methods").mkdir()
    build_cases(folder / "methods")
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
    monkeypatch.syspath_prepend(str(two / "methods"))
    prepare(tmp_path, two)
    yield tmp_path
    for name in ("letters", "places"):
        sys.modules.pop(name, None)


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


def made_by(two: Path, name: str, rank: int) -> dict[str, Any]:
    """What `iterated` gave on one of the two processes."""
    found: dict[str, Any] = torch.load(two / f"{name}.{rank}.pt", weights_only=False)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_trains_on_two_processes_as_on_one(two: Path, alone: Path, name: str) -> None:
    ours, theirs, others = iterated(two / "methods", name), made_by(two, name, 0), made_by(two, name, 1)
    assert distance(ours["after"], ours["before"]) > 1e-3
    assert distance(ours["after"], theirs["after"]) < 1e-5 and distance(theirs["after"], others["after"]) < 1e-6
    for m, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert list(m) == list(other)
        for key, value in m.items():
            assert other[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
        assert m["nfe/used"] == m["nfe/minimum"] == other["nfe/used"] == other["nfe/minimum"]  # nobody keeps company without work of its own
    assert_alike(ours["engine"], theirs["engine"])


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same state, to rounding."""
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-3, atol=1e-4)
    elif isinstance(ours, dict | list | tuple):
        assert len(ours) == len(theirs) and type(ours) is type(theirs)
        if isinstance(ours, dict):
            assert list(ours) == list(theirs)
        for a, b in zip(*((one.values() if isinstance(one, dict) else one) for one in (ours, theirs)), strict=True):
            assert_alike(a, b)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-3, abs=1e-5) if isinstance(ours, float) else theirs)


def test_the_cases_are_what_they_are_there_for(two: Path) -> None:
    """Groups that were carried over are trained, some have one answer, hints help, episodes have turns, there are pairs."""
    metrics = {name: made_by(two, name, 0)["metrics"] for name in METHODS}
    assert [m["answer/trained"] for m in metrics["dapo"]] == [1.0, 1.0] and metrics["dapo"][1]["tokens/sampled"] == 0  # 9 groups, 3 of them needed
    assert max(m["groups/singletons"] for m in metrics["xrpo"]) > 0 and max(m["groups/singletons"] for m in metrics["knapsack_rl"]) > 0
    assert max(m["groups/helped"] for m in metrics["guide_grpo"]) > 0
    assert max(m["episode/turns"] for m in metrics["gigpo"]) > 1
    assert all(m["pair/count"] > 0 for m in metrics["dpo"])


def test_answers_go_to_nobody_but_the_process_that_trains_them(two: Path) -> None:
    """Of all groups the processes tell each other rewards. Order n was sampled by process n mod 2; of three groups process 0 trains the first."""
    for name in ("dapo", "xrpo", "remix"):
        for rank in (0, 1):
            assert not any(b"Completions" in value for value in made_by(two, name, rank)["sent"].gathered)
    sent = [made_by(two, "dapo", rank)["sent"] for rank in (0, 1)]
    facts = {number: rewards for one in sent for number, (rewards, _) in pickle.loads(one.gathered[0]).items()}
    useful = [number for number in range(9) if len(set(facts[number].tolist())) > 1]
    assert len(useful) >= 6
    for rank in (0, 1):  # two iterations of three groups
        moved = [place for chosen in (useful[:3], useful[3:6]) for place, number in enumerate(chosen) if number % 2 == rank != min(place, 1)]
        assert sent[rank].groups == moved
    assert any(one.groups for one in sent)


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
