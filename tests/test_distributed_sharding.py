"""Two processes that share one network (`training.sharding: fsdp2`, gloo on the CPU) do what one process does, and their checkpoints fit any number."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
import torch
from accelerate.utils import DistributedType
from test_distributed import COMMON, read
from toys import ROOT, make_config, run_two, write_config

from flowrl import processes
from flowrl.checkpoint import find_checkpoints, load_checkpoint, load_policy, model_identity
from flowrl.cli import main
from flowrl.config import Config, load_config
from flowrl.policies.families import make_policy
from flowrl.processes import check_agreement, explain_lost_process, make_accelerator
from flowrl.run import train
from flowrl.sharding import SHARDS, fit_state
from flowrl.trainer import Trainer
from flowrl.types import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

ITERATIONS = 2
SHARED, LONGER = "training.sharding=fsdp2", f"training.iterations={ITERATIONS + 1}"
CASES = {
    # 3 groups on 2 processes, 2 rows a forward: everywhere different numbers of forwards and micro-batches; the reference is the network without adapters
    "lora": [
        *["kl.weight=0.05", "rollout.guidance_scale=2", "training.rows_per_backward=5", "training.rows_per_forward=3", "objective.updates_per_iteration=2"],
        "model.gradient_checkpointing=true",
    ],
    # the reference is a second sharded network
    "full": ["model.adapter=full", "rollout.same_noise=true", "kl.weight=0.05", "training.rows_per_forward=4", "optimizer.max_grad_norm=0.01"],
    # old log-probabilities, velocities of an old policy and of the reference, and an old policy that samples
    "awm": [
        *["method=awm", "rollout={plan: ode, num_steps: 4, group_size: 4}", "matching.num_times=2", "kl={weight: 0.1, form: v_mse}", "anchor.weight=0.1"],
        *["objective={updates_per_iteration: 3}", "training={rows_per_backward: 6, rows_per_forward: 7}", "old_policy={decay_slope: 0.1, rollout: true}"],
    ],
    # with one branch of contrast in three, a process often has nothing to train
    "contrast": [
        "rollout={plan: window, num_steps: 5, same_noise: true, window: {schedule: backward, backward_first: 3, backward_stages: 4}}",
        *["selection.contrast={high: 1.55, low: -1.55}", "advantage={centre: group, scale: group_std}", "kl.weight=0.05", "objective.updates_per_iteration=2"],
    ],
    # frozen weights in bfloat16, trained ones in float32, and a gradient for each reward
    "bfloat16": ["model.dtype=bfloat16", "rewards={toys:brightness: 1.0, toys:redness: 0.5}", "reward_weights={kind: gradient, every: 1}"],
}
TOLERANCE = {"bfloat16": 1e-3}
"""Of weights; else 1e-5. They move by more than 1e-2."""
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import toys
from flowrl import checkpoint
from flowrl.cli import main
from flowrl.run import train
folder, pipeline, rank = Path(sys.argv[1]), Path(sys.argv[3]), int(os.environ["RANK"])
for name, overrides in json.loads(sys.argv[2]).items():
    train(toys.make_config(folder / name, pipeline, *overrides))
run = folder / "alone" / "run"  # made by one process, continued by two that share
train(toys.load_config(run / "config.yaml", json.loads(sys.argv[4])), resume=run)
print("trained", flush=True)

config = str(folder / "mishaps" / "config.yaml")
code = main(["train", config, "training.sharding=fsdp2", f"seed={rank}", f"rollout.num_steps={4 + rank}"])
print("exit code", code, "run directory", (folder / "mishaps" / "run").exists(), flush=True)
write, left = checkpoint.write_shards, [2]
def dies(*arguments):
    left[0] -= 1
    if left[0] == 0 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
checkpoint.write_shards = dies
sys.exit(main(["train", config, "training={sharding: fsdp2, iterations: 3, checkpoint_every: 1}", "evaluation={every: 100, final_num_images: 3}"]))
"""


def overrides(name: str, *more: str) -> list[str]:
    settings = [f"training={{iterations: {ITERATIONS}, checkpoint_every: {ITERATIONS}}}", "evaluation={every: 100, final_num_images: 3}"]
    return [*COMMON, *CASES[name], *settings, *more]


class Two(NamedTuple):
    """What two processes have made: a folder for each case, what they said, and how they ended."""

    folder: Path
    out: list[str]
    err: list[str]
    codes: list[int]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> Two:
    """Started without a launcher, which would end a process when the other one dies."""
    folder = tmp_path_factory.mktemp("shared")
    for name in [*CASES, "alone", "mishaps"]:
        (folder / name).mkdir()
    train(make_config(folder / "alone", pipeline, *overrides("full")))
    write_config(folder / "mishaps", pipeline)
    (folder / "script.py").write_text(SCRIPT)
    cases = json.dumps({name: overrides(name, SHARED) for name in CASES})
    command = [sys.executable, str(folder / "script.py"), str(folder), cases, str(pipeline), json.dumps([SHARED, LONGER])]
    done = run_two(command)
    assert all("trained" in process.stdout for process in done), done[0].stderr
    return Two(folder, [process.stdout for process in done], [process.stderr for process in done], [process.returncode for process in done])


def newest(run: Path, config: Config) -> dict[str, Any]:
    """The whole state of a run's newest checkpoint, on one process."""
    trainer = Trainer(config)
    loaded = load_checkpoint(run, model_identity(trainer.policy))
    assert loaded is not None
    return fit_state(loaded[1], trainer.parameters)


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    return max((a.detach() - b.detach()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_that_share_the_network_train_as_one_does(two: Two, tmp_path: Path, pipeline: Path, name: str) -> None:
    config, close = make_config(tmp_path, pipeline, *overrides(name)), TOLERANCE.get(name, 1e-5)
    one, run = train(config), two.folder / name / "run"
    ours, theirs = newest(one, config), newest(run, config)
    assert distance(ours["parameters"], theirs["parameters"]) < close
    assert distance(ours["parameters"], list(Trainer(config).parameters)) > 1e-3
    assert distance(ours["ema"]["average"], theirs["ema"]["average"]) < close
    for x, y in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert distance([x["exp_avg"]], [y["exp_avg"]]) < close and x["step"] == y["step"]
    for m, other in zip(read(one / "metrics.jsonl"), read(run / "metrics.jsonl"), strict=True):
        assert list(m) == list(other)
        for key, value in m.items():
            if not key.startswith("nfe/") and name != "bfloat16":
                assert other[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
        assert other["nfe/used"] == other["nfe/minimum"] >= m["nfe/used"]  # what a process evaluates to keep another one company is counted
    for e, other in zip(read(one / "evals.jsonl"), read(run / "evals.jsonl"), strict=True):
        assert other == pytest.approx(e, abs=100 * close)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_continued_by_one_process(two: Two, tmp_path: Path, pipeline: Path) -> None:
    whole = train(make_config(tmp_path, pipeline, *overrides("lora", LONGER)))
    run = shutil.copytree(two.folder / "lora" / "run", tmp_path / "copy")
    assert (find_checkpoints(run)[0] / SHARDS / ".metadata").is_file()
    assert main(["train", "--resume", str(run), f"run_dir={run}", LONGER]) == 0
    config = load_config(run / "config.yaml")
    assert config.training.sharding == "fsdp2"
    assert not (find_checkpoints(run)[0] / SHARDS).exists()  # one process has nobody to share with
    assert distance(newest(whole, config)["parameters"], newest(run, config)["parameters"]) < 1e-5
    assert [m["iteration"] for m in read(run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_a_whole_checkpoint_is_continued_by_two_processes_that_share(two: Two, tmp_path: Path, pipeline: Path) -> None:
    config = make_config(tmp_path, pipeline, *overrides("full", LONGER))
    whole, theirs = newest(train(config), config), newest(two.folder / "alone" / "run", config)
    assert (find_checkpoints(two.folder / "alone" / "run")[0] / SHARDS / ".metadata").is_file()
    for part in ("parameters", "ema"):
        ours, other = (state[part]["average"] if part == "ema" else state[part] for state in (whole, theirs))
        assert distance(ours, other) < 1e-5
    assert theirs["counters"]["num_updates"] == ITERATIONS + 1


@pytest.mark.slow
def test_the_export_of_a_sharded_network_is_whole(two: Two) -> None:
    from diffusers import SD3Transformer2DModel

    run = two.folder / "full" / "run"
    config = load_config(run / "config.yaml")
    average = newest(run, config)["ema"]["average"]
    exported = SD3Transformer2DModel.from_pretrained(run / "export" / "transformer")
    assert distance(list(exported.parameters()), average) == 0
    assert json.loads((run / "export" / "transformer" / "config.json").read_text())["_class_name"] == "SD3Transformer2DModel"
    policy = make_policy(config.model, torch.device("cpu"))
    assert load_policy(run, policy) == ITERATIONS
    assert distance(policy.trainable(), average) == 0

    run = two.folder / "lora" / "run"
    policy = make_policy(load_config(run / "config.yaml").model, torch.device("cpu"))
    policy.load_export(run / "export")
    assert distance(policy.trainable(), newest(run, load_config(run / "config.yaml"))["ema"]["average"]) < 1e-7
    plain = make_policy(config.model, torch.device("cpu")).pipeline  # without adapters
    plain.load_lora_weights(run / "export")
    assert plain.get_active_adapters() == ["default_0"]


@pytest.mark.slow
def test_damage_to_a_shard_is_noticed(two: Two, tmp_path: Path, pipeline: Path) -> None:
    run = shutil.copytree(two.folder / "contrast" / "run", tmp_path / "copy")
    policy = make_policy(load_config(run / "config.yaml").model, torch.device("cpu"))
    shards = find_checkpoints(run)[0] / SHARDS
    first = sorted(shards.glob("__1_*"))[0]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    with pytest.raises(UserError, match=rf"is truncated or damaged \(checksum of shards/{first.name} differs\); start again"):
        load_checkpoint(run, model_identity(policy))
    first.unlink()
    with pytest.raises(UserError, match=rf"is incomplete \(shards/{first.name} is missing\)"):
        load_checkpoint(run, model_identity(policy))


@pytest.mark.slow
def test_a_config_that_differs_between_processes_ends_all_of_them_before_any_work(two: Two) -> None:
    for out, err in zip(two.out, two.err, strict=True):
        expected = "the processes disagree on the config: seed is 0 in process 0 and 1 in process 1, and 1 more settings differ; start all of them"
        assert expected in " ".join(err.split())
        assert "exit code 2 run directory False" in out


@pytest.mark.slow
def test_a_process_that_dies_while_it_saves_ends_the_job_and_the_checkpoint_before_is_whole(two: Two) -> None:
    assert two.codes == [2, -signal.SIGKILL]
    said, run = " ".join(two.err[0].split()), two.folder / "mishaps" / "run"
    assert "process 0 has lost another process of the run: it has died" in said and "the last checkpoint is whole: go on with flowrl train --resume" in said
    assert "Traceback" not in said
    assert [folder.name for folder in find_checkpoints(run)] == ["step_000001"]
    policy = make_policy(load_config(run / "config.yaml").model, torch.device("cpu"))
    assert load_policy(run, policy) == 1


def test_processes_with_the_same_config_agree(configure: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair:
        num_processes = 2

    ours, theirs = configure(), configure("objective.clip_low=0.5", "evaluation.seed=3")
    plain = [processes._flat(json.loads(config.model_dump_json())) for config in (ours, theirs)]
    monkeypatch.setattr(processes, "gather_object", lambda mine: mine * 2)
    check_agreement(cast("Accelerator", Pair()), ours)
    monkeypatch.setattr(processes, "gather_object", lambda _: plain)
    with pytest.raises(UserError, match=r"objective\.clip_low is 0\.001 in process 0 and 0\.5 in process 1, and 1 more settings differ"):
        check_agreement(cast("Accelerator", Pair()), ours)


def test_only_what_another_process_has_caused_is_called_a_lost_process() -> None:
    class Pair:
        num_processes, process_index = 2, 1

    for count, text, expected in ((2, "Connection closed by peer [127.0.0.1]:1", UserError), (2, "mat1 and mat2", RuntimeError), (1, "gloo", RuntimeError)):
        Pair.num_processes = count
        said = "lost another process" if expected is UserError else text
        with pytest.raises(expected, match=said), explain_lost_process(cast("Accelerator", Pair()), 7, "go on"):
            raise RuntimeError(text)


def test_the_launcher_must_not_shard_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match=r"accelerate's own FSDP, which flowrl does not use; .* training\.sharding: fsdp2"):
        make_accelerator("cpu")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_files_start_processes_and_nothing_else(file: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    found = load_config_from_file(str(file))
    assert isinstance(found, ClusterConfig)
    assert found.distributed_type == (DistributedType.NO if found.num_processes == 1 else DistributedType.MULTI_GPU)
    assert (found.mixed_precision, found.fsdp_config, found.deepspeed_config, found.dynamo_config) == ("no", {}, {}, {})
    assert found.num_processes % found.num_machines == 0
