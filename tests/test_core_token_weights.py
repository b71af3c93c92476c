"""Token weights and masks: by hand, at their limits, without gradient, masked."""

import math

import pytest
import torch

from flowrl.core.token_weights import (
    chord_weights,
    curvature_mask,
    divergence_weights,
    low_probability_selection,
    masked_quantile,
    min_p_log_prob,
    overlong_filter,
    position_divergence,
    top_entropy_mask,
    uncertain_mask,
)

FP64 = {"rtol": 1e-12, "atol": 1e-12}


def draw(seed, shape=(6, 7)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64), torch.rand(shape, generator=generator) < 0.7


# --- TW-GRPO ------------------------------------------------------------------------------------------------------------------------------------


def test_the_divergence_of_three_sequences_by_hand():
    # of two sequences the distances to the mean are equal and opposite, of three they are not; at position 1 the second one is over and counts as (1/2, 1/2)
    p = torch.tensor([[[0.5, 0.5], [0.1, 0.9]], [[0.25, 0.75], [0.3, 0.7]], [[0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    ours = position_divergence(p.log(), mask, torch.zeros(3, dtype=torch.int64), 1)

    def by_hand(*probabilities):
        total = 0.0
        for column in zip(*probabilities, strict=True):
            mean = sum(math.log(x) for x in column) / 3
            total += sum(math.exp(mean) / x - (mean - math.log(x)) - 1 for x in column) / 3
        return total

    assert ours.tolist() == [pytest.approx([by_hand((0.5, 0.5), (0.25, 0.75), (0.9, 0.1)), by_hand((0.1, 0.9), (0.5, 0.5), (0.2, 0.8))])]


def test_distances_beyond_11_nats_are_cut():
    # log-probabilities 0 and -60: the mean is -30, both are 30 away, cut to 11
    q = torch.tensor([[[0.0]], [[-60.0]]], dtype=torch.float64)
    ours = position_divergence(q, torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1)
    assert ours.item() == pytest.approx((math.exp(11) - 11 - 1 + math.exp(-11) + 11 - 1) / 2)


def test_the_divergence_is_of_each_group_alone_whatever_is_masked():
    logits, mask = draw(0, (6, 7, 5))
    mask = mask[..., 0]
    group = torch.tensor([1, 0, 1, 1, 0, 3])
    q = logits.log_softmax(-1)
    whole = position_divergence(q, mask, group, 4)
    for number in (0, 1):
        rows = group == number
        torch.testing.assert_close(whole[number : number + 1], position_divergence(q[rows], mask[rows], torch.zeros(int(rows.sum()), dtype=torch.int64), 1))
    assert whole[2].eq(0).all()  # nobody
    assert whole[3].eq(0).all()  # alone
    q[~mask] = math.nan
    assert position_divergence(q, mask, group, 4).equal(whole)
    assert whole.ge(0).all()
    torch.testing.assert_close(
        torch.cat([position_divergence(q[:, :3], mask[:, :3], group, 4), position_divergence(q[:, 3:], mask[:, 3:], group, 4)], 1), whole
    )


def test_a_log_distribution_with_zeros_stays_finite():
    q = torch.tensor([[[0.0, -math.inf]], [[-1.0, math.log(1 - math.exp(-1))]]])
    assert position_divergence(q.clamp_min(-1e4), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1).isfinite().all()


def test_divergence_weights_by_hand():
    # group 0 counts at positions 0..2: divergences 1, 3, 2 -> 1, 1.4, 1.2; position 3 is padding and moves nothing; group 1 is constant
    divergence = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.7, 0.7, 0.7, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    weights = divergence_weights(divergence, mask, torch.tensor([0, 0, 1, 1]))
    assert weights.tolist() == [pytest.approx([1.0, 1.4, 1.2, 1.0]), pytest.approx([1.0, 1.4, 1.0, 1.0]), [1.0] * 4, [1.0] * 4]


def test_alpha_1_and_identical_sequences_weigh_1():
    logits, _ = draw(1, (1, 7, 5))
    same, mask, group = logits.log_softmax(-1).expand(4, 7, 5), torch.ones(4, 7, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    assert divergence_weights(position_divergence(same, mask, group, 1), mask, group).eq(1).all()
    other, _ = draw(2, (4, 7, 5))
    divergence = position_divergence(other.log_softmax(-1), mask, group, 1)
    assert divergence_weights(divergence, mask, group, alpha=1.0).eq(1).all()
    weights = divergence_weights(divergence, mask, group, alpha=1.7)
    assert (weights.min().item(), weights.max().item()) == (1.0, 1.7)


def test_a_batch_without_decisions_weighs_1():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert divergence_weights(torch.rand(1, 3), mask, torch.zeros(2, dtype=torch.int64)).eq(1).all()


# --- masks --------------------------------------------------------------------------------------------------------------------------------------


def test_decisions_that_the_policy_was_sure_of_are_masked():
    p = torch.tensor([[0.95, 0.9, 0.89, 0.1]], dtype=torch.float64)
    assert uncertain_mask(p.log(), torch.tensor([[True, True, True, False]])).tolist() == [[False, False, True, False]]
    assert uncertain_mask(p.log(), torch.ones(1, 4, dtype=torch.bool), threshold=0.5).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_the_masked_quantile_is_torchs_of_what_counts(share):
    value, mask = draw(3)
    torch.testing.assert_close(masked_quantile(value, mask, share), value[mask].quantile(share))
    value[~mask] = math.nan
    assert masked_quantile(value, mask, share).isfinite()
    assert masked_quantile(value, torch.zeros_like(mask), share).item() == math.inf


def test_the_highest_entropies_are_kept():
    entropy = torch.arange(12, dtype=torch.float64).reshape(2, 6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 5] = False
    assert top_entropy_mask(entropy, mask, share=0.2).nonzero().tolist() == [[1, 2], [1, 3], [1, 4]]  # 11 values: the quantile 0.8 is 8
    assert top_entropy_mask(entropy, mask, share=1.0).equal(mask)
    assert not top_entropy_mask(entropy, torch.zeros_like(mask)).any()
    assert top_entropy_mask(entropy, mask, threshold=torch.tensor(9.5)).nonzero().tolist() == [[1, 4]]


def test_a_truncated_sequence_teaches_nothing():
    mask = torch.tensor([[True, False], [True, True]])
    assert overlong_filter(mask, torch.tensor([False, True])).tolist() == [[True, False], [False, False]]


# --- Lp-Reg -------------------------------------------------------------------------------------------------------------------------------------


def test_the_proxy_by_hand():
    # 0.6, 0.3, 0.09, 0.01 with kappa 0.1: the threshold is 0.06, the last is gone and 0.99 remains
    p = torch.tensor([0.6, 0.3, 0.09, 0.01], dtype=torch.float64).log().expand(1, 2, 4)
    torch.testing.assert_close(min_p_log_prob(p, torch.tensor([[1, 3]]), kappa=0.1), torch.tensor([[math.log(0.3 / 0.99), -1e4]], dtype=torch.float64), **FP64)


@pytest.mark.parametrize("kappa", [0.0, 1e-9])
def test_where_nothing_is_filtered_the_proxy_is_the_policy(kappa):
    logits, _ = draw(4, (2, 3, 5))
    log_p, action = logits.log_softmax(-1), torch.tensor([[0, 1, 2], [3, 4, 0]])
    torch.testing.assert_close(min_p_log_prob(log_p, action, kappa=kappa), log_p.gather(-1, action[..., None])[..., 0], **FP64)


def test_the_proxy_never_lies_below_a_kept_tokens_own_probability():
    logits, _ = draw(5, (4, 6, 30))
    log_p = (3 * logits).log_softmax(-1)
    action = log_p.argmax(-1)
    assert (min_p_log_prob(log_p, action) >= log_p.gather(-1, action[..., None])[..., 0]).all()


def test_rare_negative_tokens_below_their_proxy_are_selected():
    log_prob = torch.tensor([[-9.0, -1.0, -8.0, -7.0, -6.0], [-20.0, -5.0, -30.0, -4.0, -3.0]])
    advantages = torch.tensor([[-1.0] * 5, [1.0, -1.0, -1.0, -1.0, -1.0]])
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    proxy = log_prob + 1
    proxy[0, 2] = -1e4  # it is noise
    # 8 negative tokens: floor(0.4 * 8) = 3 lowest are -9, -8, -7, of which -8 is noise
    assert low_probability_selection(log_prob, proxy, advantages, mask, share=0.4).nonzero().tolist() == [[0, 0], [0, 3]]
    assert low_probability_selection(log_prob, proxy, advantages, mask, share=0.25).nonzero().tolist() == [[0, 0]]
    assert not low_probability_selection(log_prob, proxy, advantages, mask, share=0.24).any()  # one alone is none
    assert not low_probability_selection(log_prob, proxy, advantages, mask, share=0.0).any()
    assert not low_probability_selection(log_prob, proxy, advantages.abs(), mask, share=1.0).any()
    assert low_probability_selection(log_prob, proxy, advantages, mask, share=1.0).sum().item() == 7


def test_of_equal_log_probabilities_only_the_share_is_selected():
    flat = torch.full((1, 10), -2.0)
    assert low_probability_selection(flat, flat + 1, -torch.ones(1, 10), torch.ones(1, 10, dtype=torch.bool), share=0.3).sum().item() == 3


# --- CAPO's stand-in and CHORD ------------------------------------------------------------------------------------------------------------------


def test_the_curvature_is_the_norm_of_the_gradient_in_the_logits():
    logits = torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64, requires_grad=True)
    log_p, old, advantage, step = logits.log_softmax(0), -1.3, -0.7, 0.5
    (slope,) = torch.autograd.grad(-advantage * (log_p[1] - old).exp(), logits, retain_graph=True)
    move = (step**2 * slope.square().sum() / 2).item()
    arguments = [torch.tensor([[x]], dtype=torch.float64) for x in (advantage, log_p[1].item(), old, log_p.exp().square().sum().item())]
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert curvature_mask(*arguments, mask, step=step, threshold=move * 1.001).item()
    assert not curvature_mask(*arguments, mask, step=step, threshold=move * 0.999).item()


def test_without_a_threshold_all_are_kept_and_masked_ones_never():
    value, mask = draw(6)
    arguments = (value, -value.abs(), -value.abs() - 1, torch.rand_like(value))
    assert curvature_mask(*arguments, mask, step=1.0, threshold=math.inf).equal(mask)
    assert not curvature_mask(*arguments, mask, step=1.0, threshold=-1.0).any()


def test_chords_weight_is_highest_at_one_half():
    p = torch.tensor([0.5, 0.1, 0.9, 1.0], dtype=torch.float64)
    log_prob = p.log().requires_grad_()
    weights = chord_weights(log_prob)
    assert weights.tolist() == pytest.approx([0.25, 0.09, 0.09, 0.0])
    assert not weights.requires_grad


def test_nothing_waits_for_the_device():
    """Tensors without data: a look at a value, .item() or bool(), would raise."""
    value, mask = torch.empty(4, 6, device="meta"), torch.empty(4, 6, dtype=torch.bool, device="meta")
    group, action = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((4,), (4, 6)))
    distribution = torch.empty(4, 6, 9, device="meta")
    divergence = position_divergence(distribution, mask, group, 2)
    results = [
        divergence_weights(divergence, mask, group),
        uncertain_mask(value, mask),
        top_entropy_mask(value, mask),
        min_p_log_prob(distribution, action),
        low_probability_selection(value, value, value, mask),
        curvature_mask(value, value, value, value, mask, step=1.0, threshold=1.0),
        chord_weights(value),
        overlong_filter(mask, mask[:, 0]),
    ]
    assert all(result.is_meta and result.shape == (4, 6) for result in results)
