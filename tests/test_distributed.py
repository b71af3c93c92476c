"""Two processes (gloo on the CPU, started by `accelerate launch` or torchrun) do what one process does with the same groups."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import environment, make_config, write_config

from flowrl.checkpoint import find_checkpoints
from flowrl.cli import main
from flowrl.config import Config
from flowrl.processes import make_accelerator
from flowrl.run import train
from flowrl.trainer import Trainer
from flowrl.types import UserError

ITERATIONS = 3
COMMON = ["optimizer.eps=0.01", "advantage={centre: group, scale: batch_std}"]  # a large eps keeps AdamW's step a smooth function of the gradient
CASES = {
    # 3 groups on 2 processes: 2 and 1. Micro-batches of 5 rows, so that the processes also have different numbers of them.
    "lora": ["kl.weight=0.05", "rollout.guidance_scale=2", "objective.updates_per_iteration=2", "training.rows_per_backward=5"],
    "full": ["model.adapter=full", "rollout.same_noise=true", "objective.reduction=group_mean", "kl.weight=0.05"],
    "tree": [
        "rollout={plan: tree, num_steps: 5, group_size: 4, same_noise: true}",
        "advantage={centre: group, scale: group_std}",
        "credit.normalize=layer",
        "layer_tuning.weight=0.1",
        "objective={dynamic_clip: 0.5, ratio: ratio_norm}",
    ],
    "history": [
        "rollout={plan: chain, kernel: dance_sde, noise_level: 0.3}",
        "advantage={centre: history, scale: history, history_size: 8, history_least: 8}",
        "selection.fraction=0.7",
    ],
    # with one branch of contrast in three, a process often has nothing to train; the two rows of 3 prompts leave updates empty
    "contrast": [
        "rollout={plan: window, num_steps: 5, same_noise: true, window: {schedule: backward, backward_first: 3, backward_stages: 4}}",
        "selection.contrast={high: 1.55, low: -1.55}",
        "advantage={centre: group, scale: group_std}",
        "kl.weight=0.05",
        "objective.updates_per_iteration=2",
    ],
    "one row": ["rollout={same_noise: true, window: {size: 1}}", "objective.updates_per_iteration=2"],
    # finished samples: noise and noise levels follow from the group; the processes have different numbers of groups, of micro-batches and of pairs
    "awm": [
        *["method=awm", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "rollout.guidance_scale=2"],
        *["objective={updates_per_iteration: 3, inner_epochs: 2}", "training.rows_per_backward=5", "old_policy.decay_slope=0.1"],
    ],
    "nft": [
        *["method=diffusion_nft", "rollout={plan: ode, solver: heun, num_steps: 4, group_size: 4}", "matching={num_times: 2, shared_times: false}"],
        *["objective={reduction: group_mean, beta: 0.5}", "model.adapter=full", "training.rows_per_backward=6"],
    ],
    "ac_flow": [
        *["method=ac_flow", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "advantage={centre: group, scale: group_std}"],
        "critic={widths: [8], hidden: 8, warmup_iterations: 1, ramp_iterations: 2, gate: -1000, batch_rows: 10, learning_rate: 0.01}",
    ],
    # toys:steps gives two of the prompts one and the same score: a process often has no pair
    "dpo": [
        *["method=flow_dpo", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "objective.beta=5", "ema=null"],
        *["rewards={'toys:steps': {args: {word: red}}}", "objective.updates_per_iteration=2", "training.rows_per_backward=4", "old_policy.every=2"],
    ],
    "draft": [
        *["method=draft", "rollout={plan: ode, num_steps: 4, group_size: 3}", "rewards=[toys:Warmth]", "direct={renoise: 0, last_steps: 3}"],
        *["training.rows_per_backward=7", "model.adapter=full"],
    ],
    "srpo": [
        *["method=srpo", "rollout={plan: ode, num_steps: 4, group_size: 3}", "rewards=[toys:Warmth]", "direct={threshold: null, inversion: true}"],
        "objective={updates_per_iteration: 2, inner_epochs: 2}",
    ],
    # one group for two processes: each has half of it; and three groups in two parts each
    "shared group": ["rollout={plan: chain, groups_per_iteration: 1, group_size: 4, group_shards: 2}", "advantage={centre: group, scale: group_std}"],
    "shared awm": [
        *["method=awm", "rollout={plan: ode, num_steps: 4, group_size: 4, group_shards: 2}", "matching.num_times=2", "objective.updates_per_iteration=3"],
        "rewards={toys:brightness: 1.0, toys:redness: 0.5}",
    ],
    # groups of 2 to 16 samples; and groups of equal rewards that are left out, so that a process often has nothing to train
    "knapsack": [
        *["rollout={plan: chain, groups_per_iteration: 3, group_size: 8}", "rewards={'toys:Steps': {args: {word: blue}}}"],
        *["allocation={name: knapsack, args: {least: 2, most: 16, warmup: 1}}", "objective.updates_per_iteration=2", "training.rows_per_backward=5"],
    ],
    "drop": [
        *["rollout={plan: chain, kernel: flow_sde}", "rewards={'toys:Steps': {args: {word: red}}}", "allocation={name: drop}"],
        *["shaping=[rank_unlikely]", "advantage={centre: group, scale: batch_std}", "kl.weight=0.05", "objective.updates_per_iteration=2"],
    ],
    "two rewards": ["rewards={toys:brightness: 1.0, toys:redness: 0.5}", "rollout.plan=chain", "rollout.groups_per_iteration=5", "ema=null"],
}
SCRIPT = """
import json, sys
from pathlib import Path
import toys
from flowrl.run import train
for name, overrides in json.loads(sys.argv[2]).items():
    folder = Path(sys.argv[1]) / name
    config = toys.make_config(folder, Path(sys.argv[3]), *overrides)
    train(config)
"""


def launch(launcher: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Two processes of a script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = {
        # --multi_gpu starts several processes on CPUs too (--cpu does only under MPI); bf16 stands for what `accelerate config` may have written down.
        "accelerate.commands.launch": ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
        + ["--main_process_port", port],
        "torch.distributed.run": ["--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    command = [sys.executable, "-m", launcher, *options, *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def overrides(name: str) -> list[str]:
    return [*COMMON, *CASES[name], f"training={{iterations: {ITERATIONS}, checkpoint_every: {ITERATIONS}}}", "evaluation.every=100"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Path:
    """A folder for each case, with the run that two processes made."""
    folder = tmp_path_factory.mktemp("two")
    for name in CASES:
        (folder / name).mkdir()
    (folder / "script.py").write_text(SCRIPT)
    cases = json.dumps({name: overrides(name) for name in CASES})
    done = launch("accelerate.commands.launch", [str(folder / "script.py"), str(folder), cases, str(pipeline)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(two: Path, tmp_path: Path, pipeline: Path, name: str) -> None:
    one = train(make_config(tmp_path, pipeline, *overrides(name)))
    ours, theirs = (torch.load(find_checkpoints(run)[0] / "state.pt", weights_only=True) for run in (one, two / name / "run"))
    start = [p.detach() for p in Trainer(make_config(tmp_path, pipeline, *overrides(name))).parameters]
    moved = 0.0
    if name == "ac_flow":
        assert ours["engine"]["critic"]["explained_variance"] == pytest.approx(theirs["engine"]["critic"]["explained_variance"], abs=1e-5)
        critics = [list(state["engine"]["critic"]["network"].values()) for state in (ours, theirs)]
        assert max((a - b).abs().max().item() for a, b in zip(*critics, strict=True)) < 1e-5
    for a, b, before in zip(ours["parameters"], theirs["parameters"], start, strict=True):
        assert (a - b).abs().max() < 1e-5
        moved = max(moved, (a - before).abs().max().item())
    assert moved > 1e-4
    for x, y in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert (x["exp_avg"] - y["exp_avg"]).abs().max() < 1e-5  # the average of the gradients
    scale = max(x["exp_avg"].abs().max() for x in ours["optimizer"]["state"].values())
    assert scale > 5e-5
    assert len(theirs["random"]) == 2

    metrics, others = read(one / "metrics.jsonl"), read(two / name / "run" / "metrics.jsonl")
    assert len(others) == ITERATIONS
    for m, other in zip(metrics, others, strict=True):
        assert list(m) == list(other)
        for key, value in m.items():
            if key.startswith("nfe/") and name in ("contrast", "one row", "dpo", "drop"):
                continue  # a process that has nothing to train evaluates one row with the others
            assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert other["nfe/used"] == other["nfe/minimum"]
        assert m["nfe/used"] == m["nfe/minimum"] <= other["nfe/used"]
        assert other.get("ratio/max_abs_log_first", 0.0) < 1e-6
    for e, other in zip(read(one / "evals.jsonl"), read(two / name / "run" / "evals.jsonl"), strict=True):
        assert other == pytest.approx(e, abs=1e-4)  # a pixel between two of its 256 levels may fall on either
    assert (two / name / "run" / "report.html").is_file()
    assert len(list((two / name / "run" / "samples").iterdir())) == 2


def test_a_run_of_two_processes_can_be_resumed_by_one(two: Path, tmp_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = f"training.iterations={ITERATIONS + 2}"
    whole = train(make_config(tmp_path, pipeline, *overrides("lora"), longer))
    resumed = two / "lora" / "run"
    capsys.readouterr()
    assert main(["train", "--resume", str(resumed), longer]) == 0
    assert read(resumed / "metrics.jsonl")[-1]["iteration"] == ITERATIONS + 2
    a, b = (torch.load(find_checkpoints(run)[0] / "state.pt", weights_only=True) for run in (whole, resumed))
    for x, y in zip(a["parameters"], b["parameters"], strict=True):
        assert (x - y).abs().max() < 1e-5
    for m, other in zip(read(whole / "metrics.jsonl"), read(resumed / "metrics.jsonl"), strict=True):
        assert other["reward/total/mean"] == pytest.approx(m["reward/total/mean"], abs=1e-5)
        assert other["nfe/total"] == m["nfe/total"]


SHORT_OF_MEMORY = """
import json, sys
from pathlib import Path
import torch, toys
from flowrl.run import train
from flowrl.updates.transition import TransitionUpdate
whole = TransitionUpdate.loss
failed = 0
def loss(self, units, weights, **more):
    global failed
    if torch.distributed.get_rank() == 0 and len(units) > 2:
        failed += 1
        raise torch.OutOfMemoryError("of a test")
    return whole(self, units, weights, **more)
TransitionUpdate.loss = loss
train(toys.make_config(Path(sys.argv[1]), Path(sys.argv[2]), *json.loads(sys.argv[3])))
print("rank", torch.distributed.get_rank(), "failed", failed)
"""


def test_processes_step_back_together_when_one_runs_out_of_memory(tmp_path: Path, pipeline: Path) -> None:
    """The first process has 4 rows and holds 2: both go down to 2, once, and the run is that of one process."""
    settings = [*overrides("lora"), "training.rows_per_backward=12"]
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "script.py").write_text(SHORT_OF_MEMORY)
    done = launch("torch.distributed.run", [str(folder / "script.py"), str(folder), str(pipeline), json.dumps(settings)])
    assert done.returncode == 0, done.stderr
    assert "rank 0 failed 1" in done.stdout and "rank 1 failed 0" in done.stdout
    assert "training.rows_per_backward: 4 do not fit" in done.stderr
    one = train(make_config(tmp_path, pipeline, *settings))
    ours, theirs = (torch.load(find_checkpoints(run)[0] / "state.pt", weights_only=True) for run in (one, folder / "run"))
    for a, b in zip(ours["parameters"], theirs["parameters"], strict=True):
        assert (a - b).abs().max() < 1e-5
    assert theirs["fitting"]["rows_per_backward"] == 2
    for m, other in zip(read(one / "metrics.jsonl"), read(folder / "run" / "metrics.jsonl"), strict=True):
        assert other["nfe/used"] == other["nfe/minimum"] == m["nfe/used"]


def test_the_command_line_speaks_with_one_voice(tmp_path: Path, pipeline: Path) -> None:
    config = write_config(tmp_path, pipeline)
    arguments = ["train", str(config), "training={iterations: 1, device: auto}", "rewards=[toys:constant]"]
    done = launch("torch.distributed.run", ["-m", "flowrl.cli", *arguments])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["iteration"] == 1
    assert done.stdout.count("next: flowrl report") == 1
    assert done.stderr.count("evaluation at iteration 1") == 1
    assert done.stderr.count("gave the same score, 0.25, to all 12 samples of the run") == 1


def test_there_must_be_a_group_for_every_process(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 4)
    with pytest.raises(UserError, match="3 groups cannot be shared by 4 processes; use more groups"):
        Trainer(configure())


def test_a_launcher_that_started_one_process_instead_of_two_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    make_accelerator("cpu")
    assert caplog.messages == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # what `accelerate launch --cpu --num_processes 2` sets for its one process
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    make_accelerator("cpu")
    assert "has started one process only" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"training\.device: cuda was asked for and torch sees none; use auto or cpu"):
        make_accelerator("cuda")
