"""Advantages by hand and by their invariances, and how they reach the decisions above each sample."""

import math

import pytest
import torch

from flowrl.core.advantages import edge_advantages, group_statistics
from flowrl.core.estimators import centre, scale

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")
PUBLISHED = {"group_zscore": ("group", "group_std"), "global_std": ("group", "batch_std"), "group_mean": ("group", "none"), "reward": ("none", "none")}
"""What pictures had before: the defaults of the methods that train SDE steps."""
CENTRED = [name for name in PUBLISHED if name != "reward"]


def advantages(name, rewards, group, valid=None, *, eps=1e-4, ddof=0, spread=1.0):
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    valid = torch.ones(len(rewards), dtype=torch.bool) if valid is None else torch.tensor(valid)
    group = torch.as_tensor(group)
    return of(name, rewards, group, valid, eps=eps, ddof=ddof, spread=spread)


def of(name, rewards, group, valid, *, eps, ddof, spread):
    kinds, sets = PUBLISHED[name], (group, valid, int(group.max()) + 1)
    return scale(kinds[1], centre(kinds[0], rewards, *sets), rewards, *sets, eps=eps, ddof=ddof, batch_std=spread)


@pytest.mark.parametrize(("ddof", "std"), [(0, math.sqrt(2 / 3)), (1, 1.0)])
def test_the_group_zscore_by_hand(ddof, std):
    # group 0 is 1, 2, 3: mean 2, squares 1 + 0 + 1; group 1 is 10, 14: mean 12, squares 4 + 4
    std1 = 2.0 if ddof == 0 else math.sqrt(8)
    expected = [-1 / (std + 0.1), -2 / (std1 + 0.1), 0.0, 2 / (std1 + 0.1), 1 / (std + 0.1)]
    result = advantages("group_zscore", [1.0, 10.0, 2.0, 14.0, 3.0], [0, 1, 0, 1, 0], eps=0.1, ddof=ddof)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), **FP64)


def test_the_global_std_divides_every_group_by_one_spread():
    result = advantages("global_std", [1.0, 10.0, 3.0, 14.0], [0, 1, 0, 1], eps=0.5, spread=3.5)
    torch.testing.assert_close(result, torch.tensor([-0.25, -0.5, 0.25, 0.5], dtype=torch.float64), **FP64)


def test_the_group_mean_only_centres():
    result = advantages("group_mean", [1.0, 10.0, 3.0, 14.0], [0, 1, 0, 1])
    torch.testing.assert_close(result, torch.tensor([-1.0, -2.0, 1.0, 2.0], dtype=torch.float64), **FP64)


def test_statistics_by_hand_count_valid_samples_only():
    rewards = torch.tensor([1.0, NAN, 3.0, 7.0, 5.0])
    mean, std, count = group_statistics(rewards, torch.tensor([0, 0, 0, 1, 3]), torch.tensor([True, False, True, True, False]), 4, 0)
    assert mean.tolist() == [2.0, 7.0, 0.0, 0.0]
    assert std.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert count.tolist() == [2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_invalid_samples_get_zero_and_do_not_move_the_others(name):
    clean = advantages(name, [1.0, 4.0, 2.0], [0, 0, 0])
    result = advantages(name, [1.0, NAN, 4.0, 2.0, math.inf], [0, 0, 0, 0, 0], [True, False, True, True, False])
    torch.testing.assert_close(result, torch.tensor([clean[0], 0.0, clean[1], clean[2], 0.0], dtype=torch.float64), **FP64)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", CENTRED)
def test_a_single_valid_sample_has_nothing_to_be_compared_with(name, ddof):
    result = advantages(name, [3.0, NAN, 1.0, 2.0], [0, 0, 1, 1], [True, False, True, True], ddof=ddof)
    assert result[:2].tolist() == [0.0, 0.0]
    assert result[2:].abs().min() > 0


@pytest.mark.parametrize("name", CENTRED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 7, 24])
def test_equal_rewards_give_exactly_zero(name, dtype, size):
    # the plain mean of seven float32 0.7s is not 0.7: divided by a std of rounding errors that would become an advantage of order 1
    rewards = torch.full((size,), 0.7, dtype=dtype)
    group, valid = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    result = of(name, rewards, group, valid, eps=1e-8, ddof=0, spread=0.0)
    assert result.tolist() == [0.0] * size
    assert group_statistics(rewards, group, valid, 1, 0)[1].tolist() == [0.0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_order_of_samples_does_not_matter(name):
    generator = torch.Generator().manual_seed(0)
    rewards, group = torch.rand(40, generator=generator, dtype=torch.float64), torch.arange(40) % 5
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(advantages(name, rewards[order], group[order]), advantages(name, rewards, group)[order], **FP64)


@pytest.mark.parametrize("name", CENTRED)
def test_a_shift_of_a_groups_rewards_does_not_matter(name):
    generator = torch.Generator().manual_seed(1)
    rewards, group = torch.rand(40, generator=generator, dtype=torch.float64), torch.arange(40) % 5
    torch.testing.assert_close(advantages(name, rewards + 10.0 * group, group), advantages(name, rewards, group), rtol=1e-10, atol=1e-10)


def test_the_scale_of_rewards_cancels_in_both_zscores_and_stays_in_the_group_mean():
    generator = torch.Generator().manual_seed(2)
    rewards, group = torch.rand(40, generator=generator, dtype=torch.float64), torch.arange(40) % 5
    each = 1.0 + group  # its own scale for every group
    torch.testing.assert_close(advantages("group_zscore", each * rewards, group, eps=1e-15), advantages("group_zscore", rewards, group, eps=1e-15), **FP64)
    one, hundred = advantages("global_std", rewards, group, eps=1e-15), advantages("global_std", 100 * rewards, group, eps=1e-15, spread=100.0)
    torch.testing.assert_close(hundred, one, **FP64)
    torch.testing.assert_close(advantages("group_mean", 100 * rewards, group), 100 * advantages("group_mean", rewards, group), **FP64)


def test_groups_are_centred_and_the_zscore_has_unit_spread():
    generator = torch.Generator().manual_seed(3)
    rewards, group = torch.rand(40, generator=generator, dtype=torch.float64), torch.arange(40) % 5
    result = advantages("group_zscore", rewards, group, eps=1e-15, ddof=1)
    for g in range(5):
        assert result[group == g].mean().item() == pytest.approx(0.0, abs=1e-12)
        assert result[group == g].std().item() == pytest.approx(1.0, rel=1e-12)


def test_the_reward_is_neither_centred_nor_scaled():
    rewards = torch.tensor([0.3, NAN, -7.0, 0.3], dtype=torch.float64)
    result = advantages("reward", rewards, [0, 0, 1, 2], [True, False, True, True], eps=0.5, ddof=1, spread=9.0)
    assert result.tolist() == [0.3, 0.0, -7.0, 0.3]


def test_a_chains_decisions_have_their_own_samples_advantage():
    leaf_edge = torch.tensor([[0, 0], [2, 0], [1, 1], [3, 1]])
    assert edge_advantages(torch.tensor([0.5, -2.0]), leaf_edge, 4).tolist() == [0.5, -2.0, 0.5, -2.0]


def test_a_decision_above_a_branch_has_the_mean_of_the_samples_below_it():
    leaf_edge = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [2, 1], [2, 2]])
    assert edge_advantages(torch.tensor([3.0, -1.0, -5.0]), leaf_edge, 3).tolist() == [-1.0, 3.0, -3.0]
