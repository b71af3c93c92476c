"""Bad input of a run of a language model: one clear line and nothing written, or a skip that the run counts and shows; and settings that change nothing."""

from __future__ import annotations

import itertools
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import CONTEXT, build_language_model
from text_runs import text_config

from flowrl.agreement import settings_without_effect
from flowrl.cli import main
from flowrl.config import dump_config, load_config
from flowrl.medium_agreement import medium_of
from flowrl.policies.causal_lm import CausalLmPolicy
from flowrl.sections import ModelConfig
from flowrl.stated import asked
from flowrl.types import UserError
from rewards import sandbox

Capture = pytest.CaptureFixture[str]
TINY = Path(__file__).parent.parent / "configs" / "tiny_text.yaml"
PICTURES = Path(__file__).parent.parent / "configs" / "tiny_flow_grpo.yaml"
REWARDS = '''
import math
import torch
from flowrl.types import RewardInfo, Scores

class Unbounded:
    """The number of letters."""
    info = RewardInfo(name="unbounded", description="letters", low=-math.inf, high=math.inf, reads=("texts",))

    def load(self, device, dtype):
        pass

    def score(self, batch):
        return Scores(torch.tensor([float(len(text)) for text in batch.texts]), torch.ones(len(batch.texts), dtype=torch.bool))

class Solved(Unbounded):
    """Every answer to the second prompt is right, every other answer to the first one."""
    info = RewardInfo(name="solved", description="right or wrong", low=0.0, high=1.0, reads=("texts",))

    def score(self, batch):
        values = [float(prompt.text == "five" or place % 2) for place, prompt in enumerate(batch.prompts)]
        return Scores(torch.tensor(values), torch.ones(len(values), dtype=torch.bool))

class Broken(Unbounded):
    def score(self, batch):
        raise RuntimeError("the judge is not in")
'''
VERIFIER = """
import os, time

def judge(gold, completion):
    kind = sum(completion.encode()) % 4
    if kind == 0:
        time.sleep(60)
    if kind == 1:
        os._exit(3)
    return "right" if kind == 2 else "wrong"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a random Llama, prompts with an answer, and rewards; on sys.path."""
    folder = tmp_path_factory.mktemp("bad_input")
    text_config(folder)
    (folder / "strange.py").write_text(REWARDS)
    (folder / "problems.jsonl").write_text("".join(json.dumps({"prompt": text, "answer": "7"}) + "\n" for text in ("one", "two", "three")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: Capture) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """(*overrides) -> the metrics of a finished run, and what it said."""

    def start(*overrides: str) -> tuple[list[dict[str, Any]], str]:
        assert main(["train", str(folder / "run.yaml"), f"run_dir={tmp_path / 'run'}", *overrides]) == 0
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()], capsys.readouterr().err

    return start


@pytest.fixture
def refusal(folder: Path, tmp_path: Path, capsys: Capture) -> Callable[..., str]:
    """(*overrides) -> the one line with which a run ends before it has begun."""

    def start(*overrides: str) -> str:
        capsys.readouterr()
        assert main(["train", str(folder / "run.yaml"), f"run_dir={tmp_path / 'run'}", *overrides]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert not (tmp_path / "run").exists()
        return line.removeprefix("error: ")

    return start


# --- the tokenizer and the context --------------------------------------------------------------------------------------------------------------


def test_without_a_pad_token_a_run_is_what_it_is_with_one(run: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    usual, _ = run("training.iterations=1")
    assert "no padding token" not in caplog.text
    (tmp_path / "run").rename(tmp_path / "usual")
    bare, _ = run("training.iterations=1", f"model.path={build_language_model(folder / 'bare', pad=False)}")
    assert "no padding token" in caplog.text
    for name in ("reward/total/mean", "answer/length", "tokens/sampled", "nfe/used", "grad_norm"):
        assert bare[0][name] == pytest.approx(usual[0][name]), name


def test_without_an_end_token_a_run_needs_a_stop_text_and_shows_that_answers_are_cut(run: Any, refusal: Any, folder: Path) -> None:
    model = f"model.path={build_language_model(folder / 'endless', end=False)}"
    line = refusal(model)
    assert line == f"generation.stop: the tokenizer of {folder / 'endless'} has no end token, so that nothing would end an answer; give a text"
    (metrics, _), _ = run(model, "generation.stop=['@@']")  # a text that never comes
    assert (metrics["answer/unfinished"], metrics["answer/length"]) == (1.0, 8.0)


@pytest.mark.parametrize("key", ["data.train", "data.eval.eval"])
def test_a_prompt_longer_than_the_context_is_named_before_the_run_begins(refusal: Any, tmp_path: Path, key: str) -> None:
    (tmp_path / "long.txt").write_text("short\n" + "x" * 90 + "\n")
    line = refusal(f"{key}={tmp_path / 'long.txt'}")
    assert line.startswith("prompt 2 ('xxx") and line.endswith(
        f"has 93 tokens, and the model's context is {CONTEXT} less generation.max_new_tokens, 8; shorten one of them"
    )


def test_answers_longer_than_the_context_are_refused(refusal: Any) -> None:
    line = f"generation.max_new_tokens: {CONTEXT} leave no room for a prompt in the model's context of {CONTEXT} tokens"
    assert refusal(f"generation.max_new_tokens={CONTEXT}") == line


# --- answers and groups that teach nothing ------------------------------------------------------------------------------------------------------


def always_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token is all that a model says."""
    usual = CausalLmPolicy.next_logits

    def next_logits(self: CausalLmPolicy, *args: Any) -> torch.Tensor:
        logits = usual(self, *args)
        logits[:, list(self.ends)] += 1e4
        return logits

    monkeypatch.setattr(CausalLmPolicy, "next_logits", next_logits)


@pytest.mark.parametrize("reward", ["letters:Vowels", "exact_match", "arithmetic"])
def test_answers_without_a_word_are_wrong_and_not_invalid(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, reward: str) -> None:
    always_ends(monkeypatch)
    data = f"data={{train: {folder / 'problems.jsonl'}, eval: {{eval: {folder / 'problems.jsonl'}}}}}"
    found, _ = run(f"rewards=['{reward}']", data, "training.iterations=1")
    assert (found[0]["answer/length"], found[0]["answer/unfinished"], found[0]["answer/empty"]) == (1.0, 0.0, 12)
    assert (found[0]["reward/total/mean"], found[0]["reward/invalid"], found[0]["reward/zero_std_groups"]) == (0.0, 0, 3)


def test_pairs_of_answers_without_a_word_are_none(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always_ends(monkeypatch)
    found, _ = run("method=dpo", "rollout={groups_per_iteration: 3, group_size: 4}", "training.iterations=1")
    assert (found[0]["pair/count"], found[0]["updates"], found[0]["grad_norm"]) == (0, 0, 0.0)


def test_an_iteration_whose_rows_are_all_masked_makes_no_update(run: Any, folder: Path) -> None:
    """Every answer is cut, and cut answers are left out."""
    endless = ["generation.stop=['@@']", f"model.path={build_language_model(folder / 'never', end=False)}"]
    found, _ = run(*endless, "tokens.weights=[overlong_filter]")
    assert [(m["updates"], m["loss"], m["grad_norm"], m["answer/unfinished"], m["answer/trained"]) for m in found] == [(0, 0.0, 0.0, 1.0, 0.0)] * 2
    assert all(m["nfe/used"] == m["nfe/minimum"] for m in found)


def test_groups_of_one_answer_are_counted_and_teach_nothing(run: Any, folder: Path) -> None:
    """One of two prompts is always solved, so the knapsack leaves it one answer of eight."""
    (folder / "two.txt").write_text("one and two\nfive\n")
    prompts = [f"data.train={folder / 'two.txt'}", "rollout={groups_per_iteration: 2, group_size: 4}", "training.iterations=2"]
    found, _ = run("allocation={name: knapsack, args: {least: 1, most: 7, warmup: 0}}", "rewards=['strange:Solved']", *prompts)
    assert [m["groups/singletons"] for m in found] == [0, 1]
    assert found[1]["grad_norm"] > 0 and found[1]["nfe/used"] == found[1]["nfe/minimum"]


def test_a_group_of_one_is_refused_where_it_is_compared(refusal: Any) -> None:
    line = "advantage.centre: group compares the answers of a group, and rollout.group_size is 1; use batch or ema, or larger groups"
    assert refusal("rollout.group_size=1") == line


# --- rewards ------------------------------------------------------------------------------------------------------------------------------------


def test_a_beta_of_rewards_without_bounds_is_refused(refusal: Any) -> None:
    line = "advantage.scale: beta takes rewards as success rates, and these rewards have no lowest and highest value; use another scale"
    assert refusal("method=bnpo", "rewards=['strange:Unbounded']") == line


def test_a_verifier_that_hangs_or_crashes_ends_the_run_or_is_counted(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "math_verifier.py").write_text(VERIFIER)
    monkeypatch.setattr("rewards.math_equivalence.__file__", str(tmp_path / "math_equivalence.py"))
    settings = ["rewards=[{name: math, args: {timeout_s: 0.5}}]", "evaluation.rewards=['letters:Vowels']", "training.iterations=1"]
    settings += [f"data.train={folder / 'problems.jsonl'}"]
    assert main(["train", str(folder / "run.yaml"), f"run_dir={tmp_path / 'stopped'}", *settings]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "samples of iteration 1 could not be scored, more than training.max_invalid_share = 0.05 allows" in line
    assert "timed out after 0.5 s" in line or "the worker process ended with code 3" in line
    found, _ = run(*settings, "training.max_invalid_share=1")
    lost = found[0]["reward/invalid"]
    assert 0 < lost < 12 and found[0]["answer/trained"] == pytest.approx(1 - lost / 12)


def test_a_reward_that_raises_ends_the_run_and_says_what_it_said(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    settings = ["rewards=['strange:Broken']", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", str(folder / "run.yaml"), *settings]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "strange:Broken" in line and "the judge is not in" in line


# --- programs that a model wrote ----------------------------------------------------------------------------------------------------------------


def test_programs_that_want_files_the_network_or_processes_fail_and_are_counted(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.txt").write_text("open sesame")
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "say it", "tests": ["assert say() == 'open sesame'"]}) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        bodies = [
            "def say(): return 'open ' + 'sesame'",
            f"def say(): return open({str(tmp_path / 'secret.txt')!r}).read()",
            f"import socket\ndef say():\n    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)\n    return 'open sesame'",
            "import subprocess\ndef say(): return subprocess.check_output(['echo', '-n', 'open sesame'], text=True)",
        ]
        programs = itertools.cycle([f"```python\n{body}\n```" for body in bodies])
        monkeypatch.setattr(CausalLmPolicy, "decode", lambda self, tokens: [next(programs) for _ in tokens])
        code = ["rewards=[{name: code_tests, args: {allow_unsafe: true}}]", f"data.train={tmp_path / 'tasks.jsonl'}", "evaluation.rewards=['letters:Vowels']"]
        found, _ = run(*code, "rollout={groups_per_iteration: 1, group_size: 4}", "training.iterations=1")
        with pytest.raises(TimeoutError):
            server.accept()
    metrics = {name: found[0][f"reward/code_tests/{name}"] for name in ("mean", "code_tests_code_found", "code_tests_refused")}
    assert metrics == {"mean": 0.25, "code_tests_code_found": 1.0, "code_tests_refused": 0.75}
    assert (found[0]["reward/invalid"], found[0]["answer/trained"]) == (0, 1.0)


def test_what_the_sandbox_refuses_is_told_once_and_honest_programs_are_not_accused() -> None:
    confine = sandbox.probe() is None

    def refused(code: str) -> bool:
        reply = sandbox.run_tests(code, [["assert f() == 1", True]], 10.0, 512, confine=confine)
        assert reply["problem"] is None and reply["ended"] == "done"
        return bool(reply["refused"])

    assert refused("def f():\n    for _ in range(30000):\n        try: open('/etc/passwd')\n        except OSError: pass\n    return 1")
    assert refused("import os\ndef f(): return os.listdir('/') and 1")
    assert not refused("def f(): return 2")  # wrong, and nothing else
    honest = "import asyncio, collections, dataclasses, json, random, re, tempfile, typing, uuid\n"
    honest += "P = collections.namedtuple('P', 'x')\ndef f():\n    open('note', 'w').write('1')\n    return P(int(open('note').read())).x"
    assert not refused(honest)


# --- mistakes of a new user ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["objective.args.tau=1"], "objective.args: clipped_surrogate takes no arguments beside the keys of the section; remove tau"),
        (
            ["method=sapo", "objective.args.temperature_positve=1"],
            "objective.args: sapo takes temperature_positive, temperature_negative, not temperature_positve; did you mean temperature_positive?",
        ),
        (["rewards=[arithmetic]"], "reward arithmetic needs `answer` in the metadata of every prompt; 4 of 4 prompts lack it, the first is 'one and two'"),
        (["rewards=[episode]"], "rewards: episode is what an environment gives, and there is none; set environment, or choose another reward"),
        (["environment={max_turns: 3}"], "environment.name: missing; give an environment of flowrl, module:attribute, or path/to/file.py:attribute"),
        (
            ["rewards=[aesthetic]"],
            "reward aesthetic judges pictures, and a language model answers in text; choose another one from `flowrl rewards` (one of your own says `reads` in "
            "its info)",
        ),
        (["method=grppo"], "method: unknown method grppo; did you mean grpo?"),
    ],
)
def test_a_likely_mistake_is_one_line(refusal: Any, overrides: list[str], line: str) -> None:
    assert refusal(*overrides) == line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"instruction": "1+1?", "answer": "2"}, "line 1 needs a non-empty text under `prompt`"),
        ({"prompt": "1+1?", "answer": ""}, "the prompt '1+1?' has the metadata answer ''; give a text that is not empty, or a number"),
    ],
)
def test_a_wrong_column_is_named(refusal: Any, tmp_path: Path, content: dict[str, str], said: str) -> None:
    (tmp_path / "wrong.jsonl").write_text(json.dumps(content) + "\n")
    assert said in refusal(f"data.train={tmp_path / 'wrong.jsonl'}", "rewards=[exact_match]")


def test_pairs_that_prefer_nothing_are_named(refusal: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1?", "chosen": "2", "rejected": " 2"}\n')
    line = refusal("method=dpo", f"data.pairs={tmp_path / 'pairs.jsonl'}", "rollout.group_size=2")
    assert line.endswith("pairs.jsonl: line 1: the chosen and the rejected answer are the same; remove the pair")


# --- pictures and text --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "override", "line"),
    [
        (
            PICTURES,
            "method=dpo",
            "method: dpo trains language models, and model.path: flowrl:tiny-sd3 is an image generator; use flow_dpo, or a language model such as "
            "flowrl:tiny-lm",
        ),
        (
            PICTURES,
            "method=rloo",
            "method: rloo trains language models, and model.path: flowrl:tiny-sd3 is an image generator; use flow_grpo, or a language model such as "
            "flowrl:tiny-lm",
        ),
        (
            TINY,
            "method=flow_grpo",
            "method: flow_grpo trains image generators, and model.path: flowrl:tiny-lm is a language model; use grpo, or an image generator such as "
            "flowrl:tiny-sd3",
        ),
        (
            TINY,
            "method=flow_ipo",
            "method: flow_ipo trains image generators, and model.path: flowrl:tiny-lm is a language model; use ipo, or an image generator such as "
            "flowrl:tiny-sd3",
        ),
        (
            TINY,
            "likelihood=matching",
            "likelihood: matching belongs to image generators, and model.path: flowrl:tiny-lm is a language model; set likelihood: token",
        ),
        (
            PICTURES,
            "likelihood=token",
            "likelihood: token belongs to language models, and model.path: flowrl:tiny-sd3 is an image generator; set likelihood: transition or matching",
        ),
    ],
)
def test_a_method_of_the_other_medium_is_one_line(file: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(file, [override])
    assert str(error.value) == line


def test_what_a_model_makes_is_seen_where_its_files_are(folder: Path, pipeline: Path) -> None:
    assert medium_of(ModelConfig(path=str(folder / "model"))) == "text"
    assert medium_of(ModelConfig(path=str(pipeline))) == "pictures"
    assert medium_of(ModelConfig(path="somebody/something")) is None
    assert medium_of(ModelConfig(path="somebody/something", family="causal_lm")) == "text"
    assert medium_of(ModelConfig(path="somebody/something", family="sd3")) == "pictures"
    with pytest.raises(UserError, match=r"(?m)^kl.form: v_mse compares velocities"):  # a hub id may be anything: then the sections speak
        load_config(PICTURES, ["method=grpo", "model.path=somebody/something", "kl={weight: 1, form: v_mse}"])


def test_a_method_or_a_reward_of_text_is_refused_with_the_default_model(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"run_dir: {tmp_path / 'run'}\nrewards: [ink]\n")
    for override, line in (
        (
            "method=grpo",
            "likelihood: token belongs to language models, and flowrl:tiny-sd3 is an image generator; set likelihood: transition or matching, or another "
            "model.path",
        ),
        (
            "rewards=[length]",
            "reward length judges texts, and an image generator makes pictures; choose another one from `flowrl rewards` (one of your own says `reads` in its "
            "info)",
        ),
    ):
        assert main(["train", str(file), override]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {line}"
    assert not (tmp_path / "run").exists()


# --- settings without effect --------------------------------------------------------------------------------------------------------------------

ALONE = "leave it out"
NO_WEIGHTS = "has no effect with importance weights off; set generation.importance: truncated or masked"
PAIRS = ("method=p3o", "data.pairs=pairs.jsonl", "rollout.group_size=2")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["tokens.weights=[fresh]"], f"tokens.weights: fresh leaves out tokens of earlier iterations, and without partial there are none; {ALONE}"),
        (["evaluation.num_steps=5"], f"evaluation.num_steps: it belongs to models of pictures; with likelihood: token {ALONE}"),
        (["evaluation.guidance_scale=2"], f"evaluation.guidance_scale: it belongs to models of pictures; with likelihood: token {ALONE}"),
        (["training.offload_rollouts=true"], f"training.offload_rollouts: it belongs to models of pictures; with likelihood: token {ALONE}"),
        (["method=dpo", "pairing.levels=[1]"], "pairing.levels: the rule best_worst has none; use rule: levels"),
        (["method=dpo", "pairing.revision=Again."], f"pairing.revision: dpo lets nobody improve a draft; {ALONE}"),
        (
            ["method=self_improving_rpo", "pairing.revision=Again.", "objective.args.alpha=1"],
            f"pairing.revision: with alpha: 1 srpo lets nobody improve a draft; {ALONE}",
        ),
        ([*PAIRS, "pairing.cap=2"], f"pairing.cap: it says which answers of a group become pairs, and stored pairs are what they are; {ALONE}"),
        ([*PAIRS, "pairing.rule=all"], f"pairing.rule: it says which answers of a group become pairs, and stored pairs are what they are; {ALONE}"),
        (["method=dpo", "shaping=[novelty]"], f"shaping: novelty changes advantages, which objective dpo does not use; {ALONE}"),
        (["entropy.args.step=1"], "entropy.args: step belong to target or band, and there is neither; leave them out"),
        (["entropy.band=1"], "entropy.band: it is multiplied with entropy.weight, which is 0; set a weight above 0"),
        (["pairing.rule=all"], "pairing.rule: clipped_surrogate compares no pairs; leave it out, or use an objective of pairs, such as dpo"),
    ],
)
def test_a_value_that_was_meant_for_another_run_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TINY, overrides)
    assert str(error.value) == line


@pytest.mark.parametrize(
    "overrides",
    [
        ["generation={importance: masked, importance_high: 3, importance_level: sequence}"],
        ["generation={engine: vllm, importance_high: 3}"],
        ["old_policy={rollout: true}"],
        ["method=bapo", "objective={updates_per_iteration: 1, inner_epochs: 2}"],
        ["method=bapo", "objective.updates_per_iteration=1", "old_policy={rollout: true}"],
        ["method=t_ppo", "partial.window=16"],
        ["method=dpo", "pairing={rule: levels, levels: [1]}"],
        ["method=dpo", "pairing={rule: all, cap: 2}"],
        ["method=self_improving_rpo", "pairing.revision=Again."],
        [*PAIRS],
        ["method=p3o", "rollout.group_size=4", "pairing.rule=all"],
        ["method=dpo", "shaping=[win_rate]"],
    ],
)
def test_the_same_values_are_taken_where_they_act(overrides: list[str]) -> None:
    assert list(settings_without_effect(load_config(TINY, overrides))) == []


def test_greedy_evaluation_is_of_language_models() -> None:
    with pytest.raises(UserError, match=r"^evaluation.greedy: it belongs to language models; with likelihood: transition leave it out$"):
        load_config(PICTURES, ["evaluation.greedy=true"])


ONE_UPDATE = "one update per iteration, whose ratios are all 1"
ONLY_SHOWN = "rewards: arithmetic trains nothing with token_credit: turns, which reads what the environment gives for each turn; it is only shown"
COMPARED = "compares the rewards of two answers"


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["generation.importance_high=3"], [f"generation.importance_high {NO_WEIGHTS}"]),
        (["generation={importance: none, engine: vllm, importance_level: sequence}"], [f"generation.importance_level {NO_WEIGHTS}"]),
        (["old_policy={rollout: false}"], ["old_policy is kept and never used; set old_policy.rollout: true or anchor.weight, or old_policy: null"]),
        (
            ["method=bapo", "objective.updates_per_iteration=1"],
            ["objective.updates_per_iteration: with 1 every ratio is 1, and the bounds that bapo searches never act; use at least 2, or clipped_surrogate"],
        ),
        (["method=dpo", "pairing.cap=2"], ["pairing.cap has no effect with rule best_worst, which makes at most one pair of a group"]),
        (["method=ipo", "pairing={rule: best_random, cap: 2}"], ["pairing.cap has no effect with rule best_random, which makes at most one pair of a group"]),
        (["method=dpo", "advantage.scale=group_std"], [f"advantage.scale has no effect with objective dpo, which {COMPARED}"]),
        (["method=ipo", "advantage.clip=3"], [f"advantage.clip has no effect with objective ipo, which {COMPARED}"]),
        (["method=simpo", "objective.clip_low=0.2"], ["objective.clip_low has no effect with simpo, which has no clip"]),
        (["objective.clip_high=0.28"], [f"objective.clip_high has no effect with {ONE_UPDATE}"]),
        (["objective={clip_high: 0.28, updates_per_iteration: 2}"], []),
        (["objective={clip_high: 0.28, inner_epochs: 2}"], []),
        (["objective.clip_high=0.28", "old_policy={rollout: true}"], []),
        (["kl.form=k2"], ["kl.form has no effect with kl.weight 0"]),
        (["kl.form=k3"], []),  # as the method has it
        (["kl={form: k2, weight: 0.1}"], []),
        (["method=nash_mp", "kl={form: k3, weight: 0}"], []),  # the anchor's distance is measured so
        (["kl.place=reward"], ["kl.place has no effect with kl.weight 0"]),
        (
            ["kl={weight: 0.1, place: reward, form: k2}", "shaping=[kl_price]"],
            ["kl.form has no effect with place reward, where the price of a token is its log-ratio, k1"],
        ),
        (["kl={weight: 0.1, place: reward}", "shaping=[kl_price]"], []),
        (
            ["method=tgdpo", "pairing.guide.alpha=0.9"],
            ["pairing.guide has no effect without pairing.guide.path: to the model itself all tokens weigh 1"],
        ),
        (["method=tgdpo", "pairing.guide={alpha: 0.9, path: guide}"], []),
        (["method=tgdpo"], []),
        (["method=t_ppo"], ["partial.window: 8192 is not below generation.max_new_tokens, 48, so no answer goes on in another iteration"]),
        (["tree.segment=48"], ["tree.segment: 48 is not below generation.max_new_tokens, 48, so answers fork at the prompt alone"]),
        (["tree.segment=47"], []),
        (["environment={name: guess}"], ["environment: what guess gives for an episode has no effect unless `rewards` lists episode"]),
        (["environment={name: guess}", "rewards=[episode]"], []),
        (["method=gigpo"], []),  # which reads what each step gave
        (["method=igpo"], []),  # which reads how much likelier the right answer becomes
        (["method=salt"], ["environment: what calculator gives for an episode has no effect unless `rewards` lists episode"]),
        (["method=step_grpo"], [ONLY_SHOWN]),
        (["method=step_grpo", "rewards=[episode, arithmetic]"], [ONLY_SHOWN]),
        (["method=step_grpo", "rewards=[episode, {name: arithmetic, weight: 0}]"], []),
        (["method=step_grpo", "rewards=[episode]"], []),
    ],
)
def test_settings_that_change_nothing_are_named(overrides: list[str], lines: list[str]) -> None:
    assert list(settings_without_effect(load_config(TINY, overrides))) == lines


def test_the_config_that_a_run_keeps_asks_for_no_more_than_its_file(tmp_path: Path) -> None:
    config = load_config(TINY, ["method=p3o", "advantage.clip=3", "pairing.skip_shared=true"])
    assert (asked(config, "advantage"), asked(config, "pairing"), asked(config, "kl")) == ({"clip"}, {"skip_shared"}, frozenset())
    (tmp_path / "config.yaml").write_text(dump_config(config))
    kept = load_config(tmp_path / "config.yaml")
    assert kept == config and list(settings_without_effect(kept)) == list(settings_without_effect(config))


def test_a_run_shows_what_changes_nothing(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    run("objective.clip_high=0.28", "training.iterations=1")
    assert f"objective.clip_high has no effect with {ONE_UPDATE}" in caplog.text
