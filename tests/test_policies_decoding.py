"""Sampling from distributions, and the decoder on a model whose next token depends on the last one alone, so that every answer can be worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from rows import ids, row, seeded
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from flowrl.policies.caches import GrowingLayer
from flowrl.policies.decoding import filtered, generate, inverse_cdf
from flowrl.sections import GenerationConfig
from flowrl.types import Completions

CPU = torch.device("cpu")
PAD, END = 0, 1
LETTERS = "_$abcdefgh"


class Cache:
    """How many rows there are."""

    rows = 0

    def batch_select_indices(self, rows: Tensor) -> None:
        self.rows = len(rows)

    def move_right(self, by: Tensor) -> None:
        assert len(by) == self.rows


class Chain:
    """Logits that depend on the last token alone; it keeps a record of what it was asked."""

    pad, device = PAD, CPU

    def __init__(self, logits: Tensor, ends: Sequence[int] = (END,), at_once: int = 64) -> None:
        self.logits, self.ends, self.at_once = logits, frozenset(ends), at_once
        self.calls: list[tuple[int, int]] = []
        self.tokens = 0

    def new_cache(self) -> Any:
        return Cache()

    def next_logits(self, token: Tensor, mask: Tensor, positions: Tensor, cache: Cache, real: int, last: Tensor | None = None) -> Tensor:
        assert cache.rows in (0, len(token))
        cache.rows = len(token)
        assert torch.equal(positions[:, -1] + 1, mask.sum(1)) or not bool(mask[:, -1].all())
        self.calls.append((len(token), token.shape[1]))
        self.tokens += real
        return self.logits[token[:, -1] if last is None else token.gather(1, last[:, None])[:, 0]]

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(LETTERS[number] for number in text if number not in (PAD, END)) for text in tokens]

    def in_parts(self, count: int, work: Callable[[slice], Tensor]) -> Tensor:
        return torch.cat([work(slice(start, min(count, start + self.at_once))) for start in range(0, count, self.at_once)])


def chain(**likely: str) -> Chain:
    """Each letter is followed by another for certain; so a="b" is a -> b."""
    logits = torch.full((len(LETTERS), len(LETTERS)), -math.inf)
    logits[:, END] = -1e3
    for letter, after in likely.items():
        logits[LETTERS.index(letter), LETTERS.index(after)] = 0.0
    return Chain(logits)


def noisy(seed: int = 0, at_once: int = 64) -> Chain:
    logits = torch.randn(len(LETTERS), len(LETTERS), generator=seeded(seed))
    logits[:, PAD] = -math.inf
    return Chain(logits, at_once=at_once)


def numbers(text: str) -> Tensor:
    return ids(*(LETTERS.index(letter) for letter in text))


def said(model: Chain, prompts: Sequence[str], counts: Sequence[int], seed: int = 0, **more: Any) -> Completions:
    named = {name: more.pop(name) for name in ("prefix", "prefix_log_prob", "greedy") if name in more}
    settings = GenerationConfig(**{"max_new_tokens": 6, **more})
    return generate(model, [numbers(text) for text in prompts], counts, settings, [seeded(seed + i) for i in range(len(prompts))], **named)


# --- distributions ------------------------------------------------------------------------------------------------------------------------------


def test_a_token_is_where_the_number_falls():
    log_p = row(0.2, 0.0, 0.5, 0.3).log().expand(7, 4)
    found = inverse_cdf(log_p, row(0.0, 0.19, 0.21, 0.69, 0.71, 0.999, 1 - 2**-53))
    assert found.tolist() == [0, 0, 2, 2, 3, 3, 3]  # the second has no share


def test_what_is_ruled_out_is_never_drawn_and_the_rest_as_often_as_it_should():
    log_p = torch.randn(1, 50, generator=seeded()).masked_fill(torch.arange(50) % 3 == 0, -math.inf).float()
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    count = torch.bincount(inverse_cdf(log_p.expand(20000, 50), grid), minlength=50) / 20000
    torch.testing.assert_close(count, log_p.softmax(-1)[0], rtol=0, atol=1e-4)
    assert count[::3].sum() == 0
    assert inverse_cdf(torch.full((1, 3), -math.inf).index_fill(1, ids(2), 0.0), row(0.0)).item() == 2
    assert inverse_cdf(torch.full((1, 3), -math.inf).index_fill(1, ids(0), 0.0), row(1 - 2**-53)).item() == 0


def test_filters_by_hand():
    log_p = row(0.4, 0.1, 0.3, 0.2).log()[None]
    kept = lambda **s: filtered(log_p, GenerationConfig(**s)).isfinite()[0].tolist()  # noqa: E731
    assert kept(top_k=2) == [True, False, True, False]
    assert kept(top_p=0.69) == [True, False, True, False]
    assert kept(top_p=0.71) == [True, False, True, True]
    assert kept(top_p=0.01) == [True, False, False, False]  # the likeliest always stays
    assert kept(min_p=0.49) == [True, False, True, True]
    assert kept(top_k=2, top_p=0.56) == [True, False, False, False]  # 0.4 of 0.7 is enough
    assert kept() == [True] * 4


@pytest.mark.parametrize("settings", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}, {"top_k": 1000}])
def test_filters_are_those_of_transformers(settings: dict[str, float]):
    log_p = (3 * torch.randn(20, 60, generator=seeded(3))).log_softmax(-1)
    theirs = log_p
    for kind, name in ((TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"), (MinPLogitsWarper, "min_p")):
        theirs = kind(settings[name])(None, theirs) if name in settings else theirs
    assert torch.equal(filtered(log_p, GenerationConfig(**settings)), theirs)


# --- answers by hand ----------------------------------------------------------------------------------------------------------------------------


def test_answers_end_with_the_end_token_or_at_the_limit():
    found = said(chain(a="b", b="c", c="$", d="e", e="d"), ["a", "dd", "b"], [2, 1, 1])
    assert found.texts == ("bc", "bc", "ededed", "c")
    assert found.tokens.tolist() == [[3, 4, 1, 0, 0, 0], [3, 4, 1, 0, 0, 0], [6, 5, 6, 5, 6, 5], [4, 1, 0, 0, 0, 0]]
    assert (found.length.tolist(), found.group.tolist(), found.finished.tolist()) == ([3, 3, 6, 2], [0, 0, 1, 2], [True, True, False, True])
    assert found.mask.sum(1).tolist() == [3, 3, 6, 2] and not found.mask[0, 3:].any()
    assert [prompt.tolist() for prompt in found.prompt_tokens] == [[2], [5, 5], [3]]
    assert found.log_prob.abs().max() == 0 and found.turn is None


def test_the_batch_is_as_wide_as_the_longest_answer():
    assert said(chain(a="b", b="$"), ["a"], [3]).tokens.shape == (3, 2)


def test_stop_texts_end_an_answer_also_across_tokens_and_stay_in_it():
    model = chain(a="b", b="c", c="d", d="e", e="f", f="a")
    found = said(model, ["a", "c"], [1, 1], stop=("de", "xyz"), max_new_tokens=9)
    assert found.texts == ("bcde", "de") and found.finished.tolist() == [True, True]
    assert said(model, ["a"], [1], stop=("x",), max_new_tokens=4).finished.tolist() == [False]


def test_before_min_new_tokens_no_end_is_sampled_and_no_stop_text_is_looked_for():
    model = chain(a="b", b="$")
    model.logits[3, 4] = -5.0  # b is followed by the end, or else by c
    model.logits[4, 1] = 0.0
    assert said(model, ["a"], [1], greedy=True).texts == ("b",)
    found = said(model, ["a"], [1], greedy=True, min_new_tokens=2)
    assert found.texts == ("bc",) and found.length.item() == 3
    assert found.log_prob[0, 1].item() == pytest.approx(-math.log(1 + math.exp(5)), abs=1e-6)  # of the distribution as it is
    again = chain(a="b", b="a")
    assert said(again, ["a"], [1], stop=("b",), min_new_tokens=2).texts == ("bab",)


def test_log_probabilities_are_those_at_the_temperature_before_the_filters():
    model = noisy()
    found = said(model, ["abc"], [5], temperature=0.6, top_k=3)
    tokens = torch.cat((torch.full((5, 1), LETTERS.index("c")), found.tokens), 1)
    expected = (model.logits / 0.6).log_softmax(-1)[tokens[:, :-1], tokens[:, 1:]]
    torch.testing.assert_close(found.log_prob, torch.where(found.mask, expected, 0.0))
    assert (found.log_prob[found.mask] < 0).all()


def test_a_prefix_begins_the_answer_and_counts_as_sampled_only_if_its_log_probabilities_are_given():
    model, prefix = chain(a="b", b="c", c="d", d="$"), [numbers("bc"), ids(), numbers("$")]
    found = said(model, ["a"], [3], prefix=prefix)
    assert found.texts == ("bcd", "bcd", "") and found.length.tolist() == [4, 4, 2]
    assert found.mask.tolist()[0][:4] == [False, False, True, True] and found.mask[1, :4].all()
    given = said(model, ["a"], [3], prefix=prefix, prefix_log_prob=[row(-1, -2), row(), row(-3)])
    assert given.log_prob.tolist() == [[-1, -2, 0, 0], [0, 0, 0, 0], [-3, 0, 0, 0]] and given.mask[0, :4].all()


def test_a_stop_text_within_a_prefix_does_not_end_the_answer():
    assert said(chain(a="b", b="c", c="b"), ["a"], [1], prefix=[numbers("cb")], stop=("b",)).texts == ("cbcb",)


# --- randomness ---------------------------------------------------------------------------------------------------------------------------------


def assert_same(left: Completions, right: Completions, rows: slice = slice(None)) -> None:
    width = min(left.tokens.shape[1], right.tokens.shape[1])
    for name in ("tokens", "mask", "log_prob"):
        torch.testing.assert_close(getattr(left, name)[rows, :width], getattr(right, name)[:, :width], rtol=0, atol=0)
    assert left.texts[rows] == right.texts


def test_answers_do_not_depend_on_what_else_is_in_the_batch_nor_on_its_size():
    prompts, counts = ["ab", "c", "defg"], [4, 1, 3]
    everything = said(noisy(), prompts, counts, max_new_tokens=12)
    assert len(set(everything.texts)) > 4
    for at_once in (1, 3):
        assert_same(everything, said(noisy(at_once=at_once), prompts, counts, max_new_tokens=12))
    settings = GenerationConfig(max_new_tokens=12)
    alone = generate(noisy(), [numbers("defg")], [3], settings, [seeded(2)])
    assert_same(everything, alone, slice(5, 8))


def test_a_generator_moves_by_as_much_whatever_is_said():
    own = seeded(9)
    generate(chain(a="$"), [numbers("a")], [3], GenerationConfig(max_new_tokens=5), [own])
    other = seeded(9)
    torch.rand(3, 5, generator=other, dtype=torch.float64)
    assert torch.equal(own.get_state(), other.get_state())


def test_an_answer_that_was_cut_goes_on_as_it_would_have():
    whole = said(noisy(), ["ab"], [4], max_new_tokens=10)
    start = [text[: max(0, min(4, int(length) - 1))] for text, length in zip(whole.tokens, whole.length, strict=True)]
    known = [values[: len(text)] for values, text in zip(whole.log_prob, start, strict=True)]
    again = said(noisy(), ["ab"], [4], max_new_tokens=10, prefix=start, prefix_log_prob=known)
    assert_same(whole, again)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    model = noisy(4)
    found = said(model, ["a"], [4000], max_new_tokens=1, temperature=1.5)
    share = torch.bincount(found.tokens[:, 0], minlength=len(LETTERS)) / 4000
    expected = (model.logits[2] / 1.5).softmax(-1)
    assert ((share - expected).abs() < 4 * (expected / 4000).sqrt() + 1e-9).all()


# --- work ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_read_once_for_its_group_and_finished_rows_leave():
    model = chain(a="b", b="c", c="d", d="$", e="$")
    said(model, ["aaa", "e"], [2, 6])
    assert model.calls == [(2, 3), (2, 1), (2, 1), (2, 1)]  # both prompts; then the six answers to e have ended with their first token
    assert model.tokens == (3 + 1) + 3 * 2


def test_rows_wait_until_enough_have_finished_and_are_not_counted_meanwhile():
    model = chain(a="b", b="c", c="d", d="$", e="$")
    found = said(model, ["a", "e"], [7, 1])
    assert [rows for rows, _ in model.calls] == [2, 8, 8, 8]
    assert model.tokens == 2 + 3 * 7 and found.length.tolist() == [4] * 7 + [1]


def test_equal_prefixes_of_a_group_are_read_once():
    model = chain(a="b", b="c", c="$")
    said(model, ["aa", "a"], [3, 2], prefix=[numbers("bbb"), numbers("bbb"), ids(), numbers("b"), numbers("b")])
    assert model.calls[:2] == [(2, 2), (3, 3)]  # two prompts; bbb, nothing and b
    assert model.tokens == (2 + 1) + (3 + 0 + 1) + 5 * 1 + 1  # c after each, but b after the one without a prefix, and c after that


def test_the_cache_holds_what_that_of_transformers_holds_without_copying_it_for_every_token():
    ours, theirs, g = GrowingLayer(), DynamicLayer(), seeded(7)
    rows, copies = 3, 0
    for step in range(90):
        before = ours.keys.data_ptr() if step else None
        keys, values = (torch.randn(rows, 2, 5 if step == 0 else 1, width, generator=g) for width in (4, 3))
        for mine, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, other)
        copies += ours.keys.data_ptr() != before
        if step in (10, 40):
            which = ids(2, 0, 0, 1) if step == 10 else ids(3, 1)
            rows = len(which)
            ours.batch_select_indices(which)
            theirs.batch_select_indices(which)
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert copies <= 4 and ours.get_seq_length() == theirs.get_seq_length() == 94


def test_nothing_to_say_is_no_error():
    found = said(chain(a="b"), ["a"], [0])
    assert len(found) == 0 and found.tokens.shape == (0, 1) and found.texts == ()


@pytest.mark.parametrize(
    ("prompts", "counts", "more", "message"),
    [
        (["a", "b"], [1], {}, "2 prompts, 1 counts and 2 generators"),
        (["a", ""], [1, 1], {}, "a prompt without tokens"),
        (["a"], [2], {"prefix": [ids(3)]}, "2 answers need as many prefixes, of fewer than 6 tokens each"),
        (["a"], [1], {"prefix": [ids(2, 2, 2, 2, 2, 2)]}, "1 answers need as many prefixes, of fewer than 6 tokens each"),
        (["a"], [1], {"prefix": [ids(2)], "prefix_log_prob": [row()]}, "prefix_log_prob does not fit prefix"),
        (["a"], [1], {"prefix_log_prob": [row()]}, "prefix_log_prob without prefix"),
    ],
)
def test_what_does_not_fit_is_an_error(prompts: list[str], counts: list[int], more: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        said(chain(a="b"), prompts, counts, **more)
