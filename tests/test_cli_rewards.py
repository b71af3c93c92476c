"""flowrl/cli_rewards.py and flowrl/reward_facts.py: `flowrl rewards`, `flowrl score` and `flowrl serve-reward`."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from flowrl.cli import main
from flowrl.cli_parts import complete_reward
from flowrl.cli_rewards import _with_args
from flowrl.reward_facts import EXTRAS, every_reward, needs, range_of
from flowrl.types import UserError
from rewards import list_rewards
from rewards.plugins import BUILT_IN, GROUP
from rewards.table import REWARDS

ROOT = Path(__file__).parent.parent
OWN = '''
from flowrl.types import RewardInfo, UserError

def level(batch, scale: float = 1.0, *rest):
    """How bright."""
    return batch.images.mean((1, 2, 3)) * scale

def broken(batch):
    raise RuntimeError("planted")

class Measured:
    info = RewardInfo(
        "measured", "all facts", -1.0, 1.0, source="nobody", weights=("owner/name",), weights_license="MIT", parameters=2**29, direction="lower",
        reads=("images", "metadata"), metadata=("tag",), scope="group", extra="ocr", dtype="bfloat16", differentiable=True,
    )
    def __init__(self, model: str): self.model = model
    def load(self, device, dtype): ...
    def score(self, batch): ...
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file of rewards and three pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "planted_own", raising=False)
    (tmp_path / "planted_own.py").write_text(OWN)
    (tmp_path / "pictures").mkdir()
    for level in (0, 51, 255):
        Image.new("L", (4, 4), level).save(tmp_path / "pictures" / f"{level:03}.png")
    return tmp_path


@pytest.fixture
def plugin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with two plug-ins, one of which clashes with a built-in reward."""
    info = folder / "site" / "fake-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nshiny = fake_module:shiny\nink = fake_module:ink\n")
    monkeypatch.syspath_prepend(folder / "site")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2 and print nothing else."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


# --- flowrl rewards


def test_the_list_has_the_three_kinds_with_what_they_need(capsys: pytest.CaptureFixture[str], plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    built_in, plugins, own = re.split(r"\n\n(?:of installed plug-ins|in this folder, by the look of it):\n", output(capsys, "rewards"))
    assert re.search(r"^ocr +0 \.\. 1 .*\[ocr\]; weights ", built_in, re.MULTILINE)
    assert re.search(r"^jpeg_compressibility +-inf \.\. 0 ", built_in, re.MULTILINE)
    assert re.search(r"^shiny +fake 0\.1 +fake_module:shiny *$", plugins, re.MULTILINE)
    assert re.search(r"^ink +fake 0\.1 +fake_module:ink +is given by flowrl-diffusion and by fake 0\.1", plugins, re.MULTILINE)
    assert re.search(r"^planted_own:level +How bright\. *$", own, re.MULTILINE)
    assert "planted_own:Measured" in own
    assert "planted_own" not in sys.modules
    assert "fake_module" not in sys.modules


def test_a_narrow_terminal_keeps_names_whole(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert all(f"\n{name} " in f"\n{line} " for name, line in zip(REWARDS, lines_of_names(output(capsys, "rewards")), strict=True))


def lines_of_names(text: str) -> list[str]:
    lines = [line.split(" ")[0] for line in text.partition("in this folder")[0].splitlines()[1:] if line and not line.startswith(" ")]
    return [line for line in lines if line in REWARDS]


def test_the_list_as_json_has_every_fact(capsys: pytest.CaptureFixture[str], plugin: None) -> None:
    records = [json.loads(line) for line in output(capsys, "rewards", "--json").splitlines()]
    by_name = {record["name"]: record for record in records if record["origin"] == BUILT_IN}
    jpeg = by_name["jpeg_compressibility"]
    assert (jpeg["low"], jpeg["high"], jpeg["target"], jpeg["problem"]) == (None, 0.0, "rewards.jpeg:jpeg_compressibility", "")
    assert list(by_name) == list(REWARDS)
    assert {"name": "shiny", "target": "fake_module:shiny", "origin": "fake 0.1", "description": "", "problem": ""} in records
    assert [record["name"] for record in records if record["origin"] == "yours"] == ["planted_own:level", "planted_own:broken", "planted_own:Measured"]


def test_a_built_in_reward_that_cannot_be_imported_does_not_hide_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rewards.ink", None)
    by_name = {facts["name"]: facts for facts in every_reward(folder)}
    assert "importing module 'rewards.ink' failed" in by_name["ink"]["problem"] or "no module 'rewards.ink'" in by_name["ink"]["problem"]
    assert by_name["scene"]["problem"] == ""


def test_a_broken_built_in_reward_is_listed_with_the_reason(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rewards.ink", None)
    monkeypatch.setenv("COLUMNS", "200")
    assert re.search(r"^ink +reward 'ink': .*rewards\.ink", output(capsys, "rewards"), re.MULTILINE)


def test_show_prints_every_fact_and_the_arguments_of_a_built_in_reward(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "rewards", "show", "JPEG-compressibility", "--arg", "quality=50").splitlines()
    assert lines[0] == "jpeg_compressibility: minus the size in kB of the picture as a JPEG of quality 50"
    assert "  range       -inf .. 0, higher is better" in lines
    assert "  source      DDPO, arXiv:2305.13301" in lines
    assert "  from        built in, rewards.jpeg:jpeg_compressibility" in lines
    assert lines[-2:] == ["Arguments (`args` in a config, --arg in a shell):", "  quality: int = 95"]
    assert "  page        docs/rewards/jpeg_compressibility.md" in lines
    assert output(capsys, "rewards", "show", "scene_strict").endswith("  page        docs/rewards/scene.md\n\nIt takes no arguments.\n")


def test_an_installation_without_documentation_names_no_page(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.reward_facts._DOCS", tmp_path)
    assert "page" not in output(capsys, "rewards", "show", "ink")


def test_show_says_memory_licence_and_what_is_missing(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "ocr", ("onnxruntime", "a_package_that_is_missing"))
    assert output(capsys, "rewards", "show", "planted_own:Measured", "--arg", "model=x").splitlines() == [
        "planted_own:Measured: all facts",
        "  range       -1 .. 1, higher is better; the negative of the published measure, of which lower is better",
        "  reads       images, metadata; without tag in the metadata it cannot score",
        "  compares    all samples of a prompt together",
        "  gradient    yes",
        "  weights     owner/name",
        "  licence     MIT (of the weights)",
        "  parameters  536.9 million: 2.0 GiB in float32, 1.0 GiB in bfloat16",
        "  runs on     where the config says, in bfloat16 on an accelerator, 64 samples a call",
        "  needs       flowrl-diffusion[ocr] (not installed: a_package_that_is_missing)",
        "  source      nobody",
        "  from        your own",
        "",
        "Arguments (`args` in a config, --arg in a shell):",
        "  model: str (must be given)",
    ]
    monkeypatch.setitem(EXTRAS, "ocr", ("json",))
    assert "flowrl-diffusion[ocr] (installed)" in output(capsys, "rewards", "show", "planted_own:Measured", "--arg", "model=x")
    monkeypatch.delitem(EXTRAS, "ocr")
    assert "flowrl-diffusion[ocr]\n" in output(capsys, "rewards", "show", "planted_own:Measured", "--arg", "model=x")


def test_show_of_a_class_without_its_arguments_says_which(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = output(capsys, "rewards", "show", "planted_own:Measured")
    assert "its facts are known once it has its arguments, here --arg KEY=VALUE" in out
    assert "needs the argument 'model'" in out
    assert out.endswith("  model: str (must be given)\n")
    assert "has no argument 'modle'" in failure(capsys, "rewards", "show", "planted_own:Measured", "--arg", "modle=x")


def test_show_of_a_function_says_that_it_declares_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert output(capsys, "rewards", "show", "planted_own.py:level").splitlines() == [
        "planted_own.py:level: How bright.",
        "  facts       a plain function declares none",
        "  from        your own",
        "",
        "Arguments (`args` in a config, --arg in a shell):",
        "  scale: float = 1.0",
        "  *rest",
    ]


def test_show_of_a_plug_in_imports_it_and_names_its_distribution(
    capsys: pytest.CaptureFixture[str], plugin: None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "reward 'shiny' (plug-in of fake 0.1): no module 'fake_module'" in failure(capsys, "rewards", "show", "shiny")
    monkeypatch.setitem(sys.modules, "fake_module", SimpleNamespace(shiny=lambda batch: [1.0]))
    assert "  from        plug-in of fake 0.1, fake_module:shiny\n" in output(capsys, "rewards", "show", "Shiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "ocrr"], "error: unknown reward 'ocrr' (did you mean 'ocr'?); see `flowrl rewards`, or give your own as module:attribute"),
        (["show"], "error: Missing argument 'NAME' (see flowrl rewards show --help)"),
        (["shw"], "error: No such command 'shw'. Did you mean 'show'? (see flowrl rewards --help)"),
    ],
)
def test_mistakes_in_names_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert failure(capsys, "rewards", *arguments) == message


def test_names_are_completed(plugin: None) -> None:
    assert complete_reward("s") == ["scene", "scene_strict", "shiny"]


def test_what_a_reward_needs_in_a_few_words() -> None:
    nothing: dict[str, Any] = {"extra": "", "weights": [], "parameters": 0, "runs_on": "device", "metadata": [], "reads": ["images"], "scope": "sample"}
    assert needs(nothing) == ""
    everything = {"extra": "clip", "weights": ["a/b"], "parameters": 10**9, "runs_on": "network", "metadata": ["tag"], "reads": ["texts"], "scope": "group"}
    assert needs(everything) == "[clip]; weights 3.7 GiB; network; metadata tag; texts; whole groups"
    assert needs({**nothing, "weights": ["a/b"]}) == "weights"
    assert needs({**nothing, "weights": ["a/b"], "parameters": 5 * 2**20}) == "weights 20 MiB"
    assert range_of({"low": None, "high": None}) == "-inf .. inf"


def test_every_extra_that_a_reward_names_exists_and_is_looked_for() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {info.extra for info in list_rewards()} - {""}
    assert named <= EXTRAS.keys() <= declared.keys()


def test_the_index_of_rewards_has_each_with_its_page_range_and_extra() -> None:
    rows = dict(re.findall(r"^\| \[`([^`]+)`\]\((.*)$", (ROOT / "docs" / "rewards" / "README.md").read_text(), re.MULTILINE))
    assert rows.keys() == REWARDS.keys()
    for facts in every_reward(ROOT / "docs"):
        row = rows[facts["name"]]
        assert (ROOT / "docs" / "rewards" / row.partition(")")[0]).is_file(), facts["name"]
        if not facts["problem"]:  # of a reward without defaults nothing is known
            assert f"| {range_of(facts)} |" in row
            assert row.endswith(f"| `{facts['extra']}` |" if facts["extra"] else "| - |")


# --- flowrl score


def test_a_folder_is_scored_to_standard_output_and_a_summary_to_standard_error(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["score", "-r", "planted_own:level", "--arg", "scale=2", "pictures"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["file"], float(row["planted_own:level"]), row["valid"]) for row in rows] == [
        (str(Path("pictures", name)), pytest.approx(value), "true") for name, value in (("000.png", 0.0), ("051.png", 0.4), ("255.png", 2.0))
    ]
    assert re.search(r"^planted_own:level +3 +0 +0\.8 +0 +2 *$", err, re.MULTILINE)


def test_scores_go_to_a_file_and_the_summary_to_standard_output(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["score", "-r", "planted_own:level", "-r", "jpeg_compressibility", "--arg", "planted_own:level.scale=2", "--prompt", "a", "pictures"]
    out = output(capsys, *arguments, "--out", "s.jsonl")
    assert out.endswith("rows in s.jsonl\n")
    rows = [json.loads(line) for line in (folder / "s.jsonl").read_text().splitlines()]
    assert [row["planted_own:level"] for row in rows] == pytest.approx([0.0, 0.4, 2.0])
    assert all(row["jpeg_compressibility"] < 0 and row["jpeg_compressibility/bits_per_pixel"] > 0 and row["prompt"] == "a" for row in rows)
    summaries = [json.loads(line) for line in output(capsys, *arguments, "--out", "s.csv", "--json").splitlines()]
    assert [(summary["reward"], summary["scored"]) for summary in summaries] == [("planted_own:level", 3), ("jpeg_compressibility", 3)]
    assert len((folder / "s.csv").read_text().splitlines()) == 4


def test_json_rows_go_to_standard_output(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["score", "-r", "planted_own:level", "--json", "--dtype", "bfloat16", "--device", "cpu", "pictures"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["planted_own:level"] for line in out.splitlines()] == pytest.approx([0.0, 0.2, 1.0])
    assert json.loads(err)["scored"] == 3


def test_damaged_files_may_be_skipped(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "pictures" / "051.png").write_bytes(b"")
    assert failure(capsys, "score", "-r", "planted_own:level", "pictures").startswith(f"error: {Path('pictures', '051.png')}: is no PNG")
    out = output(capsys, "score", "-r", "planted_own:level", "--skip-damaged", "pictures")
    assert [row["planted_own:level"] for row in csv.DictReader(io.StringIO(out))] == ["0.0", "", "1.0"]


def test_texts_are_scored_with_their_prompts(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "words.py").write_text("def count(batch): return [float(len(text.split())) for text in batch.texts]\n")
    (folder / "t.jsonl").write_text('{"prompt": "a", "completion": "one two"}\n{"prompt": "b", "completion": ""}\n')
    out = output(capsys, "score", "-r", "words.py:count", "--texts", "t.jsonl", "--json")
    assert [(row["file"], row["words.py:count"]) for row in map(json.loads, out.splitlines())] == [("t.jsonl:1", 2.0), ("t.jsonl:2", 0.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures"], "give at least one --reward NAME; see `flowrl rewards`"),
        (["-r", "ocr"], "give either IMAGES or --texts FILE (see flowrl score --help)"),
        (["-r", "ocr", "pictures", "--texts", "t.jsonl"], "give either IMAGES or --texts FILE (see flowrl score --help)"),
        (["-r", "ocr", "--texts", "t.jsonl", "--prompt", "a"], "--texts has the prompts beside the texts; remove --prompt and --prompts"),
        (["-r", "ocr", "none"], "none: no such file or folder"),
        (["-r", "ocr", "."], ".: no pictures in this folder"),
        (["-r", "ocrr", "pictures"], "unknown reward 'ocrr' (did you mean 'ocr'?)"),
        (["-r", "planted_own:level", "--arg", "size=3", "pictures"], "reward 'planted_own:level' has no argument 'size'"),
        (["-r", "planted_own:level", "--prompts", "none.txt", "pictures"], "prompts none.txt: no such file"),
        (["-r", "planted_own:level", "--prompts", "one.txt", "pictures"], "prompts one.txt: 1 prompts for 3 pictures"),
        (["-r", "planted_own:level", "--out", "none/s.csv", "pictures"], "--out none/s.csv: cannot be written (No such file or directory)"),
        (["-r", "planted_own:level", "--out", "s.txt", "pictures"], "--out s.txt: give a name that ends in .csv or .jsonl"),
        (["-r", "planted_own:level", "--device", "gpu", "pictures"], "--device gpu: torch cannot use it ("),
        (["-r", "planted_own:level", "-r", "planted_own:level", "pictures"], "reward planted_own:level is listed 2 times"),
        (["-r", "pickscore", "pictures"], "reward pickscore reads the prompt; give --prompt TEXT or --prompts FILE"),
        (["-r", "planted_own:broken", "pictures"], "reward planted_own:broken failed on the prompt '': RuntimeError: planted;"),
        (["-r", "ocr", "--batch-size", "0", "pictures"], "Invalid value for '--batch-size'"),
        (["-r", "ocr", "--dtype", "int8", "pictures"], "Invalid value for '--dtype'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str], message: str) -> None:
    (folder / "one.txt").write_text("a\n")
    before = {path.name for path in folder.iterdir()} | {"__pycache__"}
    assert failure(capsys, "score", *arguments).startswith(f"error: {message}")
    assert {path.name for path in folder.iterdir()} <= before


def test_ctrl_c_keeps_the_rows_and_ends_with_130(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "stops.py").write_text("def f(batch, seen=[]):\n    seen.append(1)\n    if len(seen) > 2: raise KeyboardInterrupt\n    return [1.0]\n")
    assert main(["score", "-r", "stops.py:f", "--batch-size", "1", "--out", "s.csv", "pictures"]) == 130
    assert len((folder / "s.csv").read_text().splitlines()) == 3  # the head, and the two that were done
    assert capsys.readouterr().err == "error: stopped; the rows that were done are in s.csv\n"


# --- arguments of rewards


def test_arguments_are_yaml_and_go_to_the_reward_that_they_name() -> None:
    assert _with_args(["a"], None) == [("a", {})]
    assert _with_args(["a"], ["x=1", "y=[1, b]", "z=", "name=a=b"]) == [("a", {"x": 1, "y": [1, "b"], "z": None, "name": "a=b"})]
    assert _with_args(["hpsv2", "hpsv2.1"], ["hpsv2.1.x=1", "hpsv2.x=true"]) == [("hpsv2", {"x": True}), ("hpsv2.1", {"x": 1})]
    assert _with_args(["a"], ["a.x=1"]) == [("a", {"x": 1})]


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["a"], ["x"], r"^--arg x: write KEY=VALUE$"),
        (["a"], ["b.x=1"], r"^--arg b\.x=1: write KEY=VALUE$"),
        (["a"], ["x=1", "x=2"], r"^--arg x=2: x is given twice$"),
        (["a"], ["x=[1"], r"^--arg x=\[1: the value is no YAML \(.*\)$"),
        (["a", "b"], ["x=1"], r"^--arg x=1: say which reward it is for: --arg a\.x=1$"),
    ],
)
def test_arguments_that_cannot_be_read_are_explained(names: list[str], given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _with_args(names, given)


# --- flowrl serve-reward


def test_serve_reward_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "flowrl.serving", SimpleNamespace(serve_reward=lambda *args, **options: calls.append((args, options))))
    assert main(["serve-reward", "scene", "--arg", "form=strict", "--port", "0", "--token-env", "TOKEN", "--max-wait-ms", "2.5", "--device", "cpu"]) == 0
    ((args, options),) = calls
    assert args == ("scene", {"form": "strict"})
    assert options == {
        "host": "127.0.0.1",
        "port": 0,
        "device": "cpu",
        "dtype": None,
        "token_env": "TOKEN",
        "max_batch": 64,
        "max_wait_ms": 2.5,
        "max_body_mib": 64.0,
        "max_queue": 64,
        "open_to_all": False,
    }


def test_serve_reward_refuses_numbers_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "serve-reward", "scene", "--port", "70000").startswith("error: Invalid value for '--port'")
