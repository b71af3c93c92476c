"""rewards/ocr.py with scripted engines: the formula, targets, reading order, failures. The real engine is in test_rewards_real_weights.py."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_models import assert_reward_contract, batch_of, pictures

from flowrl.types import Prompt, SampleBatch, UserError
from rewards import ocr
from rewards.ocr import Line, OcrReward, edit_reward, reading_order, targets_of

CPU = torch.device("cpu")
HELLO = 'a sign that says "Hello World"'


def slow_distance(a: str, b: str) -> int:
    """Levenshtein distance by its recursion."""

    @cache
    def rest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return rest(i + 1, j + 1) if a[i] == b[j] else 1 + min(rest(i + 1, j), rest(i, j + 1), rest(i + 1, j + 1))

    return rest(0, 0)


def reader(*words: str | Line) -> Any:
    """An engine that reads the same in every picture."""
    lines = [word if isinstance(word, Line) else Line(word, 0.9, top=30.0 * i, bottom=30.0 * i + 20) for i, word in enumerate(words)]
    return lambda picture: lines


def read(text: str, prompt: str | Prompt = HELLO, **options: Any) -> tuple[float, dict[str, float]]:
    """The value and the raw columns where an engine reads ``text``, line by line."""
    reward = OcrReward(engine=reader(*text.splitlines()), **options)
    reward.load(CPU, torch.float32)
    scores = reward.score(SampleBatch([prompt if isinstance(prompt, Prompt) else Prompt(prompt)], torch.zeros(1, 3, 8, 8)))
    assert scores.valid.all()
    return round(scores.values.item(), 5), {name: round(column.item(), 5) for name, column in scores.raw.items()}


# --- the formula --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello World", 1.0),
        ("hello\nworld", 1.0),  # two lines
        ("H E L L O  W O R L D", 1.0),
        ("Hello Wrld", 0.9),  # one of ten letters
        ("Goodbye", 0.1),  # one of ten is kept: the o
        ("", 0.0),
        ("nothing that is alike, and long", 0.0),  # 26 edits, but at most 10
        ("Buy! Hello World! Now!", 1.0),  # the target stands in it
        ("Hello Worl", 0.9),
        ("Hello WorldWorlx", 1.0),
    ],
)
def test_the_score_of_a_text_for_hello_world(text: str, expected: float) -> None:
    assert read(text)[0] == expected


@given(st.text("ab c", max_size=9), st.text("abc", min_size=1, max_size=6))
def test_the_formula_is_that_of_a_slow_computation(text: str, target: str) -> None:
    expected = 1.0 if target in text else 1 - min(slow_distance(text, target), len(target)) / len(target)
    assert edit_reward(text, target) == pytest.approx(expected)
    assert 0 <= edit_reward(text, target) <= 1
    assert edit_reward(target, target) == 1


@given(st.text("abcd", min_size=3, max_size=8), st.randoms(use_true_random=False))
def test_one_more_letter_that_is_wrong_never_helps(target: str, random: Any) -> None:
    text, scores = list(target), []
    for i in random.sample(range(len(target)), len(target)):
        scores.append(edit_reward("".join(text), target))
        text[i] = "#"
    scores.append(edit_reward("".join(text), target))
    assert scores == sorted(scores, reverse=True)
    assert (scores[0], scores[-1]) == (1, 0)


def test_several_quoted_texts_give_their_mean_and_the_columns_what_was_read() -> None:
    prompt = 'a door with "open" and a shop called "Bakery"'
    assert read("Open\nBakery", prompt)[0] == 1
    value, raw = read("Open\nBaker", prompt)
    assert value == pytest.approx((1 + (1 - slow_distance("openbaker", "bakery") / 6)) / 2, abs=1e-5)
    assert raw == {"ocr_exact": 0, "ocr_confidence": 0.9, "ocr_surplus": 0}
    assert read("Open\nBakery\nof 1999", prompt)[1] == {"ocr_exact": 1, "ocr_confidence": 0.9, "ocr_surplus": 0.6}  # 16 letters for 10


def test_what_is_read_beside_the_target_costs_if_asked() -> None:
    assert read("xx Hello World xxx")[0] == 1
    assert read("xx Hello World xxx", extra_penalty=0.5)[0] == 0.75  # 15 letters for 10
    assert read("x" * 90 + "Hello World", extra_penalty=0.5)[0] == 0  # never below 0
    assert read("Hello", extra_penalty=0.5)[0] == 0.5  # too little is no surplus


def test_lines_of_low_confidence_are_not_read() -> None:
    lines = [Line("Hello", 0.9, top=0, bottom=20), Line("World", 0.5, top=30, bottom=50), Line("??", 0.49, top=60, bottom=80)]
    for least, expected, sure in [(0.5, 1.0, 0.7), (0.6, 0.5, 0.9), (0.0, 1.0, 0.63)]:
        reward = OcrReward(engine=reader(*lines), min_confidence=least)
        reward.load(CPU, torch.float32)
        scores = reward.score(batch_of(torch.zeros(1, 3, 8, 8), [HELLO]))
        assert scores.values.item() == expected
        assert scores.raw["ocr_confidence"].item() == pytest.approx(sure)


def test_punctuation_is_ignored_if_asked() -> None:
    assert read("it s ok", 'a cup, "It\'s O.K.!"')[0] < 1
    assert read("it s ok", 'a cup, "It\'s O.K.!"', ignore_punctuation=True)[0] == 1
    assert read("１２", 'a "12"', ignore_punctuation=True)[0] == 1  # full-width digits


# --- targets and reading order ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('says "A"', ["A"]),
        ("says “A b” and „C“", ["A b", "C"]),
        ('"A" and “B” and "C"', ["A", "B", "C"]),
        ("it's a dog's life", []),
        ('one " alone', []),
        ('a 12" disc, 7" disc', [" disc, 7"]),  # inches: give target_text
        ('"“A”"', ["“A”"]),
    ],
)
def test_targets_are_what_stands_in_quotes(text: str, expected: list[str]) -> None:
    assert targets_of(Prompt(text)) == expected


def test_target_text_of_the_metadata_overrides_the_quotes() -> None:
    assert targets_of(Prompt(HELLO, {"target_text": "Bye"})) == ["Bye"]
    assert targets_of(Prompt(HELLO, {"target_text": ["Bye", "now"]})) == ["Bye", "now"]
    assert read("Bye now", Prompt(HELLO, {"target_text": ["Bye", "now"]}))[0] == 1
    for wrong in (7, ["a", 7], {"a": "b"}):
        with pytest.raises(UserError, match="^reward ocr: target_text of the prompt 'a sign.*' must be a text or a list of texts"):
            OcrReward().check_prompts([Prompt(HELLO, {"target_text": wrong})])


def test_lines_are_read_from_top_to_bottom_and_pieces_from_left_to_right() -> None:
    pieces = [
        Line("d", 1, left=60, top=27, right=90, bottom=48),
        Line("b", 1, left=50, top=8, right=90, bottom=28),  # a little lower than a, but of its line
        Line("c", 1, left=0, top=25, right=40, bottom=46),  # begins before the line above has ended
        Line("a", 1, left=0, top=10, right=40, bottom=30),
        Line("e", 1, left=70, top=50, right=90, bottom=70),
    ]
    assert "".join(line.text for line in reading_order(pieces)) == "abcde"
    assert "".join(line.text for line in reading_order(pieces[::-1])) == "abcde"
    assert reading_order([]) == []


# --- batches, failures, messages ------------------------------------------------------------------------------------------------------------------


def by_brightness(picture: np.ndarray) -> list[Line]:
    """Reads as many letters of the target as the picture is bright, and fails on blue ones."""
    if picture[:, :, 0].mean() > picture[:, :, 2].mean() + 20:
        raise RuntimeError("cannot\nread blue")
    return [Line("Hello World"[: int(picture.mean()) // 20], 0.8)]


def test_the_reward_keeps_the_contract() -> None:
    images = pictures(5, 12, 20) * 0.5 + torch.linspace(0.0, 0.5, 5).view(5, 1, 1, 1)
    images[3, 2] += 0.2
    images[3, 0] -= 0.2
    assert_reward_contract(lambda: OcrReward(engine=by_brightness, skip_without_target=True), batch_of(images, [HELLO, HELLO, "no target", HELLO, HELLO]))


def test_a_picture_that_cannot_be_scored_is_invalid_with_its_reason_and_the_others_are_not() -> None:
    images = torch.full((5, 3, 8, 8), 0.75)
    images[1, 2], images[1, 0] = 1.0, 0.2  # blue
    images[2, 0, 0, 0] = torch.nan
    reward = OcrReward(engine=by_brightness)
    reward.load(CPU, torch.float32)
    scores = reward.score(batch_of(images, [HELLO, HELLO, HELLO, 'empty " "', HELLO]))
    assert scores.valid.tolist() == [True, False, False, False, True]
    assert scores.values[[0, 4]].tolist() == pytest.approx([0.8, 0.8])  # 191 // 20 = 9 characters, a space among them
    assert scores.values[1:4].isnan().all()
    assert scores.problems == {
        1: "the OCR engine failed with RuntimeError: cannot read blue",
        2: "the picture has NaN or infinite pixels",
        3: "the prompt has no text to look for",
    }
    assert all(column[1:4].isnan().all() for column in scores.raw.values())


def test_engines_see_blue_green_red_bytes() -> None:
    seen = []
    reward = OcrReward(engine=lambda picture: seen.append(picture) or [])
    reward.load(CPU, torch.float32)
    reward.score(batch_of(torch.tensor([0.2, 0.4, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6), [HELLO]))
    assert seen[0].shape == (4, 6, 3)
    assert seen[0].dtype == np.uint8
    assert seen[0].flags.c_contiguous
    assert seen[0][0, 0].tolist() == [255, 102, 51]


def test_any_number_of_workers_gives_the_same_scores_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(ocr, "rapid_engine", lambda threads, side: made.append((threads, side)) or by_brightness)
    batch = batch_of(pictures(7, 8) * torch.linspace(0.1, 1, 7).view(7, 1, 1, 1), [HELLO] * 7)
    results = []
    for workers in (1, 3, 9):
        reward = OcrReward(workers=workers, threads=2, detector_side=320)
        reward.load(CPU, torch.float32)
        results.append(reward.score(batch).values)
    assert made == [(2, 320)] * 13
    assert results[0].unique().numel() > 2
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_prompts_without_a_target_are_refused_before_the_run() -> None:
    prompts = [Prompt(HELLO), Prompt("a cat"), Prompt("a dog")]
    with pytest.raises(UserError, match="^reward ocr: the prompt 'a cat' has no text to look for; put it in quotes, give `target_text`"):
        OcrReward().check_prompts(prompts)
    OcrReward().check_prompts(prompts[:1])
    OcrReward(skip_without_target=True).check_prompts(prompts)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"min_confidence": 1.1}, r"min_confidence must be in \[0, 1\], not 1.1"),
        ({"min_confidence": float("nan")}, "min_confidence"),
        ({"extra_penalty": -1}, "extra_penalty must be a number of at least 0, not -1"),
        ({"extra_penalty": float("inf")}, "extra_penalty"),
        ({"detector_side": 16}, "detector_side must be a whole number of at least 32, not 16"),
        ({"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ({"workers": True}, "workers must be a whole number of at least 1, not True"),
    ],
)
def test_values_out_of_range_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward ocr: {message}"):
        OcrReward(**args)


@pytest.mark.parametrize("package", ["rapidfuzz", "rapidocr", "onnxruntime"])
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = importlib.import_module

    def gone(name: str, *args: Any) -> Any:
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(UserError, match=rf"^reward ocr: needs the package {package}.*; install flowrl-diffusion\[ocr\]"):
        OcrReward().load(CPU, torch.float32)


def fake_package(folder: Path, make: Any) -> SimpleNamespace:
    (folder / "models").mkdir()
    return SimpleNamespace(__file__=str(folder / "__init__.py"), RapidOCR=make)


def test_a_package_without_models_or_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(params: dict[str, object]) -> Any:
        def read(picture: np.ndarray, **options: object) -> None:
            raise ValueError("bad weights")

        return read

    monkeypatch.setitem(sys.modules, "rapidocr", fake_package(tmp_path, broken))
    with pytest.raises(UserError, match="^reward ocr: rapidocr has 0 models of the kind det in .*models, where 1 is expected"):
        OcrReward().load(CPU, torch.float32)
    (tmp_path / "models" / "v9_det_small.onnx").touch()
    (tmp_path / "models" / "v9_rec.onnx").touch()
    with pytest.raises(UserError, match="^reward ocr: rapidocr could not start its models in .* \\(ValueError: bad weights\\)"):
        OcrReward().load(CPU, torch.float32)


def test_the_engine_is_given_its_models_by_path_and_its_boxes_become_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []

    def make(params: dict[str, Any]) -> Any:
        given.append(params)
        boxes = np.array([[[3, 5], [30, 7], [29, 20], [2, 18]]], dtype=np.float32)
        answers = [None, None, SimpleNamespace(boxes=boxes, txts=("Hello",), scores=(0.75,)), SimpleNamespace(boxes=None, txts=None, scores=None)]
        return lambda picture, **options: answers.pop(0)

    monkeypatch.setitem(sys.modules, "rapidocr", fake_package(tmp_path, make))
    for name in ("v9_det_small.onnx", "v9_rec.onnx"):
        (tmp_path / "models" / name).touch()
    engine = ocr.rapid_engine(3, 400)
    picture = np.zeros((32, 32, 3), np.uint8)
    assert list(engine(picture)) == [Line("Hello", 0.75, 2, 5, 30, 20)]
    assert list(engine(picture)) == []
    assert given[0]["Det.model_path"] == str(tmp_path / "models" / "v9_det_small.onnx")
    assert given[0]["Rec.model_path"] == str(tmp_path / "models" / "v9_rec.onnx")
    assert given[0]["EngineConfig.onnxruntime.intra_op_num_threads"] == 3
    assert given[0]["Det.limit_side_len"] == 400
    assert given[0]["Global.use_cls"] is False
    assert given[0]["Global.text_score"] == 0
