"""Mistakes of a user's, through the command line: one clear line, a non-zero exit code, nothing written and nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
from toys import PROMPTS, Launcher

from flowrl.cli import main
from flowrl.config import Config
from flowrl.run import train
from flowrl.trainer import Trainer
from flowrl.types import UserError

Capture = pytest.CaptureFixture[str]


def errors(capsys: Capture) -> list[str]:
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def fail(config: Path, capsys: Capture, *overrides: str) -> str:
    """The one line with which a training fails that leaves no trace."""
    before = sorted(config.parent.rglob("*"))
    assert main(["train", str(config), *overrides]) == 2
    (line,) = errors(capsys)
    assert sorted(config.parent.rglob("*")) == before
    return line


# --- the config ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key; did you mean learning_rate?"),
        ("rollout.num_steps=many", "rollout.num_steps: "),
        ("rollout.num_steps=-4", "rollout.num_steps: -4 is out of range"),
        ("rollout.group_size=1", "rollout.group_size: 1 is too small, a group needs at least 2 samples to compare"),
        ("rewards=[beauty]", "unknown reward 'beauty'"),
        ("rewards=[toys:beauty]", "reward 'toys:beauty': module 'toys'"),
        ("rollout.groups_per_iteration=0", "rollout.groups_per_iteration: 0 is out of range"),
        ("objective.updates_per_iteration=99", "objective.updates_per_iteration: 99 is more than the 12 images of an iteration"),
    ],
)
def test_a_mistake_in_the_config(config_file: Path, capsys: Capture, override: str, message: str) -> None:
    assert fail(config_file, capsys, override).startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.window={size: 3, high: 4}", "rollout.window.high: 4 is too large for 4 steps, of which the last is never stochastic; use at most 3"),
        ("rollout.window.size=0", "rollout.window.size: 0 is out of range; allowed: at least 1"),
        ("rollout={plan: tree, group_size: 6}", "rollout.group_size: a tree with these branching factors has 4 leaves, and 6 is not a multiple of them"),
        ("rollout={plan: granular, same_noise: true, granularities: [2]}", "rollout.granularities: a stride of 2 does not fit into the 0 steps"),
        ("rollout={kernel: cps, noise_level: 1.5}", "rollout.noise_level: 1.5 is more noise than a cps step can hold; use at most 1"),
        ("method=flow_grpo+mix_grpo", "method: mix_grpo is a whole method and cannot be added to flow_grpo; these can: grpo_guard"),
    ],
)
def test_a_rollout_that_cannot_be_planned(config_file: Path, capsys: Capture, override: str, message: str) -> None:
    assert fail(config_file, capsys, override).startswith(message)


ODE = "rollout={plan: ode, num_steps: 8, group_size: 4}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.name=dpo"], "objective.name: dpo judges finished samples; set likelihood: matching"),
        (["anchor.weight=1"], "anchor.weight: the old policy anchors velocities at noised samples"),
        (["method=awm", ODE, "old_policy=null"], "anchor.weight: there is no old policy to anchor to; give old_policy, or weight 0"),
        (["method=diffusion_nft", ODE, "matching.num_times=6", "old_policy=null"], "old_policy: nft mirrors the policy about the old one"),
        (["method=awm", ODE, "matching.num_times=7"], "matching.num_times: 7 noise levels do not fit into the 6 of the grid"),
        (["method=awm", ODE, "matching.weighting=t3"], "matching.weighting: 't3' is not a choice; did you mean t?"),
        (["method=awm", ODE, "critic.gait=1"], "critic.gait: unknown key; did you mean gate?"),
        (["method=flow_dpo", ODE, "data.pairs=nothing.jsonl", "rollout.group_size=2", "old_policy=null"], "pairs nothing.jsonl: "),
        (["method=refl", ODE, "direct={low: 4, high: 8}"], "reward toys:brightness is not differentiable, which this objective needs"),
        (["method=refl", ODE, "direct={low: 8, high: 9}", "rewards=[ink]"], "direct.low: steps 8..8 are not within 0..7"),
    ],
    ids=str,
)
def test_a_likelihood_or_objective_that_cannot_work(config_file: Path, capsys: Capture, overrides: list[str], message: str) -> None:
    assert fail(config_file, capsys, *overrides).startswith(message)


def test_a_critic_that_never_learns_stops_the_run_and_says_what_to_do(config_file: Path, capsys: Capture) -> None:
    settings = ["method=ac_flow", ODE, "matching.num_times=2", "critic={widths: [8], hidden: 8, warmup_iterations: 1, gate: 0.9, gate_patience: 2}"]
    assert main(["train", str(config_file), *settings]) == 2
    (line,) = errors(capsys)
    assert line.startswith("critic.gate: 2 iterations after the warm-up the critic explains ")
    assert "give it more updates" in line
    assert len((config_file.parent / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_kernel_that_does_not_fit_the_network(config_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.policies.sd3.Sd3Policy.prediction", "epsilon")
    assert fail(config_file, capsys) == ("rollout.kernel: kernel flow_sde fits networks that predict a flow velocity; this one predicts epsilon: use ddim")


def test_a_tree_that_is_wider_than_the_memory(config_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 40_000})())
    tree = ["rollout={plan: tree, num_steps: 6, window: {size: 4, high: 5}, group_size: 16}", "advantage={centre: group, scale: group_std}"]
    line = fail(config_file, capsys, *tree)
    assert line.startswith("rollout: 16 samples a prompt and their 45 training states, for 3 prompts, take 4.36e-05 GiB of latents")


def test_noise_that_destroys_the_picture_is_warned_of(configure: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    Trainer(configure("rollout.noise_level=0.9"))
    assert caplog.text == ""
    Trainer(configure("rollout.noise_level=1.4"))
    assert "rollout.noise_level: " in caplog.text and "1.4" in caplog.text


# --- prompts ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty; give one prompt a line"),
        ("\n\n", "is empty; give one prompt a line"),
        ("a red circle\n\na blue square\n", "line 2 is blank; remove empty lines"),
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.eval.eval"])
def test_a_prompts_file_that_is_missing_empty_or_has_blank_lines(
    config_file: Path, capsys: Capture, tmp_path: Path, key: str, content: str | None, message: str
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    assert fail(config_file, capsys, f"{key}={file}") == f"prompts {file}: {message}"


# --- the model ----------------------------------------------------------------------------------------------------------------------------------


def other_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXPipeline"}))


def cut(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist; give a folder, a hub id such as"),
        (lambda folder: (folder / "model_index.json").unlink(), "is not a diffusers pipeline (no model_index.json)"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "could not be loaded as a"),
        (other_class, "is a LTXPipeline; flowrl knows Stable Diffusion 3 (sd3)"),
        (lambda folder: shutil.rmtree(folder / "transformer"), "has no folder transformer, which its model_index.json names; copy the whole pipeline"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer, which its model_index.json names; copy the whole pipeline"),
        (cut, "could not be loaded as a"),
    ],
    ids=["missing", "no index", "broken index", "another class", "no transformer", "no tokenizer", "truncated weights"],
)
def test_a_model_folder_that_is_not_a_pipeline(
    config_file: Path, capsys: Capture, tmp_path: Path, pipeline: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline, folder)
    damage(folder)
    line = fail(config_file, capsys, f"model.path={folder}")
    assert line.startswith(f"model.path: {folder} ")
    assert message in line


def test_a_hub_id_that_cannot_be_loaded(config_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fail(config_file, capsys, "model.path=nobody/nothing").startswith("model.path: nobody/nothing could not be loaded as a pipeline")


@pytest.mark.parametrize(
    ("kind", "advice"), [("GatedRepoError", "it is gated: accept its licence"), ("LocalEntryNotFoundError", "the hub could not be reached")]
)
def test_what_a_hub_says_is_passed_on(config_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, kind: str, advice: str) -> None:
    """diffusers calls a gated model an invalid identifier, and one that it could not ask for a folder without an index."""
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*_: Any, **__: Any) -> str:
        raise error.__new__(error, "no")  # what they are made of changes between releases

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", refuse)
    line = fail(config_file, capsys, "model.path=black-forest-labs/FLUX.1-dev")
    assert line.startswith("model.path: black-forest-labs/FLUX.1-dev could not be loaded as a pipeline: ")
    assert f"({advice}" in line


# --- rewards ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "reward toys:broken returned nan for the prompt 'three red circles'; return a finite score, or valid=False where there is none"),
        ("raise", "reward toys:broken failed on the prompt 'three red circles': ZeroDivisionError: no red here"),
        ("short", "reward toys:broken returned values of shape ["),
    ],
)
def test_a_broken_reward_is_named_with_the_prompt(config_file: Path, capsys: Capture, how: str, message: str) -> None:
    rewards = f"rewards={{'toys:broken': {{args: {{how: {how}, word: three}}}}}}"  # a prompt of the training, 5 of whose prompts make 2 iterations
    line = fail(config_file, capsys, rewards, "evaluation.rewards=[toys:brightness]", "rollout.groups_per_iteration=5")
    assert line.startswith(message)
    assert how != "short" or "the first with the prompt '" in line


def test_a_broken_reward_of_the_evaluation_stops_before_training(config_file: Path, capsys: Capture) -> None:
    broken = "evaluation.rewards={'toys:broken': {args: {how: nan, word: three}}}"
    assert "returned nan for the prompt 'three red circles'" in fail(config_file, capsys, broken)


def test_a_reward_that_breaks_later_loses_nothing(config_file: Path, capsys: Capture) -> None:
    # one group an iteration, so that the prompt with "three" comes after others: every prompt once in the first 5 iterations
    settings = ["rollout.groups_per_iteration=1", "training.checkpoint_every=1", "evaluation.rewards=[toys:brightness]"]
    run = config_file.parent / "run"
    for word in PROMPTS[:5]:
        shutil.rmtree(run, ignore_errors=True)
        broken = f"rewards={{'toys:broken': {{args: {{how: nan, word: {word}}}}}}}"
        assert main(["train", str(config_file), *settings, broken]) == 2
        if run.exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= 2:
            break
    done = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "rewards=[toys:brightness]"]) == 0
    finished = (run / "metrics.jsonl").read_bytes()
    assert finished.startswith(done)
    assert len(finished.splitlines()) == 6


def test_a_reward_that_is_constant_over_the_run_is_warned_of_with_the_count(config_file: Path, capsys: Capture) -> None:
    assert main(["train", str(config_file), "rewards={toys:constant: 1.0, toys:brightness: 1.0}"]) == 0
    err = capsys.readouterr().err
    assert err.count("warning: reward toys:constant gave the same score, 0.25, to all 72 samples of the run and teaches nothing") == 1
    assert "brightness gave the same" not in err


# --- the run directory --------------------------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_not_touched_without_resume(config_file: Path, capsys: Capture, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("precious")
    assert fail(config_file, capsys) == f"run directory {run} exists already; go on with: flowrl train --resume {run}, or choose another run_dir"
    assert (run / "metrics.jsonl").read_text() == "precious"
    (run / "metrics.jsonl").unlink()
    run.rmdir()
    run.write_text("a file")
    assert fail(config_file, capsys) == f"run directory {run} is a file; choose another run_dir"


def test_an_empty_run_directory_may_be_used_and_a_file_put_there_meanwhile_stays(configure: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    with pytest.raises(UserError, match="returned nan"):
        train(configure("rewards={'toys:broken': {args: {how: nan, word: a}}}"))
    assert not run.exists() or list(run.iterdir()) == []
    assert train(configure("training.iterations=1", "rewards=[toys:brightness]")) == run


def test_a_run_that_was_killed_while_it_wrote_its_first_file_can_be_started_again(configure: Callable[..., Config], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.77.tmp").write_text("method: fl")
    assert train(configure("training.iterations=1")) == run
    assert list(run.glob(".*")) == []
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="exists already"):  # it holds more than that
        train(configure("training.iterations=1"))


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again_on_resume(configure: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    run = train(configure("training.iterations=2"))
    metrics = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    train(configure("training.iterations=2"), resume=run)
    assert "has no checkpoint yet: starting at iteration 0" in caplog.text
    assert (run / "metrics.jsonl").read_bytes() == metrics


# --- what a run says ----------------------------------------------------------------------------------------------------------------------------


def test_a_training_says_what_matters_and_nothing_else(config_file: Path, launcher: Launcher, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert launcher.run(["train", str(config_file)], log) == 0
    lines = log.read_text().splitlines()
    assert [line for line in lines if "it/s" in line or "torchvision" in line or "arning" in line or "deprecated" in line or "float32" in line] == []
    assert lines[0].startswith("evaluation at iteration 0: eval toys:brightness 0.4")
    assert lines[1].startswith("iteration 1/6 · reward 0.4")
    assert len(lines) <= 12
