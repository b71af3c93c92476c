"""Shaping by length: by hand, continuous where it should be, right above wrong, histories that merge."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import NAN, assert_row, flags, ids, row

from flowrl.core.length_shaping import LengthHistory, history_length, length_rank, overlong, relative_length


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- overlong -------------------------------------------------------------------------------------------------------------------------------------


def test_overlong_d1_by_hand():
    assert_row(overlong(row(0, 60, 70, 100, 101, 1e9), max_length=100, cache=40), 0, 0, -0.25, -1, -1, -1)


@given(st.floats(1, 1e4), st.floats(0.01, 1))
def test_section_12_item_23_overlong_is_continuous_at_both_knots(max_length, part):
    cache = part * max_length
    for knot, value in ((max_length - cache, 0.0), (max_length, -1.0)):
        around = overlong(row(knot - 1e-9 * cache, knot, knot + 1e-9 * cache), max_length=max_length, cache=cache)
        assert around.tolist() == pytest.approx([value] * 3, abs=1e-6)
    falling = overlong(torch.linspace(0, 2 * max_length, 50, dtype=torch.float64), max_length=max_length, cache=cache)
    assert falling.diff().le(0).all() and falling.ge(-1).all() and falling.le(0).all()


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_overlong_d1_needs_a_slope_within_the_limit(cache):
    with pytest.raises(ValueError, match="cache"):
        overlong(row(1), max_length=100, cache=cache)


# --- GRPO-lambda ------------------------------------------------------------------------------------------------------------------------------------

CORRECT = flags(1, 1, 0, 1, 0, 0, 1, 0, 0)  # accuracies 2/3, 1/3, 1/3
LENGTH = row(10, 30, 99, 5, 7, 9, 8, 8, 8)
GROUP, VALID = ids(0, 0, 0, 1, 1, 1, 2, 2, 2), torch.ones(9, dtype=torch.bool)


def test_length_rank_d2_punishes_length_in_the_most_accurate_groups_only():
    # ceil(0.2 * 3) = 1 group; its right answers: mean 20, std 10
    found = length_rank(CORRECT, LENGTH, GROUP, VALID, 3)
    assert_row(found, 1 - 0.6 * sigmoid(-1), 1 - 0.6 * sigmoid(1), 0, 1, 0, 0, 1, 0, 0)


def test_length_rank_d2_share_0_is_the_outcome_and_share_1_the_penalty_everywhere():
    assert length_rank(CORRECT, LENGTH, GROUP, VALID, 3, share=0.0).equal(CORRECT.double())
    everywhere = length_rank(CORRECT, LENGTH, GROUP, VALID, 3, share=1.0)
    assert_row(everywhere, 1 - 0.6 * sigmoid(-1), 1 - 0.6 * sigmoid(1), 0, 0.7, 0, 0, 0.7, 0, 0)  # one right answer: sigmoid(0)
    assert everywhere[~CORRECT].eq(0).all()
    assert length_rank(CORRECT, LENGTH, GROUP, VALID, 3, share=0.34)[3] == pytest.approx(0.7)  # ceil(1.02): of equal groups the first
    assert length_rank(CORRECT, LENGTH, GROUP, VALID, 3, share=0.34)[6] == 1


def test_length_rank_d2_counts_exactly_where_the_share_is_no_binary_number():
    group = torch.arange(100)
    found = length_rank(torch.ones(100, dtype=torch.bool), torch.ones(100), group, torch.ones(100, dtype=torch.bool), 100, share=0.07)
    assert (found < 1).sum() == 7


def test_length_rank_d2_leaves_out_who_has_no_score_and_groups_without_anybody():
    length = LENGTH.clone()
    length[1] = NAN
    valid = VALID.clone()
    valid[1] = False
    # accuracies 1/2, 1/3, 1/3, of 4 groups one is empty: 1 group of 3 is chosen
    assert_row(length_rank(CORRECT, length, GROUP, valid, 4, share=0.2), 0.7, 0, 0, 1, 0, 0, 1, 0, 0)
    nobody = length_rank(CORRECT, length, GROUP, ~VALID, 4, share=1.0)
    assert nobody.eq(0).all()
    assert length_rank(~VALID, LENGTH, GROUP, VALID, 3, share=1.0).eq(0).all()  # no right answer in a chosen group


# --- Kimi -----------------------------------------------------------------------------------------------------------------------------------------


def test_relative_length_d20_by_hand():
    found = relative_length(row(10, 20, 30, 40, 10, 40), flags(1, 1, 1, 1, 0, 0), ids(0, 0, 0, 0, 0, 0), flags(1, 1, 1, 1, 1, 1), 1)
    assert_row(found, 0.5, 0.5 - 1 / 3, 0.5 - 2 / 3, -0.5, 0, -0.5)
    assert_row(relative_length(row(10, 20, 90), flags(1, 1, 1), ids(0, 0, 0), flags(1, 1, 0), 1), 0.5, -0.5, 0)


def test_relative_length_d20_of_equal_lengths_of_one_and_of_none():
    group, valid = ids(0, 0, 1, 2, 2), flags(1, 1, 1, 1, 0)
    assert relative_length(row(5, 5, 9, 1, NAN), flags(1, 0, 1, 1, 1), group, valid, 4).eq(0).all()


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(0, 100))
def test_relative_length_d20_knows_no_unit(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    length, correct = torch.rand(8, generator=generator, dtype=torch.float64), torch.rand(8, generator=generator) < 0.5
    group, valid = ids(0, 0, 0, 0, 1, 1, 1, 1), torch.rand(8, generator=generator) < 0.8
    torch.testing.assert_close(
        relative_length(scale * length + shift, correct, group, valid, 2), relative_length(length, correct, group, valid, 2), rtol=1e-9, atol=1e-9
    )


# --- HAPO -----------------------------------------------------------------------------------------------------------------------------------------


def test_history_length_d3_by_hand():
    length, h = row(100, 50, 150, 200, 1e6), row(100).expand(5)
    root = math.sqrt(0.5)
    assert_row(history_length(length, flags(1, 1, 1, 1, 1), h), 0, root, -0.7, -0.7, -0.7)
    assert_row(history_length(length, flags(0, 0, 0, 0, 0), h), 0, 0, -root, -1, -1)
    assert_row(history_length(row(0), flags(1), row(100)), 1)  # T: n -> 0
    assert_row(history_length(length[:2], flags(1, 1), h[:2], weight=0.5), 0, 0.5 * root)


@pytest.mark.parametrize("target", [NAN, 0.0])
def test_history_length_d3_without_a_history_is_0(target):
    assert_row(history_length(row(5, 5), flags(1, 0), row(target, target)), 0, 0)


@given(st.floats(0, 1e5), st.floats(0, 1e5), st.floats(1, 1e4), st.floats(0, 1.42))
def test_section_12_item_24_hapo_any_correct_is_above_any_wrong(short, long, h, weight):
    shaped = history_length(row(short, long), flags(1, 0), row(h, h), weight=weight)
    assert 1 + shaped[0] > 0 + shaped[1]


@pytest.mark.parametrize(("weight", "floor"), [(1 / 0.7, -0.7), (1.0, -1.0), (-0.1, -0.7)])
def test_history_length_d3_refuses_weights_that_could_put_wrong_above_right(weight, floor):
    with pytest.raises(ValueError, match="weight"):
        history_length(row(1), flags(1), row(1), weight=weight, floor=floor)


def test_length_history_d3_keeps_the_shortest_and_the_mean_of_right_answers():
    history = LengthHistory.empty(4)
    assert history.target().isnan().all()
    history = history.updated(ids(0, 0, 1, 2, 0), row(30, 10, 7, 5, 2), flags(1, 1, 1, 0, 1), flags(1, 1, 1, 1, 0))
    assert history.target()[:2].tolist() == [10, 7]
    assert history.target("mean")[:2].tolist() == [20, 7]
    assert history.target()[2:].isnan().all()  # only wrong, never asked
    later = history.updated(ids(0, 1), row(26, 4), flags(1, 1), flags(1, 1))
    assert later.target()[:2].tolist() == [10, 4]
    assert later.target("mean")[:2].tolist() == [22, 5.5]
    assert history.target()[:2].tolist() == [10, 7]  # the earlier state is as it was
    with pytest.raises(ValueError, match="mode"):
        later.target("median")  # type: ignore[arg-type]


@given(st.integers(0, 10_000))
def test_length_history_d3_of_two_processes_merges_to_that_of_one(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt, length = torch.randint(5, (12,), generator=generator), torch.randint(1, 50, (12,), generator=generator).double()
    correct, valid = torch.rand(12, generator=generator) < 0.5, torch.rand(12, generator=generator) < 0.8
    whole = LengthHistory.empty(5).updated(prompt, length, correct, valid)
    parts = [LengthHistory.empty(5).updated(prompt[i::2], length[i::2], correct[i::2], valid[i::2]) for i in range(2)]
    for merged in (LengthHistory.merge(*parts), LengthHistory.merge(*parts[::-1])):
        for mode in ("min", "mean"):
            assert merged.target(mode).nan_to_num(-1).equal(whole.target(mode).nan_to_num(-1))
    again = LengthHistory.from_state(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    assert again.shortest.equal(whole.shortest) and again.total.equal(whole.total) and again.count.equal(whole.count)


def test_lengths_keep_float32():
    one, group, valid = torch.ones(2), ids(0, 0), flags(1, 1)
    for found in (
        overlong(one),
        length_rank(valid, one, group, valid, 1),
        relative_length(one, valid, group, valid, 1),
        history_length(one, valid, row(1, NAN)),
    ):
        assert found.dtype == torch.float32
