"""`flowrl estimate` of language models: tokens are upper bounds, and what a run uses where every answer has the length that is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from language_models import PROMPTS, build_language_model, make_policy
from loading import load_script
from text_runs import text_config

from flowrl.cli import main
from flowrl.config import Config
from flowrl.estimate import Spread
from flowrl.memory_estimate import estimate_memory
from flowrl.policies.prompt_lengths import prompt_lengths
from flowrl.text_estimate import estimate_text, token_lines, uncounted
from flowrl.trainer import Trainer
from flowrl.types import UserError

WHOLE = "generation={max_new_tokens: 8, min_new_tokens: 8}"


def config_of(folder: Path, *overrides: str) -> Config:
    text_config(folder)
    return text_config(folder, f"rewards=['{folder / 'letters.py'}:Vowels']", *overrides)


CASES = {
    "one update": [],
    "three updates": ["objective={updates_per_iteration: 3}"],
    "two epochs of two updates": ["objective={updates_per_iteration: 2, inner_epochs: 2}"],
    "a reference": ["kl={weight: 0.05, form: k3}", "objective.updates_per_iteration=2"],
    "log-probabilities of all": ["kl={weight: 0.05, form: k1, place: reward}", "token_credit={name: token_returns}", "objective.updates_per_iteration=2"],
    "values": ["method=ppo"],
    "an old policy that samples": ["old_policy={rollout: true, every: 2, decay_slope: 0.0}"],
    "whole groups": ["method=gvpo", "objective.updates_per_iteration=2"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_a_run_whose_answers_are_whole(tmp_path: Path, case: str) -> None:
    config = config_of(tmp_path, WHOLE, *CASES[case])
    expected, trainer = estimate_text(config), Trainer(config)
    used = [trainer.iterate(iteration)[0] for iteration in (1, 2)]
    assert expected.not_counted == ""
    assert expected.forward == Spread.of(row["nfe/forward"] for row in used)
    assert expected.backward == Spread.of(row["nfe/backward"] for row in used)
    assert (expected.run_forward or 0) + (expected.run_backward or 0) == used[-1]["nfe/total"]
    assert expected.answers * 2 == used[-1]["answers"]


def test_the_tokens_of_grpo_by_hand(tmp_path: Path) -> None:
    """One prompt of n tokens, 4 answers of 8: n + 4 * 7 to sample, 4 (n + 7) forward and backward."""
    config = config_of(tmp_path, "rollout={groups_per_iteration: 1, group_size: 4}", "training.iterations=1")
    expected = estimate_text(config)
    n = expected.prompt_tokens.mean
    assert expected.rollout is not None and expected.forward is not None and expected.backward is not None
    assert (expected.rollout.mean, expected.forward.mean, expected.backward.mean) == (n + 28, n + 28 + 4 * (n + 7), 4 * (n + 7))
    assert expected.evaluation_answers == 2 * 4


def test_answers_that_end_earlier_take_fewer(tmp_path: Path) -> None:
    config = config_of(tmp_path, "generation={max_new_tokens: 30, stop: [e, t, a]}")
    expected, metrics = estimate_text(config), Trainer(config).iterate(1)[0]
    assert expected.forward is not None and metrics["nfe/forward"] < expected.forward.least


@pytest.mark.parametrize("template", [True, False])
def test_prompts_have_the_lengths_that_the_policy_sees(tmp_path: Path, template: bool) -> None:
    folder = build_language_model(tmp_path / "model", template=template)
    assert prompt_lengths(str(folder), PROMPTS) == [len(tokens) for tokens in make_policy(folder).encode(PROMPTS)]
    assert prompt_lengths(str(folder), []) == []


def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.path: the tokenizer of .* could not be loaded"):
        prompt_lengths(str(tmp_path / "empty"), PROMPTS)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method=dapo", "objective.updates_per_iteration=1"], "allocation: dynamic decides by the rewards what is sampled and trained"),
        (["method=tree_po"], "tree: "),
        (["method=dpo"], "objective.name: dpo trains the pairs that rewards make"),
        (["method=gigpo", "environment={name: guess}", "rewards=[episode]"], "environment: "),
        (["method=rloo"], ""),
    ],
)
def test_what_does_not_follow_from_a_config_is_said(tmp_path: Path, overrides: list[str], reason: str) -> None:
    config = config_of(tmp_path, *overrides)
    assert uncounted(config).startswith(reason) and bool(uncounted(config)) == bool(reason)
    assert (estimate_text(config).forward is None) == bool(reason)


@pytest.mark.parametrize(
    ("overrides", "answers", "notes"),
    [
        (["method=dapo", "objective.updates_per_iteration=1"], None, ["-: how many answers are sampled and scored is decided on the way"]),
        (["method=spo"], None, ["-: how many answers"]),
        (["method=knapsack_rl", "allocation.args.warmup=0"], 12, []),
        (["generation.engine=vllm"], 12, ["vllm: what it evaluates again when its memory runs out is not counted, and neither are its own network and cache"]),
        (
            ["method=gigpo", "environment={name: guess}", "rewards=[episode]"],
            12,
            ["environment: an answer is an episode of several turns, whose tokens are not estimated; nor are those of evaluations"],
        ),
        (["method=tgdpo", "pairing.guide={path: 'flowrl:tiny-lm'}"], 12, ["pairing.guide: what the second model evaluates is not counted"]),
    ],
)
def test_what_is_not_in_the_numbers_is_said(tmp_path: Path, overrides: list[str], answers: int | None, notes: list[str]) -> None:
    expected = estimate_text(config_of(tmp_path, "rollout={groups_per_iteration: 3, group_size: 4}", *overrides))
    assert expected.answers == answers and expected.scores == answers
    rows, said = token_lines(expected)
    for note in notes:
        assert any(line.startswith(note) for line in said), said
    assert len(expected.remarks) == len(notes) - (answers is None)
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["answers"] == (("-", "-") if answers is None else ("12", "24"))
    assert ("evaluation tokens" in by_name) == ("method=gigpo" not in overrides)


def test_the_command_prints_tokens_memory_and_seconds_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(tmp_path)
    arguments = ["estimate", str(tmp_path / "run.yaml"), f"rewards=['{tmp_path / 'letters.py'}:Vowels']", "model.adapter=lora"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for part in ("tokens forward", "tokens backward", "evaluated answers", "peak: rollout", "peak: training", "answers per second", "the whole run:"):
        assert part in out
    assert "images" not in out and "text encoders" not in out and not (tmp_path / "run").exists()
    assert main([*arguments, "--json", "--no-measure"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] > 0 and found["run_backward"] > 0 and found["measured"] is None
    assert main([*arguments, "method=tree_po", "--no-measure", "--no-memory"]) == 0
    assert "tokens of an iteration are not estimated: tree: what is read again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.adapter=full"],
        ["model.adapter=lora", "training.rows_per_backward=8"],
        ["model.adapter=full", "kl={weight: 0.05, form: k3}", "model.gradient_checkpointing=true"],
    ],
    ids=["full", "lora, micro-batches", "reference, gradient checkpointing"],
)
def test_the_predicted_peak_of_memory_is_the_measured_one(tmp_path: Path, overrides: list[str]) -> None:
    bench = load_script("benchmarks/gpu.py")
    embedded = "model={path: 'flowrl:tiny-lm'}"
    data = "data={train: 'flowrl:tiny-lm/train', eval: {eval: 'flowrl:tiny-lm/eval'}}"
    config = config_of(
        tmp_path, embedded, data, "rollout={groups_per_iteration: 4, group_size: 4}", "generation={max_new_tokens: 40, min_new_tokens: 40}", *overrides
    )
    expected, trainer = estimate_memory(config, "cpu"), Trainer(config)
    trainer.iterate(1)
    peak = bench.allocator_peak(lambda: trainer.iterate(2), torch.device("cpu"))
    stays = sum(p.nbytes for p in {id(p): p for p in [*trainer.policy.network.parameters(), *trainer.policy.network.buffers()]}.values())
    stays += expected.reference + expected.moments
    predicted = max(size for name, size in expected.phases.items() if name != "evaluation")
    assert predicted / (stays + peak) == pytest.approx(1, abs=0.15)


def test_memory_that_is_not_predicted_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory: environments are not predicted"):
        estimate_memory(config_of(tmp_path, "method=gigpo", "environment={name: guess}", "rewards=[episode]"))
