"""Preference pairs of texts: every usual format, by hand, and the line that each mistake gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from flowrl.data import load_prompts
from flowrl.text_pairs import TextPairs, load_text_pairs
from flowrl.types import Prompt, UserError

SYSTEM, USER = {"role": "system", "content": "be brief"}, {"role": "user", "content": "2+3=?"}
MORE = [{"role": "assistant", "content": "what?"}, {"role": "user", "content": "the sum"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_lines(folder: Path, *lines: object) -> Path:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def from_lines(folder: Path, *lines: dict[str, Any]) -> TextPairs:
    """The pairs of a .jsonl file, after a look whether a stored table of the same gives the same."""
    pairs = load_text_pairs(write_lines(folder, *lines))
    datasets.Dataset.from_list(list(lines)).to_parquet(folder / "pairs.parquet")
    assert_same_pairs(load_text_pairs(folder / "pairs.parquet"), pairs)
    return pairs


def assert_same_pairs(first: TextPairs, second: TextPairs) -> None:
    assert (first.prompts, first.chosen, first.rejected, first.dropped) == (second.prompts, second.chosen, second.rejected, second.dropped)
    for name in ("chosen_reward", "rejected_reward", "preference"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a is None and b is None) or torch.equal(a, b)


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load_text_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"pairs {path}") and "\n" not in message
    return message.removeprefix(f"pairs {path}: ")


# --- formats ------------------------------------------------------------------------------------------------------------------------------------


def test_prompt_chosen_and_rejected_stay_as_they_are(tmp_path: Path) -> None:
    pairs = from_lines(tmp_path, {"prompt": " 2+3= ", "chosen": " 5", "rejected": "6\n", "id": 7})
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == ([Prompt("2+3=", {"id": 7})], [" 5"], ["6\n"])
    assert (pairs.chosen_reward, pairs.rejected_reward, pairs.preference, pairs.dropped, len(pairs)) == (None, None, None, 0, 1)
    assert_same_pairs(load_text_pairs(tmp_path), pairs)  # a folder stands for its pairs.jsonl


@pytest.mark.parametrize(
    ("line", "text", "messages"),
    [
        ({"chosen": [USER, said("5")], "rejected": [USER, said("6")]}, "2+3=?", [USER]),
        ({"chosen": [SYSTEM, USER, *MORE, said("5")], "rejected": [SYSTEM, USER, *MORE, said("6")]}, "the sum", [SYSTEM, USER, *MORE]),
        ({"prompt": "2+3=?", "chosen": [SYSTEM, USER, said("5")], "rejected": [SYSTEM, USER, said("6")]}, "2+3=?", [SYSTEM, USER]),
        ({"prompt": "2+3=? ", "chosen": [said("5")], "rejected": [said("6")]}, "2+3=?", [USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [said("5")], "rejected": [said("6")]}, "2+3=?", [SYSTEM, USER]),
        ({"prompt": [USER], "chosen": [USER, said("5")], "rejected": [USER, said("6")]}, "2+3=?", [USER]),
        ({"prompt": [USER], "chosen": [*MORE, said("5")], "rejected": [*MORE, said("6")]}, "the sum", [USER, *MORE]),
        ({"messages": [SYSTEM, USER], "chosen": "5", "rejected": "6"}, "2+3=?", [SYSTEM, USER]),
        ({"question": [USER], "chosen": "5", "rejected": "6"}, "2+3=?", [USER]),
        (
            {"prompt": "2+3=?", "messages": [USER, said("5")], "chosen": [USER, said("5")], "rejected": [USER, said("6")]},  # as UltraFeedback
            "2+3=?",
            [USER],
        ),
        ({"chosen": "\n\nHuman: 2+3=?\n\nAssistant: 5", "rejected": "\n\nHuman: 2+3=?\n\nAssistant: 6 "}, "2+3=?", [USER]),  # as HH
        (
            {
                "chosen": "\n\nHuman: 2+3=?\n\nAssistant: what?\n\nHuman: the sum\n\nAssistant: 5",
                "rejected": "\n\nHuman: 2+3=?\n\nAssistant: what?\n\nHuman: the sum\n\nAssistant: 6",
            },
            "the sum",
            [USER, *MORE],
        ),
    ],
)
def test_the_prompt_of_conversations_is_what_they_share(tmp_path: Path, line: dict[str, Any], text: str, messages: list[dict[str, str]]) -> None:
    pairs = from_lines(tmp_path, line)
    assert pairs.prompts == [Prompt(text, {"messages": messages})]
    assert (pairs.chosen, pairs.rejected) == (["5"], ["6"])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sum is 25", "The sum is 26", ("The sum is", " 25", " 26")),  # 2 is shared, but no word is cut
        ("one two", "one two three", ("one", " two", " two three")),
        ("a\n\nb", "a\n\nc", ("a", "\n\nb", "\n\nc")),
        ("Human: hi\n\nAssistant: a", "Human: hi\n\nAssistant: b", ("Human: hi\n\nAssistant:", " a", " b")),  # does not begin with an empty line
    ],
)
def test_texts_without_a_prompt_share_their_beginning_up_to_a_white_space(tmp_path: Path, chosen: str, rejected: str, expected: tuple[str, str, str]) -> None:
    pairs = from_lines(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert (pairs.prompts[0].text, pairs.chosen[0], pairs.rejected[0]) == expected
    assert pairs.prompts[0].metadata == {}
    assert (expected[0] + expected[1], expected[0] + expected[2]) == (chosen, rejected)


@pytest.mark.parametrize("names", [("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward")])
def test_scores_are_rewards(tmp_path: Path, names: tuple[str, str]) -> None:
    lines = [{"prompt": "a", "chosen": "b", "rejected": "c", names[0]: high, names[1]: low, "margin": 9} for high, low in ((2, 0.5), (1, 1))]
    pairs = from_lines(tmp_path, *lines)
    assert pairs.chosen_reward is not None and pairs.rejected_reward is not None
    assert (pairs.chosen_reward.dtype, pairs.chosen_reward.tolist(), pairs.rejected_reward.tolist()) == (torch.float32, [2, 1], [0.5, 1])
    assert (pairs.prompts[0].metadata, pairs.dropped) == ({"margin": 9}, 0)  # equal scores are no tie: the columns say which one was chosen


def test_a_margin_is_the_difference_of_the_rewards_and_a_preference_a_chance(tmp_path: Path) -> None:
    pairs = from_lines(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5, "preference": 0.5})
    assert pairs.chosen_reward is not None and pairs.rejected_reward is not None and pairs.preference is not None
    assert (pairs.chosen_reward - pairs.rejected_reward).tolist() == [1.5]
    assert (pairs.preference.tolist(), pairs.dropped, pairs.prompts[0].metadata) == ([0.5], 0, {})


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        ("preference", [0, 1, 0.5, None, 0.0]),
        ("label", ["response_0", "response_1", "tie", None, "response_0"]),
        ("better_response_id", [0, 1, None, None, 0]),
        ("label_0", [1, 0, 0.5, None, 1.0]),
    ],
)
def test_numbered_responses_are_ordered_by_their_label_and_ties_are_dropped(tmp_path: Path, column: str, labels: list[Any]) -> None:
    lines = [{"prompt": f"q{i}", "response_0": f"a{i}", "response_1": f"b{i}", "score_0": i, "score_1": -i, column: label} for i, label in enumerate(labels)]
    lines[2]["response_1"] = "a2"  # of a tie nothing is read
    pairs = from_lines(tmp_path, *lines)
    assert ([prompt.text for prompt in pairs.prompts], pairs.dropped, pairs.preference) == (["q0", "q1", "q4"], 2, None)
    assert (pairs.chosen, pairs.rejected) == (["a0", "b1", "a4"], ["b0", "a1", "b4"])
    assert pairs.chosen_reward is not None and pairs.rejected_reward is not None
    assert (pairs.chosen_reward.tolist(), pairs.rejected_reward.tolist()) == ([0, -1, 4], [0, 1, -4])
    assert pairs.prompts[0].metadata == {}


def test_numbered_responses_may_be_conversations(tmp_path: Path) -> None:
    pairs = from_lines(tmp_path, {"response_0": [USER, said("6")], "response_1": [USER, said("5")], "better_response_id": 1, "safer_response_id": 0})
    assert (pairs.prompts, pairs.chosen, pairs.rejected) == ([Prompt("2+3=?", {"safer_response_id": 0, "messages": [USER]})], ["5"], ["6"])


def test_a_hub_id_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": rows}))
    assert load_text_pairs("someone/pairs").chosen == ["b"]


# --- mistakes -----------------------------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2 has no `rejected`; every pair needs chosen and rejected"),
        ({"prompt": "a", "chosen": "b", "rejeted": "c"}, "line 2 has no `rejected`; did you mean rejeted? write `rejected`"),
        ({"prompt": "a"}, "line 2 has no `chosen`; every pair needs chosen and rejected"),
        ({**PAIR, "chosen": None}, "line 2 has no `chosen`"),
        ({"prompt": "a", "response_0": "b", "preference": 1}, "line 2 has no `response_1`; every pair needs response_0, response_1 and a label"),
        ({**PAIR, "response_0": "b", "response_1": "c"}, "has chosen and rejected, and response_0 and response_1; keep one of the two forms"),
        ({**PAIR, "chosen": ""}, "line 2: the chosen answer is empty; remove the pair"),
        ({**PAIR, "rejected": " \n"}, "line 2: the rejected answer is empty; remove the pair"),
        ({**PAIR, "rejected": "b "}, "line 2: the chosen and the rejected answer are the same; remove the pair"),
        ({"chosen": [USER, said("5")], "rejected": [USER, said("5")]}, "line 2: the chosen and the rejected answer are the same; remove the pair"),
        ({"chosen": "a b", "rejected": "a b"}, "line 2: the chosen and the rejected answer are the same; remove the pair"),
        ({"chosen": "ab c", "rejected": "ac d"}, "line 2 has no `prompt`, and chosen and rejected share no beginning; give a `prompt`"),
        ({**PAIR, "prompt": ""}, "line 2: `prompt` is empty"),
        ({**PAIR, "prompt": " "}, "line 2: `prompt` is empty"),
        ({**PAIR, "prompt": 3}, "line 2: `prompt` is not a list of messages"),
        ({**PAIR, "question": "a"}, "line 2 has `prompt` and `question`; keep the one that is the prompt"),
        ({**PAIR, "messages": [USER]}, "line 2 has `prompt` and `messages`; keep the one that is the prompt"),
        ({**PAIR, "chosen": [said("5")]}, "line 2: chosen is a list, rejected a text; both are texts, or both are lists of messages"),
        ({**PAIR, "chosen": 5, "rejected": 6}, "line 2: chosen is int, rejected int; both are texts"),
        ({"chosen": [said("5")], "rejected": [said("6")]}, "line 2: chosen and rejected share no beginning; give a `prompt`"),
        ({"chosen": [USER, said("5"), USER], "rejected": [USER, said("6")]}, "after the shared history chosen has 2 messages (assistant, user); one text"),
        ({"chosen": [USER, said("5")], "rejected": [USER, said("5"), USER]}, "after the shared history rejected has 2 messages (assistant, user); one text"),
        ({"chosen": [USER, said("5")], "rejected": [USER, SYSTEM]}, "after the shared history rejected has 1 messages (system); one text of the assistant"),
        ({"chosen": [USER, said("a"), said("5")], "rejected": [USER, said("a"), said("6")]}, "the last message before the answer is of the role assistant"),
        (
            {"chosen": [{"role": "usr", "content": "a"}, said("5")], "rejected": [USER, said("6")]},
            "message 1 of `chosen` has the role 'usr'; did you mean user?",
        ),
        ({"chosen": [USER, said("")], "rejected": [USER, said("6")]}, "message 2 of `chosen` (assistant) is empty"),
        ({"prompt": "another", "chosen": [USER, said("5")], "rejected": [USER, said("6")]}, "the prompt is not what the user said last in chosen and rejected"),
        ({"prompt": [SYSTEM], "chosen": [USER, said("5")], "rejected": [USER, said("6")]}, "neither begin with the messages of the prompt nor follow after"),
        ({"prompt": [USER, said("a")], "chosen": "5", "rejected": "6"}, "the last message before the answer is of the role assistant; it must be the user's"),
        ({**PAIR, "preference": 1.5}, "line 2: `preference` is 1.5; it is the chance that the chosen answer is the better one, from 0 to 1"),
        ({**PAIR, "preference": "0"}, "line 2: `preference` is '0'; give a finite number"),
        ({**PAIR, "chosen_score": 1}, "line 2 has no `rejected_score` beside `chosen_score`; give both scores or none"),
        ({**PAIR, "rejected_score": 1}, "line 2 has no `chosen_score` beside `rejected_score`; give both scores or none"),
        ({**PAIR, "chosen_score": True, "rejected_score": 0}, "line 2: `chosen_score` is True; give a finite number"),
        ({**PAIR, "chosen_score": float("nan"), "rejected_score": 0}, "line 2: `chosen_score` is nan; give a finite number"),
        ({**PAIR, "chosen_score": 1, "rejected_score": 0, "score_chosen": 1}, "has chosen_score and score_chosen; keep the scores that are meant"),
        ({**PAIR, "chosen_score": 1, "rejected_score": 0}, "line 2 has scores or a margin, unlike the first pair; give it for all pairs or for none"),
        ({**PAIR, "preference": 1}, "line 2 has a `preference`, unlike the first pair; give it for all pairs or for none"),
        ({"prompt": "a", "response_0": "b", "response_1": "c"}, "line 2 has no label; give `preference`: 0 where response_0 is the better one"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "lable": 1}, "line 2 has no label; did you mean lable? write `label`"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "preference": 0.7}, "line 2: `preference` is 0.7; it is 0, 1, or 0.5 for a tie"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "label": "first"}, "line 2: `label` is 'first'; it is 0, 1, or 0.5 for a tie"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "label": True}, "line 2: `label` is True; it is 0, 1, or 0.5 for a tie"),
        ({"prompt": "a", "response_0": "b", "response_1": "c", "label": 1, "preference": 1}, "has `preference` and `label`; keep the one that is the label"),
        ({"chosen": [USER, said("5")], "rejected": [USER, said("6")], "metadata": {"messages": 1}}, "`metadata` has messages too; keep one"),
        ({**PAIR, "metadata": 3}, "line 2: `metadata` is not an object"),
        ([PAIR], 'line 2 is no object, for example {"prompt": "2+3=", "chosen": "5", "rejected": "6"}'),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: object, message: str) -> None:
    found = refusal(write_lines(tmp_path, PAIR, line))
    assert found.startswith("line 2")
    assert message in found


def test_what_is_no_file_of_pairs_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == "no such file"
    assert refusal(write_lines(tmp_path)) == "is empty; give one pair a line"
    tie = {"prompt": "a", "response_0": "b", "response_1": "c", "label": "tie"}
    assert refusal(write_lines(tmp_path, tie, tie)) == "all 2 pairs are ties"
    (tmp_path / "pairs.jsonl").write_text("{\n")
    assert refusal(tmp_path / "pairs.jsonl").startswith("line 1 is not valid JSON")
    assert refusal("./none") == "no such file or folder; give a .jsonl or .parquet file, a folder that `datasets` saved, or a hub id"
    datasets.Dataset.from_dict({"prompt": ["a"], "chosen": [b"b"], "rejected": ["c"]}).to_parquet(tmp_path / "p.parquet")
    assert refusal(tmp_path / "p.parquet") == "column `chosen` holds Value('binary'); texts or conversations are needed"
    datasets.Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["b", "c"], "rejected": ["c", "c"]}).to_parquet(tmp_path / "p.parquet")
    assert refusal(tmp_path / "p.parquet") == "row 1: the chosen and the rejected answer are the same; remove the pair"


def test_every_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "text_data.md").read_text()
    examples = [line.removeprefix("| `").partition("` |")[0] for line in page.splitlines() if line.startswith('| `{"')]
    messages = {"[USER, GOOD]": [USER, said("5")], "[USER, BAD]": [USER, said("6")], "[USER]": [USER], "[GOOD]": [said("5")], "[BAD]": [said("6")]}
    count = {"prompts": 0, "pairs": 0}
    for line in examples:
        example = line.replace("2+3=", "2+3=?")
        for name, value in messages.items():
            example = example.replace(name, json.dumps(value))
        is_pair = "chosen" in example or "response_0" in example
        count["pairs" if is_pair else "prompts"] += 1
        file = write_lines(tmp_path, json.loads(example))
        prompt = load_text_pairs(file).prompts[0] if is_pair else load_prompts(file)[0]
        assert prompt.text in ("What is 2 + 3?", "2+3=?", "2+3?", "The sum is")
    assert count == {"prompts": 5, "pairs": 8}
