"""Divergences: against torch.distributions, against each other, at equality, and single-sample estimates against exact sums."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flowrl.core.regularizers import (
    EntropyController,
    EntropyHistory,
    KlController,
    categorical_kl,
    categorical_kl_estimate,
    entropy_band,
    entropy_bonus,
    gaussian_kl,
    kl_barrier,
    kl_convex,
    kl_convex_share,
    kl_in_reward,
    off_policy_kl,
    sft_loss,
    sft_share,
    velocity_penalty,
)
from samplers.flow_sde import FlowSde
from samplers.kernels import Step
from samplers.schedules import diffusers_grid

FP64 = {"rtol": 1e-10, "atol": 1e-12}
FORMS = ("fg_code", "exact_mean", "v_mse", "x_mse")
SIGMAS = torch.tensor(diffusers_grid(10, 3.0), dtype=torch.float64)
STEP = Step(SIGMAS[:9], SIGMAS[1:10], torch.full((9,), SIGMAS[1].item(), dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64))
LENGTH = STEP.sigma - STEP.sigma_next
ELEMENTS = 2 * 3


def divergence(form, velocity, ref_velocity, x=None):
    """[9]: one row per step of SD3's grid."""
    x = torch.zeros_like(velocity) if x is None else x
    mean, std = FlowSde().moments(x, velocity, STEP)
    return gaussian_kl(
        form, mean=mean, ref_mean=FlowSde().moments(x, ref_velocity, STEP).mean, velocity=velocity, ref_velocity=ref_velocity, std=std, length=LENGTH
    )


@pytest.fixture
def velocities():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(9, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_the_exact_form_is_the_kl_of_two_normals_per_element(velocities):
    v, ref, x = velocities
    mean, std = FlowSde().moments(x, v, STEP)
    other = FlowSde().moments(x, ref, STEP).mean
    spread = std.view(9, 1, 1).expand_as(mean)
    expected = kl_divergence(Normal(mean, spread), Normal(other, spread)).sum((1, 2)) / ELEMENTS
    torch.testing.assert_close(divergence("exact_mean", v, ref, x), expected, **FP64)


def test_the_published_code_form_is_the_exact_one_times_the_step_length(velocities):
    v, ref, _ = velocities
    torch.testing.assert_close(divergence("fg_code", v, ref) / divergence("exact_mean", v, ref), LENGTH, **FP64)


def test_the_published_code_form_divides_by_the_diffusion_and_not_by_the_std(velocities):
    v, ref, _ = velocities
    s = FlowSde().diffusion(STEP)
    difference = FlowSde().grad_scale(STEP).square() * (v - ref).square().mean((1, 2))  # <(mean - ref_mean)^2>
    torch.testing.assert_close(divergence("x_mse", v, ref), difference, **FP64)
    torch.testing.assert_close(divergence("fg_code", v, ref), difference / (2 * s**2), **FP64)


def test_the_exact_form_is_a_weighted_squared_difference_of_velocities(velocities):
    v, ref, x = velocities
    s = FlowSde().diffusion(STEP)
    factor = 1 / s + s * (1 - STEP.sigma) / (2 * STEP.sigma)  # kap / s
    torch.testing.assert_close(divergence("exact_mean", v, ref, x), LENGTH / 2 * factor.square() * divergence("v_mse", v, ref, x), **FP64)
    torch.testing.assert_close(divergence("v_mse", v, ref), (v - ref).square().mean((1, 2)), **FP64)


@pytest.mark.parametrize("form", FORMS)
def test_at_equality_every_form_is_zero_with_zero_gradient(form, velocities):
    v = velocities[0].requires_grad_()
    value = divergence(form, v, v.detach().clone())
    assert value.tolist() == [0.0] * 9
    assert torch.autograd.grad(value.sum(), v)[0].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_a_gradient_in_the_policy_and_none_in_the_reference(form, velocities):
    v, ref, x = velocities[0].requires_grad_(), velocities[1].requires_grad_(), velocities[2]
    value = divergence(form, v, ref, x)
    assert value.gt(0).all()
    ours, theirs = torch.autograd.grad(value.sum(), (v, ref), allow_unused=True, materialize_grads=True)
    assert ours.ne(0).all()
    assert theirs.eq(0).all()
    assert torch.autograd.gradcheck(lambda velocity: divergence(form, velocity, ref.detach(), x), v)


def test_an_unknown_form_is_refused(velocities):
    with pytest.raises(ValueError, match="unknown KL form 'exact'; known: fg_code, exact_mean, v_mse, x_mse"):
        divergence("exact", velocities[0], velocities[1])


# --- velocity penalties: of a noise level, without a step ---


def test_the_elbo_penalty_by_hand():
    # <d^2> = (1 + 9) / 2 = 5; s^2 = 0.49 * 1 at sigma 0.5, 0.49 * 0.25 at 0.2; above 0.99 the denominator stays 0.01: 0.49 * 99.9 and 0.49 * 100
    velocity, reference = torch.tensor([[3.0, 1.0]], dtype=torch.float64).expand(4, 2), torch.tensor([[2.0, -2.0]], dtype=torch.float64).expand(4, 2)
    sigma = torch.tensor([0.5, 0.2, 0.999, 1.0], dtype=torch.float64)
    expected = torch.tensor([5 / 0.98, 5 / 0.245, 5 / (0.98 * 99.9), 5 / 98], dtype=torch.float64)
    torch.testing.assert_close(velocity_penalty("v_elbo", velocity, reference, sigma), expected, **FP64)
    assert velocity_penalty("v_mse", velocity, reference).tolist() == [5.0] * 4


def test_the_velocity_penalty_is_the_velocity_form_of_a_step(velocities):
    v, ref, _ = velocities
    assert velocity_penalty("v_mse", v, ref, STEP.sigma).equal(divergence("v_mse", v, ref))


def test_the_elbo_penalty_is_the_exact_form_per_step_length_without_the_drift_correction(velocities):
    # exact_mean = D kappa^2 <(v - ref)^2> / (2 s^2) with kappa = 1 + s^2 (1 - sigma) / (2 sigma); at noise level 0.7, s is the penalty's s below sigma 0.99
    v, ref, _ = velocities
    s = FlowSde().diffusion(STEP)
    kappa = 1 + s.square() * (1 - STEP.sigma) / (2 * STEP.sigma)
    ours, exact = velocity_penalty("v_elbo", v, ref, STEP.sigma), divergence("exact_mean", v, ref)
    assert STEP.sigma[0] == 1  # where the sampler's guard differs from the penalty's
    torch.testing.assert_close(ours[1:], (exact / (LENGTH * kappa.square()))[1:], **FP64)


@pytest.mark.parametrize("form", ["v_mse", "v_elbo"])
def test_the_velocity_penalty_has_the_policys_gradient_and_none_in_the_reference(form, velocities):
    v, ref = velocities[0].requires_grad_(), velocities[1].requires_grad_()
    ours, theirs = torch.autograd.grad(velocity_penalty(form, v, ref, STEP.sigma).sum(), (v, ref), allow_unused=True)
    assert ours.ne(0).all()
    assert theirs is None
    assert torch.autograd.gradcheck(lambda velocity: velocity_penalty(form, velocity, ref, STEP.sigma), v)
    same = velocity_penalty(form, v, v.detach().clone(), STEP.sigma)
    assert same.tolist() == [0.0] * 9
    assert torch.autograd.grad(same.sum(), v)[0].eq(0).all()


def test_the_velocity_penalty_keeps_the_velocitys_precision(velocities):
    v, ref, _ = (velocity.float() for velocity in velocities)
    assert velocity_penalty("v_elbo", v, ref, STEP.sigma).dtype == torch.float32


def test_forms_that_do_not_apply_are_refused(velocities):
    v, ref, _ = velocities
    with pytest.raises(ValueError, match="KL form 'v_elbo' belongs to the matching likelihood; for the transitions of steps: fg_code, "):
        divergence("v_elbo", v, ref)
    with pytest.raises(ValueError, match="unknown velocity penalty 'fg_code'; known: v_mse, v_elbo"):
        velocity_penalty("fg_code", v, ref, STEP.sigma)
    with pytest.raises(ValueError, match="the velocity penalty v_elbo needs sigma"):
        velocity_penalty("v_elbo", v, ref)


# --- single-sample estimates: expectations over a categorical distribution are sums ---


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, generator=generator, dtype=torch.float64), torch.randn(7, generator=generator, dtype=torch.float64)


def exact_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind, logits):
    log_p, log_q = (x.log_softmax(0) for x in logits)
    torch.testing.assert_close((log_p.exp() * categorical_kl_estimate(kind, log_p, log_q)).sum(), exact_kl(log_p, log_q), **FP64)


def test_k1_k2_and_k3_by_hand():
    # d = ln 2 - ln 1 = ln 2 where the reference likes the token twice as much
    log_p, log_q = torch.tensor([0.25], dtype=torch.float64).log(), torch.tensor([0.5], dtype=torch.float64).log()
    ln2 = torch.tensor([2.0], dtype=torch.float64).log()
    torch.testing.assert_close(categorical_kl_estimate("k1", log_p, log_q), -ln2, **FP64)
    torch.testing.assert_close(categorical_kl_estimate("k2", log_p, log_q), ln2**2 / 2, **FP64)
    torch.testing.assert_close(categorical_kl_estimate("k3", log_p, log_q), 1 - ln2, **FP64)


def test_k2_is_nearly_unbiased_near_equality_and_has_the_kls_gradient(logits):
    start, direction = logits
    p = start.clone().requires_grad_()
    log_p, log_q = p.log_softmax(0), (start + 0.01 * direction).log_softmax(0)
    weight = log_p.exp().detach()  # samples do not carry gradient
    estimate = (weight * categorical_kl_estimate("k2", log_p, log_q)).sum()
    exact = exact_kl(log_p, log_q)
    assert estimate.item() == pytest.approx(exact.item(), rel=0.02)
    (ours,), (true,) = torch.autograd.grad(estimate, p, retain_graph=True), torch.autograd.grad(exact, p)
    torch.testing.assert_close(ours, true, rtol=1e-8, atol=1e-12)


def test_k3_is_never_negative_and_zero_only_at_equality():
    log_p = torch.linspace(-8, 0, 41, dtype=torch.float64)
    values = categorical_kl_estimate("k3", log_p, torch.full_like(log_p, -3.0))
    assert values.ge(0).all()
    assert values.eq(0).tolist() == log_p.eq(-3.0).tolist()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_reference_gets_no_gradient(kind):
    log_p, log_q = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    categorical_kl_estimate(kind, log_p, log_q).sum().backward()
    assert log_p.grad.abs() > 0
    assert log_q.grad is None


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="unknown KL estimate 'k4'; known: k1, k2, k3"):
        categorical_kl_estimate("k4", torch.zeros(1), torch.zeros(1))


KINDS = ("k1", "k2", "k3", "k3_k2", "abs")


def average_gradient(kind, start, log_q):
    """The estimate's gradient in the logits, averaged over what the policy samples: exact, the sum over all outcomes."""
    p = start.clone().requires_grad_()
    log_p = p.log_softmax(0)
    return torch.autograd.grad((log_p.exp().detach() * categorical_kl_estimate(kind, log_p, log_q)).sum(), p)[0]


def test_item_21_gradients_of_the_estimates_on_an_enumerable_policy(logits):
    start, log_q = logits[0], logits[1].log_softmax(0)
    p = start.clone().requires_grad_()
    (forward,) = torch.autograd.grad(exact_kl(p.log_softmax(0), log_q), p)
    (backward,) = torch.autograd.grad(exact_kl(log_q, p.log_softmax(0)), p)
    torch.testing.assert_close(average_gradient("k1", start, log_q), torch.zeros_like(p), **FP64)
    torch.testing.assert_close(average_gradient("k2", start, log_q), forward, **FP64)
    torch.testing.assert_close(average_gradient("k3_k2", start, log_q), forward, **FP64)
    torch.testing.assert_close(average_gradient("k3", start, log_q), backward, **FP64)
    assert (forward - backward).abs().max() > 0.01


def test_k3_k2_has_the_value_of_k3():
    log_p = torch.linspace(-5, 0, 21, dtype=torch.float64)
    ref = torch.full_like(log_p, -2.0)
    torch.testing.assert_close(categorical_kl_estimate("k3_k2", log_p, ref), categorical_kl_estimate("k3", log_p, ref), **FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimate_is_0_at_equality_and_k3_is_k2_to_second_order(kind):
    same = torch.tensor([-1.0, -3.0], dtype=torch.float64)
    assert categorical_kl_estimate(kind, same, same).eq(0).all()
    if kind == "k3":
        near = categorical_kl_estimate(kind, same + 1e-4, same) / categorical_kl_estimate("k2", same + 1e-4, same)
        torch.testing.assert_close(near, torch.ones_like(near), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_the_estimates_gradients_match_finite_differences(kind, logits):
    log_p, log_q = logits[0].clone().requires_grad_(), logits[1]
    assert torch.autograd.gradcheck(lambda x: categorical_kl_estimate(kind, x, log_q), log_p)
    assert torch.autograd.gradcheck(lambda x: categorical_kl_estimate(kind, x, log_q, limits=(20.0, 10.0)), log_p)


def test_limits_hold_the_argument_and_the_value():
    log_p = torch.tensor([-40.0, -1.0], dtype=torch.float64)
    ref = torch.tensor([0.0, -40.0], dtype=torch.float64)
    assert categorical_kl_estimate("k1", log_p, ref, limits=(20.0, 10.0)).tolist() == [-10.0, 10.0]
    assert categorical_kl_estimate("k2", log_p, ref, limits=(20.0, 300.0)).tolist() == [200.0, 200.0]
    assert categorical_kl_estimate("k3", log_p, ref, limits=(20.0, 10.0)).tolist() == [10.0, 10.0]


def test_the_full_kl_is_the_exact_one_and_an_impossible_token_adds_nothing(logits):
    log_p, log_q = (x.log_softmax(0).requires_grad_() for x in logits)
    torch.testing.assert_close(categorical_kl(log_p[None], log_q[None]), exact_kl(log_p, log_q.detach())[None], **FP64)
    assert torch.autograd.grad(categorical_kl(log_p, log_q), log_q, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(lambda x: categorical_kl(x.log_softmax(0), log_q), logits[0].clone().requires_grad_())
    sure = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(categorical_kl(sure, torch.tensor([0.5, 0.5], dtype=torch.float64).log()), torch.tensor(math.log(2), dtype=torch.float64))


def test_the_off_policy_estimate_is_unbiased_under_the_policy_that_sampled(logits):
    log_p, log_q = (x.log_softmax(0) for x in logits)
    old = torch.linspace(-1, 1, 7, dtype=torch.float64).log_softmax(0)
    value = (old.exp() * off_policy_kl("k3", log_p, log_q, log_p - old)).sum()
    torch.testing.assert_close(value, exact_kl(log_p, log_q), **FP64)
    start = logits[0].clone().requires_grad_()
    ours, exact = start.log_softmax(0), exact_kl(start.log_softmax(0), log_q)
    (gradient,) = torch.autograd.grad((old.exp() * off_policy_kl("k3", ours, log_q, ours - old)).sum(), start)
    torch.testing.assert_close(gradient, torch.autograd.grad(exact, start)[0], **FP64)  # and in gradient
    assert off_policy_kl("k3", log_p, log_q, torch.zeros_like(log_p)).equal(categorical_kl_estimate("k3", log_p, log_q))


def test_the_kl_in_the_reward_by_hand():
    rewards, old, ref = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True), torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    held = kl_in_reward(rewards, old, ref, mask, beta=0.1)
    torch.testing.assert_close(held, torch.tensor([[-0.05, 1.1, 0.0]]))
    assert not held.requires_grad
    assert kl_in_reward(rewards, ref, ref, mask, beta=0.1).tolist() == [[0.0, 1.0, 0.0]]


def test_the_kl_controller_follows_its_target():
    controller = KlController(beta=0.2, target=6.0, horizon=1000.0)
    assert controller.updated(6.0, 100).beta == pytest.approx(0.2)
    assert controller.updated(6.6, 100).beta == pytest.approx(0.2 * 1.01)  # error 0.1
    assert controller.updated(600.0, 100).beta == pytest.approx(0.2 * 1.02)  # at most 0.2
    assert controller.updated(0.0, 100).beta == pytest.approx(0.2 * 0.98)
    assert controller.updated(math.nan, 100) is controller
    assert KlController(**controller.updated(6.6, 100).state_dict()) == controller.updated(6.6, 100)


def test_the_convex_kl_by_hand_and_at_its_ends():
    log_p, base, previous = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -2.0, -1.5))
    assert kl_convex("k1", log_p, base, previous, share=0.75).item() == pytest.approx(0.75 * 1.0 + 0.25 * 0.5)
    for kind in KINDS:
        assert kl_convex(kind, log_p, base, previous, share=1.0).equal(categorical_kl_estimate(kind, log_p, base))
        assert kl_convex(kind, log_p, base, previous, share=0.0).equal(categorical_kl_estimate(kind, log_p, previous))
    assert [kl_convex_share(t) for t in (0, 50, 51, 60, 61, 100, 101, 1000)] == pytest.approx([1, 1, 0.9, 0.9, 0.8, 0.5, 0.5, 0.5])


def test_the_barrier_acts_above_its_level_only():
    log_prob = torch.tensor([[-1.0, -2.0, math.nan]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.tensor([[-0.9, -2.2, 0.0]], dtype=torch.float64), torch.tensor([[True, True, False]])
    assert kl_barrier(log_prob, old, mask, mean_kl=torch.tensor(5e-5)).eq(0).all()
    value = kl_barrier(log_prob, old, mask, mean_kl=torch.tensor(0.0011, dtype=torch.float64))  # 1000 (0.0011 - 0.0001) = 1
    torch.testing.assert_close(value.detach(), torch.tensor([[0.1, -0.2, 0.0]], dtype=torch.float64), **FP64)
    assert torch.autograd.grad(value.sum(), log_prob)[0].tolist() == [pytest.approx([-1.0, -1.0, 0.0])]


# --- entropy and supervised terms ---


def test_the_entropy_bonus_is_minus_its_weight():
    entropy = torch.tensor([1.0, 2.0], requires_grad=True)
    assert entropy_bonus(entropy, weight=0.5).tolist() == [-0.5, -1.0]
    assert entropy_bonus(entropy, weight=0.0).eq(0).all()
    assert torch.autograd.grad(entropy_bonus(entropy, weight=0.5).sum(), entropy)[0].tolist() == [-0.5, -0.5]


def test_the_entropy_controller_raises_below_the_target_and_is_silent_above():
    controller = EntropyController(target=0.2, high=0.018)
    assert controller.weight == 0.01
    low = controller.updated(0.2)
    assert (low.coefficient, low.weight) == pytest.approx((0.015, 0.015))
    assert low.updated(0.1).coefficient == pytest.approx(0.018)
    high = controller.updated(0.3)
    assert high.coefficient == pytest.approx(0.005)
    assert high.weight == 0.0
    assert high.updated(0.3).updated(0.3).coefficient == 0.0
    assert high.updated(math.nan) is high
    assert EntropyController(**high.state_dict()) == high


def test_the_entropy_history_is_the_mean_of_all_updates():
    mask = torch.tensor([[True, True, False]])
    history = EntropyHistory.empty(3).updated(torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[0, 1, 0]]), mask)
    history = history.updated(torch.tensor([[2.0, 3.0, 0.0]]), torch.tensor([[0, 0, 0]]), mask)
    assert history.means().tolist() == [2.0, 3.0, 0.0]
    assert history.counts.tolist() == [3.0, 1.0, 0.0]
    assert EntropyHistory(**history.state_dict()).means().tolist() == [2.0, 3.0, 0.0]


def test_the_entropy_band_by_hand():
    # band 0.8 .. 1.2 around 1, weight 0.1; no history in the last place
    entropy = torch.tensor([0.5, 0.9, 1.5, 7.0], dtype=torch.float64, requires_grad=True)
    mean = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert entropy_band(entropy, mean).tolist() == pytest.approx([0.03, 0.0, 0.03, 0.0])
    assert entropy_band(entropy, mean, form="step").tolist() == [0.1, 0.0, 0.1, 0.0]
    assert entropy_band(2 * entropy, 2 * mean).tolist() == pytest.approx([0.03, 0.0, 0.03, 0.0])
    assert torch.autograd.grad(entropy_band(entropy, mean).sum(), entropy)[0].tolist() == pytest.approx([-0.1, 0.0, 0.1, 0.0])
    assert not entropy_band(entropy, mean, form="step").requires_grad  # text.md 15.9: as released it moves nothing
    assert torch.autograd.gradcheck(lambda x: entropy_band(x, mean), entropy)


@pytest.mark.parametrize("form", ["hinge", "step"])
def test_a_band_without_weight_leaves_the_plain_bonus(form):
    entropy = torch.tensor([0.5, 0.9, 1.5], dtype=torch.float64)
    assert entropy_band(entropy, torch.ones(3), weight=0.0, form=form).eq(0).all()
    with pytest.raises(ValueError, match="unknown form 'ramp' of the entropy band; known: hinge, step"):
        entropy_band(entropy, torch.ones(3), form="ramp")


def test_the_supervised_loss_by_hand():
    log_prob = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    mask, weight = torch.tensor([[True, True, False]]), torch.tensor([[0.5, 0.25, math.nan]])
    assert sft_loss(log_prob, mask).tolist() == [[1.0, 2.0, 0.0]]
    assert sft_loss(log_prob, mask, weight).tolist() == [[0.5, 0.5, 0.0]]
    assert torch.autograd.grad(sft_loss(log_prob, mask, weight).sum(), log_prob)[0].tolist() == [[-0.5, -0.25, 0.0]]


def test_chords_share_rises_falls_and_stays():
    assert [sft_share(t, warmup=10, peak=0.9, decay=20, valley=0.1) for t in (0, 5, 10, 20, 30, 99)] == pytest.approx([0.0, 0.45, 0.9, 0.5, 0.1, 0.1])
    assert [sft_share(t, peak=0.3, valley=0.3) for t in (0, 500)] == pytest.approx([0.3, 0.3])
    assert sft_share(3, decay=0, valley=0.2) == pytest.approx(0.2)
