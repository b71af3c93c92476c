"""Where rollouts go: filters, the knapsack against dynamic programming, priorities of intervals; tallies, rates and draws."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import NAN, flags, ids, row

from flowrl.core.allocation import Surplus, even_split, knapsack, rollout_value, t_quantile, useful_groups, xrpo_priority, xrpo_round
from flowrl.core.outcomes import SuccessRates, Tally, draw
from flowrl.types import UserError


def plain(state):
    return json.loads(json.dumps(state, allow_nan=False))


# --- dynamic sampling -------------------------------------------------------------------------------------------------------------------------------

REWARDS = row(1, 0, 1, 1, 0, 0, 1, NAN, NAN)
GROUP, VALID = ids(0, 0, 1, 1, 2, 2, 3, 3, 4), flags(1, 1, 1, 1, 1, 1, 1, 0, 0)


def test_useful_groups_e1_drop_equal_rewards_or_only_all_right_ones():
    assert useful_groups(REWARDS, GROUP, VALID, 6).tolist() == [True, False, False, False, False, False]
    assert useful_groups(REWARDS, GROUP, VALID, 6, drop="all_best").tolist() == [True, False, True, False, False, False]
    with pytest.raises(ValueError, match="all_best"):
        useful_groups(REWARDS, GROUP, VALID, 6, drop="some")


def test_dynamic_sampling_e1_collects_until_enough_and_carries_the_surplus():
    state = Surplus()
    assert not state.is_enough(3, 4)
    state = state.collected(["a", "b"], [True, False])
    assert not state.is_enough(3, 4)
    state = state.collected(["c", "d", "e"], [True, True, True])
    assert state.is_enough(3, 4)
    taken, state = state.taken(3)
    assert taken == ("a", "c", "d")
    assert state == Surplus(("e",), batches=0, short=0)
    assert Surplus.from_state(plain(state.state_dict())) == state


def test_dynamic_sampling_e1_stops_at_the_last_batch_with_fewer_or_an_error():
    state = Surplus().collected([1, 2], [False, True]).collected([3], [False])
    assert state.is_enough(3, 2)
    assert state.taken(3) == ((2,), Surplus((), 0, 1))
    with pytest.raises(UserError, match="only 1 of 3 groups"):
        state.taken(3, on_short="raise")
    nothing = Surplus().collected([1], [False])
    assert nothing.taken(2)[0] == ()


def test_dynamic_sampling_e1_of_mixed_groups_has_no_effect():
    rewards, group = row(1, 0, 0, 1), ids(0, 0, 1, 1)
    keep = useful_groups(rewards, group, flags(1, 1, 1, 1), 2)
    state = Surplus().collected([0, 1], keep.tolist())
    assert state.is_enough(2, 1)
    assert state.taken(2, on_short="raise") == ((0, 1), Surplus())


# --- knapsack ---------------------------------------------------------------------------------------------------------------------------------------


def best_by_dynamic_programming(rates, budget, least, most):
    table = {0: 0.0}
    for rate in rates:
        table = {
            total + n: max(table[t] + rollout_value(m, rate) for t in table for m in range(least, most + 1) if t + m == total + n)
            for total in table
            for n in range(least, most + 1)
        }
    return table[budget]


@given(
    st.lists(st.sampled_from([0.0, 0.05, 0.125, 0.3, 0.5, 0.8, 0.97, 1.0]) | st.floats(0, 1), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 5),
    st.floats(0, 1),
)
def test_section_12_item_22_the_greedy_knapsack_is_as_good_as_dynamic_programming(rates, least, extra, fill):
    most = least + extra
    budget = len(rates) * least + round(fill * len(rates) * extra)
    counts = knapsack(rates, budget, least=least, most=most)
    assert sum(counts) == budget
    assert all(least <= count <= most for count in counts)
    value = sum(map(rollout_value, counts, rates))
    assert value == pytest.approx(best_by_dynamic_programming(rates, budget, least, most), abs=1e-12)


def test_knapsack_e2_value_by_hand():
    assert rollout_value(2, 0.5) == pytest.approx(0.5 * 0.125)  # 1 - 1/4 - 1/4
    assert rollout_value(1, 0.3) == pytest.approx(0)
    assert rollout_value(0, 0.3) == 0
    assert rollout_value(4, 0.0) == rollout_value(4, 1.0) == 0
    assert rollout_value(10_000, 0.25) == pytest.approx(0.25 * 0.75**2)  # T: the limit


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_knapsack_e2_value_rises_and_its_gain_falls(rate, count):
    values = [rollout_value(n, rate) for n in (count, count + 1, count + 2)]
    assert values[1] >= values[0] - 1e-15
    assert values[2] - values[1] <= values[1] - values[0] + 1e-15


@given(st.floats(0.05, 0.95), st.integers(1, 9), st.integers(0, 40))
def test_knapsack_e2_of_equal_rates_is_even(rate, num, extra):
    counts = knapsack([rate] * num, 2 * num + extra)
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == 2 * num + extra


def test_knapsack_e2_gives_the_least_to_what_teaches_nothing():
    assert knapsack([0.0, 1.0, 0.3], 20) == [2, 2, 16]
    assert knapsack([0.0, 1.0], 9) == [5, 4]  # nobody gains: evenly
    assert knapsack([0.3, 0.0, 1.0], 20, most=8) == [8, 6, 6]  # the first is full, the rest even
    assert knapsack([0.0, 1.0, 0.3, 0.0], 20, unsolved_share=0.2) == [4, 2, 10, 4]  # 4 of 20 first to the unsolved


def test_knapsack_e2_with_unknown_rates_is_the_even_share():
    assert knapsack([NAN] * 3, 11) == even_split(11, 3) == [4, 4, 3]
    assert knapsack([NAN, 1.0, 0.3], 30) == [10, 2, 18]
    assert knapsack([NAN, 0.3, 0.3], 10, most=4) == [3, 4, 3]
    assert even_split(0, 2) == [0, 0]


@pytest.mark.parametrize(
    ("rates", "budget", "options"),
    [([0.5, 0.5], 3, {}), ([0.5], 200, {}), ([0.5], 2, {"least": 0}), ([1.5, 0.5], 8, {}), ([-0.1], 8, {}), ([], 4, {}), ([0.5], 4, {"least": 5, "most": 4})],
)
def test_knapsack_e2_refuses_what_cannot_be(rates, budget, options):
    with pytest.raises(ValueError, match="rollouts|rates"):
        knapsack(rates, budget, **options)


# --- XRPO -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "freedom", "value"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.30265273),
        (0.975, 3, 3.18244631),
        (0.975, 7, 2.36462425),
        (0.95, 10, 1.81246112),
        (0.975, 120, 1.97993041),
        (0.5, 4, 0.0),
    ],
)
def test_t_quantiles_e3_are_those_of_the_tables(level, freedom, value):
    assert t_quantile(level, freedom) == pytest.approx(value, rel=1e-8, abs=1e-12)


def test_priority_e3_by_hand():
    found = xrpo_priority([2, 8, 1], [0.5, 0.0, 0.5], 11, exploration=0.3)
    bonus = 0.3 * math.sqrt(math.log(12))
    assert found[0] == pytest.approx(0.5 * (12.7062047 / math.sqrt(2) - 4.30265273 / math.sqrt(3)) + bonus / math.sqrt(2))
    assert found[1] == pytest.approx(bonus / math.sqrt(8))  # E: no spread, only exploration
    assert found[2] == pytest.approx(0.5 * 12.7062047 * (1 - 1 / math.sqrt(2)) + bonus)
    with pytest.raises(ValueError, match="first rollout"):
        xrpo_priority([1, 0], [0.5, 0.5], 1, exploration=0.0)


def tally_of(*outcomes):
    prompt = torch.cat([torch.full((len(each),), number, dtype=torch.int64) for number, each in enumerate(outcomes)])
    rewards = torch.cat([row(*each) for each in outcomes])
    return Tally.of(prompt, rewards, torch.ones_like(prompt, dtype=torch.bool), len(outcomes))


@given(st.integers(1, 6), st.integers(0, 30))
def test_rounds_e3_without_exploration_and_with_equal_spread_are_even(num, size):
    found = xrpo_round(tally_of(*[(0, 1)] * num), size, exploration=0.0)
    assert sum(found) == size
    assert max(found) - min(found) <= 1


def test_rounds_e3_go_where_outcomes_differ_and_explore_where_they_do_not():
    tally = tally_of((0, 1, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1))
    assert xrpo_round(tally, 6, exploration=0.0) == [6, 0, 0]
    explored = xrpo_round(tally, 30, exploration=5.0)
    assert min(explored) > 5


def test_rounds_e3_read_one_rollout_with_the_prior_spread():
    assert xrpo_round(tally_of((1,), (1,)), 1, exploration=0.0, prior_std=0.0) == [1, 0]  # equals: the first
    assert xrpo_round(tally_of((1, 1), (1,)), 1, exploration=0.0) == [0, 1]


# --- tallies, rates, draws --------------------------------------------------------------------------------------------------------------------------


def test_tallies_by_hand():
    tally = Tally.of(ids(0, 2, 0, 2, 1), row(1, 0, 0.5, 1, NAN), flags(1, 1, 1, 1, 0), 4)
    assert tally.count.tolist() == [2, 0, 2, 0]
    assert tally.mean.nan_to_num(-1).tolist() == [0.75, -1, 0.5, -1]
    assert tally.std(0.5).tolist() == pytest.approx([0.125**0.5, 0.5, 0.5**0.5, 0.5])
    assert Tally.of(ids(0, 0, 0), row(0.1, 0.1, 0.1), flags(1, 1, 1), 1).std(0.5).item() == 0
    assert Tally.from_state(plain(tally.state_dict())).rows.equal(tally.rows)


@given(st.integers(0, 10_000))
def test_tallies_of_two_processes_merge_to_that_of_one(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt, rewards = torch.randint(4, (10,), generator=generator), torch.rand(10, generator=generator, dtype=torch.float64)
    valid = torch.rand(10, generator=generator) < 0.8
    parts = [Tally.of(prompt[i::2], rewards[i::2], valid[i::2], 4) for i in range(2)]
    torch.testing.assert_close(Tally.merge(Tally.empty(4), *parts).rows, Tally.of(prompt, rewards, valid, 4).rows, rtol=1e-12, atol=1e-12)


def test_success_rates_run():
    rates = SuccessRates.empty(3).updated(tally_of((1, 0), (1, 1), ()), momentum=0.9)
    assert rates.rates.nan_to_num(-1).tolist() == [0.5, 1, -1]  # the first mean as it is
    later = rates.updated(tally_of((1, 1), (), (0,)), momentum=0.9)
    assert later.rates.tolist() == pytest.approx([0.55, 1, 0])
    assert SuccessRates.from_state(plain(rates.state_dict())).rates.nan_to_num(-1).equal(rates.rates.nan_to_num(-1))
    assert rates.updated(tally_of((1, 1), (0,), (0,)), momentum=0.0).rates.tolist() == [1, 0, 0]


def shares(weights, count, replacement, draws=4000):
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([draw(weights, count, generator, replacement=replacement) for _ in range(draws)])
    return found


def test_draws_are_in_proportion():
    first = torch.bincount(shares(row(1, 0, 3), 1, True)[:, 0], minlength=3) / 4000
    assert first.tolist() == pytest.approx([0.25, 0, 0.75], abs=0.03)
    found = shares(row(1, 2, 5), 2, False)
    assert (torch.bincount(found[:, 0], minlength=3) / 4000).tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.03)
    after = found[found[:, 0] == 2, 1]
    assert (torch.bincount(after, minlength=3) / len(after)).tolist() == pytest.approx([1 / 3, 2 / 3, 0], abs=0.03)


def test_draws_without_replacement_take_zero_weights_last_and_at_random():
    found = shares(row(0, 1, 0), 3, False, draws=200)
    assert found[:, 0].eq(1).all()
    assert set(found[:, 1].tolist()) == {0, 2}
    assert found.sort(1).values.equal(torch.arange(3).expand(200, 3))


def test_draws_of_nothing_and_from_nothing():
    generator = torch.Generator().manual_seed(0)
    assert len(draw(row(), 0, generator)) == 0
    equal = torch.bincount(shares(row(0, 0), 1, True)[:, 0], minlength=2) / 4000
    assert equal.tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    for weights, count, replacement in ((row(1, 1), 3, False), (row(), 1, True), (row(-1, 1), 1, False), (row(NAN, 1), 1, True)):
        with pytest.raises(ValueError, match="draw"):
            draw(weights, count, generator, replacement=replacement)
    one, other = (draw(row(1, 2, 3), 2, torch.Generator().manual_seed(7)) for _ in range(2))
    assert one.equal(other)
