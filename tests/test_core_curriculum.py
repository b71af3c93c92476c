"""Which prompts to ask: Thompson sampling, variance, predictions, priorities, ramps."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import NAN, flags, ids, row, seeded

from flowrl.core.curriculum import (
    BetaTable,
    ShuffledCycle,
    difficulty_ramp,
    distinct_ngrams,
    failure_priority,
    mixed_batch,
    nearest_to_target,
    value_error,
    variance_score,
)
from flowrl.core.outcomes import Tally, draw


def tally(prompt, rewards, num_prompts):
    return Tally.of(prompt, rewards, torch.ones_like(prompt, dtype=torch.bool), num_prompts)


# --- VADE -------------------------------------------------------------------------------------------------------------------------------------------


def test_beta_table_e4_counts_and_forgets_on_two_scales():
    table = BetaTable.empty(3).updated(tally(ids(0, 0, 1), row(1, 0, 0.25), 3))
    assert table.successes.tolist() == [1, 0.25, 0]  # fractions count as fractions
    assert table.failures.tolist() == [1, 0.75, 0]
    later = table.updated(tally(ids(0), row(1), 3), global_decay=0.5, sample_decay=0.4)
    assert later.successes.tolist() == pytest.approx([1.2, 0.125, 0])  # 0: 0.5 * 0.4 * 1 + 1; 1: 0.5 * 0.25
    assert later.failures.tolist() == pytest.approx([0.2, 0.375, 0])
    again = BetaTable.from_state(json.loads(json.dumps(later.state_dict())))
    assert again.successes.equal(later.successes) and again.failures.equal(later.failures)


def test_beta_table_e4_without_decay_is_the_posterior_whatever_the_steps():
    prompt, rewards = ids(0, 1, 0, 1, 0, 0), row(1, 0, 1, 1, 0, 0)
    table = BetaTable.empty(2)
    for start in (0, 2, 4):
        table = table.updated(tally(prompt[start : start + 2], rewards[start : start + 2], 2), global_decay=1.0, sample_decay=1.0)
    assert table.successes.tolist() == [2, 1]
    assert table.failures.tolist() == [2, 1]


@pytest.mark.parametrize("rewards", [row(3.0), row(-1.0)])
def test_beta_table_e4_refuses_rewards_without_bounds(rewards):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        BetaTable.empty(1).updated(tally(ids(0), rewards, 1))


def test_thompson_e4_draws_from_the_beta():
    table = BetaTable(row(0, 5), row(0, 1))
    found = torch.stack([table.draw_rates(ids(0, 1), generator) for generator in [seeded()] for _ in range(4000)])
    assert found.mean(0).tolist() == pytest.approx([1 / 2, 6 / 8], abs=0.015)
    assert found.var(0).tolist() == pytest.approx([1 / 12, 6 * 2 / (64 * 9)], abs=0.005)
    # without data the rate is uniform: its quartiles
    assert found[:, 0].quantile(row(0.25, 0.5, 0.75)).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_thompson_e4_prefers_hard_prompts_or_even_odds():
    # beliefs so firm that the draw is the mean: 0.05, 1/3, 1/2, 0.95
    p = row(0.05, 1 / 3, 0.5, 0.95)
    table = BetaTable(1e7 * p, 1e7 * (1 - p))
    candidates = ids(3, 2, 1, 0)
    assert table.sample(candidates, 2, seeded()).tolist() == [1, 2]
    assert table.sample(candidates, 4, seeded(), power=1)[0] == 2
    assert table.sample(ids(3, 0), 1, seeded()).tolist() == [0]
    assert table.sample(candidates, 2, seeded(3)).equal(table.sample(candidates, 2, seeded(3)))
    with pytest.raises(ValueError, match="candidates"):
        table.sample(candidates, 5, seeded())


# --- variance-aware sampling --------------------------------------------------------------------------------------------------------------------------


def test_variance_scores_e5_by_hand():
    assert variance_score(row(0, 0.5, 1, 0.1, NAN)).tolist() == pytest.approx([0, 0.25, 0, 0.09, 0.25])
    assert variance_score(row(0, 0.5), row(0.4, 1), variance_weight=2.0, diversity_weight=0.5).tolist() == pytest.approx([0.2, 1.0])


def test_distinct_ngrams_e5_by_hand():
    assert distinct_ngrams(["abab"], 2) == pytest.approx(2 / 3)  # ab, ba, ab
    assert distinct_ngrams([[1, 2, 3], [1, 2, 3], [2, 3, 4]]) == pytest.approx(2 / 3)
    assert distinct_ngrams([[1], []], 2) == 0


def test_cycle_e5_draws_nobody_twice_before_everybody_once():
    cycle = ShuffledCycle.shuffled(5, seeded())
    first, cycle = cycle.taken(3)
    second, after = cycle.taken(7)
    assert sorted(first + second[:2]) == list(range(5))
    assert second[2:] == first + second[:2]
    assert after.position == 0
    again = ShuffledCycle.from_state(json.loads(json.dumps(cycle.state_dict())))
    assert again == cycle


def test_mixed_batch_e5_has_its_share_of_weighted_draws():
    cycle = ShuffledCycle((4, 3, 2, 1, 0))
    found, cycle = mixed_batch(row(0, 0, 0, 1, 0), cycle, 5, seeded())
    assert found.tolist() == [3, 3, 4, 3, 2]  # int(0.5 * 5) drawn, the rest in order
    assert cycle.position == 3


def test_mixed_batch_e5_at_the_ends():
    cycle = ShuffledCycle.shuffled(4, seeded(1))
    uniform, _ = mixed_batch(row(1, 0, 0, 0), cycle, 4, seeded(), share=0.0)
    assert sorted(uniform.tolist()) == [0, 1, 2, 3]  # T: uniform
    always, same = mixed_batch(row(0, 0, 2, 0), cycle, 6, seeded(), share=1.0)
    assert always.eq(2).all() and same == cycle  # T: always that prompt
    even, _ = mixed_batch(row(0, 0, 0, 0), cycle, 4000, seeded(), share=1.0)
    assert (torch.bincount(even) / 4000).tolist() == pytest.approx([0.25] * 4, abs=0.03)  # E: all scores 0


# --- PCL --------------------------------------------------------------------------------------------------------------------------------------------


def test_curriculum_e8_takes_the_nearest_to_the_target():
    values = row(0.1, 0.45, 0.9, 0.6, NAN)
    assert nearest_to_target(values, 3, seeded()).tolist() == [4, 1, 3]
    assert nearest_to_target(values[:4], 1, seeded(), target=1.0).tolist() == [2]
    with pytest.raises(ValueError, match="candidates"):
        nearest_to_target(values, 6, seeded())


def test_curriculum_e8_of_constant_predictions_is_a_random_choice():
    generator = seeded()
    found = torch.stack([nearest_to_target(row(0.3, 0.3, 0.3, 0.3), 2, generator) for _ in range(2000)])
    assert (torch.bincount(found.flatten(), minlength=4) / 4000).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert found[:, 0].ne(found[:, 1]).all()


def test_value_error_e8_by_hand_and_its_gradient():
    predicted = row(0.5, 0.2, 0.9).requires_grad_()
    group, valid = ids(0, 0, 1, 1), flags(1, 1, 1, 0)
    rewards = row(1, 0, 1, NAN)
    found = value_error(predicted, rewards, group, valid)
    assert found.tolist() == pytest.approx([0, 0.64, 0])  # means 1/2 and 1; group 2 is empty
    assert torch.autograd.gradcheck(lambda v: value_error(v, rewards, group, valid), predicted)
    found.sum().backward()
    assert predicted.grad.tolist() == pytest.approx([0, -1.6, 0])


# --- priorities and ramps -----------------------------------------------------------------------------------------------------------------------------


def test_failure_priority_e10():
    assert failure_priority(row(0.25, 1, NAN)).tolist() == [0.75, 0, 1]
    generator = seeded()
    found = torch.cat([draw(failure_priority(row(0.3, 0.3, 0.3)), 1, generator) for _ in range(3000)])
    assert (torch.bincount(found) / 3000).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)  # T: equal rates


def test_ramp_e11_by_hand():
    # halfway: (4^0.5 - 1) / 3 = 1/3
    assert difficulty_ramp(50, 100, start=0.1, end=0.7) == pytest.approx(0.3)
    assert difficulty_ramp(0, 100, start=0.1, end=0.7) == 0.1
    assert difficulty_ramp(100, 100, start=0.1, end=0.7) == difficulty_ramp(1000, 100, start=0.1, end=0.7) == 0.7
    assert difficulty_ramp(0, 0, start=0.1, end=0.7) == 0.7
    with pytest.raises(ValueError, match="base"):
        difficulty_ramp(1, 2, start=0, end=1, base=0)


@given(st.integers(0, 50), st.floats(-1, 1), st.floats(-1, 1))
def test_ramp_e11_special_cases(step, start, end):
    linear = start + step / 50 * (end - start)
    assert difficulty_ramp(step, 50, start=start, end=end, base=1.0) == pytest.approx(linear)
    assert difficulty_ramp(step, 50, start=start, end=end, base=1 + 1e-9) == pytest.approx(linear, abs=1e-7)
    assert difficulty_ramp(step, 50, start=start, end=start) == start
