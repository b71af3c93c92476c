"""Pair losses beyond DPO's family: values by hand, finite differences, the identities of text.md section 12 and its lines T, masks and edges."""

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from estimates import group_mean
from torch.nn.functional import logsigmoid

from flowrl.core.objectives import clipped_surrogate
from flowrl.core.pair_losses import (
    PAIR_LOSSES,
    PAIR_NEEDS,
    copg,
    dno,
    inpo,
    length_normalised_dpo,
    osp,
    p3o,
    rebel,
    robust_dpo,
    sppo,
    srpo,
    vpo,
)
from flowrl.core.preference import NEEDS_REFERENCE, PAIR_OBJECTIVES, dpo, ipo, rpo
from flowrl.types import Decisions, Pairs

FP64 = {"rtol": 1e-10, "atol": 1e-12}
COMMON = {"beta": 0.7, "margin": 0.4, "sft_weight": 0.3, "label_smoothing": 0.1}
PLAIN = {"margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}
FIELDS = {
    "reference": ("reference_chosen", "reference_rejected"),
    "previous": ("previous_chosen", "previous_rejected"),
    "reward": ("chosen_reward", "rejected_reward"),
    "preference": ("preference",),
    "calibration": ("calibration",),
    "revising": ("revising_chosen", "revising_rejected"),
}
VARIANTS = {
    **PAIR_LOSSES,
    "vpo online": partial(vpo, online=True),
    "sppo soft": partial(sppo, form="soft"),
    "p3o joint": partial(p3o, form="joint"),
    "p3o loose": partial(p3o, clip=1e3),
    "p3o joint loose": partial(p3o, form="joint", clip=1e3),
}
SMOOTH = [name for name in VARIANTS if not name.startswith("p3o")] + ["p3o loose", "p3o joint loose"]


def draw(seed, *, shape=(4, 3)):
    """Every field of Pairs; three places a pair, as an image at three noise levels has them."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform():
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 9, (2, *shape), generator=generator).double()
    return Pairs(
        chosen=normal().requires_grad_(),
        rejected=normal().requires_grad_(),
        reference_chosen=normal(),
        reference_rejected=normal(),
        mask=torch.ones(shape, dtype=torch.bool),
        chosen_length=lengths[0],
        rejected_length=lengths[1],
        previous_chosen=normal(),
        previous_rejected=normal(),
        chosen_reward=uniform(),
        rejected_reward=uniform(),
        preference=uniform(),
        calibration=normal().requires_grad_(),
        revising_chosen=normal().requires_grad_(),
        revising_rejected=normal().requires_grad_(),
    )


def one(**values):
    tensors = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in values.items()}
    base = dict.fromkeys(("chosen", "rejected", "reference_chosen", "reference_rejected"), torch.zeros(1, 1, dtype=torch.float64))
    return Pairs(**{**base, "mask": torch.ones(1, 1, dtype=torch.bool), **tensors})


def anchored(pairs, anchor):
    """The same pairs with the anchor at the policy."""
    return replace(pairs, **{f"{anchor}_chosen": pairs.chosen.detach(), f"{anchor}_rejected": pairs.rejected.detach()})


def swapped(pairs):
    sides = {"chosen": "rejected", "rejected": "chosen"}
    out = {}
    for column in fields(pairs):
        name = next((column.name.replace(side, "other").replace("other", sides[side]) for side in sides if side in column.name), column.name)
        out[name] = getattr(pairs, column.name)
    return Pairs(**{**out, "preference": 1 - pairs.preference})


def gradients(loss, pairs):
    return torch.autograd.grad(loss.sum(), (pairs.chosen, pairs.rejected), retain_graph=True)


def assert_same(ours, theirs, pairs, *, value=True):
    if value:
        torch.testing.assert_close(ours, theirs, **FP64)
    for a, b in zip(gradients(ours, pairs), gradients(theirs, pairs), strict=True):
        torch.testing.assert_close(a, b, **FP64)
        assert a.ne(0).any()


# --- values by hand -----------------------------------------------------------------------------------------------------------------------------

# chosen = ln 3 is h = ln 3: sigmoid 3/4 and 1/4


@pytest.mark.parametrize(
    ("loss", "pair", "settings", "expected"),
    [
        (robust_dpo, {"chosen": math.log(3)}, {"beta": 1.0, "label_smoothing": 0.2}, (-0.8 * math.log(0.75) + 0.2 * math.log(0.25)) / 0.6),
        # log-ratios 2 over 4 tokens and -3 over 2: z = 2 (1/2 + 3/2) = 4
        (length_normalised_dpo, {"chosen": 2.0, "rejected": -3.0, "chosen_length": 4.0, "rejected_length": 2.0}, {"beta": 2.0}, math.log1p(math.exp(-4))),
        (vpo, {"chosen": math.log(3)}, {"beta": 1.0, "alpha": 0.5}, -math.log(0.75) - 0.5 * math.log(3)),
        (vpo, {"chosen": math.log(3), "calibration": 2.0}, {"beta": 1.0, "alpha": 0.5}, -math.log(0.75) - 0.5 * 2),
        (vpo, {"chosen": math.log(3), "calibration": 2.0}, {"beta": 1.0, "alpha": 0.5, "online": True}, -math.log(0.75) + 0.5 * 2),
        # targets +-1 / (2 * 0.25) = +-2; a = 3 and 1
        (sppo, {"chosen": 3.0, "rejected": 1.0, "previous_chosen": 0.0, "previous_rejected": 0.0}, {"beta": 0.25}, 1.0 + 9.0),
        # targets (0.75 - 0.5) / 0.25 = 1 and (0.5 - 0.5) / 0.25 = 0
        (
            sppo,
            {"chosen": 3.0, "rejected": 1.0, "previous_chosen": 0.0, "previous_rejected": 0.0, "chosen_reward": 0.75, "rejected_reward": 0.5},
            {"beta": 0.25, "form": "soft"},
            4.0 + 1.0,
        ),
        # p = sigmoid(ln 4) = 0.8 and beta d = ln 3
        (
            dno,
            {"chosen": 1.0 + math.log(3), "previous_chosen": 1.0, "previous_rejected": 0.0, "chosen_reward": math.log(4), "rejected_reward": 0.0},
            {"beta": 1.0},
            -0.8 * math.log(0.75) - 0.2 * math.log(0.25),
        ),
        # h = 4 to the reference, d = 1 to the previous: h' = 1/4 * 4 + 3/4 * 1 = 1.75, target 1 / (2 * 0.5) = 1
        (inpo, {"chosen": 4.0, "previous_chosen": 3.0, "previous_rejected": 0.0}, {"beta": 0.5, "reference_share": 0.25}, 0.75**2),
        # d = 2, (R - R') / beta = 3 / 2
        (rebel, {"chosen": 2.0, "previous_chosen": 0.0, "previous_rejected": 0.0, "chosen_reward": 2.0, "rejected_reward": -1.0}, {"beta": 2.0}, 0.25),
        # R - R' - beta h = 3 - 2 * 2
        (copg, {"chosen": 2.0, "chosen_reward": 2.0, "rejected_reward": -1.0}, {"beta": 2.0}, 1.0),
        (osp, {"chosen": math.log(3), "preference": 0.6}, {"beta": 1.0}, -0.6 * math.log(0.75) - 0.4 * math.log(0.25)),
        # 0.25 (2 * 3 - 0.5)^2 + 0.75 ((2 * 1 - 0.5)^2 + (2 * -2 - 0.5)^2)
        (srpo, {"chosen": 3.0, "revising_chosen": 1.0, "revising_rejected": -2.0}, {"beta": 2.0, "alpha": 0.25}, 0.25 * 5.5**2 + 0.75 * (1.5**2 + 4.5**2)),
    ],
    ids=lambda x: getattr(x, "__name__", None) or None,
)
def test_values_by_hand(loss, pair, settings, expected):
    assert loss(one(**pair), **settings).loss.item() == pytest.approx(expected, rel=1e-12)


def p3o_pair(chosen, rejected, half):
    pair = one(chosen=math.log(chosen), rejected=math.log(rejected), previous_chosen=0.0, previous_rejected=0.0, chosen_reward=2 * half, rejected_reward=0.0)
    return replace(pair, chosen=pair.chosen.requires_grad_(), rejected=pair.rejected.requires_grad_())


@pytest.mark.parametrize(
    ("chosen", "rejected", "half", "form", "loss", "kept", "clipped"),
    [
        (1.1, 0.9, 2.0, "separate", -2 * 1.1 + 2 * 0.9, (True, True), 0.0),
        (1.3, 0.9, 2.0, "separate", -2 * 1.2 + 2 * 0.9, (False, True), 0.5),  # a good one that went far enough
        (1.3, 0.7, 2.0, "separate", -2 * 1.2 + 2 * 0.8, (False, False), 1.0),
        (0.7, 1.3, 2.0, "separate", -2 * 0.7 + 2 * 1.3, (True, True), 0.0),  # wrong way round: pulled back with full weight
        (1.3, 1.0, 2.0, "joint", -2 * 0.3, (True, True), 0.0),
        (1.3, 0.8, 2.0, "joint", -2 * 0.4, (False, False), 1.0),
        (0.7, 1.3, 2.0, "joint", 2 * 0.6, (True, True), 0.0),
        (0.7, 1.3, -2.0, "joint", -2 * 0.4, (False, False), 1.0),
        (1.3, 0.7, 0.0, "joint", 0.0, (False, False), 0.0),  # a tie
        (1.3, 0.7, 0.0, "separate", 0.0, (False, False), 0.0),
    ],
)
def test_p3o_by_hand(chosen, rejected, half, form, loss, kept, clipped):
    pairs = p3o_pair(chosen, rejected, half)
    objective = p3o(pairs, beta=0.0, clip=0.2, form=form)
    assert objective.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert objective.metrics["clipped"].item() == clipped
    expected = (-half * chosen if kept[0] else 0.0, half * rejected if kept[1] else 0.0)
    assert [g.item() for g in gradients(objective.loss, pairs)] == pytest.approx(expected, abs=1e-12)


def test_p3o_folds_the_price_of_leaving_the_reference_into_the_reward():
    # R - beta (previous - reference): 1 - 0.5 (2 - 1) = 0.5 and 0 - 0.5 (0 - 2) = 1, so D = -1/4 although the reward prefers the first
    pairs = one(
        chosen=2.0,
        rejected=0.0,
        previous_chosen=2.0,
        previous_rejected=0.0,
        reference_chosen=1.0,
        reference_rejected=2.0,
        chosen_reward=1.0,
        rejected_reward=0.0,
    )
    pairs = replace(pairs, chosen=pairs.chosen.requires_grad_(), rejected=pairs.rejected.requires_grad_())
    for form in ("separate", "joint"):
        assert [g.item() for g in gradients(p3o(pairs, beta=0.5, form=form).loss, pairs)] == pytest.approx([0.25, -0.25])


# --- gradients ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_match_finite_differences(name):
    pairs = draw(0)
    names = ("chosen", "rejected", "calibration", "revising_chosen", "revising_rejected")

    def value(*tensors):
        return VARIANTS[name](replace(pairs, **dict(zip(names, tensors, strict=True))), **COMMON).loss

    assert torch.autograd.gradcheck(value, tuple(getattr(pairs, n) for n in names))


@pytest.mark.parametrize("name", ["p3o", "p3o joint"])
def test_clipped_gradients_match_finite_differences(name):
    pairs = draw(1, shape=(40, 2))
    close = 0.25 * torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = replace(pairs, previous_chosen=pairs.chosen.detach() - close[0], previous_rejected=pairs.rejected.detach() - close[1])
    objective = VARIANTS[name](pairs, **COMMON)
    assert 0 < objective.metrics["clipped"].mean() < 1
    assert torch.autograd.gradcheck(
        lambda x, y: VARIANTS[name](replace(pairs, chosen=x, rejected=y), **COMMON).loss, (pairs.chosen, pairs.rejected), eps=1e-7, atol=1e-6
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_anchors_rewards_and_preferences_are_constants(name):
    pairs = draw(2)
    names = [n for kind in ("reference", "previous", "reward", "preference") for n in FIELDS[kind]]
    constants = {n: getattr(pairs, n).clone().requires_grad_() for n in names}
    loss = VARIANTS[name](replace(pairs, **constants), **COMMON).loss
    assert torch.autograd.grad(loss.sum(), tuple(constants.values()), allow_unused=True) == (None,) * len(names)


# --- section 12 and the lines T -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_f1_robust_dpo_at_the_reference_and_without_noise(label_smoothing):
    pairs = anchored(draw(3), "reference")
    objective = robust_dpo(pairs, beta=0.2, label_smoothing=label_smoothing)
    torch.testing.assert_close(objective.loss, torch.full_like(objective.loss, math.log(2)), **FP64)
    slope = -0.1 / (1 - 2 * label_smoothing)
    torch.testing.assert_close(gradients(objective.loss, pairs)[0], torch.full_like(pairs.chosen, slope), **FP64)
    pairs = draw(3)
    assert_same(robust_dpo(pairs, beta=0.2).loss, dpo(pairs, beta=0.2, **PLAIN).loss, pairs)


def test_f1_robust_dpo_is_unbiased_under_flipped_labels():
    # with probability e the observed pair is the swapped one
    pairs, e = draw(4), 0.15
    there, back = (robust_dpo(p, beta=0.3, label_smoothing=e).loss for p in (pairs, swapped(pairs)))
    torch.testing.assert_close((1 - e) * there + e * back, dpo(pairs, beta=0.3, **PLAIN).loss, **FP64)
    assert robust_dpo(one(chosen=50.0), beta=1.0, label_smoothing=e).loss.item() < 0


def test_f4_length_normalised_dpo_with_equal_lengths_is_dpo_with_beta_over_n():
    pairs, n = draw(5), torch.full((4, 3), 7.0, dtype=torch.float64)
    equal = replace(pairs, chosen_length=n, rejected_length=n)
    plain = {**PLAIN, "label_smoothing": 0.1}
    assert_same(length_normalised_dpo(equal, beta=5.0, label_smoothing=0.1).loss, dpo(equal, beta=5 / 7, **plain).loss, pairs)
    without = replace(pairs, chosen_length=None, rejected_length=None)
    assert_same(length_normalised_dpo(without, beta=5.0).loss, dpo(without, beta=5.0, **PLAIN).loss, pairs)


def test_f7_vpo_without_alpha_is_dpo():
    pairs = draw(6)
    for online in (False, True):
        assert_same(vpo(pairs, **COMMON, alpha=0.0, online=online).loss, dpo(pairs, **COMMON).loss, pairs)


def test_f7_vpo_offline_on_the_chosen_is_rpo_up_to_a_constant():
    pairs = replace(draw(7), calibration=None, chosen_length=None, rejected_length=None)
    ours, theirs = vpo(pairs, beta=0.3, alpha=0.4).loss, rpo(pairs, **{**PLAIN, "beta": 0.3, "sft_weight": 0.12}).loss
    torch.testing.assert_close(ours - theirs, 0.12 * pairs.reference_chosen, **FP64)
    assert_same(ours, theirs, pairs, value=False)


def test_f7_vpo_online_with_samples_of_the_reference_is_xpos_bonus():
    # XPO: DPO + alpha beta log pi(y), y from the reference: the gradient pushes down what the reference says
    pairs = draw(8)
    (slope,) = torch.autograd.grad(vpo(pairs, beta=0.3, alpha=0.4, online=True).loss.sum(), pairs.calibration)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.12), **FP64)
    (slope,) = torch.autograd.grad(vpo(pairs, beta=0.3, alpha=0.4).loss.sum(), pairs.calibration)
    torch.testing.assert_close(slope, torch.full_like(slope, -0.12), **FP64)


def test_item_12_sppo_hard_is_soft_with_win_rates_1_and_0():
    pairs = draw(9)
    certain = replace(pairs, chosen_reward=torch.ones_like(pairs.chosen), rejected_reward=torch.zeros_like(pairs.chosen))
    assert_same(sppo(certain, beta=0.01, form="soft").loss, sppo(pairs, beta=0.01).loss, pairs)


def test_f8_sppo_on_policy_is_reinforce_with_baseline_one_half():
    pairs = anchored(draw(10), "previous")
    chosen, rejected = gradients(sppo(pairs, beta=0.5, form="soft").loss, pairs)
    torch.testing.assert_close(chosen, -2 / 0.5 * (pairs.chosen_reward - 0.5), **FP64)
    torch.testing.assert_close(rejected, -2 / 0.5 * (pairs.rejected_reward - 0.5), **FP64)


@pytest.mark.parametrize("sign", [1, -1])
def test_f9_dno_with_a_certain_judge_is_dpo_from_the_previous_policy(sign):
    pairs = draw(11)
    certain = replace(pairs, chosen_reward=torch.full_like(pairs.chosen, sign * 800.0), rejected_reward=torch.zeros_like(pairs.chosen))
    there = replace(pairs, reference_chosen=pairs.previous_chosen, reference_rejected=pairs.previous_rejected)
    assert_same(dno(certain, beta=0.3).loss, dpo(there if sign > 0 else swapped(there), beta=0.3, **PLAIN).loss, pairs)


@pytest.mark.parametrize(("share", "anchor"), [(1.0, "reference"), (0.0, "previous")])
def test_item_12_inpo_at_its_ends_is_ipo(share, anchor):
    pairs = draw(12)
    other = "previous" if anchor == "reference" else "reference"
    alone = replace(pairs, **dict.fromkeys(FIELDS[other]))  # the other anchor is not even asked for
    there = {f"reference_{side}": getattr(pairs, f"{anchor}_{side}") for side in ("chosen", "rejected")}
    theirs = ipo(replace(pairs, **there, chosen_length=None, rejected_length=None), beta=0.3, **PLAIN)
    assert_same(inpo(alone, beta=0.3, reference_share=share).loss, theirs.loss, pairs)


def test_f10_inpos_fixed_target_differs_from_the_population_loss_by_a_constant():
    # all ordered pairs of 3 answers under a uniform previous policy: the winner is drawn with probability P(y beats y')
    generator = torch.Generator().manual_seed(13)
    p = torch.rand(3, 3, generator=generator, dtype=torch.float64).triu(1)
    p = p + (1 - p.T).tril(-1) + 0.5 * torch.eye(3, dtype=torch.float64)
    rate, beta = p.mean(1), 0.4
    log_prob = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    reference, previous = torch.randn(3, generator=generator, dtype=torch.float64), torch.full((3,), math.log(1 / 3), dtype=torch.float64)
    i, j = (x.flatten()[:, None] for x in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    pairs = Pairs(
        log_prob[i], log_prob[j], reference[i], reference[j], torch.ones(9, 1, dtype=torch.bool), previous_chosen=previous[i], previous_rejected=previous[j]
    )
    ours = (2 * p[i, j] * inpo(pairs, beta=beta, reference_share=0.3).loss).mean()
    h = log_prob - 0.3 * reference - 0.7 * previous
    population = (h[i] - h[j] - (rate[i] - rate[j]) / beta).square().mean()
    (a,), (b,) = (torch.autograd.grad(x, log_prob) for x in (ours, population))
    torch.testing.assert_close(a, b, **FP64)
    assert a.abs().min() > 0.01


def test_item_12_rebel_on_policy_is_pairwise_rloo():
    pairs = anchored(draw(14), "previous")
    chosen, rejected = gradients(rebel(pairs, beta=0.5).loss, pairs)
    rloo = pairs.chosen_reward - pairs.rejected_reward  # reward minus that of the only other one
    torch.testing.assert_close(chosen, -2 / 0.5 * rloo, **FP64)
    torch.testing.assert_close(rejected, 2 / 0.5 * rloo, **FP64)


def test_item_11_copgs_gradient_is_minus_its_objectives_and_rebels_scaled():
    pairs, beta = draw(15), 0.3
    ours = copg(pairs, beta=beta).loss
    h = (pairs.chosen - pairs.reference_chosen) - (pairs.rejected - pairs.reference_rejected)
    gap = pairs.chosen_reward - pairs.rejected_reward
    objective = gap * h - beta / 2 * h.square()  # to be maximised
    assert_same(ours, -2 * beta * objective, pairs, value=False)
    torch.testing.assert_close(-objective, (gap - beta * h).square() / (2 * beta) - gap.square() / (2 * beta), **FP64)
    coefficient = (pairs.chosen_reward - beta * (pairs.chosen - pairs.reference_chosen)) - (
        pairs.rejected_reward - beta * (pairs.rejected - pairs.reference_rejected)
    )
    torch.testing.assert_close(gradients(objective, pairs)[0], coefficient.detach(), **FP64)
    there = replace(pairs, previous_chosen=pairs.reference_chosen, previous_rejected=pairs.reference_rejected)
    assert_same(ours, beta**2 * rebel(there, beta=beta).loss, pairs)


def test_f12_copg_with_reward_gap_1_is_ipo_with_half_of_beta():
    pairs, beta = draw(16), 0.3
    certain = replace(pairs, chosen_reward=pairs.rejected_reward + 1, chosen_length=None, rejected_length=None)
    assert_same(copg(certain, beta=beta).loss, beta**2 * ipo(certain, **{**PLAIN, "beta": beta / 2}).loss, pairs)


def test_f15_osp_with_certain_preferences_is_dpo():
    pairs = draw(17)
    assert_same(osp(replace(pairs, preference=torch.ones_like(pairs.chosen)), beta=0.3).loss, dpo(pairs, beta=0.3, **PLAIN).loss, pairs)


@pytest.mark.parametrize("strength", [0.5, 0.6, 0.95])
def test_item_37_osps_minimum_is_the_logit_over_beta(strength):
    beta, best = 0.4, math.log(strength / (1 - strength)) / 0.4
    h = torch.tensor([[best - 0.1, best, best + 0.1]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(h.detach())
    pairs = Pairs(h, zero, zero, zero, torch.ones(1, 3, dtype=torch.bool), preference=torch.full_like(zero, strength))
    (slope,) = torch.autograd.grad(osp(pairs, beta=beta).loss.sum(), h)
    assert slope[0, 0] < 0 < slope[0, 2]
    assert slope[0, 1].item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("form", ["separate", "joint"])
def test_item_14_p3o_on_policy_is_dr_grpo_with_groups_of_two(form):
    pairs = anchored(draw(18, shape=(5, 1)), "previous")
    objective = p3o(pairs, beta=0.0, form=form)
    rewards = torch.cat([pairs.chosen_reward, pairs.rejected_reward], 1).flatten()  # pair by pair
    everyone = torch.ones(10, dtype=torch.bool)
    advantages = group_mean(rewards, torch.arange(5).repeat_interleave(2), everyone, 5, eps=0.0, ddof=0)[:, None]
    log_prob = torch.cat([pairs.chosen, pairs.rejected], 1).reshape(10, 1)
    theirs = clipped_surrogate(Decisions(log_prob, log_prob.detach(), advantages, everyone[:, None]), clip_low=0.2, clip_high=0.2).loss
    assert_same(objective.loss, theirs.view(5, 2).sum(1, keepdim=True), pairs)
    torch.testing.assert_close(gradients(objective.loss, pairs)[0], -0.5 * (pairs.chosen_reward - pairs.rejected_reward), **FP64)


def test_f16_p3o_separate_is_the_clipped_surrogate_off_policy_too():
    pairs = draw(19)
    half = 0.5 * (pairs.chosen_reward - pairs.rejected_reward)
    theirs = sum(
        clipped_surrogate(Decisions(new, old, a, pairs.mask), clip_low=0.2, clip_high=0.2).loss
        for new, old, a in ((pairs.chosen, pairs.previous_chosen, half), (pairs.rejected, pairs.previous_rejected, -half))
    )
    assert_same(p3o(pairs, beta=0.0).loss, theirs, pairs)


@pytest.mark.parametrize("form", ["separate", "joint"])
def test_f16_p3o_ignores_a_prompts_shift_of_rewards(form):
    pairs = draw(20)
    shift = torch.randn(4, 3, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    moved = replace(pairs, chosen_reward=pairs.chosen_reward + shift, rejected_reward=pairs.rejected_reward + shift)
    assert_same(p3o(moved, beta=0.2, form=form).loss, p3o(pairs, beta=0.2, form=form).loss, pairs)


def test_f18_srpo_without_revisions_is_ipo():
    pairs = replace(draw(21), chosen_length=None, rejected_length=None, revising_chosen=None, revising_rejected=None)
    assert_same(srpo(pairs, beta=0.3, alpha=1.0).loss, 0.3**2 * ipo(pairs, beta=0.3, **PLAIN).loss, pairs)


def test_f20_codpos_loss_is_rpo_with_lengths():
    pairs = draw(22)
    theirs = dpo(pairs, beta=0.1, **PLAIN).loss - 0.5 / pairs.chosen_length * pairs.chosen
    assert_same(rpo(pairs, **{**PLAIN, "beta": 0.1, "sft_weight": 0.5}).loss, theirs, pairs)


# --- invariances, edges ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dno", "rebel", "copg", "osp", "p3o", "p3o joint", "sppo soft"])
def test_losses_with_rewards_do_not_care_which_sample_is_called_chosen(name):
    pairs = draw(23)
    assert_same(VARIANTS[name](swapped(pairs), **COMMON).loss, VARIANTS[name](pairs, **COMMON).loss, pairs)


@pytest.mark.parametrize("name", ["robust_dpo", "dno", "inpo", "rebel", "copg", "osp", "srpo"])
def test_a_prompts_normalisation_of_log_probabilities_does_not_matter(name):
    pairs = draw(24)
    shift = torch.randn(4, 3, generator=torch.Generator().manual_seed(24), dtype=torch.float64)
    moved = replace(pairs, chosen=pairs.chosen + shift, rejected=pairs.rejected + shift)
    torch.testing.assert_close(VARIANTS[name](moved, **COMMON).loss, VARIANTS[name](pairs, **COMMON).loss, **FP64)


@pytest.mark.parametrize("name", ["robust_dpo", "length_normalised_dpo", "dno", "inpo", "rebel", "copg", "osp", "p3o loose", "p3o joint"])
def test_identical_responses_teach_nothing(name):
    pairs = draw(25)
    same = {f"{prefix}rejected": getattr(pairs, f"{prefix}chosen") for prefix in ("", "reference_", "previous_")}
    twins = replace(pairs, **same, rejected_length=pairs.chosen_length)
    (gradient,) = torch.autograd.grad(VARIANTS[name](twins, **COMMON).loss.sum(), pairs.chosen)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "at"), [("osp", {"preference": 0.5}), ("dno", {}), ("rebel", {}), ("copg", {}), ("p3o", {}), ("p3o joint", {})])
def test_a_tie_has_no_gradient_where_the_two_are_alike(name, at):
    pairs = anchored(anchored(draw(26), "previous"), "reference")
    tied = replace(pairs, rejected_reward=pairs.chosen_reward, **{key: torch.full_like(pairs.chosen, x) for key, x in at.items()})
    for gradient in gradients(VARIANTS[name](tied, **COMMON).loss, pairs):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_empty_responses_are_finite(name):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    pairs = replace(draw(27, shape=(1, 1)), chosen_length=zero, reference_chosen=zero, previous_chosen=zero, chosen=zero.clone().requires_grad_())
    objective = VARIANTS[name](pairs, **COMMON)
    assert objective.loss.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(objective.loss, pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", VARIANTS)
def test_certain_policies_of_either_sign_stay_finite(name, dtype):
    # sums over a large latent differ by thousands of nats: exp would leave float32
    pairs = draw(28)
    columns = {c.name: getattr(pairs, c.name).detach().to(dtype) for c in fields(pairs) if c.name != "mask"}
    chosen = torch.tensor([[4000.0, -4000.0, 0.0]], dtype=dtype).expand(4, 3).clone().requires_grad_()
    rejected = torch.tensor([4000.0, -4000.0, 90.0, 0.0], dtype=dtype)[:, None].expand(4, 3).clone().requires_grad_()
    objective = VARIANTS[name](Pairs(**{**columns, "mask": pairs.mask, "chosen": chosen, "rejected": rejected}), **COMMON)
    assert objective.loss.dtype == dtype
    assert objective.loss.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(objective.loss.sum(), (chosen, rejected)))


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_pairs_have_no_loss_and_no_gradient_whatever_they_hold(name):
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, False], [True, True, True]])
    pairs = replace(draw(29), mask=mask)
    clean = VARIANTS[name](pairs, **COMMON)
    with torch.no_grad():
        for column in fields(pairs):
            if column.name != "mask":
                getattr(pairs, column.name)[~mask] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    objective = VARIANTS[name](pairs, **COMMON)
    assert objective.loss.equal(clean.loss)
    assert objective.loss[~mask].eq(0).all()
    for gradient in torch.autograd.grad(objective.loss.sum(), (pairs.chosen, pairs.rejected, pairs.calibration, pairs.revising_chosen), allow_unused=True):
        assert gradient is None or (gradient.isfinite().all() and gradient[~mask].eq(0).all())
    for key, value in objective.metrics.items():
        assert value[~mask].eq(0.5 if key == "accuracy" else 0.0).all()


def test_item_26_no_pair_at_all_is_loss_0_and_gradient_0():
    pairs = replace(draw(30), mask=torch.zeros(4, 3, dtype=torch.bool))
    for loss in VARIANTS.values():
        value = loss(pairs, **COMMON).loss
        assert value.eq(0).all()
        assert all(g.eq(0).all() for g in gradients(value, pairs))


def test_item_29_pairs_do_not_know_each_other():
    pairs, order = draw(31), torch.tensor([2, 0, 3, 1])
    moved = Pairs(**{column.name: getattr(pairs, column.name)[order] for column in fields(pairs)})
    for loss in VARIANTS.values():
        assert loss(moved, **COMMON).loss.equal(loss(pairs, **COMMON).loss[order])


# --- metrics, tables, errors ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_metrics_agree_with_each_other_and_carry_no_gradient(name):
    objective = VARIANTS[name](draw(32), **COMMON)
    metrics = dict(objective.metrics)
    metrics.pop("clipped", None)
    assert set(metrics) == {"margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio"}
    assert all(value.shape == (4, 3) and not value.requires_grad for value in objective.metrics.values())
    scale = 1.0 if name.startswith("p3o") else COMMON["beta"]
    torch.testing.assert_close(metrics["margin"], scale * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"]), **FP64)
    assert metrics["accuracy"].equal((metrics["margin"] > 0).double())


@pytest.mark.parametrize("name", PAIR_NEEDS)
def test_the_needs_are_the_documented_ones(name):
    # each alone is refused, everything else is not asked for
    loss = {**PAIR_OBJECTIVES, **PAIR_LOSSES}[name]
    pairs = draw(33)
    asked = {n for kind in PAIR_NEEDS[name] for n in FIELDS[kind]}
    optional = {n for names in FIELDS.values() for n in names} - asked
    loss(replace(pairs, **dict.fromkeys(optional)), **COMMON)
    for missing in asked:
        with pytest.raises(ValueError, match=f"{name} (needs Pairs.{missing}, and it is None|compares with (a reference policy|the policy before))"):
            loss(replace(pairs, **{missing: None}), **COMMON)


def test_the_needs_that_settings_change():
    pairs = draw(34)
    with pytest.raises(ValueError, match=r"vpo needs Pairs.calibration"):
        vpo(replace(pairs, calibration=None), beta=0.1, online=True)
    with pytest.raises(ValueError, match=r"sppo, form soft, needs Pairs.rejected_reward"):
        sppo(replace(pairs, rejected_reward=None), beta=0.1, form="soft")
    p3o(replace(pairs, reference_chosen=None, reference_rejected=None), beta=0.0)


@pytest.mark.parametrize(("loss", "message"), [(sppo, "unknown form 'medium' of SPPO; known: hard, soft"), (p3o, "unknown form 'medium' of P3O")])
def test_unknown_forms_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(draw(35), beta=0.1, form="medium")


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_settings_without_effect_are_the_documented_ones(name):
    pairs, loss = draw(36), PAIR_LOSSES[name]
    base = loss(pairs, **COMMON).loss
    used = {"beta"} | ({"label_smoothing"} if name in ("robust_dpo", "length_normalised_dpo", "vpo") else set())
    for key, value in COMMON.items():
        assert loss(pairs, **{**COMMON, key: value / 2}).loss.equal(base) == (key not in used)


def test_the_tables_name_their_functions():
    assert all(function.__name__ == name for name, function in PAIR_LOSSES.items())
    assert list(PAIR_NEEDS) == list({**PAIR_OBJECTIVES, **PAIR_LOSSES})
    assert {name for name in PAIR_OBJECTIVES if "reference" in PAIR_NEEDS[name]} == NEEDS_REFERENCE


def test_a_column_of_another_shape_is_refused():
    for column in fields(Pairs):
        if column.name != "chosen":
            with pytest.raises(ValueError, match=f"Pairs.{column.name} has shape"):
                replace(draw(37), **{column.name: torch.zeros(4, 1)})


def test_images_a_beta_for_sums_is_one_for_means_times_the_number_of_elements():
    # log-probabilities per element: sums over n elements divided by n, targets and margins alike
    pairs, n = draw(38), 16.0
    sums = replace(pairs, **{c: n * getattr(pairs, c) for c in ("chosen", "rejected", *FIELDS["reference"], *FIELDS["previous"], *FIELDS["revising"])})
    for name in ("dno", "osp", "robust_dpo", "copg", "srpo"):
        torch.testing.assert_close(VARIANTS[name](pairs, beta=n * 0.1).loss, VARIANTS[name](sums, beta=0.1).loss, **FP64)
    for name in ("sppo", "sppo soft", "inpo", "rebel"):  # squares of log-ratios
        torch.testing.assert_close(n**2 * VARIANTS[name](pairs, beta=n * 0.1).loss, VARIANTS[name](sums, beta=0.1).loss, **FP64)


def test_logsigmoid_is_the_shared_cross_entropy():
    pairs = draw(39)
    h = (pairs.chosen - pairs.reference_chosen) - (pairs.rejected - pairs.reference_rejected)
    torch.testing.assert_close(osp(pairs, beta=0.7).loss, -pairs.preference * logsigmoid(0.7 * h) - (1 - pairs.preference) * logsigmoid(-0.7 * h), **FP64)
