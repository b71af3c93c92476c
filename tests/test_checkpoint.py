"""A run may be killed at any moment: resumed, it ends with the bytes of the run that was never killed."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import Launcher, write_config

from flowrl import checkpoint
from flowrl.checkpoint import find_checkpoints, load_checkpoint, load_policy, model_identity, random_state, restore_random_state, save_checkpoint
from flowrl.cli import main
from flowrl.config import Config
from flowrl.policies.sd3 import Sd3Policy
from flowrl.run import train
from flowrl.types import UserError

Configure = Callable[..., Config]
IDENTITY = {"model": "m", "adapter": "lora", "parameters": "abc"}
# LoRA with everything that has a state: optimiser, average, warm-up, reward statistics, global generators, several updates an iteration.
BUSY = ["rewards=[toys:noisy_brightness]", "objective.updates_per_iteration=2", "optimizer.warmup_updates=5", "ema.every=2", "kl.weight=0.01"]


def state_of(value: float) -> dict[str, Any]:
    return {"parameters": [torch.full((50,), value)], "number": value}


def save(run: Path, iteration: int, keep: int = 2) -> Path:
    return save_checkpoint(run, iteration, state_of(float(iteration)), identity=IDENTITY, keep=keep)


def load(run: Path, **options: Any) -> tuple[int, float] | None:
    found = load_checkpoint(run, IDENTITY, **options)
    return None if found is None else (found[0], found[1]["number"])


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def truncate(folder: Path) -> None:
    file = folder / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


# --- one checkpoint -----------------------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_the_oldest_are_removed(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    for iteration in (5, 10, 15):
        save(tmp_path, iteration)
    assert load(tmp_path) == (15, 15.0)
    assert names(tmp_path) == ["step_000010", "step_000015"]
    assert load(tmp_path, which="10") == (10, 10.0)
    with pytest.raises(UserError, match="has no checkpoint 5; it has: 10, 15"):
        load(tmp_path, which="5")
    with pytest.raises(UserError, match="has no checkpoint best; it has: 10, 15"):
        load(tmp_path, which="best")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated or damaged"),
        (lambda folder: (folder / "state.pt").unlink(), "is incomplete"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "is incomplete"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format": 2, "iter'), "is incomplete"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format": 2, "iteration": 10}'), "is incomplete"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format": 99}'), "has format 99, this version of flowrl reads 2"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], Any], message: str
) -> None:
    save(tmp_path, 5)
    last = save(tmp_path, 10)
    damage(last)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) == (5, 5.0)
    assert len(caplog.messages) == 2
    assert f"{last} {message}" in caplog.messages[0]
    assert caplog.messages[1] == f"using checkpoint {last.with_name('step_000005')} instead"
    with pytest.raises(UserError, match=message + r".*; choose another one"):
        load(tmp_path, which="10")
    truncate(last.with_name("step_000005"))
    with pytest.raises(UserError, match="step_000005 is truncated or damaged .*start again in a new run directory"):
        load(tmp_path)


def test_a_damaged_newer_checkpoint_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, 5, keep=1)
    shutil.copytree(tmp_path / "checkpoints" / "step_000005", tmp_path / "checkpoints" / "step_000010")
    truncate(tmp_path / "checkpoints" / "step_000010")
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step_000007"]
    assert load(tmp_path) == (7, 7.0)


@pytest.mark.parametrize(
    ("key", "message"),
    [("model", "its model is other, here it is m"), ("adapter", "its adapter is other"), ("parameters", "its trainable weights have other names or shapes")],
)
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, key: str, message: str) -> None:
    save_checkpoint(tmp_path, 5, state_of(5.0), identity=IDENTITY | {key: "other"}, keep=2)
    with pytest.raises(UserError, match=f"step_000005 belongs to another run: {message}"):
        load(tmp_path)


def test_the_identity_knows_model_adapter_and_shapes(pipeline: Path, configure: Configure) -> None:
    def identity(*overrides: str) -> dict[str, Any]:
        return model_identity(Sd3Policy(configure(*overrides).model, torch.device("cpu")))

    usual = identity()
    assert identity("model.lora.alpha=4") == usual
    assert identity("model.lora.rank=8")["parameters"] != usual["parameters"]
    assert identity("model.adapter=full")["adapter"] == "full"
    assert identity()["model"] == str(pipeline)


def test_the_state_of_all_global_generators_is_restored(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"random": random_state()}, identity=IDENTITY, keep=1)

    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.normal(), np.random.random(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    loaded = load_checkpoint(tmp_path, IDENTITY)
    assert loaded is not None
    restore_random_state(loaded[1]["random"])
    assert draw() == first


# --- a full disk --------------------------------------------------------------------------------------------------------------------------------


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["_write", "digest_of", "_sync"])
def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint, place, no_space)
    with pytest.raises(UserError, match=f"no space left on the disk of {tmp_path}; free space and resume with: flowrl train --resume {tmp_path}"):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert names(tmp_path) == ["step_000005"]
    assert load(tmp_path) == (5, 5.0)


DISK = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_really_fills_up_stops_the_run_which_can_go_on_afterwards(
    small_disk: Path, config_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = "training={checkpoint_every: 1, iterations: 3, keep_checkpoints: 9}"
    whole, run = tmp_path / "whole", small_disk / "run"
    assert main(["train", str(config_file), f"run_dir={whole}", settings]) == 0
    size = sum(file.stat().st_size for file in (whole / "checkpoints" / "step_000001").iterdir())
    filler = small_disk / "something large"
    filler.write_bytes(bytes(DISK - int(1.7 * size) - 65536))  # leaves room for a checkpoint and the small files
    capsys.readouterr()
    assert main(["train", str(config_file), f"run_dir={run}", settings]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: no space left on the disk of {run}; free space and resume with: flowrl train --resume {run}"]
    assert find_checkpoints(run)[0].name in ("step_000001", "step_000002")
    assert not any(name.startswith(".") for name in names(run))
    filler.unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert remains(run).keys() == remains(whole).keys()
    assert [file for file, content in remains(run).items() if content != remains(whole)[file]] == ["config.yaml"]  # it names the run directory


def test_a_full_disk_while_exporting_is_one_line(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline.save_lora_weights", fail)
    with pytest.raises(UserError, match="no space left on the disk"):
        train(configure("training.iterations=1"))


# --- killed and resumed -------------------------------------------------------------------------------------------------------------------------


def remains(run: Path) -> dict[str, bytes]:
    """The files of a finished run that must not depend on how it came about: all but clocks, TensorBoard, the report and the checkpoints' containers."""
    folders = [file for name in ("samples", "export", "rollouts") for file in (run / name).rglob("*.*")]
    files = [run / "metrics.jsonl", run / "evals.jsonl", run / "config.yaml", *folders]
    return {str(file.relative_to(run)): file.read_bytes() for file in files if file.is_file()}


def plain(value: Any) -> Any:
    """Tensors as lists, for comparison bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != "elapsed"}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def last_state(run: Path) -> Any:
    return plain(torch.load(find_checkpoints(run)[0] / "state.pt", weights_only=True))


class Whole:
    """A run that nobody kills, and where to put runs of the same config that somebody does."""

    def __init__(self, folder: Path, config: Path, settings: list[str], launcher: Launcher) -> None:
        self.folder, self.config, self.settings, self.launcher = folder, config, settings, launcher
        started = time.time()
        assert launcher.run(self.command("whole"), folder / "whole.log") == 0, (folder / "whole.log").read_text()
        self.seconds = time.time() - started
        self.training_seconds = time.time() - (self.run("whole") / "samples" / "iteration_000000" / "eval.json").stat().st_mtime
        self.files, self.state = remains(self.run("whole")), last_state(self.run("whole"))

    def run(self, name: str) -> Path:
        return self.folder / name

    def command(self, name: str) -> list[str]:
        if (self.run(name) / "config.yaml").exists():
            return ["train", "--resume", str(self.run(name))]
        return ["train", str(self.config), f"run_dir={self.run(name)}", *self.settings]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def check(self, name: str) -> None:
        assert self.launcher.run(self.command(name), self.log(name)) == 0, self.log(name).read_text()
        found = remains(self.run(name))
        found["config.yaml"] = found["config.yaml"].replace(str(self.run(name)).encode(), str(self.run("whole")).encode())
        assert sorted(found) == sorted(self.files)
        assert [file for file in found if found[file] != self.files[file]] == [], self.log(name).read_text()
        assert last_state(self.run(name)) == self.state
        assert list(self.run(name).rglob(".*")) == []  # no unfinished file is left


SETTINGS = {
    "lora": [*BUSY, "model.adapter=lora"],
    "full": ["model.adapter=full", "rollout.same_noise=true"],
    "tree": [
        "rollout={plan: tree, num_steps: 5, group_size: 4, same_noise: true, tree: {noise_growth: 0.2, sibling_scale: 4}}",
        "rollout.window={schedule: progressive, every: 2}",
        "advantage={centre: group, scale: group_std}",
        "credit.normalize=layer",
        "objective={dynamic_clip: 0.5, ratio: ratio_norm}",
        "layer_tuning.weight=0.1",
    ],
    "granular": ["rollout={plan: granular, num_steps: 6, window: {schedule: random, size: 1, high: 2}, granularities: [1, 2], same_noise: true}"],
    "history": [
        "rollout={plan: window, num_steps: 5, same_noise: true, window: {schedule: backward, backward_first: 3, backward_stages: 4}}",
        "advantage={centre: history, scale: history, history_size: 12, history_least: 8}",
        "selection.contrast={high: 0.2, low: -0.2}",
    ],
    # everything that has a state: the old policy, the critic and its optimiser and gate, the reward statistics
    "awm": [
        *["method=awm", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "old_policy={rollout: true, decay_slope: 0.1}"],
        *["objective.updates_per_iteration=2", "rewards=[toys:noisy_brightness]"],
    ],
    "nft": ["method=diffusion_nft", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "old_policy={every: 3, decay_slope: 0.1}"],
    "ac_flow": [
        *["method=ac_flow", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "advantage={history_size: 12, history_least: 4}"],
        "critic={widths: [8], hidden: 8, warmup_iterations: 2, ramp_iterations: 5, gate: -1000, batch_rows: 10, learning_rate: 0.01}",
    ],
    "dpo": ["method=flow_dpo", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "old_policy.every=4", "logging.rollouts_every=2"],
    "subset": ["rollout={plan: chain, num_steps: 5, kernel: dance_sde, noise_level: 0.3, same_noise: true}", "selection.fraction=0.6"],
}


@pytest.fixture(scope="module", params=["lora", "full"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pipeline: Path, launcher: Launcher) -> Whole:
    folder = tmp_path_factory.mktemp(request.param)
    return Whole(folder, write_config(folder, pipeline), SETTINGS[request.param], launcher)


PLACES = [
    "half of state.pt:2",
    "before checkpoint.json:2",
    "before the rename:3",  # of the second checkpoint: each syncs twice, before and after its rename
    "before pruning:3",
    "half a line:8",
    "half a line:9",
    "before a grid:2",
    "before the report:1",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_a_run_killed_at_the_worst_places_ends_with_the_same_bytes(whole: Whole, place: str) -> None:
    name = place.replace(" ", "-").replace(":", "-")
    assert whole.launcher.run(whole.command(name), whole.log(name), die_at=place) == -signal.SIGKILL, whole.log(name).read_text()
    whole.check(name)


@pytest.mark.parametrize("whole", ["tree", "granular", "history", "subset", "awm", "nft", "ac_flow", "dpo"], indirect=True)
def test_a_killed_run_of_every_plan_and_likelihood_ends_with_the_same_bytes(whole: Whole) -> None:
    assert whole.launcher.run(whole.command("killed"), whole.log("killed"), die_at="half a line:9") == -signal.SIGKILL, whole.log("killed").read_text()
    whole.check("killed")


def test_a_run_killed_again_and_again_at_random_moments_ends_with_the_same_bytes(whole: Whole) -> None:
    seed = time.time_ns()
    moments = random.Random(seed)
    print(f"moments from seed {seed}")  # noqa: T201  shown when the test fails
    whole.launcher.kill_later(whole.command("random"), whole.log("random"), moments.uniform(0, whole.seconds))
    for _ in range(3):  # counted from the first iteration of the process, so that the start-up does not catch most of them
        metrics = whole.run("random") / "metrics.jsonl"
        whole.launcher.kill_later(whole.command("random"), whole.log("random"), moments.uniform(0, whole.training_seconds), after=metrics)
    whole.check("random")


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_ctrl_c_finishes_the_iteration_saves_and_exits_with_130(whole: Whole) -> None:
    run = whole.run("interrupted")
    process = whole.launcher.start([*whole.command("interrupted"), "training.checkpoint_every=100"], whole.log("interrupted"))
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.005)
    os.kill(process, signal.SIGINT)
    assert whole.launcher.wait() == 130
    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 6
    assert find_checkpoints(run)[0].name == f"step_{done:06d}"
    assert f"error: stopped; continue with: flowrl train --resume {run}" in whole.log("interrupted").read_text()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("checkpoint_every: 100", "checkpoint_every: 2"))
    whole.check("interrupted")


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_a_run_with_a_truncated_last_checkpoint_goes_on_from_the_one_before_and_says_so(whole: Whole) -> None:
    run = whole.run("truncated")
    shutil.copytree(whole.run("whole"), run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(whole.run("whole")), str(run)))
    truncate(run / "checkpoints" / "step_000006")
    whole.check("truncated")
    log = whole.log("truncated").read_text()
    assert f"checkpoint {run / 'checkpoints' / 'step_000006'} is truncated or damaged (checksum differs); trying the one before" in log
    assert f"using checkpoint {run / 'checkpoints' / 'step_000004'} instead" in log


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in whole.run("whole").rglob("*") if file.is_file()}
    assert main(["train", "--resume", str(whole.run("whole")), "model.lora.rank=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: checkpoint ")
    assert "belongs to another run: its trainable weights have other names or shapes" in line
    assert {file: file.read_bytes() for file in whole.run("whole").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("whole", ["lora"], indirect=True)
def test_the_tuned_weights_of_a_run_are_the_average_when_there_is_one(whole: Whole) -> None:
    run = whole.run("whole")
    from flowrl.config import load_config

    config = load_config(run / "config.yaml")
    policy = Sd3Policy(config.model, torch.device("cpu"))
    assert load_policy(run, policy) == 6
    assert plain(policy.trainable()) == whole.state["ema"]["average"] != whole.state["parameters"]
    assert load_policy(run, policy, "4") == 4
    assert plain(policy.trainable()) != whole.state["ema"]["average"]
    empty = run.with_name("empty")
    empty.mkdir()
    with pytest.raises(UserError, match="has no checkpoint yet; train it first"):
        load_policy(empty, policy)
    assert json.loads((find_checkpoints(run)[0] / "checkpoint.json").read_text())["iteration"] == 6
