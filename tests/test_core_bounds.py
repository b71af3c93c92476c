"""BAPO's search for clip bounds: by hand, against the loop of the paper, monotone, and the same on several processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.bounds import bound_candidates, bound_statistics, choose_bounds
from flowrl.core.objectives import clipped_surrogate
from flowrl.types import Decisions


def draw(seed, shape=(6, 8)):
    generator = torch.Generator().manual_seed(seed)
    log_ratio, advantages = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return 0.5 * log_ratio, advantages, torch.rand(shape, generator=generator) < 0.8


def search(log_ratio, advantages, mask, *, target, stat="grad"):
    candidates = bound_candidates()
    low, high = choose_bounds(candidates, bound_statistics(log_ratio, advantages, mask, candidates, stat=stat), target=target)
    return low.item(), high.item()


def test_the_candidates_raise_the_lower_bound_and_then_the_upper_one():
    candidates = bound_candidates(low_start=0.6, low_end=0.7, high_start=1.2, high_end=1.33)
    assert candidates.tolist() == [pytest.approx(pair) for pair in ([0.6, 1.2], [0.65, 1.2], [0.7, 1.2], [0.7, 1.25], [0.7, 1.3], [0.7, 1.33])]
    assert bound_candidates(low_start=0.8, low_end=0.8, high_start=1.2, high_end=1.2).tolist() == [[0.8, 1.2]]
    assert len(bound_candidates()) == 7 + 36


def test_statistics_by_hand():
    # ratios 2, 1, 0.5, 1.5 with A 1, 2, -1, -2; the last decision is masked
    log_ratio = torch.tensor([[2.0, 1.0, 0.5, 1.5, 9.0]], dtype=torch.float64).log()
    advantages = torch.tensor([[1.0, 2.0, -1.0, -2.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True, False]])
    candidates = torch.tensor([[0.4, 1.2], [0.6, 3.0]], dtype=torch.float64)
    assert bound_statistics(log_ratio, advantages, mask, candidates).tolist() == [pytest.approx([2.0, 3.5]), pytest.approx([4.0, 3.0])]
    assert bound_statistics(log_ratio, advantages, mask, candidates, stat="value").tolist() == [pytest.approx([3.2, 3.5]), pytest.approx([4.0, 3.6])]
    with pytest.raises(ValueError, match="unknown statistic 'mean' of the search for clip bounds; known: grad, value"):
        bound_statistics(log_ratio, advantages, mask, candidates, stat="mean")


def loop(log_ratio, advantages, mask, target):
    """The released search, with its statistic, as the paper tells it."""

    def share(low, high):
        ratio = log_ratio.exp()
        effective = torch.where(advantages >= 0, ratio.clamp(max=high), ratio.clamp(min=low)) * advantages * mask
        return (effective.clamp(min=0).sum() / (-effective).clamp(min=0).sum()).item()

    low, high = 0.6, 1.2
    while share(low, high) < target and low < 0.9 - 1e-9:
        low = min(low + 0.05, 0.9)
    while share(low, high) < target and high < 3.0 - 1e-9:
        high = min(high + 0.05, 3.0)
    return low, high


@pytest.mark.parametrize("target", [0.5, 0.9, 1.0, 1.05, 1.1, 1.2, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_the_released_loop_finds(seed, target):
    batch = draw(seed)
    assert search(*batch, target=target, stat="value") == pytest.approx(loop(*batch, target))


def test_the_search_stops_in_the_middle_somewhere():
    found = {search(*draw(seed), target=1.1) for seed in range(20)}
    assert len(found) > 5


def test_item_20_target_0_is_ppo_with_the_first_bounds():
    log_ratio, advantages, mask = draw(5)
    low, high = search(log_ratio, advantages, mask, target=0.0)
    assert (low, high) == (0.6, 1.2)
    loss = clipped_surrogate(Decisions(log_ratio, torch.zeros_like(log_ratio), advantages, mask), clip_low=1 - low, clip_high=high - 1).loss
    ratio = log_ratio.exp()
    expected = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.6, 1.2)) * mask
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_bounds_that_are_tensors_go_straight_into_the_clip():
    log_ratio, advantages, mask = draw(6)
    candidates = bound_candidates()
    low, high = choose_bounds(candidates, bound_statistics(log_ratio, advantages, mask, candidates), target=1.0)
    batch = Decisions(log_ratio, torch.zeros_like(log_ratio), advantages, mask)
    ours = clipped_surrogate(batch, clip_low=1 - low, clip_high=high - 1, dual_clip=3.0).loss
    assert ours.equal(clipped_surrogate(batch, clip_low=1 - low.item(), clip_high=high.item() - 1, dual_clip=3.0).loss)


@pytest.mark.parametrize("stat", ["grad", "value"])
def test_without_negative_decisions_nothing_is_searched_and_without_positive_ones_the_search_ends(stat):
    log_ratio, advantages, mask = draw(7)
    assert search(log_ratio, advantages.abs(), mask, target=1.0, stat=stat) == (0.6, 1.2)
    assert search(log_ratio, -advantages.abs(), mask, target=1.0, stat=stat) == (0.9, 3.0)
    assert search(log_ratio, advantages, torch.zeros_like(mask), target=1.0, stat=stat) == (0.6, 1.2)


@given(st.integers(0, 10_000))
def test_item_40_raising_either_bound_never_lowers_the_share_of_the_gradient_statistic(seed):
    batch = draw(seed)
    positive, negative = bound_statistics(*batch, bound_candidates()).unbind(1)
    assert (positive.diff() >= -1e-12).all()  # along the candidates one bound rises at a time
    assert (negative.diff() <= 1e-12).all()


def test_item_40_of_the_released_statistic_only_the_upper_bound_helps():
    # text.md 15.8: raising the lower bound can only raise N by value
    log_ratio, advantages, mask = draw(8)
    candidates = bound_candidates()
    positive, negative = bound_statistics(log_ratio, advantages, mask, candidates, stat="value").unbind(1)
    share = positive / negative
    assert share[6] < share[0]
    assert (share[6:].diff() >= 0).all()


@pytest.mark.parametrize("stat", ["grad", "value"])
def test_item_28_statistics_of_parts_add_to_those_of_the_whole(stat):
    log_ratio, advantages, mask = draw(9)
    candidates = bound_candidates()
    parts = sum(bound_statistics(log_ratio[rows], advantages[rows], mask[rows], candidates, stat=stat) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
    torch.testing.assert_close(parts, bound_statistics(log_ratio, advantages, mask, candidates, stat=stat))


def test_masked_decisions_do_not_count_whatever_they_hold():
    log_ratio, advantages, mask = draw(10)
    expected = bound_statistics(log_ratio, advantages, mask, bound_candidates())
    log_ratio[~mask], advantages[~mask] = torch.inf, torch.nan
    assert bound_statistics(log_ratio, advantages, mask, bound_candidates()).equal(expected)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({"low_start": 0.95}, "0 <= 0.95 <= 0.9"), ({"high_start": 0.9}, "<= 1 <= 0.9"), ({"low_step": 0.0}, "must be above 0, not 0.0 and 0.05")],
)
def test_bounds_out_of_order_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        bound_candidates(**bounds)


def test_the_search_does_not_wait_for_the_device():
    """Tensors without data: a look at a value, .item() or bool(), would raise."""
    value, mask = torch.empty(4, 6, device="meta"), torch.empty(4, 6, dtype=torch.bool, device="meta")
    candidates = bound_candidates()
    low, high = choose_bounds(candidates, bound_statistics(value, value, mask, candidates))
    assert low.is_meta
    assert high.shape == ()
