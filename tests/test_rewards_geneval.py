"""rewards/geneval.py: its rules against cases worked out by hand, and metadata that are not of the published form. Networks: test_rewards_detectors.py."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from reward_models import batch_of
from torch import Tensor

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.detectors import Detection
from rewards.geneval import Clause, GenEvalReward, Request, judge, relations, request_of

CPU = torch.device("cpu")
FLIPS = {"left of": "right of", "right of": "left of", "above": "above", "below": "below"}


def at(x: float, y: float, score: float = 0.95, size: float = 10) -> Detection:
    """A square object around (x, y)."""
    return Detection(score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


class Finder:
    """A detector that says what it was told, one answer a picture."""

    def __init__(self, *answers: Mapping[str, Sequence[Detection]]) -> None:
        self.answers = answers

    def detect(self, images: Tensor) -> list[dict[str, list[Detection]]]:
        return [{name: list(things) for name, things in self.answers[i % len(self.answers)].items()} for i in range(len(images))]


def by_score(scores: Mapping[float, str]) -> Any:
    """A namer of colours that knows objects by their scores."""
    return lambda image, name, things: [scores[thing.score] for thing in things]


def asking(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, object]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def want(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def run(data: dict[str, object], found: Mapping[str, Sequence[Detection]], colors: Mapping[float, str] | None = None, **options: Any) -> tuple[float, int, int]:
    """(score, correct, strict) through the whole reward."""
    reward = GenEvalReward(finder=Finder(found), name_colors=by_score(colors or {}), **options)
    reward.load(CPU, torch.float32)
    scores = reward.score(SampleBatch([Prompt("x", data)], torch.zeros(1, 3, 64, 64)))
    assert scores.values[0] == scores.raw[f"geneval_{reward.reading}"][0]
    return round(scores.raw["geneval_score"].item(), 4), int(scores.raw["geneval_correct"].item()), int(scores.raw["geneval_strict"].item())


# --- the rules ----------------------------------------------------------------------------------------------------------------------------------

RIGHT = {"laptop": [at(10, 30)], "cow": [at(50, 30)]}  # the cow stands right of the laptop
COW_RIGHT = asking("position", want("laptop"), want("cow", position=["right of", 0]))
COW_LEFT = asking("position", want("laptop"), want("cow", position=["left of", 0]))
TWO_GLASSES = asking("counting", want("wine glass", 2), exclude=[want("wine glass", 3)])
PINK_AND_BLACK = asking("color_attr", want("handbag", color="pink"), want("scissors", color="black"))
RED_BUS = asking("colors", want("bus", color="red"))


def many(name: str, number: int, score: float = 0.95) -> dict[str, list[Detection]]:
    return {name: [at(10 * i + 5, 30, score - i / 1000) for i in range(number)]}


CASES: list[tuple[str, dict[str, object], Mapping[str, Sequence[Detection]], dict[float, str], tuple[float, int, int]]] = [
    ("there", asking("single_object", want("cat")), {"cat": [at(5, 5)]}, {}, (1, 1, 1)),
    ("not there", asking("single_object", want("cat")), {"dog": [at(5, 5)]}, {}, (0, 0, 0)),
    ("two for one", asking("single_object", want("cat")), many("cat", 2), {}, (0, 1, 0)),
    ("three for one stays at 0", asking("single_object", want("cat")), many("cat", 3), {}, (0, 1, 0)),
    ("below the threshold", asking("single_object", want("cat")), {"cat": [at(5, 5, 0.3)]}, {}, (0, 0, 0)),
    ("above the threshold", asking("single_object", want("cat")), {"cat": [at(5, 5, 0.31)]}, {}, (1, 1, 1)),
    ("something else beside it", asking("single_object", want("cat")), {"cat": [at(5, 5)], "dog": [at(9, 9)]}, {}, (1, 1, 1)),
    ("both", asking("two_object", want("cat"), want("dog")), {"cat": [at(5, 5)], "dog": [at(9, 9)]}, {}, (1, 1, 1)),
    ("one of two", asking("two_object", want("cat"), want("dog")), {"cat": [at(5, 5)]}, {}, (0.5, 0, 0)),
    ("none of two", asking("two_object", want("cat"), want("dog")), {}, {}, (0, 0, 0)),
    ("one twice", asking("two_object", want("cat"), want("dog")), {**many("cat", 2), "dog": [at(9, 9)]}, {}, (0.5, 1, 0)),
    ("two glasses", TWO_GLASSES, many("wine glass", 2), {}, (1, 1, 1)),
    ("one glass", TWO_GLASSES, many("wine glass", 1), {}, (0.5, 0, 0)),
    ("three glasses are excluded", TWO_GLASSES, many("wine glass", 3), {}, (0.5, 0, 0)),
    ("four glasses", TWO_GLASSES, many("wine glass", 4), {}, (0, 0, 0)),
    ("counting is stricter: 0.9 does not count", TWO_GLASSES, {"wine glass": [at(5, 5), at(9, 9, 0.9)]}, {}, (0.5, 0, 0)),
    ("another class is excluded", asking("single_object", want("cat"), exclude=[want("dog")]), {"cat": [at(5, 5)], "dog": [at(9, 9)]}, {}, (1, 0, 0)),
    ("right colour", RED_BUS, {"bus": [at(5, 5, 0.8)]}, {0.8: "red"}, (1, 1, 1)),
    ("wrong colour", RED_BUS, {"bus": [at(5, 5, 0.8)]}, {0.8: "blue"}, (0.5, 0, 0)),
    ("no bus, no colour", RED_BUS, {}, {}, (0, 0, 0)),
    ("the surest bus is red, the other is not", RED_BUS, {"bus": [at(5, 5, 0.8), at(9, 9, 0.7)]}, {0.8: "red", 0.7: "blue"}, (0, 1, 0)),
    ("the surest bus is blue, the other is red", RED_BUS, {"bus": [at(5, 5, 0.8), at(9, 9, 0.7)]}, {0.8: "blue", 0.7: "red"}, (0, 0, 0)),
    ("one of two is red", asking("colors", want("bus", 2, color="red")), {"bus": [at(5, 5, 0.8), at(9, 9, 0.7)]}, {0.8: "red", 0.7: "blue"}, (0.75, 0, 0)),
    ("both colours", PINK_AND_BLACK, {"handbag": [at(5, 5, 0.8)], "scissors": [at(9, 9, 0.7)]}, {0.8: "pink", 0.7: "black"}, (1, 1, 1)),
    ("colours swapped", PINK_AND_BLACK, {"handbag": [at(5, 5, 0.8)], "scissors": [at(9, 9, 0.7)]}, {0.8: "black", 0.7: "pink"}, (0.5, 0, 0)),
    ("one of the two is absent", PINK_AND_BLACK, {"handbag": [at(5, 5, 0.8)]}, {0.8: "pink"}, (0.5, 0, 0)),
    ("right place", COW_RIGHT, RIGHT, {}, (1, 1, 1)),
    ("wrong place", COW_LEFT, RIGHT, {}, (0.6667, 0, 0)),
    ("no laptop to be right of", COW_RIGHT, {"cow": [at(50, 30)]}, {}, (0.3333, 0, 0)),
    ("no cow", COW_RIGHT, {"laptop": [at(10, 30)]}, {}, (0.3333, 0, 0)),
    ("two laptops, the surest left of the cow", COW_RIGHT, {"laptop": [at(10, 30, 0.8), at(60, 30, 0.7)], "cow": [at(50, 30)]}, {}, (0.3333, 1, 0)),
    ("two laptops, the surest right of the cow", COW_RIGHT, {"laptop": [at(60, 30, 0.8), at(10, 30, 0.7)], "cow": [at(50, 30)]}, {}, (0.3333, 0, 0)),
    ("one of two cows is on the wrong side", asking("position", want("laptop"), want("cow", 2, position=["right of", 0])),
     {"laptop": [at(30, 30)], "cow": [at(50, 30, 0.8), at(10, 30, 0.7)]}, {}, (0.6667, 0, 0)),
    ("colour and place", asking("position", want("laptop"), want("cow", color="red", position=["right of", 0])), RIGHT, {0.95: "red"}, (1, 1, 1)),
    ("with a wrong colour the place does not count", asking("position", want("laptop"), want("cow", color="red", position=["right of", 0])),
     RIGHT, {0.95: "blue"}, (0.6667, 0, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("data", "found", "colors", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_three_readings_of(data, found, colors, expected):
    assert run(data, found, colors) == expected


@pytest.mark.parametrize("found", range(7))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_score_of_a_count(count: int, found: int) -> None:
    table = {1: [0, 1, 0, 0, 0, 0, 0], 2: [0, 1 / 2, 1, 1 / 2, 0, 0, 0], 3: [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0], 4: [0, 1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 2 / 4]}
    score, correct, strict = run(asking("counting", want("cow", count)), many("cow", found))
    assert score == round(table[count][found], 4)
    assert (correct, strict) == (int(found >= count), int(found == count))


def test_compat_brings_back_the_two_defects_and_the_exclusion_that_strict_forgets() -> None:
    assert run(asking("single_object", want("cat")), many("cat", 3), compat=True) == (-1, 1, 0)
    assert run(COW_LEFT, RIGHT, compat=True) == (0.75, 0, 0)  # counts 1 and 1, place 0, and 1
    assert run(COW_LEFT, {"cow": RIGHT["cow"]}, compat=True) == (0.3333, 0, 0)  # count 0 of the laptop, 1 of the cow, place 0 and nothing more
    assert run(asking("single_object", want("cat"), exclude=[want("dog")]), {"cat": [at(5, 5)], "dog": [at(9, 9)]}, compat=True) == (1, 0, 1)
    assert GenEvalReward(compat=True).info.low == -14  # 16 found for one asked
    assert run(asking("single_object", want("cat")), many("cat", 30), compat=True)[0] == -14


def test_at_most_max_objects_of_a_class_are_counted() -> None:
    assert run(asking("counting", want("cow", 4)), many("cow", 9), max_objects=4) == (1, 1, 1)


@pytest.mark.parametrize("reading", ["score", "correct", "strict"])
def test_the_value_is_the_reading_that_was_chosen(reading: str) -> None:
    assert run(asking("two_object", want("cat"), want("dog")), {**many("cat", 2), "dog": [at(9, 9)]}, reading=reading) == (0.5, 1, 0)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 0, {"right of"}),
        (-20, 0, {"left of"}),
        (0, 20, {"below"}),
        (0, -20, {"above"}),
        (20, -20, {"right of", "above"}),  # (18, -18) / 28.3 = 0.64 on each axis
        (2, 0, set()),  # shrunk by 0.1 (10 + 10) = 2 to nothing
        (2.5, 0, set()),  # 0.5 / 2.5 = 0.2
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 = 0.51
        (20, 13, {"right of"}),  # 18 / 23.85 = 0.75 and 11 / 23.85 = 0.46
        (0, 0, set()),
    ],
)
def test_places_of_squares_of_10_pixels(x: float, y: float, expected: set[str]) -> None:
    assert relations(at(x, y), at(0, 0)) == expected


def test_a_mirrored_picture_swaps_left_and_right_and_exchanged_objects_swap_all() -> None:
    rng = random.Random(0)
    opposite = FLIPS | {"above": "below", "below": "above"}
    seen = set()
    for _ in range(300):
        a, b = (at(rng.uniform(10, 54), rng.uniform(10, 54), size=rng.uniform(2, 20)) for _ in range(2))
        mirrored = [Detection(thing.score, (64 - thing.box[2], thing.box[1], 64 - thing.box[0], thing.box[3])) for thing in (a, b)]
        seen |= relations(a, b)
        assert relations(*mirrored) == {FLIPS[relation] for relation in relations(a, b)}
        assert relations(b, a) == {opposite[relation] for relation in relations(a, b)}
    assert seen == set(FLIPS)


def test_one_object_too_many_never_helps_the_strict_reading_and_no_colour_is_asked_for_without_need() -> None:
    request = Request("two_object", (Clause("cat", 1), Clause("dog", 2)))

    def colors(name: str, things: Sequence[Detection]) -> list[str]:
        raise AssertionError("no colour is wanted")

    for cats, dogs in itertools.product(range(4), repeat=2):
        found = {**many("cat", cats), **many("dog", dogs)}
        for more in ({**found, **many("cat", cats + 1)}, {**found, **many("dog", dogs + 1)}):
            if judge(more, request, colors).strict:
                assert (cats, dogs) in [(0, 2), (1, 1)]  # what was added was missing
                assert not judge(found, request, colors).strict
            else:
                assert judge(more, request, colors).score <= 1


def test_the_order_of_the_clauses_without_places_is_irrelevant() -> None:
    clauses = (Clause("cat", 2), Clause("dog", 1, "red"), Clause("cow", 1))
    found = {**many("cat", 1), "dog": [at(5, 5, 0.8)], "cow": [at(9, 9)]}
    verdicts = {judge(found, Request("two_object", order), lambda name, things: ["red"] * len(things)) for order in itertools.permutations(clauses)}
    assert len(verdicts) == 1
    assert verdicts.pop().score == pytest.approx((0.5 + 1 + 1 + 1) / 4)


# --- metadata -----------------------------------------------------------------------------------------------------------------------------------


def test_metadata_as_published_are_read() -> None:
    data = {"tag": "position", "include": [want("laptop"), want("cow", color="red", position=["right of", 0])], "prompt": "kept aside by the loader"}
    assert request_of(Prompt("x", data)) == Request("position", (Clause("laptop", 1), Clause("cow", 1, "red", ("right of", 0))))
    assert request_of(Prompt("x", asking("single_object", want("mouse")))).include[0].name == "computer mouse"  # COCO's own name
    GenEvalReward().check_prompts([Prompt("x", data), Prompt("y", TWO_GLASSES)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "need a `tag`, one of single_object, .*, not None"),
        ({"tag": "couting"}, "not 'couting'"),
        ({"tag": "counting"}, "need `include`, a list such as"),
        ({"tag": "counting", "include": []}, "need `include`"),
        ({"tag": "counting", "include": {"class": "cow"}}, "`include` must be a list of objects"),
        ({"tag": "counting", "include": ["cow"]}, "`include` must be a list of objects"),
        (asking("counting", want("unicorn")), r"`include\[0\]` needs a `class`, one of COCO's 80, not 'unicorn'"),
        (asking("counting", {"count": 1}), "needs a `class`.*None"),
        (asking("counting", want("cow"), want("cat", 0)), r"`include\[1\]` needs a `count` of at least 1, not 0"),
        (asking("counting", want("cow", True)), "needs a `count`.*True"),
        (asking("counting", want("cow"), exclude=[{"class": "cow"}]), r"`exclude\[0\]` needs a `count` of at least 1, not None"),
        (asking("colors", want("cow", color="grey")), "the `color` of .* must be one of red, .*, not 'grey'"),
        (asking("colors", want("cow", colour="red")), "has the unknown key 'colour'; it takes class, color, count, position"),
        (asking("colors", want("cow"), exclude=[want("cat", color="red")]), r"`exclude\[0\]` has the unknown key 'color'; it takes class, count"),
        (asking("position", want("cow", position=["right of", 0])), r"must be \[left of | .*, not \['right of', 0\]"),
        (asking("position", want("cat"), want("cow", position=["beside", 0])), "the `position` of"),
        (asking("position", want("cat"), want("cow", position=["left of", -1])), "the `position` of"),
        (asking("position", want("cat"), want("cow", position="left of")), "the `position` of"),
    ],
)
def test_other_metadata_are_refused_with_the_first_such_prompt(data: dict[str, object], message: str) -> None:
    reward = GenEvalReward(finder=Finder({}), name_colors=by_score({}))
    prompts = [Prompt("fine", TWO_GLASSES), Prompt("bad one", data), Prompt("another", {})]
    with pytest.raises(UserError, match=f"^reward geneval: the prompt 'bad one' cannot be scored: .*{message}"):
        reward.check_prompts(prompts)
    reward.load(CPU, torch.float32)
    with pytest.raises(UserError, match="^reward geneval: the prompt 'bad one'"):
        reward.score(SampleBatch(prompts, torch.zeros(3, 3, 8, 8)))


def test_without_clip_prompts_with_colours_are_refused_and_others_scored() -> None:
    reward = GenEvalReward(finder=Finder(many("wine glass", 2)), clip=None)
    reward.check_prompts([Prompt("x", TWO_GLASSES)])
    with pytest.raises(UserError, match="'red bus' cannot be scored: it asks for a colour; give `clip`"):
        reward.check_prompts([Prompt("x", TWO_GLASSES), Prompt("red bus", RED_BUS)])
    reward.load(CPU, torch.float32)
    assert reward.score(batch_of(torch.zeros(2, 3, 8, 8), metadata=[TWO_GLASSES] * 2)).values.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"reading": "loose"}, "reading must be score, correct or strict, not 'loose'"),
        ({"detector": "yolo"}, "detector must be mask2former or ssd, not 'yolo'"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, not 1.0"),
        ({"counting_threshold": -0.1}, "counting_threshold must be"),
        ({"margin": float("nan")}, "margin must be"),
        ({"max_objects": 1}, "max_objects must be a whole number of at least 2, not 1"),
        ({"detector_side": 80.0}, "detector_side must be a whole number of at least 32, not 80.0"),
    ],
)
def test_values_out_of_range_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward geneval: {message}"):
        GenEvalReward(**args)
