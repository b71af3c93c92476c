"""Prompt files and the order in which prompts are sampled."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
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
