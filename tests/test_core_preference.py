"""Pair losses: values by hand, gradients by finite differences, special cases, invariances, and Flow-DPO's loss as `dpo` on velocity errors."""

import math
from dataclasses import fields, replace

import pytest
import torch

from flowrl.core.preference import NEEDS_REFERENCE, PAIR_OBJECTIVES, dpo, ipo, rpo, simpo
from flowrl.types import Pairs

FP64 = {"rtol": 1e-12, "atol": 1e-12}
SETTINGS = {"beta": 0.7, "margin": 0.4, "sft_weight": 0.3, "label_smoothing": 0.1}
PLAIN = {"beta": 1.0, "margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}
FAMILY = ("dpo", "ipo", "simpo", "rpo")
METRICS = {"margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio"}


def draw(seed, *, shape=(4, 3), lengths=False):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, reference_chosen, reference_rejected = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    chosen_length, rejected_length = (torch.randint(1, 9, shape, generator=generator).double() if lengths else None for _ in range(2))
    return Pairs(
        chosen.requires_grad_(),
        rejected.requires_grad_(),
        reference_chosen,
        reference_rejected,
        torch.ones(shape, dtype=torch.bool),
        chosen_length,
        rejected_length,
    )


def changed(pairs, **changes):
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected", "mask", "chosen_length", "rejected_length")
    return Pairs(**{name: changes.get(name, getattr(pairs, name)) for name in names})


def swapped(pairs):
    return Pairs(pairs.rejected, pairs.chosen, pairs.reference_rejected, pairs.reference_chosen, pairs.mask, pairs.rejected_length, pairs.chosen_length)


def one(chosen, rejected, reference_chosen=0.0, reference_rejected=0.0, chosen_length=None, rejected_length=None):
    values = [None if x is None else torch.tensor([[x]], dtype=torch.float64) for x in (chosen, rejected, reference_chosen, reference_rejected)]
    lengths = [None if x is None else torch.tensor([[x]], dtype=torch.float64) for x in (chosen_length, rejected_length)]
    return Pairs(*values, torch.ones(1, 1, dtype=torch.bool), *lengths)


def at_the_reference(seed):
    pairs = draw(seed)
    return changed(pairs, reference_chosen=pairs.chosen.detach(), reference_rejected=pairs.rejected.detach())


def gradients(objective, pairs):
    return torch.autograd.grad(objective.loss.sum(), (pairs.chosen, pairs.rejected))


# --- values by hand -----------------------------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    # u = (-2 + 3) = 1 and (-4 + 2) = -2, so h = 3; beta ln 3 / 3 makes z = ln 3: sigmoid 3/4 and 1/4
    pairs, beta = one(-2.0, -4.0, -3.0, -2.0), math.log(3) / 3
    objective = dpo(pairs, **{**PLAIN, "beta": beta})
    assert objective.loss.item() == pytest.approx(-math.log(0.75), rel=1e-12)
    assert {name: value.item() for name, value in objective.metrics.items()} == pytest.approx(
        {"margin": math.log(3), "accuracy": 1.0, "chosen_log_ratio": 1.0, "rejected_log_ratio": -2.0}, rel=1e-12
    )
    smoothed = dpo(pairs, **{**PLAIN, "beta": beta, "label_smoothing": 0.2}).loss
    assert smoothed.item() == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25), rel=1e-12)


def test_ipo_by_hand_with_sums_and_with_means():
    # h = 1 + 2 = 3 as sums; 1/4 + 2/5 = 0.65 as means over 4 and 5 tokens; the target is 1 / (2 beta) = 2
    assert ipo(one(-2.0, -4.0, -3.0, -2.0), **{**PLAIN, "beta": 0.25}).loss.item() == pytest.approx(1.0, rel=1e-12)
    objective = ipo(one(-2.0, -4.0, -3.0, -2.0, 4.0, 5.0), **{**PLAIN, "beta": 0.25})
    assert objective.loss.item() == pytest.approx(1.35**2, rel=1e-12)
    assert objective.metrics["margin"].item() == pytest.approx(0.25 * 0.65, rel=1e-12)


def test_simpo_by_hand():
    # means -2/4 = -0.5 and -6/3 = -2, so beta (difference) - margin = 2 * 1.5 - 0.8 = 2.2
    pairs = one(-2.0, -6.0, None, None, 4.0, 3.0)
    objective = simpo(pairs, **{**PLAIN, "beta": 2.0, "margin": 0.8})
    assert objective.loss.item() == pytest.approx(math.log1p(math.exp(-2.2)), rel=1e-12)
    assert {name: value.item() for name, value in objective.metrics.items()} == pytest.approx(
        {"margin": 3.0, "accuracy": 1.0, "chosen_log_ratio": -0.5, "rejected_log_ratio": -2.0}, rel=1e-12
    )


@pytest.mark.parametrize(("length", "likelihood"), [(None, -2.0), (4.0, -0.5)])
def test_rpo_by_hand(length, likelihood):
    # the preference term of the DPO example, on sums, plus 0.1 times the negative log-likelihood, per token where lengths are known
    settings = {**PLAIN, "beta": math.log(3) / 3, "sft_weight": 0.1}
    objective = rpo(one(-2.0, -4.0, -3.0, -2.0, length, length), **settings)
    assert objective.loss.item() == pytest.approx(-math.log(0.75) - 0.1 * likelihood, rel=1e-12)
    assert objective.metrics["margin"].item() == pytest.approx(math.log(3), rel=1e-12)


def test_the_accuracy_is_one_half_at_a_tie():
    for chosen, accuracy in ((-1.0, 0.0), (0.0, 0.5), (1.0, 1.0)):
        assert dpo(one(chosen, 0.0), **PLAIN).metrics["accuracy"].item() == accuracy


# --- gradients ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_gradients_match_finite_differences(name, lengths):
    pairs = draw(0, lengths=lengths)
    loss = PAIR_OBJECTIVES[name]
    assert torch.autograd.gradcheck(lambda x, y: loss(changed(pairs, chosen=x, rejected=y), **SETTINGS).loss, (pairs.chosen, pairs.rejected))


@pytest.mark.parametrize("name", ["dpo", "ipo", "rpo"])
def test_a_reference_is_a_constant(name):
    pairs = draw(1)
    references = tuple(x.clone().requires_grad_() for x in (pairs.reference_chosen, pairs.reference_rejected))
    objective = PAIR_OBJECTIVES[name](changed(pairs, reference_chosen=references[0], reference_rejected=references[1]), **SETTINGS)
    assert torch.autograd.grad(objective.loss.sum(), references, allow_unused=True) == (None, None)


@pytest.mark.parametrize("name", ["dpo", "rpo"])
def test_at_the_reference_the_loss_is_ln_2_and_its_gradient_half_beta(name):
    pairs = at_the_reference(2)
    for beta in (0.1, 0.2, 50.0):
        objective = PAIR_OBJECTIVES[name](pairs, **{**PLAIN, "beta": beta})
        torch.testing.assert_close(objective.loss, torch.full_like(objective.loss, math.log(2)), **FP64)
        assert objective.metrics["accuracy"].eq(0.5).all()
        chosen, rejected = gradients(objective, pairs)
        torch.testing.assert_close(chosen, torch.full_like(chosen, -beta / 2), **FP64)
        torch.testing.assert_close(rejected, -chosen, **FP64)


def test_swapping_chosen_and_rejected_flips_the_gradient_at_the_reference():
    pairs = at_the_reference(3)
    there, back = dpo(pairs, **SETTINGS), dpo(swapped(pairs), **SETTINGS)
    for ours, theirs in zip(gradients(there, pairs), gradients(back, pairs), strict=True):
        torch.testing.assert_close(ours, -theirs, **FP64)
        assert ours.ne(0).all()


@pytest.mark.parametrize("name", FAMILY)
def test_swapping_flips_the_sign_of_the_margin_and_the_accuracy(name):
    pairs = draw(4, lengths=True)
    there, back = (PAIR_OBJECTIVES[name](p, **SETTINGS).metrics for p in (pairs, swapped(pairs)))
    torch.testing.assert_close(there["margin"], -back["margin"], **FP64)
    torch.testing.assert_close(there["accuracy"], 1 - back["accuracy"], **FP64)


@pytest.mark.parametrize("name", FAMILY)
def test_certain_preferences_of_either_sign_stay_finite(name):
    # sums over a large latent differ by thousands of nats: exp would leave float32
    chosen = torch.tensor([[4000.0, -4000.0]], requires_grad=True)
    zeros = torch.zeros(1, 2)
    objective = PAIR_OBJECTIVES[name](Pairs(chosen, zeros, zeros, zeros, torch.ones(1, 2, dtype=torch.bool)), **PLAIN)
    assert objective.loss.isfinite().all()
    (gradient,) = torch.autograd.grad(objective.loss.sum(), chosen)
    assert gradient.isfinite().all()
    if name != "ipo":
        assert objective.loss.tolist() == [[0.0, 4000.0]]
        assert gradient.tolist() == [[0.0, -1.0]]


# --- special cases and minima -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_rpo_without_its_second_term_is_dpo(label_smoothing):
    pairs = draw(5, lengths=True)
    settings = {**SETTINGS, "sft_weight": 0.0, "label_smoothing": label_smoothing}
    assert rpo(pairs, **settings).loss.equal(dpo(pairs, **settings).loss)


def test_simpo_without_a_margin_and_with_equal_lengths_is_dpo_without_a_reference():
    pairs = draw(6)
    length, zero = torch.full_like(pairs.mask, 5, dtype=torch.float64), torch.zeros_like(pairs.chosen)
    ours = simpo(changed(pairs, chosen_length=length, rejected_length=length), **{**PLAIN, "beta": 2.0})
    theirs = dpo(changed(pairs, reference_chosen=zero, reference_rejected=zero), **{**PLAIN, "beta": 2.0 / 5})
    torch.testing.assert_close(ours.loss, theirs.loss, **FP64)
    torch.testing.assert_close(ours.metrics["margin"], theirs.metrics["margin"], **FP64)


@pytest.mark.parametrize("name", ["ipo", "simpo", "rpo"])
def test_lengths_of_one_are_no_lengths(name):
    pairs = draw(7)
    length = torch.ones_like(pairs.chosen)
    ours = PAIR_OBJECTIVES[name](changed(pairs, chosen_length=length, rejected_length=length), **SETTINGS)
    assert ours.loss.equal(PAIR_OBJECTIVES[name](pairs, **SETTINGS).loss)


def test_an_empty_sequence_has_mean_log_probability_zero():
    assert simpo(one(0.0, -3.0, None, None, 0.0, 3.0), **PLAIN).metrics["margin"].item() == 1.0


def test_ipos_minimum_is_half_of_one_over_beta():
    beta = 0.2
    chosen = torch.tensor([[2.5, 2.4, 2.6, 2.5]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([[0.0, 0.0, 0.0, 0.7]], dtype=torch.float64)
    zeros = torch.zeros_like(rejected)
    pairs = Pairs(chosen, rejected, zeros, zeros, torch.ones(1, 4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(ipo(pairs, **{**PLAIN, "beta": beta}).loss.sum(), chosen)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.2, 0.2, -1.4]], dtype=torch.float64), **FP64)


def test_smoothed_dpos_minimum_is_the_log_odds_of_a_right_label():
    beta, smoothing = 0.5, 0.2
    chosen = torch.tensor([[math.log(0.8 / 0.2) / beta]], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    pairs = Pairs(chosen, zeros, zeros, zeros, torch.ones(1, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(dpo(pairs, **{**PLAIN, "beta": beta, "label_smoothing": smoothing}).loss.sum(), chosen)
    assert gradient.item() == pytest.approx(0.0, abs=1e-15)


def test_a_smoothed_label_is_the_average_over_both_orders():
    pairs = draw(8)
    there, back = (dpo(p, **{**PLAIN, "beta": 0.3}).loss for p in (pairs, swapped(pairs)))
    torch.testing.assert_close(dpo(pairs, **{**PLAIN, "beta": 0.3, "label_smoothing": 0.1}).loss, 0.9 * there + 0.1 * back, **FP64)


def test_a_prompts_normalisation_of_log_probabilities_does_not_matter():
    # log p + c for both samples of a pair: only differences count
    pairs = draw(9)
    shift = torch.randn(pairs.chosen.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = changed(pairs, chosen=pairs.chosen + shift, rejected=pairs.rejected + shift)
    for loss in (dpo, ipo, simpo):
        torch.testing.assert_close(loss(moved, **SETTINGS).loss, loss(pairs, **SETTINGS).loss, **FP64)


# --- images: Flow-DPO ---------------------------------------------------------------------------------------------------------------------------


def test_flow_dpos_beta_of_100_is_50_here():
    generator = torch.Generator().manual_seed(10)
    shape = (2, 5, 3, 4, 4)  # chosen and rejected, 5 pairs, a latent
    clean, noise, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    target = noise - clean
    reference = target + residual
    weight = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    velocity = reference + weight * clean.sin()

    def error(v):
        return (v - target).square().mean((2, 3, 4))[..., None]  # [2, 5, 1]

    (m_chosen, m_rejected), (ref_chosen, ref_rejected) = error(velocity), error(reference)
    theirs = -torch.nn.functional.logsigmoid(-100 / 2 * ((m_chosen - ref_chosen) - (m_rejected - ref_rejected)))
    ours = dpo(Pairs(-m_chosen, -m_rejected, -ref_chosen, -ref_rejected, torch.ones(5, 1, dtype=torch.bool)), **{**PLAIN, "beta": 50.0}).loss
    torch.testing.assert_close(ours, theirs, **FP64)
    ours, theirs = (torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (ours, theirs))
    assert ours.item() != 0
    torch.testing.assert_close(ours, theirs, **FP64)


# --- masks, metrics, errors ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_masked_pairs_have_no_loss_and_no_gradient_whatever_they_hold(name):
    mask = torch.tensor([[True, False, True], [False, True, True], [True, True, False], [True, True, True]])
    pairs = changed(draw(11, lengths=True), mask=mask)
    clean = PAIR_OBJECTIVES[name](pairs, **SETTINGS)
    with torch.no_grad():
        pairs.chosen[0, 1], pairs.rejected[1, 0], pairs.reference_chosen[2, 2], pairs.chosen_length[0, 1] = math.nan, -math.inf, math.nan, math.nan
    objective = PAIR_OBJECTIVES[name](pairs, **SETTINGS)
    assert objective.loss.equal(clean.loss)
    assert objective.loss[~mask].eq(0).all()
    assert objective.loss[mask].ne(0).all()
    for gradient in gradients(objective, pairs):
        assert gradient[~mask].eq(0).all()
        assert gradient[mask].ne(0).all()
        assert gradient.isfinite().all()
    for key, value in objective.metrics.items():
        assert value[~mask].eq(0.5 if key == "accuracy" else 0.0).all()


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_metrics_agree_with_each_other_and_carry_no_gradient(name, lengths):
    objective = PAIR_OBJECTIVES[name](draw(12, lengths=lengths), **SETTINGS)
    metrics = objective.metrics
    assert objective.loss.requires_grad
    assert set(metrics) == METRICS
    assert all(value.shape == (4, 3) and not value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics["margin"], SETTINGS["beta"] * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"]), **FP64)
    assert metrics["accuracy"].equal((metrics["margin"] > 0).double())
    assert 0 < metrics["accuracy"].mean() < 1


@pytest.mark.parametrize("name", FAMILY)
def test_what_other_losses_read_has_no_effect(name):
    pairs = draw(15, lengths=True)
    names = [column.name for column in fields(Pairs)][7:]
    assert names[0] == "previous_chosen"
    assert all(getattr(pairs, column) is None for column in names)
    full = replace(pairs, **{column: torch.full_like(pairs.chosen, torch.nan) for column in names})
    assert PAIR_OBJECTIVES[name](full, **SETTINGS).loss.equal(PAIR_OBJECTIVES[name](pairs, **SETTINGS).loss)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_identical_responses_teach_nothing(name):
    pairs = draw(16, lengths=True)
    twins = replace(pairs, rejected=pairs.chosen, reference_rejected=pairs.reference_chosen, rejected_length=pairs.chosen_length)
    (gradient,) = torch.autograd.grad(PAIR_OBJECTIVES[name](twins, **SETTINGS).loss.sum(), pairs.chosen)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("name", FAMILY)
def test_empty_responses_are_finite_and_no_pair_at_all_is_0(name):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    pairs = replace(draw(17, shape=(1, 1), lengths=True), chosen=zero.clone().requires_grad_(), reference_chosen=zero, chosen_length=zero)
    objective = PAIR_OBJECTIVES[name](pairs, **SETTINGS)
    assert objective.loss.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(objective, pairs))
    objective = PAIR_OBJECTIVES[name](replace(pairs, mask=torch.zeros(1, 1, dtype=torch.bool)), **SETTINGS)
    assert objective.loss.item() == 0
    assert all(g.item() == 0 for g in gradients(objective, pairs))


@pytest.mark.parametrize("missing", ["reference_chosen", "reference_rejected"])
def test_a_missing_reference_is_refused_by_those_that_need_it(missing):
    pairs = changed(draw(13), **{missing: None})
    for name in FAMILY:
        loss = PAIR_OBJECTIVES[name]
        if name in NEEDS_REFERENCE:
            with pytest.raises(ValueError, match=f"{name} compares with a reference policy, and Pairs has no reference log-probabilities"):
                loss(pairs, **SETTINGS)
        else:
            assert loss(pairs, **SETTINGS).loss.equal(loss(draw(13), **SETTINGS).loss)


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("dpo", ("margin", "sft_weight")),
        ("ipo", ("margin", "sft_weight", "label_smoothing")),
        ("simpo", ("sft_weight", "label_smoothing")),
        ("rpo", ("margin",)),
    ],
)
def test_settings_without_effect_are_the_documented_ones(name, unused):
    pairs, loss = draw(14), PAIR_OBJECTIVES[name]
    base = loss(pairs, **SETTINGS).loss
    for key, value in SETTINGS.items():
        assert loss(pairs, **{**SETTINGS, key: value / 2}).loss.equal(base) == (key in unused)


def test_the_table_names_its_functions():
    assert list(PAIR_OBJECTIVES.items())[:4] == [("dpo", dpo), ("ipo", ipo), ("simpo", simpo), ("rpo", rpo)]
    assert set(PAIR_OBJECTIVES) - NEEDS_REFERENCE == {"simpo", "sppo", "dno", "rebel"}
