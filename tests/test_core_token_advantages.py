"""Advantages within a sample: by hand, against plain loops, special cases and identities of text.md (A3, A9, A14 to A19), masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.core.estimators import centre, combine_heads, scale
from flowrl.core.token_advantages import (
    Moments,
    gae,
    gate_steps,
    length_lambda,
    masked_moments,
    outcome_rewards,
    segment_advantages,
    segment_ids,
    step_entropy,
    steps_to_decisions,
    token_returns,
    tree_advantages,
    truncated_masks,
    value_loss,
    whiten,
)

FP64 = {"rtol": 1e-11, "atol": 1e-12}
NAN = float("nan")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def booleans(*rows):
    return torch.tensor([[character == "x" for character in row] for row in rows])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 99)) < 0.7


GAPS = booleans("xx.x", ".xx.", "....")


# --- whitening, A3 and A9 --------------------------------------------------------------------------------------------------------------------------


def test_whitening_by_hand_counts_tokens():
    # 4 tokens of 1 and 1 of 6: mean 2, squares 4 1 + 16 = 20, ddof 1: variance 5
    result = whiten(tensor([1.0, 6.0]), booleans("xxxx", ".x.."), eps=0.5)
    low, high = -1 / (math.sqrt(5) + 0.5), 4 / (math.sqrt(5) + 0.5)
    torch.testing.assert_close(result, tensor([[low] * 4, [0.0, high, 0.0, 0.0]]), **FP64)


def test_whitened_advantages_have_mean_0_and_std_1_and_masked_values_do_not_count():
    value, mask = noise(5, 7), random_mask(5, 7)
    dirty = torch.where(mask, value, torch.full_like(value, NAN))
    result = whiten(dirty, mask, eps=0.0)
    assert torch.equal(result, whiten(value, mask, eps=0.0))
    assert (result[~mask] == 0).all()
    torch.testing.assert_close(result[mask].mean(), tensor(0.0), **FP64)
    torch.testing.assert_close(result[mask].std(), tensor(1.0), **FP64)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("value", [0.1, 1e6 / 3, 0.0])
def test_equal_rewards_in_the_whole_batch_whiten_to_0(value, eps):
    assert (whiten(torch.full((7,), value, dtype=torch.float64), random_mask(7, 9), eps=eps) == 0).all()
    assert (whiten(torch.full((7,), value), random_mask(7, 9), eps=eps) == 0).all()


def test_an_empty_mask_whitens_to_0():
    assert (whiten(noise(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


def test_moments_of_two_processes_are_those_of_one():
    value, mask = noise(6, 5), random_mask(6, 5)
    parts = [(value[:2], mask[:2]), (value[2:], mask[2:])]
    one = masked_moments(value, mask)
    counts = torch.stack([torch.stack([v[m].sum(), m.sum().double()]) for v, m in parts]).sum(0)
    squares = sum((v[m] - one.mean).square().sum() for v, m in parts)
    sums = iter([counts, squares])
    both = masked_moments(*parts[0], add=lambda mine: next(sums))
    torch.testing.assert_close(torch.stack(both), torch.stack(one), **FP64)
    torch.testing.assert_close(whiten(value[:2], mask[:2], moments=both), whiten(value, mask)[:2], **FP64)


def test_given_moments_without_spread_are_0():
    assert (whiten(noise(2, 3), torch.ones(2, 3, dtype=torch.bool), moments=Moments(tensor(0.0), tensor(0.0))) == 0).all()


def test_a3_one_token_and_an_outcome_is_the_batch_zscore():
    rewards, mask = noise(6), torch.ones(6, 1, dtype=torch.bool)
    result = whiten(token_returns(outcome_rewards(rewards, mask), mask), mask, eps=0.0)
    torch.testing.assert_close(result[:, 0], (rewards - rewards.mean()) / rewards.std(), **FP64)


def test_a9_gdpo_ends_with_whitening_and_one_head_without_it_is_grpo():
    group, mask, valid = torch.tensor([0, 0, 1, 1, 1]), random_mask(5, 6), torch.ones(5, dtype=torch.bool)
    heads = []
    for seed in (1, 2):
        rewards = noise(5, seed=seed)
        heads.append(scale("group_std", centre("group", rewards, group, valid, 2), rewards, group, valid, 2, eps=1e-6, ddof=1))
    combined = combine_heads(torch.stack(heads), tensor([1.0, 0.5]))
    result = whiten(combined, mask, eps=0.0)[mask]
    spread = combined[:, None].expand_as(mask)[mask]
    torch.testing.assert_close(result, (spread - spread.mean()) / spread.std(), **FP64)
    assert torch.equal(combine_heads(torch.stack(heads[:1]), tensor([1.0])), heads[0])


# --- returns and GAE, A1, A3, A17, A18, A19 ----------------------------------------------------------------------------------------------------------


def test_the_outcome_stands_at_the_last_decision_that_counts():
    assert outcome_rewards(tensor([2.0, 3.0, 4.0]), GAPS).tolist() == [[0, 0, 0, 2.0], [0, 0, 3.0, 0], [0, 0, 0, 0]]
    assert outcome_rewards(tensor([2.0, NAN]), booleans("xx", "..")).tolist() == [[0, 2.0], [0, 0]]


def test_token_returns_by_hand_pass_through_gaps():
    result = token_returns(tensor([[1.0, 2.0, 99.0, 4.0], [99.0, 1.0, 8.0, 99.0], [9.0] * 4]), GAPS, gamma=0.5)
    assert result.tolist() == [[1 + 0.5 * (2 + 0.5 * 4), 4.0, 0, 4.0], [0, 5.0, 8.0, 0], [0] * 4]


@given(st.integers(0, 1000), st.integers(1, 13), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30)
def test_returns_and_gae_are_the_plain_recursion(seed, columns, gamma, lam):
    rewards, values, mask = noise(3, columns, seed=seed), noise(3, columns, seed=seed + 1), random_mask(3, columns, seed)
    done = torch.tensor([True, False, True])
    returns, advantages = torch.zeros(3, columns, dtype=torch.float64), torch.zeros(3, columns, dtype=torch.float64)
    for row in range(3):
        running = ahead = following = 0.0
        first = True
        for t in reversed(range(columns)):
            if not mask[row, t]:
                continue
            running = returns[row, t] = rewards[row, t] + gamma * running
            value_next = values[row, t] if first and not done[row] else following
            ahead = advantages[row, t] = rewards[row, t] + gamma * value_next - values[row, t] + gamma * lam * ahead
            following, first = values[row, t], False
    torch.testing.assert_close(token_returns(rewards, mask, gamma=gamma), returns, **FP64)
    result = gae(rewards, values, mask, gamma=gamma, lam=lam, done=done)
    torch.testing.assert_close(result.advantages, advantages, **FP64)
    torch.testing.assert_close(result.returns, torch.where(mask, advantages + values, 0.0), **FP64)


def test_gae_by_hand():
    # deltas: 1 + .5 4 - 2 = 1, 3 + 0 - 4 = -1; A = 1 + .25 (-1)
    result = gae(tensor([[1.0, 3.0]]), tensor([[2.0, 4.0]]), booleans("xx"), gamma=0.5, lam=0.5)
    assert result.advantages.tolist() == [[0.75, -1.0]]
    assert result.returns.tolist() == [[2.75, 3.0]]


def test_identity_16_gae_without_values_is_the_reward_to_go():
    rewards, mask = noise(4, 6), random_mask(4, 6)
    result = gae(rewards, torch.zeros(4, 6, dtype=torch.float64), mask, gamma=1.0, lam=1.0)
    expected = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(result.advantages, torch.where(mask, expected, 0.0), **FP64)


def test_identity_16_egae_with_all_done_is_gae():
    rewards, values, mask = noise(4, 6), noise(4, 6, seed=3), random_mask(4, 6)
    assert torch.equal(torch.stack(gae(rewards, values, mask, done=torch.ones(4, dtype=torch.bool))), torch.stack(gae(rewards, values, mask)))


def test_a18_the_last_delta_of_an_unfinished_sample_is_its_reward_at_gamma_1():
    values, mask = noise(2, 4), booleans("xxxx", "xxx.")
    result = gae(torch.zeros(2, 4, dtype=torch.float64), values, mask, lam=0.0, done=torch.tensor([False, False]))
    assert result.advantages[0, 3] == 0
    assert result.advantages[1, 2] == 0
    torch.testing.assert_close(result.returns[1, 2], values[1, 2], **FP64)  # bootstraps from itself


def test_gae_ignores_what_is_masked():
    rewards, values, mask = noise(4, 6), noise(4, 6, seed=3), random_mask(4, 6)
    dirty = gae(torch.where(mask, rewards, NAN), torch.where(mask, values, NAN), mask)
    assert torch.equal(torch.stack(dirty), torch.stack(gae(rewards, values, mask)))
    assert all((part[~mask] == 0).all() for part in dirty)


def test_gae_has_no_gradient():
    values = noise(2, 3).requires_grad_()
    assert not any(part.requires_grad for part in gae(noise(2, 3), values, torch.ones(2, 3, dtype=torch.bool)))


def test_a19_the_length_dependent_lambda():
    mask = booleans("x" * 40 + "." * 40, "x" * 80, "x" * 10 + "." * 70, "." * 80)
    torch.testing.assert_close(length_lambda(mask, dtype=torch.float64), tensor([0.5, 0.75, 0.0, 0.0]), **FP64)  # alpha n = 2, 4, 0.5
    assert length_lambda(mask, alpha=math.inf).tolist() == [1.0] * 4


def test_a19_every_sample_may_have_its_own_lambda():
    rewards, values, mask = noise(2, 5), noise(2, 5, seed=1), torch.ones(2, 5, dtype=torch.bool)
    both = gae(rewards, values, mask, lam=tensor([0.3, 0.9])).advantages
    one, other = (gae(rewards, values, mask, lam=lam).advantages for lam in (0.3, 0.9))
    torch.testing.assert_close(both, torch.stack([one[0], other[1]]), **FP64)


def test_a18_what_trains_the_policy_and_what_the_critic():
    mask, fresh = booleans("xxxx.", "xxx..", "....."), booleans("..xxx", "xxxxx", "xxxxx")
    masks = truncated_masks(mask, torch.tensor([True, False, False]), fresh, tail=1)
    assert torch.equal(masks.policy, booleans("..xx.", "xx...", "....."))
    assert torch.equal(masks.value, booleans("xxxx.", ".....", "....."))
    assert torch.equal(truncated_masks(mask, torch.tensor([True, False, False]), fresh).policy, mask & fresh)


def test_the_value_loss_by_hand():
    # V, old, G: within the clip; beyond it, away from the return; beyond it on either side, towards the return: the clipped value is further off
    values, old, returns = tensor([[0.1, 1.0, 1.0, -1.0, NAN]]), torch.zeros(1, 5, dtype=torch.float64), tensor([[1.0, -1.0, 2.0, -2.0, 1.0]])
    result = value_loss(values, old, returns, booleans("xxxx."), clip=0.2)
    torch.testing.assert_close(result, tensor([[0.5 * 0.81, 0.5 * 4.0, 0.5 * 3.24, 0.5 * 3.24, 0.0]]), **FP64)
    torch.testing.assert_close(value_loss(values, old, returns, booleans("xxxx."), clip=math.inf), tensor([[0.405, 2.0, 0.5, 0.5, 0.0]]), **FP64)


def test_the_gradient_of_the_value_loss_matches_finite_differences_and_is_0_where_masked():
    values, old, returns, mask = noise(3, 4).requires_grad_(), noise(3, 4, seed=1), noise(3, 4, seed=2), random_mask(3, 4)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask, clip=0.3), values)
    value_loss(values, old, returns, mask).sum().backward()
    assert (values.grad[~mask] == 0).all()
    assert (values.grad[mask] != 0).any()


# --- segments, A15 -------------------------------------------------------------------------------------------------------------------------------


def test_segments_are_cut_at_every_nth_decision_that_was_not_sure():
    p = tensor([[0.5, 0.95, 0.5, 0.99, 0.5, 0.5, 0.5, 0.1]])
    mask = booleans("xxxxxxx.")
    assert segment_ids(p.log(), mask, interval=2).tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert segment_ids(p.log(), mask, interval=9).tolist() == [[0] * 8]


def test_segment_advantages_by_hand():
    segment = torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]])
    result = segment_advantages(tensor([[0.5, 0.75, 0.25], [0.5, NAN, NAN]]), tensor([1.0, 0.0]), segment, booleans("xxxx", "xx.."))
    assert result.tolist() == [[0.25, 0.25, -0.5, 0.75], [-0.5, -0.5, 0.0, 0.0]]


@given(st.integers(0, 1000), st.integers(1, 3))
@settings(max_examples=25)
def test_identity_17_segment_advantages_telescope(seed, interval):
    p = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [5], [1], [7]])
    segment, values, rewards = segment_ids(p.log(), mask, interval=interval, threshold=0.6), noise(4, 10, seed=seed), noise(4, seed=seed + 1)
    values = values[:, : int(segment.max()) + 1]
    result = segment_advantages(values, rewards, segment, mask)
    # the first decision of a segment stands for it; a sample whose first decisions form segment 1 has an empty segment 0
    starts = torch.cat([torch.ones(4, 1, dtype=torch.bool), segment[:, 1:] > segment[:, :-1]], 1) & mask
    begin = values.gather(1, segment[:, :1])[:, 0]
    torch.testing.assert_close(torch.where(starts, result, 0.0).sum(1), rewards - begin, **FP64)


def test_a15_one_segment_and_the_group_mean_as_value_is_dr_grpo():
    rewards, group, mask, valid = noise(6), torch.arange(6) % 2, random_mask(6, 5), torch.ones(6, dtype=torch.bool)
    centred = centre("group", rewards, group, valid, 2)
    result = segment_advantages((rewards - centred)[:, None], rewards, torch.zeros(6, 5, dtype=torch.int64), mask)
    torch.testing.assert_close(result, torch.where(mask, centred[:, None], 0.0), **FP64)


def test_a15_on_a_tree_siblings_are_a_group():
    # the parents' values are the means of their children's; child - parent over the siblings' std; an only child has 0
    value, parent = tensor([0.0, 1.0, 0.5, 0.25, 0.25]), torch.tensor([0, 0, 1, 2, 2])
    valid = torch.ones(5, dtype=torch.bool)
    result = scale("group_std", centre("group", value, parent, valid, 3), value, parent, valid, 3, eps=0.0, ddof=0)
    assert result.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


# --- trees, A16 ------------------------------------------------------------------------------------------------------------------------------------

ANCESTORS = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 2]])  # prompt 0 has three leaves, two below one node; prompt 1 has one


def test_tree_advantages_by_hand():
    rewards, valid = tensor([1.0, 0.0, 2.0, 5.0]), torch.ones(4, dtype=torch.bool)
    # depth 0: 0, -1, 1 with 3 leaves; depth 1: 1/2, -1/2 with 2 leaves, leaf 2 is alone there
    torch.testing.assert_close(tree_advantages(rewards, ANCESTORS, valid, 3), tensor([1 / 5, -3 / 5 - 1 / 5, 1.0, 0.0]), **FP64)
    torch.testing.assert_close(tree_advantages(rewards, ANCESTORS, valid, 3, weight="mean"), tensor([0.25, -0.75, 1.0, 0.0]), **FP64)
    assert tree_advantages(rewards, ANCESTORS, valid, 3, singleton="raw")[3] == 5


def test_tree_advantages_may_skip_subtrees_without_spread():
    rewards, valid = tensor([1.0, 1.0, 4.0, 5.0]), torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(tree_advantages(rewards, ANCESTORS, valid, 3), tensor([-3 / 5, -3 / 5, 2.0, 0.0]), **FP64)
    torch.testing.assert_close(tree_advantages(rewards, ANCESTORS, valid, 3, skip_constant=True), tensor([-1.0, -1.0, 2.0, 0.0]), **FP64)


def test_a_leaf_without_a_reward_is_in_no_subtree_and_a_short_path_has_no_deep_ancestor():
    rewards, ancestors = tensor([1.0, 0.0, 2.0, NAN]), torch.tensor([[0, 0], [0, -1], [0, 0], [0, 0]])
    result = tree_advantages(rewards, ancestors, torch.tensor([True, True, True, False]), 1)
    torch.testing.assert_close(result, tensor([-1 / 5, -1.0, 3 / 5 + 1 / 5, 0.0]), **FP64)
    assert tree_advantages(rewards, ancestors, torch.zeros(4, dtype=torch.bool), 1).tolist() == [0.0] * 4


@pytest.mark.parametrize("weight", ["size", "mean"])
def test_identity_18_treepo_of_depth_1_is_reinforce_plus_plus_baseline(weight):
    rewards, group, mask, valid = noise(8), torch.arange(8) % 3, random_mask(8, 5), torch.ones(8, dtype=torch.bool)
    tree = whiten(tree_advantages(rewards, group[:, None], valid, 3, weight=weight), mask)
    torch.testing.assert_close(tree, whiten(centre("group", rewards, group, valid, 3), mask), **FP64)


def test_an_unknown_weight_of_depths_is_named():
    with pytest.raises(ValueError, match="unknown weight of depths 'depth'"):
        tree_advantages(tensor([1.0]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.bool), 1, weight="depth")


# --- steps of an answer, A14 -----------------------------------------------------------------------------------------------------------------------


def test_step_entropies_and_advantages_go_from_tokens_to_steps_and_back():
    step, mask = torch.tensor([[0, 0, 1, 7], [0, 1, 1, 2]]), booleans("xxx.", "x.xx")
    mean, present = step_entropy(tensor([[1.0, 3.0, 5.0, NAN], [2.0, NAN, 4.0, 6.0]]), step, mask, 3)
    assert mean.tolist() == [[2.0, 5.0, 0.0], [2.0, 4.0, 6.0]]
    assert torch.equal(present, booleans("xx.", "xxx"))
    assert steps_to_decisions(mean, step, mask).tolist() == [[2.0, 2.0, 5.0, 0.0], [2.0, 0.0, 4.0, 6.0]]


def test_empg_by_hand():
    # scaled entropies 0, 1 | 1/2; gates before the mean: 1, e^-2 | e^-1; the first step is followed by one with clarity e^-1/2
    result = gate_steps(tensor([2.0, -1.0]), tensor([[1.0, 3.0], [2.0, NAN]]), booleans("xx", "x."), gate=2.0, clarity=0.5, bonus=0.5)
    gates = tensor([1.0, math.exp(-2), math.exp(-1)])
    raw = tensor([2.0, 2.0, -1.0]) * gates / gates.mean() + tensor([0.5 * math.exp(-0.5), 0.0, 0.0])
    raw = raw - raw.mean()
    torch.testing.assert_close(result, torch.stack([raw[:2], torch.stack([raw[2], tensor(0.0)])]), rtol=1e-7, atol=1e-7)  # 1e-8 in the range


@given(st.integers(0, 1000), st.floats(0, 5))
@settings(max_examples=25)
def test_identity_32_the_mean_gate_is_1(seed, gate):
    entropy, present = noise(4, 5, seed=seed).abs(), torch.arange(5) < torch.tensor([[5], [2], [1], [0]])
    # with advantages of 1 the result is the gates less their mean
    gates = gate_steps(torch.ones(4, dtype=torch.float64), entropy, present, gate=gate, bonus=0.0)[present] + 1
    torch.testing.assert_close(gates.mean(), tensor(1.0), **FP64)
    scaled = (entropy - entropy[present].min()) / (entropy[present].max() - entropy[present].min() + 1e-8)
    weight = (-gate * scaled).exp()[present]
    torch.testing.assert_close(gates, weight / weight.mean(), **FP64)


def test_a14_without_gate_and_bonus_only_the_mean_is_taken_off():
    advantages, present = tensor([1.0, 3.0]), booleans("xx", "x.")
    result = gate_steps(advantages, noise(2, 2), present, gate=0.0, bonus=0.0)
    torch.testing.assert_close(result, tensor([[1 - 5 / 3, 1 - 5 / 3], [3 - 5 / 3, 0.0]]), **FP64)


def test_a14_one_step_or_constant_entropy_has_gate_1():
    assert gate_steps(tensor([3.0]), tensor([[2.0]]), booleans("x")).tolist() == [[0.0]]
    result = gate_steps(tensor([1.0, 3.0]), torch.full((2, 1), 0.3, dtype=torch.float64), booleans("x", "x"))
    torch.testing.assert_close(result, tensor([[-1.0], [1.0]]), **FP64)


def test_samples_without_steps_are_in_no_statistic_of_the_gate():
    advantages, entropy, present = tensor([1.0, 3.0, NAN]), noise(3, 2), booleans("xx", "x.", "..")
    result = gate_steps(advantages, torch.where(present, entropy, NAN), present)
    torch.testing.assert_close(result[:2], gate_steps(advantages[:2], entropy[:2], present[:2]), **FP64)
    assert result[2].tolist() == [0.0, 0.0]
    assert (gate_steps(advantages, entropy, torch.zeros(3, 2, dtype=torch.bool)) == 0).all()


# --- order ----------------------------------------------------------------------------------------------------------------------------------------


def test_identity_29_the_order_of_samples_does_not_matter():
    rewards, values, mask, order = noise(4, 6), noise(4, 6, seed=1), random_mask(4, 6), torch.tensor([2, 0, 3, 1])
    flat, done, valid = rewards[:, 0], torch.tensor([True, False, True, False]), torch.tensor([True, True, False, True])
    torch.testing.assert_close(whiten(rewards[order], mask[order]), whiten(rewards, mask)[order], **FP64)
    mixed = gae(rewards[order], values[order], mask[order], done=done[order])
    torch.testing.assert_close(mixed.advantages, gae(rewards, values, mask, done=done).advantages[order], **FP64)
    torch.testing.assert_close(tree_advantages(flat[order], ANCESTORS[order], valid[order], 3), tree_advantages(flat, ANCESTORS, valid, 3)[order], **FP64)
    present = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    torch.testing.assert_close(gate_steps(flat[order], values[order], present[order]), gate_steps(flat, values, present)[order], **FP64)


def test_float32_stays_float32():
    value, mask = noise(2, 3).float(), torch.ones(2, 3, dtype=torch.bool)
    assert whiten(value, mask).dtype == token_returns(value, mask).dtype == gae(value, value, mask, lam=length_lambda(mask)).returns.dtype == torch.float32
    assert gate_steps(value[:, 0], value, mask).dtype == torch.float32
    assert tree_advantages(value[:, 0], torch.zeros(2, 1, dtype=torch.int64), mask[:, 0], 1).dtype == torch.float32
