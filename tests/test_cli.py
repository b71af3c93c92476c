"""The command line: help, messages, exit codes. Training itself is tested elsewhere."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowrl import __version__
from flowrl.cli import main
from flowrl.config import dump_config, list_methods, load_config
from flowrl.types import UserError

ROOT = Path(__file__).parent.parent
COMMANDS = ["train", "sample", "eval", "export", "report", "methods", "rewards", "score", "serve-reward"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\nrewards: [scene]\n")
    return path


@pytest.fixture
def run(config: Path) -> Path:
    loaded = load_config(config, ["seed=7"])
    folder = Path(loaded.run_dir)
    (folder / "checkpoints" / "step_000010").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(loaded))
    return folder


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any) -> list[tuple[Any, ...]]:
    """Replace a function of a module that the command imports when it runs; returns the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def record(*args: Any) -> Any:
        calls.append(args)
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: record}))
    return calls


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2 and print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples" in out
    assert f"flowrl {command}" in out.split("Examples")[1]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"│ {command} " in out for command in COMMANDS)
    assert "--install-completion" in out


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flowrl {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    # What makes `flowrl --help` and tab completion fast: torch alone takes over a second.
    code = (
        "import sys; from flowrl.cli import main; main(['train', '--help'])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'matplotlib', 'omegaconf'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_passes_the_exit_code_on() -> None:
    command = [sys.executable, "-m", "flowrl.cli", "train", "none.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: config none.yaml: no such file\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: No such command 'trian'. Did you mean 'train'? (see flowrl --help)"),
        (["train", "--resum", "x"], "error: No such option: --resum (Possible options: --resume) (see flowrl train --help)"),
        (["train"], "error: give a CONFIG to start a run, or --resume RUN to continue one (see flowrl train --help)"),
        (["train", "seed=1"], "error: give a CONFIG to start a run"),
        (["train", "none.yaml", "seed=1"], "error: config none.yaml: no such file"),
        (["train", "--resume", "none"], "error: none is not a run directory: it has no config.yaml"),
        (["sample"], "error: give a PROMPT or --prompts FILE (see flowrl sample --help)"),
        (["sample", "--prompts", "none.txt"], "error: prompts none.txt: no such file"),
        (["sample", "a", "--run", "none"], "error: none is not a run directory"),
        (["sample", "a", "--num-steps", "0"], "error: Invalid value for '--num-steps'"),
        (["eval"], "error: Missing argument 'RUN|CONFIG'"),
        (["eval", "none"], "error: config none: no such file"),
        (["report", "none"], "error: none is not a run directory"),
        (["methods", "flow_grp"], "error: unknown method flow_grp; did you mean flow_grpo?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = failure(capsys, *arguments)
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_every_mistake_of_a_config_has_its_own_line(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    assert failure(capsys, "train", str(config), "rollout.group_sise=4", "seed=-1") == [
        "error: seed: -1 is out of range; allowed: at least 0",
        "error: rollout.group_sise: unknown key; did you mean group_size?",
    ]
    assert not (config.parent / "run").exists()


def test_train_passes_the_resolved_config_and_shows_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, run: Path
) -> None:
    row = {"split": "eval", "guidance_scale": 1.0, "reward": "scene", "n": 512, "ci95": 0.01}
    rows = [
        row | {"iteration": 0, "policy": "tuned", "mean": 0.4},
        row | {"iteration": 0, "policy": "base", "guidance_scale": 3.0, "mean": None},
        row | {"iteration": 5, "policy": "tuned", "mean": 0.9},
        row | {"iteration": 10, "policy": "tuned", "mean": 0.625},
    ]
    (run / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    calls = stand_in(monkeypatch, "flowrl.run", "train", run)
    assert main(["train", str(config), "seed=3"]) == 0
    ((given, resume),) = calls
    assert (given.seed, resume) == (3, None)
    out = capsys.readouterr().out
    assert "0.400 ± 0.010  0.625 ± 0.010  +0.225*     512" in out
    assert "0.900" not in out
    assert f"flowrl report {run}" in out


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, run: Path) -> None:
    stand_in(monkeypatch, "flowrl.run", "train", run)
    monkeypatch.setenv("RANK", "1")
    assert main(["train", str(config)]) == 0
    assert capsys.readouterr().out == ""


def test_resume_uses_the_config_of_the_run_and_its_present_place(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    calls = stand_in(monkeypatch, "flowrl.run", "train", moved)
    assert main(["train", "--resume", str(moved), "training.iterations=400"]) == 0
    ((given, resume),) = calls
    assert (given.seed, given.training.iterations, given.run_dir, resume) == (7, 400, str(moved), moved)


def test_ctrl_c_in_training_says_how_to_go_on_with_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, run: Path
) -> None:
    stand_in(monkeypatch, "flowrl.run", "train", KeyboardInterrupt())
    assert main(["train", str(config)]) == 130
    assert capsys.readouterr().err == f"error: stopped; continue with: flowrl train --resume {run}\n"
    (run / "checkpoints" / "step_000010").rmdir()
    assert main(["train", str(config)]) == 130
    assert capsys.readouterr().err == "error: stopped; before the first checkpoint\n"


def test_a_user_error_from_deep_inside_has_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> None:
    stand_in(monkeypatch, "flowrl.run", "train", UserError("reward scene: it rains"))
    assert failure(capsys, "train", str(config)) == ["error: reward scene: it rains"]


def test_a_full_disk_is_one_line_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    stand_in(monkeypatch, "flowrl.report", "write_report", OSError(errno.ENOSPC, "No space left on device", "report.html"))
    assert main(["report", str(run)]) == 1
    assert capsys.readouterr().err == "error: no space left on the disk (report.html); free some and run the command again\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    stand_in(monkeypatch, "flowrl.report", "write_report", ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["report", str(run)])


def test_report_prints_the_path_and_nothing_else(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    stand_in(monkeypatch, "flowrl.report", "write_report", run / "report.html")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_sample_draws_with_the_settings_of_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path) -> None:
    (tmp_path / "p.txt").write_text("two\nthree\n")
    out = tmp_path / "out"
    calls = stand_in(monkeypatch, "flowrl.sampling", "sample_to_folder", [out / "0.png"])
    assert main(["sample", "one", "--prompts", str(tmp_path / "p.txt"), "--run", str(run), "--out", str(out), "--seed", "5"]) == 0
    assert calls == [("flowrl:tiny-sd3", ["one", "two", "three"], out, run, "last", 20, 1.0, 5, 1, None)]
    assert capsys.readouterr().out == f"1 pictures in {out}\n"


def test_sample_refuses_an_unknown_dtype(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "new")
    assert failure(capsys, "sample", "a", "--out", out, "--dtype", "int8") == ["error: --dtype int8: use float32, bfloat16 or float16"]


def test_a_language_model_answers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "answers"
    assert main(["sample", "Tom has 3 apples.", "--model", "flowrl:tiny-lm", "--out", str(out), "--answers-per-prompt", "2", "--dtype", "bfloat16"]) == 0
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Tom has 3 apples."] * 2
    assert lines[0]["answer"] != lines[1]["answer"]
    assert f"answers in {out / 'answers.jsonl'}" in capsys.readouterr().out


def test_sample_never_mixes_with_what_is_already_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calls = stand_in(monkeypatch, "flowrl.sampling", "sample_to_folder", [])
    (tmp_path / "mine.png").write_bytes(b"")
    assert failure(capsys, "sample", "a", "--out", str(tmp_path)) == [f"error: {tmp_path} is not an empty folder; choose another --out"]
    assert calls == []


EVAL_ROWS = [
    {"iteration": 0, "split": "eval", "policy": "base", "guidance_scale": 1.0, "reward": "scene", "mean": 0.50, "ci95": 0.02, "n": 64},
    {"iteration": 9, "split": "eval", "policy": "tuned", "guidance_scale": 1.0, "reward": "scene", "mean": 0.53, "ci95": 0.02, "n": 64},
]


def test_eval_shows_base_beside_tuned_and_marks_only_separate_intervals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    calls = stand_in(monkeypatch, "flowrl.evaluation", "evaluate_run", EVAL_ROWS)
    assert main(["eval", str(run), "-r", "scene", "-n", "64", "-g", "1", "-g", "2.5", "--split", "eval"]) == 0
    assert calls == [(run, None, ["scene"], 64, 20, [1.0, 2.5], ["eval"], 1234, "last")]
    out = capsys.readouterr().out
    assert "0.500 ± 0.020  0.530 ± 0.020   +0.030      64" in out


def test_eval_of_a_config_has_the_base_model_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> None:
    calls = stand_in(monkeypatch, "flowrl.evaluation", "evaluate_run", EVAL_ROWS[:1])
    assert main(["eval", str(config)]) == 0
    ((run, given, rewards, num_images, *_),) = calls
    assert (run, given, rewards, num_images) == (None, load_config(config), [], 512)
    assert "0.500 ± 0.020      -" in capsys.readouterr().out


def test_eval_prints_the_rows_as_json_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    stand_in(monkeypatch, "flowrl.evaluation", "evaluate_run", EVAL_ROWS)
    assert main(["eval", str(run), "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == EVAL_ROWS


def test_eval_of_an_unknown_prompt_set_names_the_nearest(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert failure(capsys, "eval", str(run), "--split", "unsen") == ["error: --split unsen: no such prompt set; did you mean unseen?"]


def test_methods_lists_all_and_shows_the_deviations_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in list_methods())
    assert main(["methods", "flow_grpo"]) == 0
    out = capsys.readouterr().out
    assert "arXiv:2505.05470" in out
    assert all(f"- {note}" in out for note in list_methods()["flow_grpo"].deviations)
    assert "clip_low: 0.0001" in out


def test_rewards_lists_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    from rewards.registry import REWARDS

    assert main(["rewards"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in REWARDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flowrl tr", "train"),
        ("flowrl train c.yaml rollout.window.si", "rollout.window.size="),
        ("flowrl methods flow_grpo_", "flow_grpo_fast"),
        ("flowrl eval run --reward scene_", "scene_strict"),
    ],
)
def test_tab_completion_knows_commands_keys_methods_and_rewards(words: str, expected: str) -> None:
    environment = os.environ | {"_FLOWRL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-m", "flowrl.cli"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [expected]
