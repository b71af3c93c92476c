"""rewards/arithmetic.py and rewards/arithmetic_world.py: word problems solved a second time from their text, splits, and the verifier by hand."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_models import assert_reward_contract

from flowrl.data import load_prompts
from flowrl.types import Prompt, SampleBatch, UserError
from rewards import arithmetic_world as world
from rewards.arithmetic import ArithmeticReward, final_answer, true_share
from rewards.registry import load_reward

CPU = torch.device("cpu")
PROMPTS = Path(__file__).parent.parent / "flowrl" / "assets" / "prompts" / "tiny-lm"
LOSE = "loses|sells|uses"


def solve(text: str) -> int:
    """Read a problem sentence by sentence, without the generator's grammar: what the first person has, then the second, then who is asked about."""
    *story, question = re.split(r"(?<=[.?]) ", text)
    first, mine, other = story[0].split()[0], 0, None
    for sentence in story:
        who, numbers = sentence.split()[0], [int(n) for n in re.findall(r"\d+", sentence)]
        amount = math.prod(numbers)
        if sentence is story[0]:
            mine = amount
        elif re.search(LOSE, sentence):
            mine -= amount
        elif who in ("He", "She", "Then"):
            mine += amount
        elif "twice" in sentence or "three times" in sentence:
            other = mine * (2 if "twice" in sentence else 3)
        elif "than" in sentence:
            other = mine + (amount if "more" in sentence else -amount)
        else:
            other = amount
    if "together" in question:
        assert other is not None
        return mine + other
    asked = re.search(r"does (\w+) have", question)
    assert asked is not None
    if asked[1] in (first, "he", "she"):
        return mine
    assert other is not None
    return other


def value(text: str, answer: object = 12) -> float:
    scores = ArithmeticReward().score(SampleBatch([Prompt("q", {"answer": answer})], texts=[text]))
    assert scores.valid.all()
    return scores.values.item()


# --- the world


@pytest.mark.parametrize("kind", [kind for level in (1, 2, 3) for kind in world.kinds(level)])
def test_every_kind_has_the_answer_that_its_text_says(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(20):
        problem = world.make_problem(rng, kind)
        assert problem.answer == solve(problem.prompt), problem.prompt
        assert problem.level == len(problem.steps) == problem.solution.count("=") and 0 <= problem.answer <= world.LARGEST
        assert final_answer(problem.solution) == str(problem.answer) and true_share(problem.solution) == 1


def test_there_are_7_kinds_of_one_step_22_of_two_and_54_of_three() -> None:
    # One step: boxes, 2 changes, 4 ends. Two: boxes and a change or an end 2 + 4; two changes 4, boxes gained 1, change and end 8, 3 double ends.
    assert [len(world.kinds(level)) for level in (1, 2, 3)] == [7, 22, 54]
    assert {kind for level in (2, 3) for kind in world.kinds(level)} > world.unseen_kinds() and len(world.unseen_kinds()) == 15


def test_every_piece_of_an_unseen_kind_is_in_a_known_one() -> None:
    known = {piece for level in (1, 2, 3) for kind in world.kinds(level) if kind not in world.unseen_kinds() for piece in kind.split("+")}
    assert {piece for kind in world.unseen_kinds() for piece in kind.split("+")} <= known


def test_a_mistake_in_an_early_step_would_be_carried_on() -> None:
    steps = (world.Step(7, "-", 3, "loss"), world.Step(-1, "*", 5, "twice"), world.Step(-1, "+", -2, "together"))
    assert world.calculate(steps) == [(7, "-", 3, 4), (4, "*", 5, 20), (4, "+", 20, 24)]
    assert world.write(world.calculate(steps)) == "7-3=4 4*5=20 4+20=24 #24"


def test_hints_are_growing_beginnings_of_the_solution() -> None:
    assert world.hints_of("7-3=4 4*15=60 #60") == ["7-3=", "7-3=4", "7-3=4 4*15=", "7-3=4 4*15=60"]


def test_a_kind_that_does_not_exist_is_refused() -> None:
    for kind in ("", "apples", "gain+boxes", "more+gain", "gain+gain+gain+gain"):
        with pytest.raises(ValueError, match="no kind of problem is called"):
            world.make_problem(random.Random(0), kind)
    with pytest.raises(ValueError, match="stays between 0 and 199"):
        world.make_problem(random.Random(0), "gain", 400)


def test_splits_follow_from_the_seed_and_do_not_meet() -> None:
    def prompts(name: str, seed: int, taken: set[str]) -> list[str]:
        return [problem.prompt for problem in world.make_split(name, 60, seed, taken)]

    assert prompts("eval", 3, set()) == prompts("eval", 3, set()) != prompts("eval", 4, set())
    taken: set[str] = set()
    first = prompts("eval", 3, taken)
    assert taken == set(first)
    assert not set(first) & set(prompts("eval", 3, taken))  # the same draws, which are taken now


def test_the_shipped_splits_are_those_of_seed_0() -> None:
    taken: set[str] = set()
    for name, count in (("train", 2000), ("eval", 256), ("unseen", 256)):
        made = [{"prompt": problem.prompt, **problem.metadata()} for problem in world.make_split(name, count, 0, taken)]
        assert made == [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        loaded = load_prompts(f"flowrl:tiny-lm/{name}")
        assert [prompt.text for prompt in loaded] == [entry["prompt"] for entry in made]
        assert [sum(prompt.metadata["level"] == level for prompt in loaded) for level in (1, 2, 3)] == [-(-count // 3), -((1 - count) // 3), count // 3]
    assert len(taken) == 2512  # no prompt twice


def test_only_the_unseen_split_has_held_out_kinds_and_numbers() -> None:
    def facts(name: str) -> list[tuple[bool, bool]]:
        problems = load_prompts(f"flowrl:tiny-lm/{name}")
        starts = [int(re.findall(r"\d+", problem.text)[0]) for problem in problems]
        return [(41 <= start <= 49, problem.metadata["kind"] in world.unseen_kinds()) for start, problem in zip(starts, problems, strict=True)]

    assert {fact for name in ("train", "eval") for fact in facts(name)} == {(False, False)}
    unseen = facts("unseen")
    assert all(number or kind for number, kind in unseen)
    assert sum(kind for _, kind in unseen) >= 80 and sum(number for number, _ in unseen) >= 160


# --- the verifier


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7+5=12 #12", "12"),
        ("#12", "12"),
        ("#3 #12", "12"),
        ("  # 12 \n", "12"),
        ("#0012", "12"),
        ("#-7", "-7"),
        ("#-0", "0"),
        ("#000", "0"),
        ("12", None),
        ("", None),
        ("#", None),
        ("#12 #", None),
        ("#12 13", None),
        ("#12.0", None),
        ("#1 2", None),
        ("#+12", None),
        ("#--12", None),
        ("#12 apples", None),
        ("#１２", None),  # full-width digits
        ("#٣", None),  # an Arabic digit
        ("#12²", None),
        ("#1_2", None),
        ("#0x0c", None),
        ("#nan", None),
        ("#12\x00", None),
        ("#12\n#13\n", "13"),
    ],
)
def test_the_final_answer_is_the_whole_number_after_the_last_marker(text: str, found: str | None) -> None:
    assert final_answer(text) == found
    assert value(text) == float(found == "12")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("7+5=12 12-3=9 #9", 1.0),
        ("7+5=12 12-3=8 #8", 0.5),
        ("7 + 5 = 12", 1.0),
        ("3-5=-2", 1.0),
        ("3*4=12 #12 1+1=3", 1.0),  # the last marker ends the working, whatever follows it
        ("#12", math.nan),
        ("1+2+3=6", math.nan),
        ("1+2=3+4", math.nan),
        ("1.5+2=3", math.nan),
        ("1+2=3.5", math.nan),
        ("1+2=3.", 1.0),
        ("9999999999999+1=1", math.nan),
        ("", math.nan),
    ],
)
def test_the_work_is_the_share_of_true_equations(text: str, share: float) -> None:
    torch.testing.assert_close(torch.tensor(true_share(text)), torch.tensor(share), equal_nan=True)


def test_columns_by_hand() -> None:
    prompts = [
        Prompt("a", {"answer": 9, "level": 2}),
        Prompt("b", {"answer": "9", "level": 1}),
        Prompt("c", {"answer": -9}),
        Prompt("d", {"answer": " 009 ", "level": 3}),
    ]
    scores = ArithmeticReward().score(SampleBatch(prompts, texts=["7+5=12 12-3=9 #9", "7+5=11 #8", "#-9", "2+7=9 9"]))
    assert scores.values.tolist() == [1, 0, 1, 0] and scores.values.dtype == torch.float32 and scores.valid.tolist() == [True] * 4
    expected = {"arithmetic_format": [1, 1, 1, 0], "arithmetic_work": [1, 0, math.nan, 1], "arithmetic_level": [2, 1, math.nan, 3]}
    assert scores.raw.keys() == expected.keys()
    for name, column in expected.items():
        torch.testing.assert_close(scores.raw[name], torch.tensor(column, dtype=torch.float32), equal_nan=True)


def test_the_reward_keeps_the_contract() -> None:
    prompts = load_prompts("flowrl:tiny-lm/eval")[:9]
    texts = [str(prompt.metadata["solution"]) if k % 2 else "1+1=3 #3" for k, prompt in enumerate(prompts)]
    assert_reward_contract(ArithmeticReward, SampleBatch(prompts, texts=texts), needs_load=False)
    assert ArithmeticReward().score(SampleBatch(prompts, texts=texts)).values.tolist() == [0, 1] * 4 + [0]
    assert load_reward("arithmetic").info.name == "arithmetic"


@pytest.mark.parametrize(
    "text",
    [
        "#" * 1_000_000,
        "1" * 1_000_000,
        "#" + "9" * 1_000_000,
        "#" + "0" * 1_000_000 + "12",
        "1+" * 500_000,
        "1+1=" * 250_000,
        " " * 1_000_000,
        "#" + " " * 999_998 + "x",
        "1 + " * 250_000,
        "-" * 1_000_000,
        "1=" * 500_000,
        "1+1=2 " * 160_000 + "#12",
        "=" * 1_000_000,
        "\u0661" * 1_000_000,
    ],
    ids=range(14),
)
def test_a_million_characters_are_scored_in_a_moment(text: str) -> None:
    start = time.process_time()
    assert value(text) == float(text.endswith("12"))
    assert time.process_time() - start < 2


@given(text=st.text() | st.text(alphabet="0123456789+-*=# .\n"))
def test_any_text_is_right_or_wrong(text: str) -> None:
    scores = ArithmeticReward().score(SampleBatch([Prompt("q", {"answer": 1})], texts=[text]))
    assert scores.valid.all() and scores.values.item() in (0.0, 1.0)
    assert scores.values.item() <= scores.raw["arithmetic_format"].item()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no metadata 'answer'"),
        *(({"answer": bad}, "whole number") for bad in ("12.0", "x", 1.5, "1 2", "１２")),
        ({"answer": True}, "metadata answer True"),
    ],
)
def test_a_prompt_without_a_whole_number_is_refused_before_any_work(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ArithmeticReward().check_prompts([Prompt("fine", {"answer": 3}), Prompt("How many?", metadata)])
    assert "'How many?'" in str(caught.value) and "\n" not in str(caught.value)
