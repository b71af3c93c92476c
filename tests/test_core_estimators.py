"""Centres and scales: by hand, special cases, the identities of text.md (A1 to A11, A21, section 12), edges."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.core.advantages import group_statistics
from flowrl.core.estimators import (
    CENTRES,
    SCALES,
    Beta,
    RewardAverage,
    beta_parameters,
    beta_weight,
    centre,
    check_groups,
    combine_heads,
    group_success,
    scale,
)

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")
WITHIN = ("group", "leave_one_out", "length_weighted", "virtual_max")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def everyone(rewards):
    return torch.ones(len(rewards), dtype=torch.bool)


def centred(kind, rewards, group, valid=None, **options):
    rewards, group = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(group)
    valid = everyone(rewards) if valid is None else torch.tensor(valid)
    options = {"lengths": torch.arange(1.0, len(rewards) + 1, dtype=torch.float64), "baseline": 0.5} | options
    return centre(kind, rewards, group, valid, int(group.max()) + 1, **options)


def estimate(centre_kind, scale_kind, rewards, group, valid=None, *, eps=0.0, ddof=1, scaling=None, **options):
    rewards, group = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(group)
    valid = everyone(rewards) if valid is None else torch.as_tensor(valid)
    number = int(group.max()) + 1
    shared = {key: options[key] for key in ("stats_mask", "virtual") if key in options}
    scaling = {"batch_std": 2.0} if scale_kind == "given" and scaling is None else scaling or {}
    first = centred(centre_kind, rewards, group, valid.tolist(), **options)
    return scale(scale_kind, first, rewards, group, valid, number, eps=eps, ddof=ddof, **shared, **({"bounds": (-100.0, 100.0)} | scaling))


def batch(seed=0, size=12, groups=3):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(size, generator=generator, dtype=torch.float64)
    return rewards, torch.arange(size) % groups


# --- by hand ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0, 10.0, 4.0, 20.0]),
        ("batch", [1 - 8.75, 10 - 8.75, 4 - 8.75, 20 - 8.75]),
        ("group", [-1.5, -5.0, 1.5, 5.0]),
        ("leave_one_out", [-3.0, -10.0, 3.0, 10.0]),
        ("length_weighted", [1 - 13 / 4, 10 - 100 / 6, 4 - 13 / 4, 20 - 100 / 6]),  # (1 1 + 3 4) / 4 and (2 10 + 4 20) / 6
        ("virtual_max", [1 - 35 / 3, 10 - 20.0, 4 - 35 / 3, 20 - 20.0]),  # with a 30 in each group
        ("best_minus_second", [0.0, 0.0, 3.0, 10.0]),
        ("ema", [0.5, 9.5, 3.5, 19.5]),
        ("given", [0.5, 9.5, 3.5, 19.5]),
    ],
)
def test_centres_by_hand(kind, expected):
    result = centred(kind, [1.0, 10.0, 4.0, 20.0], [0, 1, 0, 1], virtual=(1, 30.0))
    torch.testing.assert_close(result, tensor(expected), **FP64)


@pytest.mark.parametrize(
    ("kind", "ddof", "divisors"),
    [
        ("none", 1, [1.0, 1.0]),
        ("group_std", 0, [1.5, 5.0]),
        ("group_std", 1, [math.sqrt(4.5), math.sqrt(50)]),
        ("batch_std", 0, [math.sqrt(517 / 4 - 8.75**2)] * 2),  # squares 1 + 100 + 16 + 400
        ("batch_std_centred", 0, [math.sqrt((2 * 1.5**2 + 2 * 25) / 4)] * 2),
        ("batch_std_centred", 1, [math.sqrt((2 * 1.5**2 + 2 * 25) / 3)] * 2),
        ("given", 1, [2.0, 2.0]),
    ],
)
def test_scales_by_hand(kind, ddof, divisors):
    result = estimate("group", kind, [1.0, 10.0, 4.0, 20.0], [0, 1, 0, 1], eps=0.1, ddof=ddof)
    one, other = (divisor + (0 if kind == "none" else 0.1) for divisor in divisors)
    torch.testing.assert_close(result, tensor([-1.5 / one, -5 / other, 1.5 / one, 5 / other]), **FP64)


def test_the_mean_and_the_std_of_all_processes_replace_those_of_these_samples():
    assert centred("batch", [1.0, 2.0], [0, 0], batch_mean=10.0).tolist() == [-9.0, -8.0]
    assert estimate("group", "batch_std", [1.0, 3.0], [0, 0], scaling={"batch_std": torch.tensor(4.0)}).tolist() == [-0.25, 0.25]


def test_the_running_baseline_has_no_bias_and_is_restored():
    average = RewardAverage(decay=0.5)
    assert average.value(7.0) == 7.0  # nothing seen: the batch itself
    average = average.update(4.0)
    assert average.value(0.0) == 4.0
    average = average.update(1.0)
    assert average.value(0.0) == pytest.approx((0.25 * 4 + 0.5 * 1) / 0.75)
    assert RewardAverage(**json.loads(json.dumps(average.state_dict()))) == average


def test_the_running_baseline_with_decay_0_is_the_last_batch():
    assert RewardAverage(decay=0.0).update(3.0).update(5.0).value(0.0) == 5.0


# --- section 12 of text.md -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(2, 9))
@settings(max_examples=25)
def test_identity_2_rloo_is_the_group_mean_times_g_over_g_minus_1(seed, size):
    rewards, _ = batch(seed, size)
    group = torch.zeros(size, dtype=torch.int64)
    rloo = centred("leave_one_out", rewards, group)
    torch.testing.assert_close(rloo, centred("group", rewards, group) * size / (size - 1), **FP64)
    others = torch.stack([rewards[torch.arange(size) != i].mean() for i in range(size)])
    torch.testing.assert_close(rloo, rewards - others, **FP64)
    assert rloo.sum().abs() < 1e-12


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=25)
def test_identity_3_grpo_does_not_see_a_scale_and_a_shift_of_rewards_and_sums_to_0(seed, factor, shift):
    rewards, group = batch(seed)
    result = estimate("group", "group_std", rewards, group)
    torch.testing.assert_close(estimate("group", "group_std", factor * rewards + shift, group), result, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.zeros(3, dtype=torch.float64).index_add_(0, group, result), torch.zeros(3, dtype=torch.float64), **FP64)


def test_identity_4_ngrpo_without_virtual_rewards_is_grpo():
    rewards, group = batch()
    assert torch.equal(estimate("virtual_max", "group_std", rewards, group, virtual=(0, 1.0)), estimate("group", "group_std", rewards, group))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_identity_4_ngrpo_on_an_all_wrong_group(size):
    result = estimate("virtual_max", "group_std", [0.0] * size, [0] * size, virtual=(1, 1.0))
    torch.testing.assert_close(result, torch.full_like(result, -1 / math.sqrt(size + 1)), **FP64)


def test_a11_ngrpo_on_an_all_right_group_is_0_and_sums_are_at_most_0():
    assert estimate("virtual_max", "group_std", [1.0] * 3, [0] * 3, virtual=(1, 1.0)).tolist() == [0.0] * 3
    for k in (1, 2, 5):
        rewards = tensor([0.0, 1.0, 0.25, 0.0])
        result = estimate("virtual_max", "group_std", rewards, [0] * 4, virtual=(k, 1.0))
        augmented = torch.cat([rewards, torch.ones(k, dtype=torch.float64)])
        torch.testing.assert_close(result, (rewards - augmented.mean()) / augmented.std(), **FP64)
        torch.testing.assert_close(result.sum(), -k * (1 - augmented.mean()) / augmented.std(), **FP64)


def test_identity_5_bnpo_with_a_flat_density_is_dr_grpo():
    rewards, group = (batch()[0] > 0).double(), batch()[1]
    result = estimate("group", "beta", rewards, group, scaling={"bounds": (0.0, 1.0), "beta": Beta(1.0, 1.0)})
    torch.testing.assert_close(result, centred("group", rewards, group), **FP64)


def test_identity_5_bnpo_with_three_halves_is_grpo_times_pi_over_8():
    rewards, group = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]), [0, 0, 0, 0, 1, 1, 1, 1]
    result = estimate("group", "beta", rewards, group, scaling={"bounds": (0.0, 1.0), "beta": Beta(1.5, 1.5)})
    torch.testing.assert_close(result, math.pi / 8 * estimate("group", "group_std", rewards, group, ddof=0), **FP64)


ESTIMATORS = [
    ("group", "none"),
    ("group", "group_std"),
    ("group", "batch_std"),
    ("group", "batch_std_centred"),
    ("leave_one_out", "none"),
    ("length_weighted", "none"),
    ("best_minus_second", "group_std"),
    ("group", "beta"),
]


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("kinds", ESTIMATORS)
def test_identity_27_a_group_of_equal_rewards_has_advantage_0(kinds, eps):
    result = estimate(*kinds, [0.1, 0.1, 0.1, 0.0, 0.3], [0, 0, 0, 1, 1], eps=eps)
    assert result[:3].tolist() == [0.0] * 3
    assert result[3:].abs().max() > 0
    assert estimate(*kinds, [0.1] * 6, [0] * 6, eps=eps).tolist() == [0.0] * 6  # the whole batch


def test_identity_27_but_not_where_virtual_rewards_say_that_it_is_all_wrong():
    assert (estimate("virtual_max", "group_std", [0.0] * 4, [0] * 4, virtual=(1, 1.0)) < 0).all()


@pytest.mark.parametrize("scale_kind", SCALES)
@pytest.mark.parametrize("kind", CENTRES)
def test_identity_29_the_order_of_samples_does_not_matter(kind, scale_kind):
    rewards, group = batch(5)
    lengths = torch.arange(1.0, 13.0, dtype=torch.float64)
    valid = torch.arange(12) != 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    straight = estimate(kind, scale_kind, rewards, group, valid, lengths=lengths)
    mixed = estimate(kind, scale_kind, rewards[order], group[order], valid[order], lengths=lengths[order])
    torch.testing.assert_close(mixed, straight[order], **FP64)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=25)
def test_identity_29_nor_do_the_numbers_of_groups_of_unequal_sizes(sizes, seed):
    rewards, _ = batch(seed, sum(sizes))
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    renamed = (len(sizes) - 1 - group) * 2  # other numbers, with gaps
    for kinds in ESTIMATORS[:-1]:
        torch.testing.assert_close(estimate(*kinds, rewards, renamed), estimate(*kinds, rewards, group), **FP64)


# --- the lines T of the entries ------------------------------------------------------------------------------------------------------------------


def test_a1_the_batch_mean_over_one_group_is_the_group_mean():
    rewards, _ = batch()
    one = torch.zeros(12, dtype=torch.int64)
    assert torch.equal(centred("batch", rewards, one), centred("group", rewards, one))


@pytest.mark.parametrize(("ddof", "size"), [(0, 1.0), (1, 1 / math.sqrt(2))])
def test_a4_two_distinct_rewards_give_plus_and_minus_the_same(ddof, size):
    torch.testing.assert_close(estimate("group", "group_std", [0.3, 7.0], [0, 0], ddof=ddof), tensor([-size, size]), **FP64)


@pytest.mark.parametrize("right", [1, 3, 7])
def test_a4_binary_rewards_have_the_closed_form_in_the_success_rate(right):
    p = right / 8
    result = estimate("group", "group_std", [1.0] * right + [0.0] * (8 - right), [0] * 8, ddof=0)
    torch.testing.assert_close(result[0], tensor(math.sqrt((1 - p) / p)), **FP64)
    torch.testing.assert_close(result[-1], tensor(-math.sqrt(p / (1 - p))), **FP64)


def test_a5_dr_grpo_is_grpo_times_its_std():
    rewards, group = batch()
    _, std, _ = group_statistics(rewards, group, everyone(rewards), 3, 1)
    torch.testing.assert_close(centred("group", rewards, group), estimate("group", "group_std", rewards, group, eps=0.01) * (std + 0.01)[group], **FP64)


@pytest.mark.parametrize("kind", ["batch_std", "batch_std_centred"])
def test_a6_lite_ppo_with_one_group_is_grpo(kind):
    rewards, _ = batch()
    one = torch.zeros(12, dtype=torch.int64)
    torch.testing.assert_close(estimate("group", kind, rewards, one, eps=1e-4), estimate("group", "group_std", rewards, one, eps=1e-4), **FP64)


def test_a7_opo_with_equal_lengths_is_dr_grpo():
    rewards, group = batch()
    torch.testing.assert_close(centred("length_weighted", rewards, group, lengths=torch.full((12,), 7)), centred("group", rewards, group), **FP64)


def test_a7_opo_leaves_samples_without_tokens_out_of_the_baseline_and_sums_to_0_with_lengths():
    result = centred("length_weighted", [1.0, 0.0, 9.0], [0, 0, 0], lengths=torch.tensor([1, 3, 0]))
    torch.testing.assert_close(result, tensor([0.75, -0.25, 8.75]), **FP64)
    assert (result[:2] * tensor([1.0, 3.0])).sum() == 0
    assert centred("length_weighted", [1.0, 5.0], [0, 0], lengths=torch.tensor([2, 0])).tolist() == [0.0, 0.0]  # one is left: nothing to compare
    assert centred("length_weighted", [1.0, 5.0], [0, 0], lengths=torch.tensor([0, 0]), singleton="raw").tolist() == [1.0, 5.0]


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_a8_at_most_one_sample_of_a_group_is_not_0(seed):
    rewards, group = batch(seed)
    result = estimate("best_minus_second", "group_std", rewards.round(), group)
    assert (torch.zeros(3).index_add_(0, group, (result != 0).float()) <= 1).all()
    assert (result >= 0).all()


def test_a8_two_equal_best_samples_have_nothing():
    assert centred("best_minus_second", [2.0, 2.0, 1.0], [0, 0, 0]).tolist() == [0.0, 0.0, 0.0]


def test_a9_a_head_without_spread_does_not_erase_the_others():
    group = torch.tensor([0, 0, 1, 1])
    heads = torch.stack([estimate("group", "group_std", rewards, group, ddof=0) for rewards in ([1.0, 0.0, 5.0, 5.0], [2.0, 2.0, 0.0, 3.0])])
    torch.testing.assert_close(combine_heads(heads, torch.tensor([2.0, 0.5])), tensor([2.0, -2.0, -0.5, 0.5]), **FP64)
    assert torch.equal(combine_heads(heads[:1], torch.ones(1)), heads[0])


def test_a10_the_beta_fit_by_hand():
    # p = 1/4, 1/2, 3/4: M = 1/2, V = 1/16, c = 3, alpha = beta = 1 + 3/2/3
    alpha, beta = beta_parameters(tensor([0.25, 0.5, 0.75, NAN]), torch.tensor([True, True, True, False]))
    torch.testing.assert_close(torch.stack([alpha, beta]), tensor([1.5, 1.5]), **FP64)
    alpha, beta = beta_parameters(tensor([0.1, 0.3]), torch.ones(2, dtype=torch.bool))  # M = 0.2, V = 0.02, c = 7
    torch.testing.assert_close(torch.stack([alpha, beta]), tensor([1 + 1.4 / 3, 1 + 5.6 / 3]), **FP64)


def test_a10_the_weight_is_one_over_the_density():
    p = tensor([0.2, 0.7])
    density = torch.distributions.Beta(tensor(1.3), tensor(2.4)).log_prob(p).exp()
    torch.testing.assert_close(beta_weight(p, Beta(1.3, 2.4)), 1 / density, **FP64)
    assert beta_weight(p.float(), Beta(1.3, 2.4)).dtype == torch.float32


def test_a10_edges_of_the_beta_fit():
    one = beta_parameters(tensor([0.3, NAN]), torch.tensor([True, False]))
    assert [value.item() for value in one] == [1.0, 1.0]
    equal = beta_parameters(tensor([0.4, 0.4, 0.4]), torch.ones(3, dtype=torch.bool))
    assert [value.item() for value in equal] == [1e3, 1e3]
    assert [value.item() for value in beta_parameters(tensor([0.0, 0.0]), torch.ones(2, dtype=torch.bool))] == [1.0, 1.0]  # all wrong: 0 / 0
    assert beta_weight(tensor([0.0, 1.0]), Beta(1.5, 1.5)).tolist() == [1e6, 1e6]
    assert beta_weight(tensor([0.0, 1.0]), Beta(1.0, 1.0)).tolist() == [1.0, 1.0]
    rewards = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]  # success rates 0, 1 and 1/2
    result = estimate("group", "beta", rewards, [0, 0, 1, 1, 2, 2], scaling={"bounds": (0.0, 1.0), "beta": Beta(1.5, 1.5)})
    assert result[:4].tolist() == [0.0] * 4
    assert result[5] > 0


def test_a10_rewards_are_first_scaled_to_0_to_1():
    rewards, group = tensor([0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]), [0, 0, 0, 1, 1, 1, 1]
    unit = estimate("group", "beta", rewards, group, scaling={"bounds": (0.0, 1.0)})
    torch.testing.assert_close(estimate("group", "beta", 4 * rewards - 3, group, scaling={"bounds": (-3.0, 1.0)}), unit, **FP64)
    success, known = group_success(rewards, torch.tensor(group), everyone(rewards), 3, (0.0, 1.0))
    torch.testing.assert_close(success, tensor([1 / 3, 0.75, 0.0]), **FP64)
    assert known.tolist() == [True, True, False]
    assert group_success(tensor([2.0, -1.0]), torch.tensor([0, 1]), everyone([0, 0]), 2, (0.0, 1.0))[0].tolist() == [1.0, 0.0]  # beyond the bounds


@pytest.mark.parametrize("bounds", [None, (0.0, math.inf), (-math.inf, 1.0), (1.0, 1.0), (NAN, 1.0)])
def test_a10_an_unbounded_reward_is_refused(bounds):
    with pytest.raises(ValueError, match="both finite"):
        estimate("group", "beta", [0.0, 1.0], [0, 0], scaling={"bounds": bounds})


@pytest.mark.parametrize("kind", ["group", "leave_one_out", "length_weighted"])
def test_a21_a_reference_score_per_prompt_cancels_within_the_group(kind):
    rewards, group = batch()
    torch.testing.assert_close(centred(kind, rewards - tensor([3.0, -1.0, 8.0])[group], group), centred(kind, rewards, group), **FP64)


# --- edges -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_kind", SCALES)
@pytest.mark.parametrize("kind", CENTRES)
def test_invalid_samples_get_0_and_do_not_move_the_others(kind, scale_kind):
    rewards, group = [1.0, 4.0, 2.0, 0.0, 3.0], [0, 0, 0, 1, 1]
    lengths = torch.tensor([2.0, 1.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    clean = estimate(kind, scale_kind, rewards, group, lengths=lengths, eps=1e-6)
    result = estimate(
        kind,
        scale_kind,
        [NAN, *rewards, math.inf],
        [0, *group, 1],
        [False, *[True] * 5, False],
        lengths=torch.cat([tensor([9.0]), lengths, tensor([9.0])]),
        eps=1e-6,
    )
    torch.testing.assert_close(result, torch.cat([tensor([0.0]), clean, tensor([0.0])]), **FP64)


@pytest.mark.parametrize("kind", WITHIN)
def test_a_single_sample_gets_0_or_its_reward(kind):
    options = {"virtual": (0, 0.0)}
    assert centred(kind, [3.0, 1.0, 2.0], [0, 1, 1], **options)[0] == 0
    assert centred(kind, [3.0, 1.0, 2.0], [0, 1, 1], singleton="raw", **options)[0] == 3
    assert centred(kind, [3.0, NAN, 1.0, 2.0], [0, 0, 1, 1], [True, False, True, True], singleton="raw", **options)[:2].tolist() == [3.0, 0.0]
    assert estimate(kind, "group_std", [3.0, 1.0, 2.0], [0, 1, 1], singleton="raw", eps=1e-6, **options)[0] == 3 / (1 + 1e-6)  # verl: std 1


def test_a_single_sample_has_no_second_best():
    assert centred("best_minus_second", [3.0, 1.0, 2.0], [0, 1, 1], singleton="raw").tolist() == [0.0, 0.0, 1.0]


def test_item_15_17_inserted_samples_are_compared_but_not_counted():
    rewards, group, mine = [0.0, 1.0, 5.0], [0, 0, 0], torch.tensor([True, True, False])
    assert centred("group", rewards, group, stats_mask=mine).tolist() == [-0.5, 0.5, 4.5]
    assert centred("leave_one_out", rewards, group, stats_mask=mine).tolist() == [-1.0, 1.0, 4.5]
    assert centred("batch", rewards, group, stats_mask=mine).tolist() == [-0.5, 0.5, 4.5]
    assert centred("length_weighted", rewards, group, stats_mask=mine, lengths=torch.tensor([1, 3, 9])).tolist() == [-0.75, 0.25, 4.25]
    assert centred("best_minus_second", rewards, group, stats_mask=mine).tolist() == [0.0, 1.0, 0.0]
    assert estimate("group", "group_std", rewards, group, stats_mask=mine, ddof=0).tolist() == [-1.0, 1.0, 9.0]
    assert centred("group", rewards, group, stats_mask=torch.ones(3, dtype=torch.bool)).tolist() == [-2.0, -1.0, 3.0]


def test_item_15_17_an_inserted_sample_beside_equal_ones_is_not_divided_by_eps():
    mine = torch.tensor([True, True, False])
    torch.testing.assert_close(
        estimate("group", "group_std", [0.0, 0.0, 1.0], [0, 0, 0], stats_mask=mine, eps=1e-6), tensor([0.0, 0.0, 1 / (1 + 1e-6)]), **FP64
    )


def test_item_15_17_beside_a_single_counted_sample_nothing_is_compared():
    assert centred("group", [0.0, 1.0], [0, 0], stats_mask=torch.tensor([True, False])).tolist() == [0.0, 0.0]


def test_groups_that_teach_nothing_are_counted():
    rewards, group = tensor([1.0, 1.0, 2.0, 3.0, 4.0, NAN, 5.0, 5.0]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    checked = check_groups(rewards, group, ~rewards.isnan(), 5)
    assert checked.singleton.tolist() == [False, False, True, False, False]
    assert checked.constant.tolist() == [True, False, False, True, False]
    inserted = check_groups(rewards, group, ~rewards.isnan(), 5, stats_mask=torch.arange(8) != 6)
    assert inserted.singleton.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("scale_kind", SCALES)
@pytest.mark.parametrize("kind", CENTRES)
def test_no_valid_sample_at_all_gives_0(kind, scale_kind):
    assert estimate(kind, scale_kind, [NAN, NAN], [0, 0], [False, False]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", CENTRES)
def test_float32_stays_float32(kind):
    rewards, group, valid = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    first = centre(kind, rewards, group, valid, 1, lengths=torch.ones(3), baseline=0.0)
    assert first.dtype == torch.float32
    for scale_kind in SCALES:
        assert scale(scale_kind, first, rewards, group, valid, 1, eps=1e-6, ddof=1, batch_std=1.0, bounds=(0.0, 4.0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: centred("median", [1.0], [0]), "unknown centre 'median'"),
        (lambda: centred("group", [1.0], [0], singleton="drop"), "unknown singleton rule 'drop'"),
        (lambda: centred("length_weighted", [1.0], [0], lengths=None), "needs the lengths"),
        (lambda: centred("given", [1.0], [0], baseline=None), "the centre given needs a baseline"),
        (lambda: centred("ema", [1.0], [0], baseline=None), "the centre ema needs a baseline"),
        (lambda: centred("virtual_max", [1.0], [0], virtual=(-1, 1.0)), "cannot be -1"),
        (lambda: estimate("group", "range", [1.0], [0]), "unknown scale 'range'"),
        (lambda: estimate("group", "given", [1.0], [0], scaling={"batch_std": None}), "needs batch_std"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
