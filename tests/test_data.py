"""Prompt files and the order in which prompts are sampled."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.data import GroupSampler, load_prompts
from flowrl.types import Prompt, UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_gives_one_prompt_a_line(tmp_path: Path) -> None:
    expected = [Prompt("a red circle"), Prompt("ein grünes Quadrat")]
    assert load_prompts(write(tmp_path / "p.txt", "a red circle\n ein grünes Quadrat \n")) == expected
    assert load_prompts(write(tmp_path / "p.txt", "a red circle\nein grünes Quadrat")) == expected
    (tmp_path / "windows.txt").write_bytes("\ufeffa red circle\r\nein grünes Quadrat\r\n".encode())
    assert load_prompts(tmp_path / "windows.txt") == expected


def test_a_jsonl_file_gives_prompts_with_metadata(tmp_path: Path) -> None:
    lines = [{"prompt": " two cats ", "count": 2}, {"metadata": {"count": 1, "deep": {"a": [1]}}, "prompt": "a dog", "id": "x"}]
    prompts = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert prompts == [Prompt("two cats", {"count": 2}), Prompt("a dog", {"id": "x", "count": 1, "deep": {"a": [1]}})]


def test_a_line_separator_inside_a_prompt_does_not_end_the_line(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False)
    assert load_prompts(write(tmp_path / "p.jsonl", line)) == [Prompt("a\u2028b")]


@pytest.mark.parametrize("split", ["train", "eval", "unseen"])
def test_the_embedded_prompt_sets_load_without_duplicates(split: str) -> None:
    texts = [prompt.text for prompt in load_prompts(f"flowrl:tiny-sd3/{split}")]
    assert len(texts) == len(set(texts)) >= 8


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "is empty; give one prompt a line"),
        ("p.txt", " \n\n", "is empty; give one prompt a line"),
        ("p.txt", "a\n\nb\n", "line 2 is blank; remove empty lines"),
        ("p.txt", "a\n\n \nb\n\n", "lines 2, 3, 5 are blank; remove empty lines"),
        ("p.txt", "a" + 7 * "\n" + "b", "lines 2, 3, 4, 5, 6 and 1 more are blank; remove empty lines"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"}', "line 2 is blank"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "line 2 is not valid JSON (Expecting value at column 12)"),
        ("p.jsonl", '{"text": "a"}', 'line 1 needs a non-empty text under `prompt`, for example {"prompt": "a red circle"}'),
        ("p.jsonl", '{"prompt": 3}', "line 1 needs a non-empty text under `prompt`"),
        ("p.jsonl", '{"prompt": " "}', "line 1 needs a non-empty text under `prompt`"),
        ("p.jsonl", '"a red circle"', "line 1 needs a non-empty text under `prompt`"),
        ("p.jsonl", '{"prompt": "a", "metadata": 3}', "line 1: `metadata` is not an object"),
        ("p.jsonl", '{"prompt": "a", "n": 1, "metadata": {"n": 2}}', "line 1: n stands both beside and inside `metadata`"),
        ("p.csv", "a\n", "give a .txt file with one prompt a line or a .jsonl file"),
    ],
)
def test_a_bad_prompt_file_is_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"prompts {path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.txt")


@pytest.mark.parametrize("name", ["flowrl:tiny-sd3/trian", "flowrl:../secret", "flowrl:"])
def test_an_unknown_embedded_set_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"no such embedded set; (did you mean|known:) .*flowrl:tiny-sd3/"):
        load_prompts(name)


# --- language models ----------------------------------------------------------------------------------------------------------------------------


SYSTEM, USER, ASSISTANT = ({"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant"))


def refusal(path: object) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(str(path))
    said = str(caught.value)
    assert said.startswith(f"prompts {path}") and "\n" not in said
    return said.removeprefix(f"prompts {path}: ")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": " 2+3=? ", "answer": 5}, Prompt("2+3=?", {"answer": 5})),
        ({"question": "2+3=?", "answer": "two and three\n#### 5"}, Prompt("2+3=?", {"answer": "two and three\n#### 5"})),
        ({"problem": "2+3=?", "solution": "so $5$", "level": 1}, Prompt("2+3=?", {"answer": "so $5$", "solution": "so $5$", "level": 1})),
        ({"problem": "2+3=?", "solution": "so 5", "answer": "5"}, Prompt("2+3=?", {"answer": "5", "solution": "so 5"})),
        ({"messages": [SYSTEM, USER], "answer": 5}, Prompt("user says", {"messages": [SYSTEM, USER], "answer": 5})),
        ({"prompt": [USER, ASSISTANT, USER]}, Prompt("user says", {"messages": [USER, ASSISTANT, USER]})),
        ({"messages": [{**USER, "name": None, "id": 7}]}, Prompt("user says", {"messages": [{**USER, "id": 7}]})),
        ({"prompt": "a", "metadata": {"question": "kept", "n": 1}}, Prompt("a", {"question": "kept", "n": 1})),
        ({"prompt": "a", "metadata": None}, Prompt("a")),
    ],
)
def test_texts_questions_and_conversations_are_read_from_lines_and_tables_alike(tmp_path: Path, line: dict[str, Any], prompt: Prompt) -> None:
    assert load_prompts(write(tmp_path / "p.jsonl", json.dumps(line))) == [prompt]
    datasets.Dataset.from_list([line]).save_to_disk(tmp_path / "rows")
    assert load_prompts(tmp_path / "rows") == [prompt]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "question": "b"}, "line 2 has `prompt` and `question`; keep the one that is the prompt"),
        ({"prompt": "a", "messages": [USER]}, "line 2 has `prompt` and `messages`; keep the one that is the prompt"),
        ({"promt": "a"}, 'needs a non-empty text under `prompt`, for example {"prompt": "a red circle"}; did you mean promt? write `prompt`'),
        ({"quesion": "a"}, "did you mean quesion? write `question`"),
        ({"question": ["a"]}, 'line 2 needs a non-empty text under `question`, for example {"question": "What is 2 + 3?"}'),
        ({"question": ""}, "line 2 needs a non-empty text under `question`"),
        (
            {"prompt": "a", "solution": "1", "ground_truth": "2"},
            "`solution` and `ground_truth`; keep the one that is the right answer, and call it `answer`",
        ),
        ({"messages": "hello"}, "line 2: `messages` is not a list of messages, for example [{"),
        ({"messages": []}, "line 2: `messages` is not a list of messages"),
        ({"messages": [USER, ASSISTANT]}, "the last message of `messages` is of the role assistant; a prompt ends with the user's"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1 of `messages` has the role 'usr'; did you mean user?"),
        ({"messages": [{"role": 3, "content": "a"}]}, "has the role 3; known: system, developer, user, assistant, tool"),
        ({"messages": [SYSTEM, {"role": "user", "content": " "}]}, "message 2 of `messages` (user) is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "message 1 of `messages` has a content that is list, not text"),
        ({"messages": [{"role": "user", "content": None}]}, "has a content that is NoneType, not text"),
        ({"messages": [{"from": "human", "value": "a"}]}, "message 1 of `messages` has from, value; it needs `role` and `content`"),
        ({"messages": ["hello"]}, "message 1 of `messages` is str; it needs `role` and `content`"),
        ({"messages": [USER], "metadata": {"messages": 1}}, "`metadata` has messages too; keep one"),
        ([1], "line 2 needs a non-empty text under `prompt`"),
    ],
)
def test_a_wrong_line_for_a_language_model_is_refused(tmp_path: Path, line: object, message: str) -> None:
    said = refusal(write(tmp_path / "p.jsonl", json.dumps({"prompt": "first"}) + "\n" + json.dumps(line)))
    assert said.startswith("line 2")
    assert message in said


def test_a_line_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    depth = 200_000
    said = refusal(write(tmp_path / "p.jsonl", '{"prompt": "a", "n": ' + "[" * depth + "]" * depth + "}"))
    assert said == "line 1 is not usable JSON (nested too deeply)"


def test_an_assistant_that_calls_a_tool_may_say_nothing(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "calc"}]}
    messages = [USER, call, {"role": "tool", "content": "36"}, USER]
    prompt = load_prompts(write(tmp_path / "p.jsonl", json.dumps({"messages": messages})))[0]
    assert prompt.metadata["messages"][1] == {**call, "content": ""}
    assert "(assistant) is empty" in refusal(write(tmp_path / "p.jsonl", json.dumps({"messages": [{"role": "assistant", "content": ""}, USER]})))


@pytest.mark.parametrize("stored", ["folder", "split folder", "parquet", "torch format"])
def test_a_table_gives_its_rows_in_order_without_pictures_bytes_and_dates(tmp_path: Path, stored: str, capfd: pytest.CaptureFixture[str]) -> None:
    n = 2500  # more than are read at once
    rows = datasets.Dataset.from_dict(
        {"question": [f" {i}+0 " for i in range(n)], "answer": list(range(n)), "scan": [b"\xff"] * n, "tags": [["a"]] * n, "ok": [True] * n},
        features=datasets.Features(
            {
                "question": datasets.Value("string"),
                "answer": datasets.Value("int64"),
                "scan": datasets.Value("binary"),
                "tags": datasets.List(datasets.Value("string")),
                "ok": datasets.Value("bool"),
            }
        ),
    )
    rows = rows.add_column("picture", [None] * n, feature=datasets.Image()).add_column("day", [None] * n, feature=datasets.Value("date32"))
    path = tmp_path / ("rows.parquet" if stored == "parquet" else "rows")
    if stored == "parquet":
        rows.to_parquet(path)
    elif stored == "split folder":
        datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(path)
    else:
        (rows.with_format("torch") if stored == "torch format" else rows).save_to_disk(path)
    capfd.readouterr()
    prompts = load_prompts(path)
    assert capfd.readouterr().err == ""  # no progress bar
    assert [prompt.text for prompt in prompts] == [f"{i}+0" for i in range(n)]
    assert prompts[2000].metadata == {"answer": 2000, "tags": ["a"], "ok": True}
    assert type(prompts[0].metadata["answer"]) is int


def test_a_hub_id_may_name_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: str) -> Any:
        return datasets.DatasetDict({split: datasets.Dataset.from_dict({"question": [f"{'/'.join(names)} {split}"]}) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = {name: load_prompts(name)[0].text for name in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k:main@test", "openai/gsm8k@test")}
    assert list(said.values()) == ["openai/gsm8k train", "openai/gsm8k/main train", "openai/gsm8k/main test", "openai/gsm8k test"]
    assert refusal("openai/gsm8k@tset") == "no split is called tset; did you mean test?"


def test_a_wrong_table_of_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(table: dict[str, list[Any]]) -> Path:
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    assert refusal(stored({"promt": ["a"]})) == "no column `prompt`, `question`, `problem` or `messages`; did you mean promt? write `prompt`"
    assert refusal(stored({"x": ["a"], "y": ["b"]})) == "no column `prompt`, `question`, `problem` or `messages`; it has x, y"
    assert refusal(stored({"prompt": ["a"], "problem": ["b"]})) == "the table has `prompt` and `problem`; keep the one that is the prompt"
    assert refusal(stored({"prompt": [b"a"]})) == "column `prompt` holds Value('binary'), not text"
    assert refusal(stored({"prompt": ["a", None]})).startswith("row 1 needs a non-empty text under `prompt`")
    assert refusal(stored({"prompt": [3]})).startswith("row 0 needs a non-empty text under `prompt`")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.Dataset.from_dict({"prompt": []}))
    assert refusal("someone/none") == "has no rows"
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "rows")
    assert refusal(tmp_path / "rows").startswith("cannot be loaded by `datasets` (")
    accepted = "give a .txt file with one prompt a line or a .jsonl file with a `prompt` key, a .parquet file, a folder that `datasets` saved, or a hub id"
    assert refusal("./none") == f"no such file or folder; {accepted}"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith("cannot be loaded by `datasets` (")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the `datasets` library: run `pip install 'flowrl-diffusion[data]'`, or give a .jsonl file" in refusal(tmp_path / "p.parquet")


def test_the_text_rewards_read_gsm8k_answers_that_are_kept_raw(tmp_path: Path) -> None:
    """What docs/text_data.md says: `exact_match` and `math` take the number behind #### of a gold answer; in a completion only `exact_match` does."""
    from flowrl.types import SampleBatch
    from rewards.math_verifier import judge
    from rewards.text_match import ExactMatch

    gold = "Tom has 2*3=<<2*3=6>>6 at $5 each.\n#### 1,030"
    prompts = load_prompts(write(tmp_path / "p.jsonl", json.dumps({"question": "q", "answer": gold})))
    assert prompts[0].metadata["answer"] == gold
    texts = ["so\n#### 1030", r"\boxed{1030}", r"\boxed{6}"]
    reward = ExactMatch()
    reward.load(torch.device("cpu"), torch.float32)
    assert reward.score(SampleBatch(prompts * 3, texts=texts)).values.tolist() == [1, 1, 0]
    assert [judge(gold, text) for text in texts] == ["no answer", "right", "wrong"]


# --- which prompts an iteration samples ---------------------------------------------------------------------------------------------------------


@given(num_prompts=st.integers(1, 14), groups=st.integers(1, 30), seed=st.integers(0, 5))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_prompts_of_an_iteration_are_distinct_while_possible(num_prompts: int, groups: int, seed: int) -> None:
    sampler = GroupSampler(num_prompts, groups, seed)
    for iteration in range(25):
        counts = Counter(sampler.groups(iteration))
        assert counts.total() == groups
        assert len(counts) == min(num_prompts, groups)
        assert max(counts.values()) - min(counts[index] for index in range(num_prompts)) <= 1


@given(num_prompts=st.integers(2, 14), groups=st.integers(1, 13), seed=st.integers(0, 5))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_every_epoch_takes_every_prompt_once(num_prompts: int, groups: int, seed: int) -> None:
    groups = min(groups, num_prompts - 1)
    sampler = GroupSampler(num_prompts, groups, seed)
    drawn = [index for iteration in range(30) for index in sampler.groups(iteration)]
    for epoch in range(len(drawn) // num_prompts):
        assert sorted(drawn[epoch * num_prompts : (epoch + 1) * num_prompts]) == list(range(num_prompts))


@given(num_prompts=st.integers(1, 20), groups=st.integers(1, 25), iteration=st.integers(0, 400))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_an_iteration_draws_the_same_prompts_whatever_was_drawn_before(num_prompts: int, groups: int, iteration: int) -> None:
    used = GroupSampler(num_prompts, groups, 3)
    for other in (iteration + 5, 0, iteration // 2):
        used.groups(other)
    assert used.groups(iteration) == GroupSampler(num_prompts, groups, 3).groups(iteration)


def test_orders_differ_between_epochs_and_seeds() -> None:
    first = GroupSampler(50, 25, 0)
    epochs = {tuple(first.groups(2 * epoch) + first.groups(2 * epoch + 1)) for epoch in range(20)}
    assert len(epochs) == 20
    assert len({tuple(GroupSampler(50, 25, seed).groups(0)) for seed in range(20)}) == 20


def test_every_prompt_is_equally_likely_to_come_first() -> None:
    # 2,000 seeds over 5 prompts: 400 each with a standard deviation of sqrt(2000 * 0.2 * 0.8) = 17.9; 5 of them are 90.
    counts = Counter(GroupSampler(5, 2, seed).groups(0)[0] for seed in range(2000))
    assert all(abs(counts[index] - 400) < 90 for index in range(5))


def test_counts_below_one_and_iterations_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        GroupSampler(0, 1, 0)
    with pytest.raises(ValueError, match="at least one prompt"):
        GroupSampler(1, 0, 0)
    with pytest.raises(ValueError, match="below 0"):
        GroupSampler(3, 2, 0).groups(-1)
