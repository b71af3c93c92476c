"""Losses of whole groups: by hand, against pairs and GVPO, finite differences, the identities of text.md section 12, edges. Nash-MP on a known game."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid

from flowrl.core.group_gates import gradient_weights, gvpo
from flowrl.core.list_losses import LIST_OBJECTIVES, copg_group, lipo, nash_mp_penalty, sppo_group, trpa, win_rates
from flowrl.core.pair_losses import copg, length_normalised_dpo, sppo
from flowrl.core.pairing_rules import make_pairs
from flowrl.core.preference import dpo
from flowrl.core.reductions import sequence_weights
from flowrl.types import Decisions, Pairs

FP64 = {"rtol": 1e-10, "atol": 1e-12}
PLAIN = {"margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}
SHAPE = (7, 5)
GROUP = torch.tensor([0, 1, 0, 0, 1, 2, 0])  # 4, 2 and 1 of a prompt
GROUPED = {"group": GROUP, "num_groups": 3}
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
REWARDS = torch.tensor([1.0, 0.0, 3.0, 2.0, 1.0, 5.0, 2.0], dtype=torch.float64)
LEVEL = torch.tensor([1, 3, 2, 4, 1, 2, 2])
REF = -1.5 + 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
LOSSES = {
    "copg_group": partial(copg_group, ref_log_prob=REF, beta=0.4),
    "sppo_group": partial(sppo_group, beta=0.4),
    "trpa": partial(trpa, level=LEVEL, beta=0.4),
    "trpa unpaired": partial(trpa, level=torch.ones_like(LEVEL), beta=0.4),
    "lipo": partial(lipo, ref_log_prob=REF, beta=0.4),
}


def draw(seed, *, mask=MASK, rewards=REWARDS, shape=SHAPE, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    old = -1 - torch.rand(shape, generator=generator, dtype=torch.float64)
    log_prob = old + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return Decisions(log_prob.requires_grad_(), old, rewards[:, None].expand(shape).clone(), mask)


def singles(values, old=None, rewards=None):
    """Sequences of one decision each."""
    log_prob = torch.tensor(values, dtype=torch.float64)[:, None].requires_grad_()
    other = torch.zeros_like(log_prob).detach() if old is None else torch.tensor(old, dtype=torch.float64)[:, None]
    a = torch.zeros_like(other) if rewards is None else torch.tensor(rewards, dtype=torch.float64)[:, None]
    return Decisions(log_prob, other, a, torch.ones_like(log_prob, dtype=torch.bool))


def reduced(objective, mask):
    weight, total = sequence_weights("seq_mean", mask, dtype=torch.float64)
    return (weight * objective.loss).sum() / total


def u(decisions, anchor):
    return torch.where(decisions.mask, decisions.log_prob - anchor, 0.0).sum(1)


def gradient(loss, decisions):
    return torch.autograd.grad(loss, decisions.log_prob, retain_graph=True)[0]


# --- by hand ------------------------------------------------------------------------------------------------------------------------------------


def test_copg_by_hand():
    # R' = R - 0.5 u = 1 - 1, 0 + 1, 2 - 0 = 0, 1, 2: differences 1, 2, 1, so (1 + 4 + 1) / 2 = 3 for the group
    decisions = singles([2.0, -2.0, 0.0], rewards=[1.0, 0.0, 2.0])
    objective = copg_group(decisions, group=torch.zeros(3, dtype=torch.int64), num_groups=1, ref_log_prob=torch.zeros(3, 1, dtype=torch.float64), beta=0.5)
    assert objective.loss.flatten().tolist() == pytest.approx([4.5, 0.0, 4.5])
    assert reduced(objective, decisions.mask).item() == pytest.approx(3.0)


def test_sppo_by_hand():
    # A / beta = 0.25 / 0.5; (2 - 0.5)^2 and (-1 + 0.5)^2
    decisions = singles([3.0, 0.0], old=[1.0, 1.0], rewards=[0.25, -0.25])
    assert sppo_group(decisions, group=torch.zeros(2, dtype=torch.int64), num_groups=1, beta=0.5).loss.flatten().tolist() == pytest.approx([2.25, 0.25])


def test_trpa_by_hand():
    # levels 1, 2, 2: pairs (0, 1) and (0, 2) with c = 2.5; beta 0.4 makes c beta = 1
    decisions = singles([math.log(3), 0.0, math.log(9)])
    group = {"group": torch.zeros(3, dtype=torch.int64), "num_groups": 1}
    objective = trpa(decisions, **group, level=torch.tensor([1, 2, 2]), beta=0.4)
    assert reduced(objective, decisions.mask).item() == pytest.approx((-math.log(0.75) - math.log(0.25)) / 2)
    # each pair's loss is halved between its two, times 3 sequences / 2 pairs
    assert objective.loss.flatten().tolist() == pytest.approx([0.75 * loss for loss in (-math.log(0.75 * 0.25), -math.log(0.75), -math.log(0.25))])
    # levels 2, 3, 3: no top level, c = 1 and c beta = 0.4
    objective = trpa(decisions, **group, level=torch.tensor([2, 3, 3]), beta=0.4)
    assert reduced(objective, decisions.mask).item() == pytest.approx((math.log1p(3**-0.4) + math.log1p(3**0.4)) / 2)


def test_trpa_without_a_pair_by_hand():
    decisions = singles([math.log(3), math.log(3)])
    for level, expected in (((1, 1), -math.log(0.75)), ((4, 4), -math.log(0.25))):
        objective = trpa(decisions, group=torch.zeros(2, dtype=torch.int64), num_groups=1, level=torch.tensor(level))
        assert reduced(objective, decisions.mask).item() == pytest.approx(expected)
    # two levels, but in two groups
    objective = trpa(decisions, group=torch.arange(2), num_groups=2, level=torch.tensor([1, 2]))
    assert objective.loss.flatten().tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])


def test_lipo_by_hand():
    # u = ln 3, 0, -ln 3: ranks 1, 2, 3; labels 0, 2, 1: gains 0, 3, 1
    decisions = singles([math.log(3), 0.0, -math.log(3)], rewards=[0.0, 2.0, 1.0])
    zero = torch.zeros(3, 1, dtype=torch.float64)
    objective = lipo(decisions, group=torch.zeros(3, dtype=torch.int64), num_groups=1, ref_log_prob=zero, beta=1.0)
    d1, d2, d3 = (1 / math.log(1 + rank) for rank in (1, 2, 3))
    pairs = [3 * (d1 - d2) * math.log(1 + 3), 1 * (d1 - d3) * math.log(1 + 9), 2 * (d2 - d3) * math.log(1 + 1 / 3)]
    assert reduced(objective, decisions.mask).item() == pytest.approx(sum(pairs))
    expected = [1.5 * (pairs[a] + pairs[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert objective.loss.flatten().tolist() == pytest.approx(expected)


def test_win_rates_by_hand():
    preference = torch.tensor([[torch.nan, 0.5, 1.0], [0.5, torch.nan, 0.25], [0.0, 0.75, torch.nan]], dtype=torch.float64)
    rewards, valid = win_rates(preference, ~torch.eye(3, dtype=torch.bool))
    assert rewards.tolist() == [0.75, 0.375, 0.375]
    assert rewards.sum().item() == 3 / 2  # half of the matches, whatever the answers
    assert valid.all()
    rewards, valid = win_rates(preference, torch.tensor([[False, True, True], [False, False, True], [False, False, False]]))
    assert rewards.tolist() == [0.75, 0.25, 0.0]
    assert valid.tolist() == [True, True, False]


# --- gradients ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lipo"])
def test_gradients_match_finite_differences(name):
    decisions = draw(0)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES[name](Decisions(x, decisions.old_log_prob, decisions.advantages, MASK), **GROUPED).loss, decisions.log_prob
    )


def test_lipos_gradient_is_that_of_its_pairs_with_constant_weights():
    # ranks are steps, so a finite difference is right where it crosses none; then the weights are constants by themselves
    decisions = draw(1)
    assert torch.autograd.gradcheck(
        lambda x: LOSSES["lipo"](Decisions(x, decisions.old_log_prob, decisions.advantages, MASK), **GROUPED).loss, decisions.log_prob
    )


@pytest.mark.parametrize("name", ["copg_group", "lipo"])
def test_a_reference_is_a_constant(name):
    reference = REF.clone().requires_grad_()
    loss = LIST_OBJECTIVES[name](draw(2), **GROUPED, ref_log_prob=reference).loss
    assert torch.autograd.grad(loss.sum(), reference, allow_unused=True) == (None,)


# --- section 12 and the lines T -------------------------------------------------------------------------------------------------------------------


def test_item_39_copg_of_pairs_is_the_group_variance():
    decisions, beta = draw(3), 0.4
    ours = copg_group(decisions, **GROUPED, ref_log_prob=REF, beta=beta)
    value = REWARDS - beta * u(decisions, REF)
    per_sequence = (ours.loss * MASK).sum(1) / MASK.sum(1)
    for number, k in ((0, 4), (1, 2)):
        members = value[number == GROUP]
        pairs = sum((members[i] - members[j]).square() for i in range(k) for j in range(i)) / (k - 1)
        torch.testing.assert_close(pairs, k / (k - 1) * (members - members.mean()).square().sum(), **FP64)
        torch.testing.assert_close(per_sequence[number == GROUP].mean(), pairs, **FP64)
        torch.testing.assert_close(pairs, k**2 / (k - 1) * members.var(correction=0), **FP64)
    assert per_sequence[GROUP == 2].item() == 0  # a group of one


def test_item_39_copgs_gradient_at_the_reference_is_leave_one_out():
    decisions, beta = draw(4), 0.4
    at = Decisions(decisions.log_prob, decisions.old_log_prob, decisions.advantages, MASK)
    loss = copg_group(at, **GROUPED, ref_log_prob=decisions.log_prob.detach(), beta=beta).loss
    for number, k in ((0, 4), (1, 2)):
        members = number == GROUP
        rewards = REWARDS[members]
        rloo = rewards - (rewards.sum() - rewards) / (k - 1)
        of_group = (loss[members] / MASK[members].sum(1, keepdim=True)).sum() / k
        torch.testing.assert_close(gradient(of_group, decisions)[members], torch.where(MASK[members], -2 * beta * rloo[:, None], 0.0), **FP64)


def test_f12_copg_is_2k_times_gvpo_and_a_pair_is_the_pair_loss():
    decisions, beta = draw(5), 0.4
    size = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64).index_add_(0, GROUP, REWARDS) / size
    centred = Decisions(decisions.log_prob, decisions.old_log_prob, decisions.advantages - mean[GROUP][:, None], MASK)
    theirs = gvpo(centred, **GROUPED, ref_log_prob=REF, beta=beta).loss
    ours = copg_group(decisions, **GROUPED, ref_log_prob=REF, beta=beta).loss
    torch.testing.assert_close(ours, 2 * size[GROUP][:, None] * theirs, **FP64)

    two = torch.tensor([1, 4])
    log_ratio = u(decisions, REF)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    columns = [x.view(1, 1) for x in log_ratio[two]]
    pair = Pairs(*columns, zero, zero, torch.ones(1, 1, dtype=torch.bool), chosen_reward=zero + REWARDS[1], rejected_reward=zero + REWARDS[4])
    of_pair = (ours / MASK.sum(1, keepdim=True))[two].sum() / 2
    torch.testing.assert_close(of_pair, copg(pair, beta=beta).loss.sum(), **FP64)


def test_f12_copgs_minimum_is_one_regularised_reward_for_all():
    beta = 0.4
    decisions = draw(6, mask=torch.ones(SHAPE, dtype=torch.bool))
    best = torch.zeros(SHAPE, dtype=torch.float64)
    best[:, 2] = REWARDS / beta + torch.tensor([0.3, -2.0, 7.0])[GROUP]  # any constant of the prompt
    at = Decisions((REF + best).requires_grad_(), decisions.old_log_prob, decisions.advantages, decisions.mask)
    loss = copg_group(at, **GROUPED, ref_log_prob=REF, beta=beta).loss
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-20)


def test_f8_sppo_of_certain_pairs_is_the_hard_form_and_on_policy_reinforce():
    decisions, beta = draw(7, rewards=torch.tensor([0.5, 0.5, -0.5, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)), 0.2
    ours = sppo_group(decisions, **GROUPED, beta=beta).loss / MASK.sum(1, keepdim=True)
    a = u(decisions, decisions.old_log_prob)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    pair = Pairs(a[:1, None], a[2:3, None], None, None, torch.ones(1, 1, dtype=torch.bool), previous_chosen=zero, previous_rejected=zero)
    torch.testing.assert_close(ours[[0, 2]].sum(), sppo(pair, beta=beta).loss.sum(), **FP64)

    on_policy = Decisions(decisions.log_prob, decisions.log_prob.detach(), decisions.advantages, MASK)
    loss = (sppo_group(on_policy, **GROUPED, beta=beta).loss / MASK.sum(1, keepdim=True)).sum()
    torch.testing.assert_close(gradient(loss, decisions), torch.where(MASK, -2 / beta * decisions.advantages, 0.0), **FP64)


def test_item_13_trpa_at_the_old_policy_is_ln_2():
    decisions = draw(8, spread=0.0)
    objective = trpa(decisions, **GROUPED, level=LEVEL)
    assert reduced(objective, MASK).item() == pytest.approx(math.log(2), rel=1e-12)
    assert gradient(reduced(objective, MASK), decisions).ne(0).any()


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_f13_trpa_is_length_normalised_dpo_on_the_pairs_of_its_levels(strength):
    decisions, beta = draw(9), 0.4
    winner, loser = make_pairs(LEVEL, GROUP, MASK.any(1), rule="levels")
    old, length = decisions.old_log_prob, MASK.sum(1).double()
    columns = [
        torch.where(MASK, x, 0.0).sum(1)[rows, None] for x, rows in ((decisions.log_prob, winner), (decisions.log_prob, loser), (old, winner), (old, loser))
    ]
    pairs = Pairs(*columns, torch.ones(len(winner), 1, dtype=torch.bool), length[winner, None], length[loser, None])
    of_top = LEVEL[winner] == 1
    theirs = torch.where(of_top[:, None], *(length_normalised_dpo(pairs, beta=b).loss for b in (strength * beta, beta))).mean()
    assert 0 < of_top.sum() < len(winner)
    ours = reduced(trpa(decisions, **GROUPED, level=LEVEL, beta=beta, top_strength=strength), MASK)
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, decisions), gradient(theirs, decisions), **FP64)


def test_item_36_lipo_of_a_list_of_2_is_a_constant_times_dpo():
    decisions, beta = draw(10), 0.3
    members = torch.tensor([1, 4])  # rewards 0 and 1
    constant = 1.0 * abs(1 / math.log(2) - 1 / math.log(3))
    assert constant == pytest.approx(0.5325, abs=1e-4)
    mask = torch.zeros_like(MASK)
    mask[members] = MASK[members]
    log_ratio = u(decisions, REF)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    pair = Pairs(log_ratio[4].view(1, 1), log_ratio[1].view(1, 1), zero, zero, torch.ones(1, 1, dtype=torch.bool))
    at = Decisions(decisions.log_prob, decisions.old_log_prob, decisions.advantages, mask)
    ours, theirs = reduced(lipo(at, **GROUPED, ref_log_prob=REF, beta=beta), mask), constant * dpo(pair, **PLAIN, beta=beta).loss.sum()
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, decisions), gradient(theirs, decisions), **FP64)


def test_lipo_is_the_mean_over_lists_of_its_definition():
    decisions, beta = draw(11), 0.3
    s = beta * u(decisions, REF)
    total = 0.0
    for number in range(3):
        members = torch.nonzero(number == GROUP).flatten().tolist()
        order = sorted(members, key=lambda i: -s[i].item())
        for i in members:
            for j in members:
                if REWARDS[i] > REWARDS[j]:
                    weight = abs(2 ** REWARDS[i] - 2 ** REWARDS[j]) * abs(1 / math.log(2 + order.index(i)) - 1 / math.log(2 + order.index(j)))
                    total = total - weight * logsigmoid(s[i] - s[j])
    torch.testing.assert_close(reduced(lipo(decisions, **GROUPED, ref_log_prob=REF, beta=beta), MASK), total / 3, **FP64)


def test_lipos_equal_labels_are_silent_and_equal_scores_learn():
    silent = draw(12, rewards=torch.ones(7, dtype=torch.float64))
    loss = lipo(silent, **GROUPED, ref_log_prob=REF).loss
    assert loss.eq(0).all()
    assert gradient(loss.sum(), silent).eq(0).all()
    decisions = draw(12)
    loss = lipo(decisions, **GROUPED, ref_log_prob=decisions.log_prob.detach()).loss
    assert gradient(loss.sum(), decisions)[MASK & (GROUP != 2)[:, None]].ne(0).any()


# --- Nash-MP --------------------------------------------------------------------------------------------------------------------------------------


class Game:
    """Five answers with intransitive preferences, a reference and exact expectations."""

    def __init__(self):
        generator = torch.Generator().manual_seed(13)
        upper = torch.rand(5, 5, generator=generator, dtype=torch.float64).triu(1)
        self.preference = upper + (1 - upper.T).tril(-1) + 0.5 * torch.eye(5, dtype=torch.float64)
        self.reference = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)

    def half_step(self, opponent, centre, beta, eta):
        """argmin of -E P(pi beats the opponent) + beta KL(pi || ref) + beta / eta KL(pi || centre)."""
        weight = beta + beta / eta
        return torch.softmax((self.preference @ opponent + beta * self.reference.log() + beta / eta * centre.log()) / weight, 0)

    def step(self, policy, beta, eta):
        return self.half_step(self.half_step(policy, policy, beta, eta), policy, beta, eta)


@pytest.mark.parametrize("kind", ["k2", "k3_k2"])
def test_f19_the_policy_gradient_of_nash_mp_vanishes_at_its_half_step(kind):
    game, beta, eta = Game(), 0.3, 0.7
    opponent, previous = (torch.softmax(torch.randn(5, generator=torch.Generator().manual_seed(s), dtype=torch.float64), 0) for s in (1, 2))

    def policy_gradient(policy):
        logits = policy.log().requires_grad_()
        log_prob = torch.log_softmax(logits, 0)
        every_opponent = game.preference[:, :, None].expand(5, 5, 1000).flatten(1)  # 5000 opponents, so many of each as it is likely
        shown = torch.arange(1000)[None, :] < (opponent * 1000).round()[:, None]
        rewards, valid = win_rates(every_opponent, shown.flatten().expand(5, -1))
        assert valid.all()
        penalty = nash_mp_penalty(log_prob[:, None], game.reference.log()[:, None], previous.log()[:, None], beta=beta, eta=eta, kind=kind)
        advantages = rewards - policy @ rewards
        loss = (policy.detach() * (-advantages * log_prob + penalty[:, 0])).sum()
        return torch.autograd.grad(loss, logits)[0]

    rounded = (opponent * 1000).round()
    best = game.half_step(rounded / rounded.sum(), previous, beta, eta)
    torch.testing.assert_close(policy_gradient(best), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    assert policy_gradient(previous).abs().max() > 1e-3


def test_f19_nash_mp_ends_at_the_regularised_equilibrium_and_a_large_beta_at_the_reference():
    game, beta, eta = Game(), 0.2, 0.5
    policy = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(400):
        policy = game.step(policy, beta, eta)
    # the best answer to itself with the reference as the only anchor
    torch.testing.assert_close(policy, torch.softmax((game.preference @ policy + beta * game.reference.log()) / beta, 0), rtol=1e-9, atol=1e-12)
    assert (policy - game.reference).abs().max() > 0.05
    policy = torch.full((5,), 0.2, dtype=torch.float64)
    for _ in range(400):
        policy = game.step(policy, 1e6, eta)
    torch.testing.assert_close(policy, game.reference, rtol=1e-5, atol=0)


def test_f19_the_two_anchors_by_hand_and_their_gradient():
    log_prob = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference, previous = torch.tensor([[-2.0, -2.0]], dtype=torch.float64), torch.tensor([[-1.0, -4.0]], dtype=torch.float64)
    # k2: d^2 / 2 of 1, 0 and 0, 2, times 0.3 and 0.3 / 0.5
    assert nash_mp_penalty(log_prob, reference, previous, beta=0.3, eta=0.5).tolist() == [pytest.approx([0.15, 1.2])]
    for kind in ("k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: nash_mp_penalty(x, reference, previous, beta=0.3, eta=0.5, kind=kind), log_prob)


# --- masks, order, groups ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_masked_decisions_do_not_matter_and_the_loss_stands_at_the_others(name):
    clean, dirty = draw(14), draw(14)
    expected = LOSSES[name](clean, **GROUPED).loss
    with torch.no_grad():
        for tensor in (dirty.log_prob, dirty.old_log_prob, dirty.advantages):
            tensor[~MASK] = math.nan
    loss = LOSSES[name](dirty, **GROUPED).loss
    assert loss.equal(expected)
    assert loss[~MASK].eq(0).all()
    found = gradient(loss.sum(), dirty)
    assert found.isfinite().all()
    assert found[~MASK].eq(0).all()
    assert found.equal(gradient(expected.sum(), clean))


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_without_decisions_is_in_no_statistic(name):
    mask = MASK.clone()
    mask[2] = False
    keep = torch.tensor([0, 1, 3, 4, 5, 6])
    decisions = draw(15, mask=mask)
    whole = LOSSES[name](decisions, **GROUPED)
    settings = {key: value[keep] if isinstance(value, torch.Tensor) else value for key, value in LOSSES[name].keywords.items()}
    parts = (decisions.log_prob, decisions.old_log_prob, decisions.advantages, mask)
    alone = LOSSES[name].func(Decisions(*(x[keep] for x in parts)), group=GROUP[keep], num_groups=3, **settings)
    torch.testing.assert_close(whole.loss[keep], alone.loss, **FP64)
    assert whole.loss[2].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_item_26_no_decision_at_all_is_loss_0_and_gradient_0(name):
    decisions = draw(16, mask=torch.zeros_like(MASK))
    loss = LOSSES[name](decisions, **GROUPED).loss
    assert loss.eq(0).all()
    assert gradient(loss.sum(), decisions).eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_item_29_order_and_group_numbers_do_not_matter(name):
    decisions, order = draw(17), torch.tensor([3, 6, 1, 0, 5, 2, 4])
    settings = {key: value[order] if isinstance(value, torch.Tensor) else value for key, value in LOSSES[name].keywords.items()}
    parts = (decisions.log_prob, decisions.old_log_prob, decisions.advantages, MASK)
    moved = LOSSES[name].func(Decisions(*(x[order] for x in parts)), group=torch.tensor([2, 0, 3])[GROUP][order], num_groups=4, **settings)
    torch.testing.assert_close(moved.loss, LOSSES[name](decisions, **GROUPED).loss[order], **FP64)


@pytest.mark.parametrize("name", ["copg_group", "trpa", "lipo"])
def test_a_group_of_one_and_identical_responses_are_silent(name):
    decisions = draw(18)
    loss = LOSSES[name](decisions, **GROUPED).loss
    assert gradient(loss.sum(), decisions)[5].eq(0).all()
    same = torch.ones(SHAPE, dtype=torch.bool)
    twin = -1 - torch.rand(1, 5, generator=torch.Generator().manual_seed(18), dtype=torch.float64)
    shared = twin.clone().requires_grad_()
    twins = Decisions(shared.expand(SHAPE), twin.expand(SHAPE) + 0.1, decisions.advantages, same)
    (found,) = torch.autograd.grad(LOSSES[name](twins, **GROUPED).loss.sum(), shared)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_by_gradient_weights(name):
    decisions = draw(19)
    weight, total = sequence_weights("seq_mean", MASK, dtype=torch.float64)
    coefficients = gradient_weights(partial(LOSSES[name], **GROUPED), decisions, weight / total)
    torch.testing.assert_close(coefficients, gradient(reduced(LOSSES[name](decisions, **GROUPED), MASK), decisions), **FP64)


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_carry_no_gradient(name):
    objective = LOSSES[name](draw(20), **GROUPED)
    assert set(objective.metrics) == {"ratio", "log_ratio", "clipped_low", "clipped_high"}
    assert all(value.shape == SHAPE and not value.requires_grad for value in objective.metrics.values())
    assert objective.loss.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_float32(name):
    decisions = draw(21)
    low = Decisions(*(x.float() for x in (decisions.log_prob, decisions.old_log_prob, decisions.advantages)), MASK)
    settings = {key: value.float() if key == "ref_log_prob" else value for key, value in LOSSES[name].keywords.items()}
    loss = LOSSES[name].func(low, **GROUPED, **settings).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), LOSSES[name](decisions, **GROUPED).loss, rtol=1e-4, atol=1e-5)


def test_the_table_names_its_functions():
    assert list(LIST_OBJECTIVES.items()) == [("copg_group", copg_group), ("sppo_group", sppo_group), ("trpa", trpa), ("lipo", lipo)]
