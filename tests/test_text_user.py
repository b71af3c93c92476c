"""What a user meets around the training of language models: exports that load in plain transformers and peft, reports of answers, tables, messages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from language_models import build_language_model
from PIL import Image
from text_runs import text_config

from flowrl.checkpoint import load_policy
from flowrl.checks import check_run
from flowrl.cli import main
from flowrl.config import list_methods, load_config
from flowrl.exporting import _asked, export_run, text_snippet
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.policies.families import make_policy
from flowrl.report import write_report
from flowrl.run import train
from flowrl.run_records import load_run
from flowrl.types import Prompt, UserError

CPU = torch.device("cpu")
FAST = [
    "optimizer={eps: 0.01, learning_rate: 0.05}",
    "training={iterations: 3, checkpoint_every: 1, keep_checkpoints: 9}",
    "evaluation={every: 2, greedy: true, grid_images: 4, num_images: 4, final_num_images: 4}",
]


def make_text_run(folder: Path, *overrides: str) -> Path:
    text_config(folder)
    return train(text_config(folder, *FAST, f"rewards=['{folder / 'letters.py'}:Vowels']", *overrides))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose alpha is not its rank, so that a forgotten scale shows."""
    return make_text_run(tmp_path_factory.mktemp("lora"), "model={adapter: lora, lora: {rank: 4, alpha: 12}}", "ema={every: 1, decay: 0.5}")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_run(tmp_path_factory.mktemp("full"), "generation={max_new_tokens: 6, stop: ['z']}")


def tuned(run: Path) -> CausalLmPolicy:
    policy = make_policy(load_config(run / "config.yaml").model, CPU)
    load_policy(run, policy)
    return policy


def ours(policy: CausalLmPolicy, run: Path, prompt: str) -> str:
    """The likeliest answer."""
    config = load_config(run / "config.yaml")
    found = policy.generate(policy.encode([Prompt(prompt)]), [1], config.generation, [torch.Generator()], greedy=True)
    return found.texts[0]


def said_by(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a card's lines print in the export's folder."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(code, {})
    return capsys.readouterr().out.removesuffix("\n")


def snippet_of(card: Path) -> str:
    return card.read_text().split("```python\n")[1].split("\n```")[0]


# --- exports ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "merged", "network"])
def test_every_form_answers_as_the_run_does_in_plain_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    run = request.getfixturevalue("full_run" if form == "network" else "lora_run")
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--form", form]) == 0
    code, expected = snippet_of(tmp_path / "out" / "README.md"), ours(tuned(run), run, "one and two")
    assert repr("one and two") in code and "flowrl" not in code
    assert said_by(code, tmp_path / "out", monkeypatch, capsys) == expected
    assert expected != ours(make_policy(load_config(run / "config.yaml").model, CPU), run, "one and two")  # else weights that were never loaded would pass


def test_without_a_chat_template_and_with_sampling_the_snippet_runs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = build_language_model(tmp_path / "plain", template=False)
    config = text_config(tmp_path, f"model={{path: {folder}, adapter: full}}", "generation={top_p: 0.9, top_k: 5, min_p: 0.1, min_new_tokens: 2}")
    policy = make_policy(config.model, CPU)
    policy.export(tmp_path / "out")
    code = text_snippet(policy, config, "network", "float32", Prompt("five"))
    assert "top_p=0.9, top_k=5, min_p=0.1" in code and "min_new_tokens=2" in code and "apply_chat_template" not in code
    torch.manual_seed(0)
    assert said_by(code, tmp_path / "out", monkeypatch, capsys)


def test_a_snippet_asks_with_the_whole_conversation_as_evaluations_do(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "it's five"}]
    rows = [{"prompt": "six"}, {"messages": said}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = text_config(tmp_path, "model={adapter: full}", f"data.eval={{gone: {tmp_path / 'gone.jsonl'}, asked: {tmp_path / 'asked.jsonl'}}}")
    policy = make_policy(config.model, CPU)
    assert [_asked(config, text).metadata.get("messages") for text in ("six", "it's five", "new")] == [None, said, None]
    code = text_snippet(policy, config, "network", "float32", _asked(config, "it's five"))
    assert f"messages = {said!r}\n" in code


def test_a_snippet_finds_the_embedded_model_on_any_machine(tmp_path: Path) -> None:
    config = text_config(tmp_path, "model={path: 'flowrl:tiny-lm', adapter: lora}")
    code = text_snippet(make_policy(config.model, CPU), config, "lora", "float32", Prompt("five"))
    assert 'base = Path(flowrl.__file__).parent / "assets" / "tiny-lm"' in code
    compile(code, "card", "exec")


def test_the_card_of_a_language_model_speaks_of_answers(lora_run: Path, tmp_path: Path) -> None:
    export_run(lora_run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"lora", "peft", "grpo"} <= set(front["tags"]) and "diffusers" not in front["tags"]
    assert "A LoRA (rank 4) for `model` (language model), trained by" in text and "averaged over the training (EMA)" in text
    assert "| reward | prompts | base | tuned | change | answers |" in text and "at most 8 tokens,\nthe likeliest token each time" in text
    assert "Answers are text, so there is no picture of them." in text and "| prompt | before | after |" in text
    assert "| Answers | 36 (sampled and scored) |" in text and "| Network tokens | " in text and "diffusers 0" not in text
    first = json.loads((lora_run / "samples" / "iteration_000003" / "eval.jsonl").read_text().splitlines()[0])
    assert f"| {first['prompt']} |" in text
    with Image.open(tmp_path / "out" / "reward_curve.png") as picture:
        assert picture.width > 50
    assert not (tmp_path / "out" / "before_after.png").exists() and "](before_after" not in text
    for word in ("guidance", "start noise", "images"):
        assert word not in text.split("## Config")[0]
    assert not [line for line in text.splitlines() if line.endswith(" ")] and "\n\n\n" not in text


def test_a_card_of_a_run_without_records_says_so(lora_run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(lora_run, bare, ignore=shutil.ignore_patterns("evals.jsonl", "samples", "metrics.jsonl", "timings.jsonl"))
    export_run(bare, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "No curve: no reward curve can be drawn" in text and "No answers before and after training have been saved." in text
    assert repr("What is 2 + 3?") in snippet_of(tmp_path / "out" / "README.md")


def test_forms_that_do_not_fit_are_one_line(lora_run: Path, full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(run: Path, form: str) -> str:
        assert main(["export", str(run), "--out", str(tmp_path / "out"), "--form", form]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and not (tmp_path / "out").exists()
        return err

    assert "is a network and its tokenizer; use --form merged" in refused(lora_run, "pipeline")
    assert "is a network and its tokenizer; use --form network" in refused(full_run, "pipeline")
    assert "trained a language model; use --form merged" in refused(lora_run, "transformer")
    assert "trained a LoRA; use --form merged" in refused(lora_run, "network")
    assert "there is no LoRA; use --form network" in refused(full_run, "lora")


# --- reports and tables -------------------------------------------------------------------------------------------------------------------------


def test_the_report_shows_answers_and_speaks_of_them(lora_run: Path) -> None:
    text = write_report(lora_run).read_text()
    seen = text.split('<h2 id="results">')[1].split('<h2 id="details">')[0]
    assert "one and two" in seen and 'class="answer"' in seen and "<img" not in seen
    for part in ("Every answer could be scored", "equal rewards for all their answers", "Length of answers", "mean over the answers of an iteration"):
        assert part in seen
    for word in (" images", "guidance", "NFE", "noisiest"):
        assert word not in seen
    head = text.split('<h2 id="results">')[0]
    assert "Network tokens" in head and "3 prompts × 4 answers" in head and "at most 8 tokens" in head and "Guidance" not in head


def test_many_cut_answers_are_something_to_look_at(lora_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora_run, tmp_path / "run")
    lines = [json.loads(line) | {"answer/unfinished": 0.75} for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(check_run(load_run(run)))
    assert ("warn", "75% of the answers of the last iteration were cut at 8 tokens: raise generation.max_new_tokens, or shape their length.") in found


def test_evaluations_have_no_column_of_guidance(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(full_run), "--num-answers", "4"]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["prompts", "reward", "base", "tuned", "change", "answers"] and row.startswith("eval")
    assert main(["eval", str(full_run), "--guidance-scale", "2"]) == 2
    assert capsys.readouterr().err == "error: --guidance-scale: language models are sampled without guidance; leave it out\n"


def test_methods_are_listed_by_what_they_train_and_show_their_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    pictures, text = capsys.readouterr().out.split("Methods of language models (")
    known = {name: method.config.get("likelihood") == "token" for name, method in list_methods().items()}
    assert all((f"\n{name} " in text) == of_text and (f"\n{name} " in pictures) != of_text for name, of_text in known.items())
    assert main(["methods", "gspo"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "centre: group",
        "scale: group_std",
        "ratio: seq_mean",
        "objective: clipped_surrogate",
        "reduction: seq_mean",
        "credit: answer",
        "shaping: none",
    ):
        assert f"- {part}\n" in shown
    assert main(["methods", "dapo"]) == 0
    shown = capsys.readouterr().out
    assert "- shaping: overlong\n" in shown and "- allocation: dynamic\n" in shown


@pytest.mark.parametrize("name", list_methods())
def test_every_method_shows_its_parts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0
    assert "\nParts:\n- likelihood: " in capsys.readouterr().out


# --- mistakes -----------------------------------------------------------------------------------------------------------------------------------


def test_a_least_length_above_the_most_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        text_config(tmp_path, "generation={max_new_tokens: 8, min_new_tokens: 9}")
    assert str(error.value) == "generation.min_new_tokens: 9 is more than max_new_tokens, 8, so no answer could end; lower it, or raise max_new_tokens"
    text_config(tmp_path, "generation={max_new_tokens: 8, min_new_tokens: 8}")


def test_a_model_that_is_not_there_names_both_embedded_ones(tmp_path: Path) -> None:
    config = text_config(tmp_path, "model.path=/no/such/model")
    with pytest.raises(UserError, match=r"does not exist; give a folder, a hub id such as .*, flowrl:tiny-sd3 or flowrl:tiny-lm"):
        make_policy(config.model, CPU)
