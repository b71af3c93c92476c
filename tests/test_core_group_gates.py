"""Objectives that couple a group: by hand, against their definitions, the identities of text.md section 12. What holds of all gates: test_core_gates.py."""

import math
from functools import partial

import pytest
import torch
from estimates import group_mean

from flowrl.core.group_gates import GROUP_OBJECTIVES, drpo, gvpo, reg_grpo
from flowrl.core.reductions import sequence_weights
from flowrl.types import Decisions

FP64 = {"rtol": 1e-10, "atol": 1e-12}
SHAPE = (6, 5)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
GROUPED = {"group": GROUP, "num_groups": 2}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
REF = -1.5 + 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def draw(seed, *, spread, shape=SHAPE):
    """Log-probabilities, old ones, and advantages that are equal within a sequence and sum to 0 in a group."""
    generator = torch.Generator().manual_seed(seed)
    old, noise = -1 - torch.rand(shape, generator=generator, dtype=torch.float64), torch.randn(shape, generator=generator, dtype=torch.float64)
    return (old + spread * noise).requires_grad_(), old, centred(torch.randn(6, generator=generator, dtype=torch.float64), GROUP, 2)[:, None].expand(shape)


def centred(rewards, group, num_groups):
    return group_mean(rewards, group, torch.ones(6, dtype=torch.bool), num_groups, eps=0.0, ddof=0)


def batch(log_prob, old, advantages, mask=None):
    return Decisions(log_prob, old, advantages, torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask)


def reduced(loss, mask):
    weight, total = sequence_weights("seq_mean", mask, dtype=loss.dtype)
    return (weight * loss).sum() / total


def gradient(loss, log_prob):
    return torch.autograd.grad(loss.sum(), log_prob, retain_graph=True)[0]


def test_reg_grpo_by_hand():
    # D = 0.1, 0.5, centred -+0.2, std (ddof 0) 0.2; A = 1, -1
    old = torch.zeros(2, 1, dtype=torch.float64)
    decisions = batch(torch.tensor([[0.1], [0.5]], dtype=torch.float64), old, torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    group = {"group": torch.zeros(2, dtype=torch.int64), "num_groups": 1}
    assert reg_grpo(decisions, **group, scale=2.0).loss.flatten().tolist() == pytest.approx([1.4**2] * 2)
    assert reg_grpo(decisions, **group, form="std").loss.flatten().tolist() == pytest.approx([4.0] * 2)
    assert reg_grpo(decisions, **group, form="std", ddof=1).loss.flatten().tolist() == pytest.approx([(1 + 1 / math.sqrt(2)) ** 2] * 2)
    with pytest.raises(ValueError, match="unknown form 'center' of Reg-GRPO; known: centre, std, std_sg"):
        reg_grpo(decisions, **group, form="center")


def test_item_31_reg_grpo_on_policy_is_proportional_to_grpos_reinforce():
    log_prob, _, advantages = draw(24, spread=0.0)  # the advantages sum to 0 in every group
    loss = reduced(reg_grpo(batch(log_prob, log_prob.detach(), advantages, MASK), **GROUPED, scale=0.5).loss, MASK)
    torch.testing.assert_close(gradient(loss, log_prob), torch.where(MASK, -2 * 0.5 * advantages / 6, 0.0), **FP64)


def test_item_31_reg_grpo_of_pairs_is_rebel_on_normalised_rewards():
    # sum over a pair of (A_i - b (D_i - mean))^2 = ((A_1 - A_2) - b (D_1 - D_2))^2 / 2 with A_1 = -A_2: REBEL's (D_1 - D_2 - eta (R_1 - R_2))^2 at b = 1 / eta
    log_prob, old, _ = draw(25, spread=0.5)
    group, sign = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    loss = reg_grpo(batch(log_prob, old, sign[:, None].expand(SHAPE), MASK), group=group, num_groups=3, scale=0.4).loss
    d = torch.where(MASK, log_prob - old, 0.0).sum(1)
    rebel = ((d[::2] - d[1::2]) - 2.5 * (sign[::2] - sign[1::2])).square().sum()
    ours = (loss / MASK.sum(1, keepdim=True)).sum()
    torch.testing.assert_close(ours, 0.4**2 / 2 * rebel, **FP64)
    torch.testing.assert_close(gradient(ours, log_prob), 0.4**2 / 2 * gradient(rebel, log_prob), **FP64)


def test_the_standardised_form_ignores_shift_and_size_of_the_log_ratios():
    log_prob, old, advantages = draw(26, spread=0.5, shape=(6, 1))
    loss = reg_grpo(batch(log_prob, old, advantages), **GROUPED, form="std").loss
    moved = reg_grpo(batch(old + 3 * (log_prob - old) + 0.7, old, advantages), **GROUPED, form="std").loss
    torch.testing.assert_close(loss, moved, **FP64)


@pytest.mark.parametrize("form", ["std", "std_sg"])
def test_the_standardised_form_is_guarded_on_policy(form):
    log_prob, _, advantages = draw(27, spread=0.0)
    loss = reg_grpo(batch(log_prob, log_prob.detach(), advantages, MASK), **GROUPED, form=form, min_std=1e-2).loss
    torch.testing.assert_close(loss.detach(), torch.where(MASK, advantages**2, 0.0), **FP64)
    expected = torch.where(MASK, -2 * advantages * MASK.sum(1, keepdim=True) / 1e-2, 0.0)  # every decision repeats its sequence's loss; guarded: std 1e-2
    mean = torch.zeros(2, dtype=torch.float64).index_add_(0, GROUP, (advantages[:, 0] * MASK.sum(1)) / 3)[GROUP][:, None]
    torch.testing.assert_close(gradient(loss, log_prob), torch.where(MASK, expected + 2 * mean / 1e-2, 0.0), rtol=1e-9, atol=1e-9)


def test_the_stopped_std_holds_only_the_std():
    log_prob, old, advantages = draw(28, spread=0.5)
    decisions = batch(log_prob, old, advantages, MASK)
    d = torch.where(MASK, log_prob - old, 0.0).sum(1)
    shifted = d - torch.zeros(2, dtype=torch.float64).index_add(0, GROUP, d / 3)[GROUP]
    std = torch.stack([d[:3].std(correction=0), d[3:].std(correction=0)])[GROUP]
    for form, divisor in (("std", std), ("std_sg", std.detach())):
        expected = torch.where(MASK, (advantages - (shifted / divisor)[:, None]).square(), 0.0)
        loss = reg_grpo(decisions, **GROUPED, form=form).loss
        torch.testing.assert_close(loss, expected, **FP64)
        torch.testing.assert_close(gradient(loss, log_prob), gradient(expected, log_prob), **FP64)


def test_reg_grpo_of_means_divides_by_the_length():
    log_prob, old, advantages = draw(29, spread=0.5)
    ours = reg_grpo(batch(log_prob, old, advantages, MASK), **GROUPED, level="mean").loss
    means = (torch.where(MASK, log_prob - old, 0.0).sum(1) / MASK.sum(1))[:, None]
    theirs = reg_grpo(batch(means, torch.zeros_like(means), advantages[:, :1]), **GROUPED).loss
    torch.testing.assert_close(ours, torch.where(MASK, theirs, 0.0), **FP64)


def test_gvpo_by_hand_and_a_group_of_one_is_0():
    # implicit rewards 0.5 (0.2, 0.8, 0) minus their mean 1/6: -1/15, 7/30, -1/6
    log_prob = torch.tensor([[0.2], [0.8], [0.0], [9.0]], dtype=torch.float64)
    zero, advantages = torch.zeros_like(log_prob), torch.tensor([[1.0], [0.0], [-1.0], [5.0]], dtype=torch.float64)
    loss = gvpo(batch(log_prob, zero, advantages), group=torch.tensor([0, 0, 0, 1]), num_groups=2, ref_log_prob=zero, beta=0.5).loss.flatten()
    expected = [0.75 * (x - a) ** 2 for x, a in zip((-1 / 15, 7 / 30, -1 / 6), (1, 0, -1), strict=True)]
    assert loss.tolist() == pytest.approx([*expected, 0.0])
    # the mean over the group is the published sum / (G - 1)
    assert loss[:3].mean().item() == pytest.approx(sum(0.5 * (x - a) ** 2 for x, a in zip((-1 / 15, 7 / 30, -1 / 6), (1, 0, -1), strict=True)) / 2)


def test_gvpo_of_pairs_is_rebel_with_the_reference():
    log_prob, old, _ = draw(30, spread=0.5)
    group, rewards = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.3, 1.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    advantages = centred(rewards, group, 3)
    decisions = batch(log_prob, old, advantages[:, None].expand(SHAPE), MASK)
    loss = gvpo(decisions, group=group, num_groups=3, ref_log_prob=REF, beta=0.2).loss
    u = torch.where(MASK, log_prob - (REF), 0.0).sum(1)
    rebel = ((u[::2] - u[1::2]) - 5 * (rewards[::2] - rewards[1::2])).square().sum()  # eta = 1 / beta
    torch.testing.assert_close((loss / MASK.sum(1, keepdim=True)).sum(), 0.2**2 / 2 * rebel, **FP64)  # factor 2 of G / (G - 1), 1/2, and half the square


def test_gvpo_is_at_rest_where_implicit_rewards_match_up_to_a_constant():
    ref, beta = torch.full((6, 1), -2.0, dtype=torch.float64), 0.5
    rewards = torch.tensor([0.3, 1.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    advantages = centred(rewards, GROUP, 2)[:, None]
    shift = torch.tensor([0.7, -0.2], dtype=torch.float64)[GROUP]
    log_prob = (ref + ((rewards + shift) / beta)[:, None]).requires_grad_()
    slope = gradient(gvpo(batch(log_prob, ref, advantages), **GROUPED, ref_log_prob=ref, beta=beta).loss, log_prob)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)
    assert gradient(gvpo(batch(log_prob, ref, advantages + torch.eye(6)[:, :1]), **GROUPED, ref_log_prob=ref, beta=beta).loss, log_prob).ne(0).any()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_item_35_drpo_of_one_right_and_one_wrong_answer_pulls_their_scores_apart(temperature):
    log_prob, old, _ = draw(31, spread=0.5)
    group, sign = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0], dtype=torch.float64)  # the last group is all equal
    decisions = batch(log_prob, old, sign[:, None].expand(SHAPE), MASK)
    ours = reduced(drpo(decisions, group=group, num_groups=3, temperature=temperature, max_length=8.0).loss, MASK)
    score = torch.where(MASK, log_prob, 0.0).sum(1) / MASK.sum(1)
    theirs = -((score[0] - score[1]) + (score[3] - score[2])) / 3  # dropped prompts stay in the mean
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, log_prob), gradient(theirs, log_prob), **FP64)


def by_definition(log_prob, right, wrong, temperature, length_scale, max_length):
    score, lengths = torch.where(MASK, log_prob, 0.0).sum(1) / MASK.sum(1), MASK.sum(1).double()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 6)):
        if right[rows].any() and wrong[rows].any():
            s, w = score[rows], ((1 - lengths[rows] / max_length) / length_scale).exp()[right[rows]]
            pull = (w * s[right[rows]]).sum() / w.sum()
            push = temperature * ((s[wrong[rows]] / temperature).exp().mean()).log()
            total = total - (pull - push)
    return total / 2


@pytest.mark.parametrize("signs", [[1, 1, -1, -1, 1, -1], [1, -1, -1, 1, 1, 1], [1, 1, 1, -1, -1, -1]])
def test_drpo_equals_its_definition_in_value_and_gradient(signs):
    log_prob, old, _ = draw(32, spread=0.5)
    sign = torch.tensor(signs, dtype=torch.float64)
    decisions = batch(log_prob, old, sign[:, None].expand(SHAPE), MASK)
    ours = reduced(drpo(decisions, **GROUPED, temperature=0.7, length_scale=0.5, max_length=8.0).loss, MASK)
    theirs = by_definition(log_prob, sign > 0, sign < 0, 0.7, 0.5, 8.0) + 0 * log_prob.sum()
    torch.testing.assert_close(ours, theirs, **FP64)
    slope = gradient(ours, log_prob)
    torch.testing.assert_close(slope, gradient(theirs, log_prob), **FP64)
    assert (slope[(sign > 0)] <= 0).all()  # no right answer is ever pushed down, short or long
    assert (slope[(sign < 0)] >= 0).all()


def test_drpo_with_a_wide_length_scale_is_disco():
    log_prob, old, _ = draw(33, spread=0.5)
    decisions = batch(log_prob, old, torch.tensor([1.0, 1, -1, -1, 1, 1], dtype=torch.float64)[:, None].expand(SHAPE), MASK)
    wide, constant = drpo(decisions, **GROUPED, length_scale=1e12, max_length=8.0).loss, drpo(decisions, **GROUPED).loss
    torch.testing.assert_close(wide, constant, **FP64)
    short = drpo(decisions, **GROUPED, length_scale=0.5, max_length=8.0).loss
    assert gradient(short[4], log_prob)[4].abs().sum() < gradient(constant[4], log_prob)[4].abs().sum()  # the longer of the right ones counts less
    assert gradient(short[5], log_prob)[5].abs().sum() > gradient(constant[5], log_prob)[5].abs().sum()


def test_a_masked_sample_is_in_no_statistic_of_its_group():
    log_prob, old, advantages = draw(34, spread=0.5)
    mask = MASK.clone()
    mask[1] = False
    kept = torch.tensor([0, 2, 3, 4, 5])
    small = {"group": GROUP[kept], "num_groups": 2}
    for gate, extra in ((reg_grpo, {}), (partial(reg_grpo, form="std"), {}), (gvpo, {"ref_log_prob": REF}), (drpo, {"max_length": 8.0})):
        whole = reduced(gate(batch(log_prob, old, advantages, mask), **GROUPED, **extra).loss, mask)
        fewer = {key: value[kept] if key == "ref_log_prob" else value for key, value in extra.items()}
        rest = reduced(gate(batch(log_prob[kept], old[kept], advantages[kept], mask[kept]), **small, **fewer).loss, mask[kept])
        torch.testing.assert_close(whole, rest, **FP64)


def test_a_group_of_one_teaches_nothing_through_squares():
    log_prob, old, _ = draw(35, spread=0.5)
    decisions = batch(log_prob, old, torch.zeros(SHAPE, dtype=torch.float64), MASK)
    alone = {"group": torch.arange(6), "num_groups": 6}
    for loss in (reg_grpo(decisions, **alone).loss, reg_grpo(decisions, **alone, form="std").loss, gvpo(decisions, **alone, ref_log_prob=old).loss):
        assert gradient(loss, log_prob).eq(0).all()


def test_the_table_names_its_functions():
    assert all(function.__name__ == name for name, function in GROUP_OBJECTIVES.items())
