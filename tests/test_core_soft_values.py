"""Soft values, A*-PO and OREO: by hand, optima, limits, finite differences, edges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.list_losses import sppo_group
from flowrl.core.soft_values import a_star_po, oreo_actor, oreo_critic, soft_value
from flowrl.types import Decisions

FP64 = {"rtol": 1e-10, "atol": 1e-12}
SHAPE = (4, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
STEPS = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
FIRST = torch.tensor([[1, 0, 0, 0, 0]] * 4).bool()
REWARDS = torch.tensor([1.0, 0.0, -1.0, 1.0], dtype=torch.float64)


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    value, log_prob, reference = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    return value.requires_grad_(), log_prob.requires_grad_(), reference


# --- soft values and A*-PO ------------------------------------------------------------------------------------------------------------------------


def value_of(rewards, temperature, dtype=torch.float64):
    rewards = torch.tensor(rewards, dtype=dtype)
    everyone = torch.ones(len(rewards), dtype=torch.bool)
    return soft_value(rewards, torch.zeros(len(rewards), dtype=torch.int64), everyone, 1, temperature=temperature)[0].item()


def test_soft_values_by_hand():
    # temperature 1 / ln 2: exp(R / T) = 2^R; mean of 2 and 8 is 5, of 4 alone 4; the third group has nobody
    rewards = torch.tensor([1.0, 2.0, 3.0, torch.nan, torch.nan], dtype=torch.float64)
    group, valid = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([True, True, True, False, False])
    value, known = soft_value(rewards, group, valid, 3, temperature=1 / math.log(2))
    torch.testing.assert_close(value, torch.tensor([math.log2(5), 2.0, 0.0], dtype=torch.float64), **FP64)
    assert known.tolist() == [True, True, False]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(0.01, 100), st.floats(-50, 50))
def test_soft_values_lie_between_the_mean_and_the_largest_and_shift_along(rewards, temperature, shift):
    value = value_of(rewards, temperature)
    assert sum(rewards) / len(rewards) - 1e-9 <= value <= max(rewards) + 1e-9
    assert value_of([r + shift for r in rewards], temperature) == pytest.approx(value + shift, abs=1e-9)


def test_v2_a_high_temperature_is_the_mean_and_a_low_one_the_largest():
    rewards = [0.0, 1.0, 5.0]
    assert value_of(rewards, 1e9) == pytest.approx(2.0, abs=1e-6)
    assert value_of(rewards, 1e6, torch.float32) == pytest.approx(2.0, abs=1e-4)
    assert value_of(rewards, 1e-3) == pytest.approx(5.0, abs=2e-3)  # minus temperature ln 3
    assert value_of([1000.0, 1000.0], 0.5) == 1000.0  # exp(2000) is beyond all numbers


def decisions_of(log_prob, old, advantages):
    return Decisions(log_prob, old, advantages[:, None].expand(SHAPE), MASK)


def test_v2_a_star_po_by_hand_and_its_gradient():
    _, log_prob, reference = draw(0)
    decisions = decisions_of(log_prob, reference, REWARDS)
    arguments = {"group": torch.arange(4), "num_groups": 4, "ref_log_prob": reference, "beta": 0.3}
    u = torch.where(MASK, log_prob - reference, 0.0).sum(1, keepdim=True)
    loss = a_star_po(decisions, **arguments).loss
    torch.testing.assert_close(loss, torch.where(MASK, (0.3 * u - REWARDS[:, None]).square(), 0.0), **FP64)
    assert torch.autograd.gradcheck(lambda x: a_star_po(decisions_of(x, reference, REWARDS), **arguments).loss, log_prob)
    # the same regression as SPPO's on the old policy, up to scale
    torch.testing.assert_close(loss, 0.3**2 * sppo_group(decisions, group=torch.arange(4), num_groups=4, beta=0.3).loss, **FP64)


def test_v2_a_star_po_and_the_response_form_of_oreo_vanish_at_the_regularised_optimum():
    # enumerable: pi* = ref exp(R / beta) / Z, V* = beta log Z, Z the mean over the reference of exp(R / beta)
    beta = 0.7
    counts = torch.tensor([3, 1, 2, 2])  # the reference in eighths
    reference = counts.double() / 8
    rewards = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    copies = rewards.repeat_interleave(counts)
    optimal, _ = soft_value(copies, torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool), 1, temperature=beta)
    policy = torch.softmax(reference.log() + rewards / beta, 0)
    log_prob, ref = policy.log()[:, None], reference.log()[:, None]
    everything = torch.ones(4, 1, dtype=torch.bool)
    decisions = Decisions(log_prob, log_prob, (rewards - optimal)[:, None], everything)
    loss = a_star_po(decisions, group=torch.zeros(4, dtype=torch.int64), num_groups=1, ref_log_prob=ref, beta=beta).loss
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-24)
    theirs = oreo_actor(optimal.expand(4, 1), log_prob, ref, everything, everything, rewards, beta=beta)
    torch.testing.assert_close(theirs, torch.zeros_like(theirs), rtol=0, atol=1e-24)


# --- OREO -----------------------------------------------------------------------------------------------------------------------------------------


def test_v1_oreo_by_hand():
    # one answer of three tokens with log-ratios 1, 2, 4: c = 7, 6, 4; V = 10, 20, 30; R = 5, beta = 2
    value, log_prob = torch.tensor([[10.0, 20.0, 30.0]], dtype=torch.float64), torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    reference, mask, rewards = torch.zeros_like(value), torch.ones(1, 3, dtype=torch.bool), torch.tensor([5.0], dtype=torch.float64)
    for loss in (oreo_critic, oreo_actor):
        assert loss(value, log_prob, reference, mask, mask, rewards, beta=2.0).tolist() == [[19.0**2, 27.0**2, 33.0**2]]
        assert loss(value, log_prob, reference, mask, torch.tensor([[True, False, True]]), rewards, beta=2.0).tolist() == [[19.0**2, 0.0, 33.0**2]]


@pytest.mark.parametrize("state", [MASK, STEPS, FIRST], ids=["token", "step", "response"])
def test_v1_the_critic_learns_values_only_and_the_actor_its_own_step_only(state):
    value, log_prob, reference = draw(1)
    arguments = (reference, MASK, state, REWARDS)
    critic = oreo_critic(value, log_prob, *arguments, beta=0.3).sum()
    assert torch.autograd.grad(critic, log_prob, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.gradcheck(lambda v: oreo_critic(v, log_prob, *arguments, beta=0.3), value)
    actor = oreo_actor(value, log_prob, *arguments, beta=0.3)
    assert torch.autograd.grad(actor.sum(), value, allow_unused=True, retain_graph=True) == (None,)
    # 2 beta times the state's residual for each decision from it to the next state
    suffix = torch.where(MASK, log_prob - reference, 0.0).flip(1).cumsum(1).flip(1)
    residual = (value + 0.3 * suffix - REWARDS[:, None]).detach()
    (found,) = torch.autograd.grad(actor.sum(), log_prob)
    for i in range(4):
        current = None
        for t in range(5):
            current = residual[i, t] if state[i, t] and MASK[i, t] else current
            expected = 2 * 0.3 * current if MASK[i, t] and current is not None else 0.0
            assert found[i, t].item() == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(actor, torch.where(state & MASK, residual.square(), 0.0), **FP64)


def test_v1_the_response_form_has_finite_difference_gradients_and_is_a_star_po():
    value, log_prob, reference = draw(2)
    mask = torch.ones(SHAPE, dtype=torch.bool)
    arguments = (reference, mask, FIRST, REWARDS)
    assert torch.autograd.gradcheck(lambda x: oreo_actor(value, x, *arguments, beta=0.3), log_prob)
    decisions = Decisions(log_prob, reference, (REWARDS[:, None] - value[:, :1]).detach().expand(SHAPE), mask)
    theirs = a_star_po(decisions, group=torch.arange(4), num_groups=4, ref_log_prob=reference, beta=0.3).loss
    torch.testing.assert_close(oreo_actor(value, log_prob, *arguments, beta=0.3)[:, 0], theirs[:, 0], **FP64)


def test_v1_the_soft_bellman_optimum_has_no_loss():
    value, log_prob, reference = draw(3)
    suffix = torch.where(MASK, log_prob - reference, 0.0).flip(1).cumsum(1).flip(1).detach()
    optimum = REWARDS[:, None] - 0.3 * suffix
    for loss in (oreo_critic, oreo_actor):
        found = loss(optimum, log_prob, reference, MASK, MASK, REWARDS, beta=0.3)
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-24)
        assert loss(value, log_prob, reference, MASK, MASK, REWARDS, beta=0.3)[MASK].gt(0).all()


def test_v1_a_large_beta_pins_the_policy_to_the_reference():
    # the minimum of the response form is u = (R - V) / beta
    value, _, reference = draw(4)
    for beta in (1.0, 1e6):
        log_prob = (reference + (REWARDS[:, None] - value.detach()[:, :1]) / beta / 5).requires_grad_()
        loss = oreo_actor(value, log_prob, reference, torch.ones(SHAPE, dtype=torch.bool), FIRST, REWARDS, beta=beta)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_prob)[0] / beta, torch.zeros_like(reference), rtol=0, atol=1e-9)
    assert (log_prob - reference).abs().max() < 1e-5


@pytest.mark.parametrize("loss", [oreo_critic, oreo_actor])
def test_item_26_no_state_no_loss_and_masked_places_do_not_matter(loss):
    value, log_prob, reference = draw(5)
    clean = loss(value, log_prob, reference, MASK, STEPS, REWARDS)
    with torch.no_grad():
        for tensor in (value, log_prob, reference):
            tensor[~MASK] = math.nan
    rewards = torch.where(MASK.any(1), REWARDS, torch.nan)  # a sample without a reward is masked
    found = loss(value, log_prob, reference, MASK, STEPS, rewards)
    assert found.equal(clean)
    learner = value if loss is oreo_critic else log_prob
    (gradient,) = torch.autograd.grad(found.sum(), learner)
    assert gradient.isfinite().all()
    assert gradient[~MASK].eq(0).all()
    nothing = loss(value, log_prob, reference, MASK, torch.zeros_like(MASK), torch.full_like(rewards, torch.nan))
    assert nothing.eq(0).all()
    assert torch.autograd.grad(nothing.sum(), learner)[0].eq(0).all()


def test_float32_stays_float32():
    value, log_prob, reference = (x.detach().float() for x in draw(6))
    for loss in (oreo_critic, oreo_actor):
        assert loss(value, log_prob, reference, MASK, MASK, REWARDS.float()).dtype == torch.float32
    assert soft_value(REWARDS.float(), torch.arange(4), torch.ones(4, dtype=torch.bool), 4, temperature=0.5)[0].dtype == torch.float32
