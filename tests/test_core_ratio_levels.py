"""Ratio levels: by hand, forms that agree, gradients, masks, clamps; weights and masks for decisions of another policy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.objectives import clipped_surrogate
from flowrl.core.ratio_levels import (
    RATIO_LEVELS,
    at_level,
    clip_centre,
    importance_weights,
    log_ratio,
    masked_mean,
    multiple_importance_log_ratio,
    off_policy_sequence_mask,
)
from flowrl.core.reductions import sequence_weights
from flowrl.types import Decisions

FP64 = {"rtol": 1e-12, "atol": 1e-12}
OLD = torch.zeros(2, 3, dtype=torch.float64)
NEW = torch.tensor([[0.1, 0.2, 0.6], [0.4, 9.0, -0.2]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, False, True]])


def draw(seed, shape=(4, 6), spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    old, noise, advantages = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[:, 0] = True
    return (old + spread * noise).requires_grad_(), old, advantages, mask


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [[0.1, 0.2, 0.6], [0.4, 0.0, -0.2]]),
        ("seq_mean", [[0.3, 0.3, 0.3], [0.1, 0.0, 0.1]]),
        ("seq_mean_token", [[0.3, 0.3, 0.3], [0.1, 0.0, 0.1]]),
        ("seq_sum", [[0.9, 0.9, 0.9], [0.2, 0.0, 0.2]]),
        ("none", [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
)
def test_values_by_hand(level, expected):
    torch.testing.assert_close(log_ratio(NEW, OLD, MASK, level), torch.tensor(expected, dtype=torch.float64), **FP64)


def test_gradients_by_hand():
    def gradient(level):
        new = NEW.clone().requires_grad_()
        weight = torch.tensor([[1.0, 10.0, 100.0]] * 2, dtype=torch.float64)  # says whose loss a gradient comes from
        return torch.autograd.grad((weight * log_ratio(new, OLD, MASK, level)).sum(), new)[0].tolist()

    own = [[1.0, 10.0, 100.0], [1.0, 0.0, 100.0]]
    assert gradient("token") == gradient("seq_mean_token") == gradient("none") == own
    assert gradient("seq_sum") == [[111.0] * 3, [101.0, 0.0, 101.0]]
    assert gradient("seq_mean") == [pytest.approx([37.0] * 3), pytest.approx([50.5, 0.0, 50.5])]


@pytest.mark.parametrize("level", ["token", "seq_mean", "seq_sum"])
def test_the_gradient_matches_finite_differences(level):
    new, old, _, mask = draw(0)
    assert torch.autograd.gradcheck(lambda x: log_ratio(x, old, mask, level), new)


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_masked_decisions_and_empty_sequences_have_ratio_1_and_no_gradient_whatever_they_hold(level):
    new, old, _, mask = draw(1)
    mask[2] = False
    with torch.no_grad():
        new[2, 0], old[2, 1], new[2, 3] = math.nan, -math.inf, math.inf
    value = log_ratio(new, old, mask, level)
    (gradient,) = torch.autograd.grad(value.sum(), new)
    assert value[~mask].eq(0).all()
    assert gradient[~mask].eq(0).all()
    assert gradient[mask].ne(0).all()
    assert gradient.isfinite().all()


def test_item_7_the_token_form_of_gspo_equals_the_sequence_form_in_value_and_gradient():
    new, old, advantages, mask = draw(2, spread=0.02)
    mask[1] = False
    advantages = advantages[:, :1].expand(4, 6)
    results = []
    for level, reduction in (("seq_mean", "seq_mean"), ("seq_mean_token", "seq_mean_token_mean")):
        objective = clipped_surrogate(at_level(Decisions(new, old, advantages, mask), level, low=-math.inf, high=10.0), clip_low=3e-3, clip_high=4e-3)
        weight, total = sequence_weights(reduction, mask, dtype=torch.float64)
        loss = (weight * objective.loss).sum() / total
        results.append((loss.detach(), torch.autograd.grad(loss, new)[0], objective.metrics["clipped_high"] + objective.metrics["clipped_low"]))
    stopped = results[0][2][:, 0] > 0
    assert 0 < int(stopped.sum()) < 3  # one of the sequences is beyond a bound, one within
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **FP64)


def test_item_7_gspo_of_a_whole_sequence_by_its_definition():
    new, old, advantages, mask = draw(3, spread=0.5)
    advantages = advantages[:, :1]
    s = ((new - old) * mask).sum(1, keepdim=True).div(mask.sum(1, keepdim=True)).exp()
    expected = torch.maximum(-advantages * s, -advantages * s.clamp(0.9, 1.2)).mean()
    objective = clipped_surrogate(at_level(Decisions(new, old, advantages.expand(4, 6), mask), "seq_mean"), clip_low=0.1, clip_high=0.2)
    weight, total = sequence_weights("seq_mean", mask, dtype=torch.float64)
    loss = (weight * objective.loss).sum() / total
    torch.testing.assert_close(loss, expected, **FP64)
    torch.testing.assert_close(torch.autograd.grad(loss, new), torch.autograd.grad(expected, new), **FP64)


@pytest.mark.parametrize("level", ["seq_mean", "seq_mean_token", "seq_sum"])
def test_with_one_decision_every_level_is_the_tokens(level):
    new, old, _, _ = draw(4, shape=(5, 1))
    mask = torch.ones(5, 1, dtype=torch.bool)
    ours, token = (log_ratio(new, old, mask, kind) for kind in (level, "token"))
    torch.testing.assert_close(ours, token, **FP64)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), new), torch.autograd.grad(token.sum(), new), **FP64)


def test_the_clamp_stops_value_and_gradient():
    new = torch.tensor([[30.0, -30.0, 1.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    value = log_ratio(new, torch.zeros(1, 3), mask, "token")
    assert value.tolist() == [[20.0, -20.0, 1.0]]
    assert torch.autograd.grad(value.sum(), new)[0].tolist() == [[0.0, 0.0, 1.0]]
    assert log_ratio(new, torch.zeros(1, 3), mask, "seq_sum", high=0.5).tolist() == [[0.5] * 3]
    assert log_ratio(20 * mask.double(), torch.zeros(1, 3), mask, "seq_mean_token", low=-math.inf, high=10.0).tolist() == [[10.0] * 3]


def test_bias_0_and_scale_1_change_nothing_and_others_shift_and_divide():
    new, old, _, mask = draw(5)
    plain = log_ratio(new, old, mask, "token")
    assert log_ratio(new, old, mask, "token", bias=torch.zeros(4, 6), scale=torch.ones(6)).equal(plain)
    moved = log_ratio(new, old, mask, "token", bias=torch.full((4, 6), -0.5), scale=torch.tensor([1.0, 2, 4, 1, 1, 1]))
    torch.testing.assert_close(moved, torch.where(mask, (new - old + 0.5) / torch.tensor([1.0, 2, 4, 1, 1, 1]), 0.0), **FP64)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="unknown ratio level 'sequence'; known: token, seq_mean, seq_mean_token, seq_sum, none"):
        log_ratio(NEW, OLD, MASK, "sequence")


def test_item_29_a_level_does_not_depend_on_the_order_of_sequences():
    new, old, advantages, mask = draw(6)
    order = torch.tensor([2, 0, 3, 1])
    for level in RATIO_LEVELS:
        moved = at_level(Decisions(new[order], old[order], advantages[order], mask[order]), level)
        assert moved.log_prob.equal(at_level(Decisions(new, old, advantages, mask), level).log_prob[order])


# --- RL-PLUS and ReMix --------------------------------------------------------------------------------------------------------------------------


def test_the_multiple_importance_ratio_by_hand():
    # p = 1/2, p_old = 1/5: 2 (1/2) / (0.2 + 0.6) = 1.25; p_old = 1 leaves p
    p, old = torch.tensor([0.5, 0.3], dtype=torch.float64), torch.tensor([0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(multiple_importance_log_ratio(p.log(), old.log()).exp(), torch.tensor([1.25, 0.3], dtype=torch.float64), **FP64)


@given(st.floats(-60, 0), st.floats(-60, 0))
def test_item_19_the_multiple_importance_ratio_is_at_most_4(log_prob, old_log_prob):
    new = torch.tensor([log_prob], dtype=torch.float64)
    value = multiple_importance_log_ratio(new, torch.tensor([old_log_prob], dtype=torch.float64)).exp()
    assert 0 < float(value) <= 4 + 1e-12


def test_the_multiple_importance_ratio_is_differentiated_in_the_policy_alone():
    new, old = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -0.1], requires_grad=True)
    multiple_importance_log_ratio(new, old).sum().backward()
    assert new.grad.tolist() == [1.0, 1.0]
    assert old.grad is None


def test_the_centre_of_on_policy_decisions_is_1_and_then_the_clip_is_ppos():
    new, old, advantages, mask = draw(7, spread=0.5)
    centre = clip_centre(old, old, mask)
    assert centre.eq(1).all()
    batch = Decisions(new, old, advantages, mask)
    assert clipped_surrogate(batch, clip_low=0.2, clip_high=0.3, centre=centre).loss.equal(clipped_surrogate(batch, clip_low=0.2, clip_high=0.3).loss)


def test_the_centre_by_hand_and_its_limits():
    now, sampled = torch.tensor([[2.0, 4.0, 1e30]], dtype=torch.float64).log(), torch.tensor([[1.0, 8.0, 1e-30]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True]])
    torch.testing.assert_close(clip_centre(now, sampled, mask, limit=3.0), torch.tensor([[2.0, 0.5, math.exp(3)]], dtype=torch.float64), **FP64)
    assert clip_centre(now, sampled, ~mask).tolist() == [[1.0] * 3]
    # ratio 2.5 to the sampler around centre 2: within 2 + 0.6, beyond 2 + 0.4
    batch = Decisions(torch.tensor([[2.5]]).log(), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    for clip, value in ((0.6, -2.5), (0.4, -2.4)):
        assert clipped_surrogate(batch, clip_low=clip, clip_high=clip, centre=torch.full((1, 1), 2.0)).loss.item() == pytest.approx(value)


# --- corrections for another engine -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_item_38_weights_are_1_when_engine_and_training_agree(kind, level):
    _, old, _, mask = draw(8)
    assert importance_weights(old, old, mask, kind, level, low=0.5).eq(1).all()


def test_item_38_no_sequence_is_dropped_when_engine_and_training_agree():
    _, old, advantages, mask = draw(9)
    assert off_policy_sequence_mask(advantages, old, old, mask).equal(mask)


def test_importance_weights_by_hand():
    old = torch.tensor([[3.0, 0.1, 1.5, 7.0], [1.2, 1.2, 1.2, math.nan]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    rollout = torch.zeros(2, 4, dtype=torch.float64)
    weigh = {(kind, level): importance_weights(old, rollout, mask, kind, level, low=0.5) for kind in ("truncated", "masked") for level in ("token", "sequence")}
    expected = {
        ("truncated", "token"): [[2.0, 0.5, 1.5, 1.0], [1.2, 1.2, 1.2, 1.0]],
        ("masked", "token"): [[0.0, 0.0, 1.5, 1.0], [1.2, 1.2, 1.2, 1.0]],
        ("truncated", "sequence"): [[0.5, 0.5, 0.5, 1.0], [1.728] * 4],  # 3 * 0.1 * 1.5 = 0.45; 1.2^3
        ("masked", "sequence"): [[0.0, 0.0, 0.0, 1.0], [1.728] * 4],
    }
    for key, value in expected.items():
        torch.testing.assert_close(weigh[key], torch.tensor(value, dtype=torch.float64), **FP64)
    with pytest.raises(ValueError, match="unknown importance weights 'tis' of level 'token'; known: truncated, masked; token, sequence"):
        importance_weights(old, rollout, mask, "tis", "token")


def test_sequences_that_left_the_policy_are_dropped_only_where_the_advantage_is_negative():
    rollout, new = torch.zeros(3, 2), torch.tensor([[-1.0, -0.2], [-1.0, -0.2], [-0.9, -0.05]])  # mean drift 0.6, 0.6, 0.475
    advantages, mask = torch.tensor([[-1.0], [1.0], [-1.0]]).expand(3, 2), torch.ones(3, 2, dtype=torch.bool)
    assert off_policy_sequence_mask(advantages, new, rollout, mask).tolist() == [[False] * 2, [True] * 2, [True] * 2]
    mask[0, 0] = False  # its mean drift is now 0.2
    assert off_policy_sequence_mask(advantages, new, rollout, mask)[0].tolist() == [False, True]
    new[2, 0] = math.nan
    assert off_policy_sequence_mask(advantages, new, rollout, mask)[2].tolist() == [True, True]


def test_the_masked_mean_of_nothing_is_0():
    assert masked_mean(torch.tensor([[math.nan, 2.0], [3.0, 5.0]]), torch.tensor([[False, False], [True, True]])).tolist() == [[0.0], [4.0]]


@pytest.mark.parametrize("level", RATIO_LEVELS)
def test_nothing_waits_for_the_device(level):
    """Tensors without data: a look at a value, .item() or bool(), would raise."""
    value, mask = torch.empty(4, 6, device="meta"), torch.empty(4, 6, dtype=torch.bool, device="meta")
    assert log_ratio(value, value, mask, level).is_meta
    assert importance_weights(value, value, mask, "masked", "sequence").is_meta
    assert off_policy_sequence_mask(value, value, value, mask).is_meta
    assert clip_centre(value, value, mask).is_meta
    assert sequence_weights("seq_mean", mask).weight.is_meta
