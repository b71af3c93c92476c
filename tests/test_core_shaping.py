"""Shaped rewards and advantages: by hand, at the limits that make them the plain reward, under invariances, with samples that have no score."""

import itertools
import math

import pytest
import torch
from estimates import group_mean, group_zscore
from hypothesis import given
from hypothesis import strategies as st
from rows import FP64, NAN, assert_row, flags, ids, row

from flowrl.core.advantage_shaping import anchor_inserted, compress, downscale_inserted, novelty, position_bonus
from flowrl.core.shaping import (
    centre_distance,
    cluster_centres,
    collinear,
    constraint_gate,
    exit_decay,
    exploration_reward,
    gap,
    gate_product,
    group_rank,
    marginal_gains,
    preferences,
    progress_reward,
    rank_unlikely,
    referee_reward,
    soft_choice,
    weighted_heads,
    win_rate,
)


def batch(seed, size=12, num_groups=4):
    """Rewards of 0 or 1, likelihoods, groups and who is valid; one group alone, one without anybody."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(num_groups - 1, (size,), generator=generator)
    return (
        torch.randint(2, (size,), generator=generator).double(),
        torch.randn(size, generator=generator, dtype=torch.float64),
        group,
        torch.rand(size, generator=generator) < 0.8,
    )


def advantage_of(estimator, rewards, group, valid, num_groups):
    return estimator(rewards, group, valid, num_groups, eps=0.0 if estimator is group_mean else 1e-9, ddof=0)


# --- ranks ----------------------------------------------------------------------------------------------------------------------------------------


def test_ranks_are_of_each_group_and_leave_out_who_has_no_score():
    values = row(3, 1, 2, NAN, 5, 5, -1)
    group, valid = ids(0, 0, 0, 0, 1, 1, 1), flags(1, 1, 1, 0, 1, 1, 1)
    assert group_rank(values, group, valid, 3).tolist() == [2, 0, 1, 3, 1, 2, 0]


@given(st.integers(0, 10_000))
def test_ranks_are_those_of_a_sort(seed):
    _, values, group, valid = batch(seed)
    found = group_rank(values, group, valid, 4)
    for number in range(4):
        members = [i for i in range(12) if group[i] == number and valid[i]]
        assert [int(found[i]) for i in sorted(members, key=lambda i: float(values[i]))] == list(range(len(members)))


# --- S-GRPO ---------------------------------------------------------------------------------------------------------------------------------------


def test_exit_decay_d4_halves_for_each_right_exit_before():
    correct, position = flags(1, 0, 1, 1, 1, 1), row(10, 20, 30, 40, 5, 2)  # the second trace is listed with its last exit first
    found = exit_decay(correct, position, ids(0, 0, 0, 0, 1, 1), flags(1, 1, 1, 1, 1, 1), 3)
    assert_row(found, 1, 0, 0.5, 0.25, 0.5, 1)


def test_exit_decay_d4_of_all_none_one_and_invalid():
    group, everybody = ids(0, 0, 0), flags(1, 1, 1)
    assert_row(exit_decay(flags(1, 1, 1), row(1, 2, 3), group, everybody, 1), 1, 0.5, 0.25)
    none = exit_decay(flags(0, 0, 0), row(1, 2, 3), group, everybody, 1)
    assert advantage_of(group_mean, none, group, everybody, 1).eq(0).all()
    assert_row(exit_decay(flags(1, 0), row(7, 7), ids(0, 1), flags(1, 1), 2), 1, 0)  # one exit only is the outcome
    assert_row(exit_decay(flags(1, 1, 1), row(1, 2, 3), group, flags(0, 1, 1), 1), 0, 1, 0.5)


# --- Posterior-GRPO -------------------------------------------------------------------------------------------------------------------------------


def test_gate_product_d5_by_hand():
    assert_row(gate_product(row(1, 0, 1, 1), row(1, 1, 0, 0), row(0.5, 0.25, 0.9, 0.1)), 2.5, 1.25, 1, 1)


def test_gate_product_d5_ignores_the_reasoning_of_wrong_answers_and_splits_right_ones():
    assert gate_product(row(1), row(0), row(NAN)).item() == 1
    shaped = gate_product(row(1, 1), row(1, 1), row(0.2, 0.8))
    assert shaped[0] < shaped[1]  # outcomes alone are equal


# --- unlikeliness ---------------------------------------------------------------------------------------------------------------------------------


def test_rank_unlikely_d6_by_hand():
    # ranks 1, 3, 0, 2 of G = 4: 1 - 0.25 k / 4
    found = rank_unlikely(row(1, 1, 1, 0), row(-2, -0.5, -3, -1), ids(0, 0, 0, 0), flags(1, 1, 1, 1), 1)
    assert_row(found, 1 - 1 / 16, 1 - 3 / 16, 1, 0)


@given(st.integers(0, 10_000))
def test_rank_unlikely_d6_prefers_the_unlikely_among_the_right_and_leaves_the_wrong(seed):
    rewards, likelihood, group, valid = batch(seed)
    rewards[~valid] = NAN
    shaped = rank_unlikely(rewards, likelihood, group, valid, 4)
    assert shaped[~valid].eq(0).all()
    assert shaped[valid & (rewards == 0)].eq(0).all()
    for i, j in itertools.permutations(range(12), 2):
        if valid[i] and valid[j] and group[i] == group[j] and rewards[i] == rewards[j] == 1 and likelihood[i] < likelihood[j]:
            assert shaped[i] > shaped[j]
    assert rank_unlikely(rewards, likelihood, group, valid, 4, strength=0.0)[valid].equal(rewards[valid])  # T: strength 0 is GRPO
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert rank_unlikely(rewards[order], likelihood[order], group[order], valid[order], 4).equal(shaped[order])


def test_rank_unlikely_d6_ties_follow_the_order():
    assert_row(rank_unlikely(row(1, 1), row(-1, -1), ids(0, 0), flags(1, 1), 1, strength=1.0), 1, 0.5)


# --- partial credit, several answers ----------------------------------------------------------------------------------------------------------------


def test_soft_choice_d9():
    gold = flags(1, 1, 0, 0).repeat(5, 1)
    predicted = torch.stack([flags(1, 1, 0, 0), flags(1, 0, 0, 0), flags(1, 1, 1, 0), flags(0, 0, 0, 0), flags(0, 0, 0, 1)])
    assert_row(soft_choice(predicted, gold), 1, 0.5, 0, 0, 0)
    assert_row(soft_choice(torch.stack([flags(0, 0), flags(1, 0)]), flags(0, 0).repeat(2, 1)), 1, 0)  # nothing is right


def test_exploration_reward_d10():
    count, first = ids(1, 4, 4, 2, 0, 3), ids(1, 1, 4, 0, 0, 1)
    found = exploration_reward(count, first, flags(1, 1, 1, 1, 1, 0))
    assert_row(found, 1, 0.5, 0.25, -0.5, -1, -1)


def test_collinear_points_d10():
    points = torch.tensor([[[0, 0], [1, 1], [2, 2]], [[0, 0], [1, 1], [2, 3]], [[0, 0], [5, 0], [9, 0]], [[3, 1], [3, 8], [3, 2]]])
    assert collinear(points, torch.ones(4, 3, dtype=torch.bool)).tolist() == [True, False, True, True]
    assert not collinear(points, flags(1, 1, 0).repeat(4, 1)).any()  # two points always are
    assert not collinear(points[:, :2], torch.ones(4, 2, dtype=torch.bool)).any()


# --- constraints ----------------------------------------------------------------------------------------------------------------------------------


def test_constraint_gate_d11_by_hand():
    satisfied = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    found = constraint_gate(row(1, 5, 2, 2), row(1, 0, 1, 1), satisfied, row(0, 0, 5, 20), kl_max=10.0)
    s = 1 / (1 + math.exp(-1))
    assert_row(found, 0.5, 0, 0.5 * s, 0)


def test_constraint_gate_d11_without_constraints_and_kl_is_the_calibrated_reward():
    rewards, baseline = row(1.5, -2, 0), row(0, 0, 3)
    found = constraint_gate(rewards, baseline, torch.zeros(3, 0, dtype=torch.bool), row(3, -4, 100), kl_max=math.inf)
    torch.testing.assert_close(found, torch.sigmoid(rewards - baseline), **FP64)


def test_constraint_gate_d11_has_no_gradient_through_the_kl():
    log_ratio = row(1.0).requires_grad_()
    assert not constraint_gate(row(0), row(0), flags(1)[None], log_ratio, kl_max=10.0).requires_grad


# --- heads ----------------------------------------------------------------------------------------------------------------------------------------


def test_weighted_heads_d13_by_hand_and_without_a_look_at_weight_0():
    heads = torch.stack([row(1, 2), row(10, -10), row(NAN, NAN)])
    assert_row(weighted_heads(heads, row(0.5, 0.1, 0)), 1.5, 0)


@given(st.integers(0, 10_000))
def test_weighted_heads_d13_where_one_head_varies_summing_before_or_after_normalising_is_the_same(seed):
    _, head, group, valid = batch(seed)
    other = row(4, -1, 2, 0)[group]  # constant within groups
    before = advantage_of(group_zscore, weighted_heads(torch.stack([head, other]), row(1, 3)), group, valid, 4)
    after = advantage_of(group_zscore, head, group, valid, 4) + 3 * advantage_of(group_zscore, other, group, valid, 4)
    torch.testing.assert_close(before, after, rtol=1e-7, atol=1e-7)


# --- progress -------------------------------------------------------------------------------------------------------------------------------------


def test_progress_reward_d16_by_hand():
    # distances 1 and 3 of the failures: mean 2, std 1
    found = progress_reward(row(0, 1, 3, 9), flags(1, 0, 0, 0), flags(1, 1, 1, 0), eps=0.0)
    s = 1 / (1 + math.exp(-1))
    assert_row(found, 1, s / 2, (1 - s) / 2, 0)


def test_progress_reward_d16_of_one_failure_no_success_and_equal_distances():
    assert_row(progress_reward(row(0, 4), flags(1, 0), flags(1, 1)), 1, 0.25)
    assert_row(progress_reward(row(math.inf, math.inf), flags(0, 0), flags(1, 1)), 0, 0)
    found = progress_reward(row(0, 4, 4), flags(1, 0, 0), flags(1, 1, 1))
    assert_row(found, 1, 0.25, 0.25)
    group = ids(0, 0, 0)  # T: constant squashing is binary GRPO
    binary = advantage_of(group_zscore, row(1, 0, 0), group, flags(1, 1, 1), 1)
    torch.testing.assert_close(advantage_of(group_zscore, found, group, flags(1, 1, 1), 1), binary, rtol=1e-7, atol=1e-7)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=6))
def test_progress_reward_d16_keeps_failures_in_order_below_one_half(distances):
    distance = row(*distances)
    nothing = torch.zeros(len(distances), dtype=torch.bool)
    found = progress_reward(distance, nothing, ~nothing)
    assert found.lt(0.5).all() and found.gt(0).all()
    order = distance.argsort()
    assert (found[order].diff() <= 0).all()


def test_cluster_centres_d16_by_hand():
    points = torch.tensor([[0.0, 0], [1, 0], [2, 0], [10, 0], [10, 1], [50, 50]], dtype=torch.float64)
    found = cluster_centres(points, radius=1.0, least=2)
    assert found.tolist() == [[1, 0], [10, 0.5]]
    assert cluster_centres(points, radius=1.0, least=3).tolist() == [[1, 0]]  # only (1, 0) is dense; its neighbours are on its border
    assert cluster_centres(points, radius=0.1, least=2).equal(points)
    assert len(cluster_centres(points, radius=0.1, least=1)) == 6
    assert cluster_centres(points[:0], radius=1.0, least=1).shape == (0, 2)


def test_cluster_centres_d16_end_at_their_border():
    # (0, 0) alone is dense; (1, 0) is on its border, and (2, 0) is near to that only
    points = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [2, 0]], dtype=torch.float64)
    assert cluster_centres(points, radius=1.0, least=4).tolist() == [[0, 0.25]]


def test_cluster_centres_d16_follow_a_long_chain():
    points = torch.stack([torch.arange(20.0), torch.zeros(20)], 1)[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    assert cluster_centres(points, radius=1.0, least=2).tolist() == [[9.5, 0]]


def test_centre_distance_d16():
    embedding = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert centre_distance(embedding, torch.tensor([[0.0, 0.0], [0.0, 3.0]])).tolist() == pytest.approx([10**0.5, 1])
    assert centre_distance(embedding, torch.zeros(0, 2)).tolist() == [math.inf, math.inf]


# --- referee --------------------------------------------------------------------------------------------------------------------------------------


def test_referee_reward_d17_by_hand():
    truth = row(1, 2, 3).repeat(4, 1)
    scores = torch.stack([row(0, 5, 9), row(9, 5, 0), row(1, 3, 2), row(4, 4, 4)])
    assert_row(referee_reward(scores, truth, torch.ones(4, 3, dtype=torch.bool)), 1, -1, 1 / 3, 0)


def test_referee_reward_d17_of_two_candidates_ties_and_absent_ones():
    everybody = torch.ones(3, 2, dtype=torch.bool)
    assert_row(referee_reward(torch.stack([row(1, 0), row(0, 1), row(2, 2)]), row(1, 0).repeat(3, 1), everybody), 1, -1, 0)
    assert_row(referee_reward(row(1, 0)[None], row(3, 3)[None], everybody[:1]), 0)  # truth has no order
    assert_row(referee_reward(row(1, 0, 5)[None], row(1, 0, -5)[None], flags(1, 1, 0)[None]), 1)
    assert_row(referee_reward(row(0, 1, 2)[None], row(1, 1, 2)[None], flags(1, 1, 1)[None]), 1)  # two pairs differ, both are right
    assert_row(referee_reward(row(1)[None], row(1)[None], flags(1)[None]), 0)


# --- marginal gains -------------------------------------------------------------------------------------------------------------------------------


def test_marginal_gains_d19_by_hand_with_a_gap():
    values, mask = row(2, NAN, 3, 7)[None], flags(1, 0, 1, 1)[None]
    assert_row(marginal_gains(values, mask, row(1))[0], 1, 0, 1, 4)


@given(st.integers(0, 10_000))
def test_marginal_gains_d19_telescope_and_are_the_rewards_of_a_modular_function(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, initial = torch.randn(3, 5, generator=generator, dtype=torch.float64), torch.randn(3, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    rewards = torch.where(mask, rewards, 0.0)
    values = initial[:, None] + rewards.cumsum(1)
    gains = marginal_gains(torch.where(mask, values, NAN), mask, initial)
    torch.testing.assert_close(gains, rewards, **FP64)
    torch.testing.assert_close(gains.sum(1), values[:, -1] - initial, **FP64)


# --- win rate and gap -------------------------------------------------------------------------------------------------------------------------------


def test_win_rate_a20_by_hand():
    preference = torch.tensor([[NAN, 1.0, 0.5], [0.0, NAN, 0.25], [0.5, 0.75, NAN]], dtype=torch.float64)
    assert_row(win_rate(preference, ids(0, 0, 0), flags(1, 1, 1)), 0.75, 0.125, 0.625)
    assert_row(win_rate(preference, ids(0, 0, 0), flags(1, 1, 0)), 1, 0, 0)
    assert_row(win_rate(preference, ids(0, 0, 1), flags(1, 1, 1)), 1, 0, 0.5)


@given(st.integers(0, 10_000), st.floats(0.05, 5))
def test_win_rate_a20_sums_to_half_the_group(seed, temperature):
    _, scores, group, valid = batch(seed)
    rate = win_rate(preferences(scores, temperature=temperature), group, valid)
    for number in range(4):
        members = valid & (group == number)
        assert rate[members].sum().item() == pytest.approx(members.sum().item() / 2)


@given(st.integers(0, 10_000))
def test_win_rate_a20_of_certain_comparisons_is_the_normalised_rank(seed):
    _, scores, group, valid = batch(seed)
    rate = win_rate(preferences(scores, temperature=0.0), group, valid)
    rank, count = group_rank(scores, group, valid, 4), torch.bincount(group[valid], minlength=4)[group]
    several = valid & (count > 1)
    torch.testing.assert_close(rate[several], (rank.double() / (count - 1))[several], **FP64)
    assert preferences(row(2, 2), temperature=0.0).tolist() == [[0.5, 0.5], [0.5, 0.5]]


@given(st.integers(0, 10_000))
def test_gap_a21_is_lost_in_group_centring(seed):
    _, scores, group, valid = batch(seed)
    moved = gap(scores, row(1, -2, 30, 4), group)
    torch.testing.assert_close(advantage_of(group_mean, moved, group, valid, 4), advantage_of(group_mean, scores, group, valid, 4), **FP64)
    assert_row(gap(row(1, 2), row(5, 7), ids(1, 0)), -6, -3)


# --- novelty --------------------------------------------------------------------------------------------------------------------------------------


def test_novelty_d7_by_hand():
    # likelihoods -2, 0, -1: mean -1, eta e^-1, e, 1
    advantages, likelihood = row(0.9, 0.5, -1.0), row(-2, 0, -1)
    found = novelty(advantages, likelihood, flags(1, 1, 0), ids(0, 0, 0), flags(1, 1, 1), 1)
    assert_row(found, 0.9 + 1 - math.exp(-1), 0.5, -1.0)
    assert_row(novelty(row(-0.5, 0.0, 0.5), likelihood, flags(1, 1, 1), ids(0, 0, 0), flags(1, 1, 1), 1), -0.5, 0.0, 0.5)  # only A > 0 gains
    capped = novelty(advantages, likelihood, flags(1, 1, 0), ids(0, 0, 0), flags(1, 1, 1), 1, scale=100.0, cap=0.5)
    assert_row(capped, 1.35, 0.5, -1.0)


@given(st.integers(0, 10_000), st.floats(0, 5), st.floats(0, 2))
def test_novelty_d7_only_raises_right_unlikely_samples_within_its_cap(seed, scale, cap):
    rewards, likelihood, group, valid = batch(seed)
    advantages = advantage_of(group_zscore, rewards, group, valid, 4)
    found = novelty(advantages, likelihood, rewards > 0, group, valid, 4, scale=scale, cap=cap)
    gain = found - advantages
    assert gain.ge(0).all()
    assert (found <= (1 + cap) * advantages.clamp_min(0) + 1e-12)[advantages > 0].all()
    assert gain[(advantages <= 0) | (rewards == 0) | ~valid].eq(0).all()
    assert novelty(advantages, likelihood, rewards > 0, group, valid, 4, scale=0.0).equal(advantages)
    mean = torch.stack([likelihood[valid & (group == g)].mean() for g in range(4)])[group]
    assert gain[valid & (likelihood >= mean + 1e-12)].eq(0).all()  # T: likely samples are unchanged


# --- ASPO -----------------------------------------------------------------------------------------------------------------------------------------


def test_position_bonus_d8_by_hand():
    # eligible: positions 10 and 30, lengths 100 and 60: mean 20 and 80; -2 (p - 20) / 80 = +0.25 and -0.25
    advantages = row(1, 0.2, 1, -1)
    found = position_bonus(advantages, row(10, 30, NAN, 3), row(100, 60, NAN, 50), flags(1, 1, 0, 0), ids(0, 0, 0, 0), flags(1, 1, 1, 1), 1)
    assert_row(found, 1.25, 0.2 - 0.7 * 0.2, 1, -1)


@given(st.integers(0, 10_000), st.floats(0, 0.99), st.floats(-5, 5))
def test_position_bonus_d8_keeps_the_sign(seed, cap, strength):
    rewards, _, group, valid = batch(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    position, length = (torch.randint(1, 200, (12,), generator=generator).double() for _ in range(2))
    advantages = advantage_of(group_zscore, rewards, group, valid, 4)
    found = position_bonus(advantages, position, length, rewards > 0, group, valid, 4, strength=strength, cap=cap)
    assert found.sign().equal(advantages.sign())
    assert found[~(valid & (rewards > 0))].equal(advantages[~(valid & (rewards > 0))])
    torch.testing.assert_close(position_bonus(advantages, position, length, rewards > 0, group, valid, 4, cap=0.0), advantages, rtol=0, atol=0)  # T: k = 0


def test_position_bonus_d8_without_a_call_or_length_changes_nothing():
    advantages = row(1, -1)
    args = (ids(0, 0), flags(1, 1), 1)
    assert position_bonus(advantages, row(5, 6), row(1, 1), flags(0, 0), *args).equal(advantages)
    assert position_bonus(advantages, row(5, 6), row(0, 0), flags(1, 1), *args).equal(advantages)
    assert position_bonus(advantages, row(5, 6), row(9, 9), flags(1, 0), *args).equal(advantages)  # one alone is its own mean


# --- TempSamp-R1 ------------------------------------------------------------------------------------------------------------------------------------


def test_downscaling_d14_sets_the_inserted_reward():
    assert_row(downscale_inserted(row(1, 0.3, NAN), flags(0, 0, 1)), 1, 0.3, 0.8)
    assert_row(downscale_inserted(row(1, 0.3), flags(1, 0), factor=0.5, highest=2.0), 1, 0.3)


def test_compression_d14_by_hand():
    e = math.e
    found = compress(row(0, 0.8, 1, 0.3))
    assert_row(found, 0.8 - (e**0.8 - 1) / (e - 1), 0.8, 0.8 + 0.01 * math.log(1.2), 0.8 - (e**0.5 - 1) / (e - 1))
    assert found[0].item() == pytest.approx(0.0867, abs=2e-4)
    with pytest.raises(ValueError, match="below"):
        compress(row(0), below=0.0)


@given(st.floats(0, 1), st.floats(0.01, 2), st.floats(0.01, 5))
def test_compression_d14_is_continuous_increasing_and_saturates(threshold, above, below):
    assert_row(compress(row(threshold), threshold=threshold, above=above, below=below), threshold)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    found = compress(grid, threshold=threshold, above=above, below=below)
    assert found.diff().gt(0).all()
    step = compress(row(threshold - 1e-9, threshold + 1e-9), threshold=threshold, above=above, below=below)
    assert step.diff().item() == pytest.approx(0, abs=1e-7)
    flat = compress(grid, threshold=threshold, above=0.0, below=below)
    assert flat[grid >= threshold].eq(threshold).all()
    small = compress(grid, threshold=threshold, above=above, below=1e-9)
    torch.testing.assert_close(small[grid < threshold], grid[grid < threshold], rtol=1e-6, atol=1e-6)


def test_anchoring_d14_follows_the_best_own_advantage():
    group, inserted, valid = ids(0, 0, 0, 1, 1, 1), flags(0, 0, 1, 0, 0, 1), flags(1, 1, 1, 1, 1, 1)
    rewards = row(0, 1, 1, 0.5, 0.5, 1)
    advantages = advantage_of(group_zscore, rewards, group, valid & ~inserted, 2)
    torch.testing.assert_close(anchor_inserted(advantages, inserted, group, valid, 2), row(-1, 1, 1.2, 0, 0, 0), rtol=1e-7, atol=1e-7)
    assert anchor_inserted(advantages, inserted, group, valid, 2, scale=1.0)[2] == advantages[1]  # T: the best own advantage
    assert anchor_inserted(advantages, flags(0, 0, 0, 0, 0, 0), group, valid, 2).equal(advantages)
    assert anchor_inserted(row(1, 2, 0), flags(0, 0, 1), ids(0, 0, 0), flags(1, 1, 0), 1)[2] == 0  # no score
    assert anchor_inserted(row(-1, -2, 5), flags(0, 0, 1), ids(0, 0, 0), flags(1, 1, 1), 1)[2] == 0


def test_mixing_d14_is_grpo_over_the_union():
    # the treatment without a function: the statistics of all, the inserted one among them
    rewards, group, valid = row(0, 0, 0, 1), ids(0, 0, 0, 0), flags(1, 1, 1, 1)
    torch.testing.assert_close(advantage_of(group_zscore, rewards, group, valid, 1), row(-1, -1, -1, 3) / 3**0.5, rtol=1e-7, atol=1e-7)


# --- float32 ----------------------------------------------------------------------------------------------------------------------------------------


def test_shaping_keeps_float32():
    one, group, valid = torch.ones(2), ids(0, 0), flags(1, 1)
    for found in (
        rank_unlikely(one, one, group, valid, 1),
        gate_product(one, one, one),
        constraint_gate(one, one, valid[:, None], one, kl_max=1.0),
        weighted_heads(one[None], torch.ones(1)),
        progress_reward(one, ~valid, valid),
        marginal_gains(one[None], valid[None], torch.zeros(1)),
        win_rate(preferences(one), group, valid),
        novelty(one, one, valid, group, valid, 1),
        position_bonus(one, one, one, valid, group, valid, 1),
        downscale_inserted(one, valid),
        compress(one),
        anchor_inserted(one, flags(0, 1), group, valid, 1),
    ):
        assert found.dtype == torch.float32
