"""rewards/text_match.py and rewards/text_form.py: answers found and compared, formats, lengths and repetitions by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_models import assert_reward_contract

from flowrl.types import Prompt, Reward, SampleBatch, UserError
from rewards.registry import load_reward
from rewards.text_form import AnswerFormat, LengthPenalty, RepetitionPenalty
from rewards.text_match import ExactMatch, clean_answer, find_answer, texts_of

CPU = torch.device("cpu")


def batch(texts: list[str], answers: list[Any] | None = None) -> SampleBatch:
    return SampleBatch([Prompt(f"question {i}", {} if answers is None else {"answer": answers[i]}) for i in range(len(texts))], texts=texts)


def value(reward: Reward, text: str, answer: object = None) -> float:
    reward.load(CPU, torch.float32)
    scores = reward.score(SampleBatch([Prompt("q", {} if answer is None else {"answer": answer})], texts=[text]))
    assert scores.valid.all()
    return scores.values.item()


def tokenizer_folder(tmp_path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "c": 3, "!": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{1} and then \boxed{\frac{1}{2}} #### 7 or 8", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} done", r"\{1, 2\}"),
        (r"\boxed{4}, no: \boxed{5", "4"),
        (r"\boxed{\left\{ 1 \right.} }", r"\left\{ 1 \right."),
        (r"\fbox{x} \boxed {a{b}c}", "a{b}c"),
        ("step 1\n#### 1,234\nthanks 5", "1,234"),
        ("#### 1\n#### 2", "2"),
        ("nothing after ####", None),
        ("####", None),
        ("first 3, then -1,234.5e2.", "-1,234.5e2"),
        ("it is \N{MINUS SIGN}7", "-7"),
        ("costs $.50", ".50"),
        ("1,23 apples", "23"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_else_after_the_hashes_else_the_last_number(text: str, expected: str | None) -> None:
    assert find_answer(text) == expected


def test_each_place_can_be_asked_for_alone() -> None:
    text = r"<answer> 1 </answer> \boxed{2} <answer>3</answer> <answer>4 #### 5 and 6"
    found = {kind: find_answer(text, kind) for kind in ("boxed", "hashes", "number", "tag", "whole")}  # type: ignore[arg-type]
    assert found == {"boxed": "2", "hashes": "5 and 6", "number": "6", "tag": "3", "whole": text}
    assert find_answer("<answer>4", "tag") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  Paris \n", "paris"),
        ("1,234,567.5", "1234567.5"),
        ("1,23", "1,23"),
        ("(1,234, 5)", "(1234, 5)"),
        ("1,2345", "1,2345"),
        ("１２", "12"),
        ("a  b", "a b"),
        ("−3", "-3"),
    ],
)
def test_answers_are_cleaned_before_they_are_compared(answer: str, expected: str) -> None:
    assert clean_answer(answer) == expected


@given(st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean_answer(text)
    assert clean_answer(once) == once or "," in once or any(ord(c) > 127 for c in once)


@given(st.text(alphabet="\\boxed{}# 1.,\n-$"))
def test_no_text_breaks_the_extraction(text: str) -> None:
    for kind in ("auto", "boxed", "hashes", "number", "tag", "whole"):
        found = find_answer(text, kind)  # type: ignore[arg-type]
        assert found is None or isinstance(found, str)


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_make_no_difference(number: int) -> None:
    assert value(ExactMatch(), f"The answer is {number:,}.", number) == 1


@pytest.mark.parametrize(
    ("text", "answer", "tolerance", "expected"),
    [
        (r"\boxed{7}", "7", None, 1),
        (r"\boxed{7}", 7, None, 1),
        (r"\boxed{7.0}", 7, None, 0),
        (r"\boxed{7.0}", 7, 0, 1),
        (r"\boxed{7.1}", 7, 0.1000001, 1),
        (r"\boxed{7.2}", 7, 0.1, 0),
        (r"\boxed{3/4}", "0.75", 1e-9, 1),
        (r"\boxed{3/0}", "0.75", 1.0, 0),
        (r"\boxed{1e999}", "1", 1e30, 0),
        (r"\boxed{PARIS }", "Paris", 0, 1),
        (r"\boxed{Rome}", "Paris", 5, 0),
        ("the answer is 42", "worked out #### 42", None, 1),
        ("the answer is 3", r"so it is \boxed{3}", None, 1),
        ("no idea", "3", None, 0),
    ],
)
def test_exact_match_by_hand(text: str, answer: object, tolerance: float | None, expected: float) -> None:
    assert value(ExactMatch(tolerance=tolerance), text, answer) == expected


def test_exact_match_says_where_no_answer_was_found_and_counts_it_as_wrong() -> None:
    scores = ExactMatch().score(batch(["nothing", "1", "2"], [1, 1, 1]))
    assert scores.values.tolist() == [0, 1, 0]
    assert scores.raw["exact_match_answer_found"].tolist() == [0, 1, 1]
    assert scores.valid.all()


@pytest.mark.parametrize("make", [ExactMatch, lambda: LengthPenalty("cosine")])
def test_a_prompt_without_an_answer_is_refused_before_any_work_and_named(make: Any) -> None:
    reward, good = make(), Prompt("fine", {"answer": 0})
    reward.check_prompts([good])
    with pytest.raises(UserError, match=rf"^reward {reward.info.name}: the prompt 'how\? {'x' * 72}\.\.\.' has no metadata 'answer'; add"):
        reward.check_prompts([good, Prompt("how?\n" + "x" * 100)])
    for bad in ("", "  ", True, ["1"]):
        with pytest.raises(UserError, match="the prompt 'why' has the metadata answer"):
            reward.check_prompts([Prompt("why", {"answer": bad})])
    with pytest.raises(UserError, match="has no metadata 'answer'"):
        reward.score(batch(["1"]))
    LengthPenalty().check_prompts([Prompt("needs none")])


def test_a_batch_without_texts_is_refused() -> None:
    for reward in (ExactMatch(), AnswerFormat(), LengthPenalty(), RepetitionPenalty()):
        with pytest.raises(UserError, match=f"^reward {reward.info.name}: needs texts .*only pictures"):
            reward.score(SampleBatch([Prompt("x")], torch.zeros(1, 3, 8, 8)))
    with pytest.raises(UserError, match="got none"):
        texts_of("r", SampleBatch([Prompt("x")]))
    with pytest.raises(UserError, match="the completion of the prompt 'x' is int"):
        texts_of("r", SampleBatch([Prompt("x")], texts=[3]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        texts_of("r", SampleBatch([Prompt("x")], texts=["a", "b"]))


GOOD = "<think>one\ntwo</think>\n<answer>3</answer>"


@pytest.mark.parametrize(
    ("text", "full", "graded"),
    [
        (GOOD, 1, 1),
        (f"\n {GOOD} \n", 1, 1),
        (GOOD + "!", 0, 1),
        ("x" + GOOD, 0, 1),
        ("<think></think><answer></answer>", 1, 1),
        ("<think>a</think> and <answer>3</answer>", 0, 1),
        ("<answer>3</answer><think>a</think>", 0, 0.5),  # in order: <think>, </think>; the answer's tags come too early
        ("<think>a<think>b</think><answer>3</answer>", 0, 0.75),
        ("<think>a</think><answer>3", 0, 0.75),
        (GOOD + GOOD, 0, 0),
        ("<think>a<answer>b</answer></think>", 0, 0.5),
        ("", 0, 0),
    ],
)
def test_the_format_by_hand(text: str, full: float, graded: float) -> None:
    assert value(AnswerFormat(), text) == full
    assert value(AnswerFormat(graded=True), text) == graded


def test_tags_and_patterns_of_ones_own() -> None:
    reward = AnswerFormat(tags=["plan", "code", "end"])
    assert value(reward, "<plan>a</plan><code>b</code><end></end>") == 1
    assert value(reward, GOOD) == 0
    assert value(AnswerFormat(tags=["a", "b", "c"], graded=True), "<a>") == pytest.approx(1 / 6)
    pattern = AnswerFormat(pattern=r"Answer: \d+.*")
    assert [value(pattern, text) for text in ("Answer: 12\nbecause", "The Answer: 12", "Answer: x")] == [1, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerFormat(pattern="("), "is no regular expression"),
        (lambda: AnswerFormat(pattern="a", graded=True), "knows no pattern"),
        (lambda: AnswerFormat(tags="think"), "tags must be a list"),
        (lambda: AnswerFormat(tags=["a b"]), "tags must be a list"),
        (lambda: ExactMatch(extract="last"), "extract must be one of auto, boxed"),  # type: ignore[arg-type]
        (lambda: ExactMatch(tolerance=-1), "tolerance must be"),
        (lambda: ExactMatch(tolerance=math.nan), "tolerance must be"),
        (lambda: LengthPenalty("short"), "mode must be overlong or cosine"),  # type: ignore[arg-type]
        (lambda: LengthPenalty(max_length=0), "max_length must be a whole number from 1 on, not 0"),
        (lambda: LengthPenalty(max_length=5, cache=6), "cache 6 is beyond max_length 5"),
        (lambda: LengthPenalty(cache=True), "cache must be"),
        (lambda: LengthPenalty(correct=[1.0]), "correct must be two finite numbers"),
        (lambda: LengthPenalty(wrong=[math.inf, 0]), "wrong must be two finite numbers"),
        (lambda: LengthPenalty(unit="tokens"), "give `tokenizer`"),
        (lambda: LengthPenalty(unit="words", tokenizer="x"), "leave `tokenizer` away"),
        (lambda: LengthPenalty(unit="lines"), "unit must be tokens, words or characters, not 'lines'"),  # type: ignore[arg-type]
        (lambda: RepetitionPenalty(n=0), "n must be a whole number from 1 on"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^reward \w+: .*{message}"):
        make()


def test_the_overlong_penalty_by_hand_and_continuous() -> None:
    reward = LengthPenalty(max_length=10, cache=4, unit="characters")
    expected = {0: 0, 6: 0, 7: -0.25, 8: -0.5, 9: -0.75, 10: -1, 11: -1, 50: -1}
    scores = reward.score(batch(["x" * n for n in expected]))
    assert scores.values.tolist() == list(expected.values())
    assert scores.raw["length_units"].tolist() == list(expected)
    fine = LengthPenalty(max_length=2000, cache=1000, unit="characters").score(batch(["x" * n for n in range(0, 2100, 7)])).values
    steps = fine.diff()
    assert (steps <= 0).all()
    assert steps.min() >= -7 / 1000 - 1e-6  # no jump at either knot


def test_the_cosine_goes_from_one_end_to_the_other_and_is_continuous() -> None:
    reward = LengthPenalty("cosine", max_length=8, unit="characters", correct=[1.0, 0.5], wrong=[-1.0, 0.0], extract="number")
    texts = ["1", "1 " + "x" * 2, "1 " + "x" * 6, "1" + " " * 98]
    right, wrong = reward.score(batch(texts, [1] * 4)).values, reward.score(batch(texts, [2] * 4)).values
    shape = torch.tensor([(1 + math.cos(math.pi * n / 8)) / 2 for n in (1, 4, 8, 8)])
    torch.testing.assert_close(right, 0.5 + 0.5 * shape)
    torch.testing.assert_close(wrong, -shape)
    assert right[1].item() == pytest.approx(0.75)  # half way
    fine = LengthPenalty("cosine", max_length=700, unit="characters").score(batch(["1" + " " * n for n in range(800)], [1] * 800)).values
    assert fine.diff().abs().max() < 0.5 * math.pi / 2 / 700 + 1e-6
    assert fine[-1] == 0.5


def test_units_are_words_characters_or_tokens(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path)
    lengths = {}
    for unit, reward in {"tokens": LengthPenalty(tokenizer=folder), "words": LengthPenalty(), "characters": LengthPenalty(unit="characters")}.items():
        if unit == "tokens":
            with pytest.raises(RuntimeError, match="reward length: load must be called before score"):
                reward.score(batch(["a"]))
        reward.load(CPU, torch.float32)
        lengths[unit] = reward.score(batch(["a b! c!"])).raw["length_units"].item()
    assert lengths == {"tokens": 5, "words": 3, "characters": 7}
    repetition = RepetitionPenalty(n=1, tokenizer=folder)
    assert value(repetition, "a b! c!") == pytest.approx(-1 / 5)
    with pytest.raises(UserError, match="reward length: there is no file or folder"):
        LengthPenalty(tokenizer=str(tmp_path / "none")).load(CPU, torch.float32)


def slow_repetition(text: str, n: int) -> float:
    words = text.lower().split()
    grams = list(zip(*(itertools.islice(words, i, None) for i in range(n)), strict=False))
    return -sum(gram in grams[:i] for i, gram in enumerate(grams)) / len(grams) if grams else 0.0


def test_the_repetition_by_hand() -> None:
    scores = RepetitionPenalty().score(batch(["a b c", "a b", "", "a a a a", "a b c A B C", "x y z x y z x y z"]))
    torch.testing.assert_close(scores.values, torch.tensor([0, 0, 0, -0.5, -0.25, -4 / 7]))
    assert scores.raw["repetition_ngrams"].tolist() == [1, 0, 0, 2, 4, 7]


@given(st.lists(st.sampled_from("abC"), max_size=30).map(" ".join), st.integers(1, 4))
def test_the_repetition_is_the_share_of_grams_seen_before(text: str, n: int) -> None:
    assert value(RepetitionPenalty(n), text) == pytest.approx(slow_repetition(text, n), abs=1e-6)


def test_every_text_reward_keeps_the_contract() -> None:
    texts = [GOOD, "1 2 3 1 2 3 1 2 3", r"\boxed{3}", "", "word " * 40]
    for name, args in [("exact_match", {}), ("format", {}), ("format", {"graded": True}), ("repetition", {}), ("length", {"max_length": 30, "cache": 20})]:
        assert_reward_contract(lambda name=name, args=args: load_reward(name, args), batch(texts, [3] * 5), needs_load=False)
    assert_reward_contract(lambda: load_reward("length", {"mode": "cosine", "max_length": 9}), batch(texts, [3] * 5), needs_load=False)
    assert LengthPenalty("cosine", correct=[1, 1], wrong=[1, 1]).info.low < 1
