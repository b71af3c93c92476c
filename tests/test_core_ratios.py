"""GRPO-Guard: the centred ratio in all its published forms, its distribution and gradient, and the weights of steps on real kernels."""

import math

import pytest
import torch

from flowrl.core.ratios import ratio_norm, step_weights
from samplers.flow_sde import FlowSde
from samplers.kernels import Step, Transition, expand, gaussian_log_prob
from samplers.schedules import diffusers_grid

FP64 = {"rtol": 1e-10, "atol": 1e-10}
SHAPE = (6, 4, 3)
WEIGHTS = ("none", "inv_dt", "inv_kap_dt", "kap_over_dt")


def draw(seed=0, dtype=torch.float64, *, shift=0.1):
    """x_next drawn from the old policy, mean (with gradient), old_mean, std and the noise z."""
    generator = torch.Generator().manual_seed(seed)
    old, delta, z = (torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(3))
    std = torch.tensor([0.05, 0.2, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    return old + expand(std, old) * z, (old + shift * delta).requires_grad_(), old, std, z


def gaussian(x_next, mean, std, reduction="mean"):
    return gaussian_log_prob(x_next, Transition(mean, std), reduction)


def test_the_centred_ratio_by_hand():
    # delta = (1, 2), x_next - old_mean = (3, -1): products 3, -2, mean 0.5, sum 1
    x_next, mean, old = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    assert ratio_norm(x_next, mean, old, torch.tensor([0.5])).tolist() == [1.0]
    assert ratio_norm(x_next, mean, old, torch.tensor([0.5]), "sum").tolist() == [2.0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_is_the_papers_formula_and_flow_factorys(reduction):
    x_next, mean, old, std, _ = draw()
    log_ratio = gaussian(x_next, mean, std, reduction) - gaussian(x_next, old, std, reduction)
    square = (mean - old).square().flatten(1)
    square = square.mean(1) if reduction == "mean" else square.sum(1)
    result = ratio_norm(x_next, mean, old, std, reduction)
    torch.testing.assert_close(result, std * (log_ratio + square / (2 * std**2)), **FP64)
    torch.testing.assert_close(result, std * log_ratio + square / (2 * std), **FP64)


def test_in_float32_the_forms_agree_to_1e_6():
    x_next, mean, old, std, _ = draw(1, torch.float32, shift=0.01)
    tau = std.float()
    log_ratio = gaussian(x_next, mean, std) - gaussian(x_next, old, std)
    square = (mean - old).square().flatten(1).mean(1)
    torch.testing.assert_close(ratio_norm(x_next, mean, old, std), tau * log_ratio + square / (2 * tau), rtol=0, atol=1e-6)


def test_without_the_constants_of_a_gaussian_the_matching_form_has_another_factor():
    x_next, mean, old, std, _ = draw(2)
    log_prob = [-(x_next - m).square().flatten(1).mean(1) for m in (mean, old)]  # CPS
    form = (log_prob[0] - log_prob[1] + (mean - old).square().flatten(1).mean(1)) / (2 * std)
    torch.testing.assert_close(ratio_norm(x_next, mean, old, std), form, **FP64)


def test_the_gradient_is_linear_in_the_mean_and_matches_every_form():
    x_next, mean, old, std, z = draw(3)
    (gradient,) = torch.autograd.grad(ratio_norm(x_next, mean, old, std).sum(), mean)
    torch.testing.assert_close(gradient, z / (SHAPE[1] * SHAPE[2]), **FP64)  # <z grad mean>, whatever delta is
    full = std * (gaussian(x_next, mean, std) - gaussian(x_next, old, std) + (mean - old).square().flatten(1).mean(1) / (2 * std**2))
    torch.testing.assert_close(torch.autograd.grad(full.sum(), mean)[0], gradient, **FP64)
    assert torch.autograd.gradcheck(lambda m: ratio_norm(x_next, m, old, std), mean)


def test_only_the_mean_gets_a_gradient():
    x_next, mean, old, std, _ = draw(4)
    x_next, old = x_next.requires_grad_(), old.clone().requires_grad_()
    gradients = torch.autograd.grad(ratio_norm(x_next, mean, old, std).sum(), (mean, x_next, old), allow_unused=True)
    assert gradients[0].ne(0).all()
    assert gradients[1:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_first_update_the_ratio_is_exactly_one_and_the_gradient_tau_times_the_plain_one(dtype):
    x_next, _, old, std, _ = draw(5, dtype)
    mean = old.clone().requires_grad_()
    ratio = ratio_norm(x_next, mean, old, std).exp()
    assert ratio.tolist() == [1.0] * 6
    (ours,) = torch.autograd.grad(ratio.sum(), mean)
    (plain,) = torch.autograd.grad((gaussian(x_next, mean, std) - gaussian(x_next, old, std)).exp().sum(), mean)
    torch.testing.assert_close(ours, expand(std, plain) * plain, rtol=1e-5, atol=1e-8)


def test_stopping_the_gradient_of_the_bias_is_the_same_at_the_first_update_and_another_method_after_it():
    x_next, mean, old, std, _ = draw(6)

    def gradients(mean):
        square = (mean - old).square().flatten(1).mean(1)
        stopped = std * (gaussian(x_next, mean, std) - gaussian(x_next, old, std) + square.detach() / (2 * std**2))
        return [torch.autograd.grad(value.sum(), mean)[0] for value in (ratio_norm(x_next, mean, old, std), stopped)]

    torch.testing.assert_close(*gradients(old.clone().requires_grad_()), **FP64)
    ours, stopped = gradients(mean)
    torch.testing.assert_close(stopped - ours, -(mean - old).detach() / expand(std, mean) / (SHAPE[1] * SHAPE[2]), **FP64)


@pytest.mark.parametrize("tau", [0.006, 0.743])
def test_under_the_old_policy_its_mean_is_zero_and_its_spread_does_not_depend_on_tau(tau):
    generator = torch.Generator().manual_seed(7)
    draws, d = 2000, 256
    old, delta = (torch.randn(1, d, generator=generator, dtype=torch.float64) for _ in range(2))
    delta = 1e-3 * delta
    x_next = old + tau * torch.randn(draws, d, generator=generator, dtype=torch.float64)
    std = torch.full((draws,), tau, dtype=torch.float64)
    old, mean = old.expand(draws, d), (old + delta).expand(draws, d)
    values = ratio_norm(x_next, mean, old, std)
    spread = math.sqrt(delta.square().mean().item() / d)
    assert abs(values.mean().item()) < 3 * spread / math.sqrt(draws)
    assert values.std().item() == pytest.approx(spread, rel=0.05)
    plain = gaussian(x_next, mean, std) - gaussian(x_next, old, std)  # is left of 0 by <delta^2> / (2 tau^2), and its spread is 1 / tau times as large
    assert plain.mean().item() == pytest.approx(-delta.square().mean().item() / (2 * tau**2), abs=3 * spread / tau / math.sqrt(draws))
    assert plain.std().item() == pytest.approx(spread / tau, rel=0.05)


def test_a_deterministic_step_is_refused():
    with pytest.raises(ValueError, match="deterministic"):
        ratio_norm(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.1, 0.0]))


# --- weights of steps ---------------------------------------------------------------------------------------------------------------------------

SIGMAS = torch.tensor(diffusers_grid(10, 3.0), dtype=torch.float64)
STEP = Step(SIGMAS[:9], SIGMAS[1:10], torch.full((9,), SIGMAS[1].item(), dtype=torch.float64), torch.full((9,), 0.7, dtype=torch.float64))
LENGTH = STEP.sigma - STEP.sigma_next


def test_the_weights_by_hand():
    length, grad_scale = torch.tensor([0.5, 0.1], dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)  # kap = 2, 3
    by_kind = {kind: step_weights(kind, length=length, grad_scale=grad_scale).tolist() for kind in WEIGHTS}
    assert by_kind["none"] == [1.0, 1.0]
    assert by_kind["inv_dt"] == pytest.approx([2.0, 10.0])
    assert by_kind["inv_kap_dt"] == pytest.approx([1.0, 1 / 0.3])
    assert by_kind["kap_over_dt"] == pytest.approx([4.0, 30.0])


@pytest.mark.parametrize("kind", WEIGHTS)
def test_where_kap_is_one_all_weights_but_none_are_one_over_the_length(kind):
    expected = torch.ones_like(LENGTH) if kind == "none" else 1 / LENGTH
    torch.testing.assert_close(step_weights(kind, length=LENGTH, grad_scale=LENGTH), expected, **FP64)


def gradient_norms(kind):
    """|weight grad_v log r_hat| per step of SD3's grid under Flow-SDE, for one noise and one velocity."""
    kernel, generator = FlowSde(), torch.Generator().manual_seed(8)
    x, old_velocity, z, change = (torch.randn(1, 4, 3, generator=generator, dtype=torch.float64).repeat(9, 1, 1) for _ in range(4))
    velocity = (old_velocity + 0.1 * change).requires_grad_()
    old, new = kernel.moments(x, old_velocity, STEP), kernel.moments(x, velocity, STEP)
    value = ratio_norm(old.mean + expand(old.std, z) * z, new.mean, old.mean, old.std)
    weight = step_weights(kind, length=LENGTH, grad_scale=kernel.grad_scale(STEP))
    return torch.autograd.grad((weight * value).sum(), velocity)[0].flatten(1).norm(dim=1), z[0].norm().item() / 12


def test_one_over_the_length_makes_all_steps_of_flow_sde_equal_after_the_first():
    norms, unit = gradient_norms("inv_dt")
    torch.testing.assert_close(norms[1:], torch.full((8,), (1 + 0.7**2 / 2) * unit, dtype=torch.float64), **FP64)
    assert norms[0].item() == pytest.approx(unit)  # kap = 1 there


def test_one_over_the_gradients_scale_makes_all_steps_equal():
    norms, unit = gradient_norms("inv_kap_dt")
    torch.testing.assert_close(norms, torch.full((9,), unit, dtype=torch.float64), **FP64)


def test_without_a_weight_long_steps_dominate():
    norms, _ = gradient_norms("none")
    assert (norms.max() / norms.min()).item() == pytest.approx((LENGTH * (1 + 0.7**2 / 2))[-1].item() / LENGTH[0].item())


def test_a_weight_without_a_name_is_refused():
    with pytest.raises(ValueError, match="unknown step weight 'dt'; known: none, inv_dt, inv_kap_dt, kap_over_dt"):
        step_weights("dt", length=LENGTH, grad_scale=LENGTH)
