"""Objectives: values by hand, gradients by finite differences, special cases, masks, and the clip bounds of each decision."""

import math

import pytest
import torch

from flowrl.core.objectives import OBJECTIVES, clipped_surrogate, dynamic_clip_bounds, nft, reinforce
from flowrl.types import Decisions

FP64 = {"rtol": 1e-12, "atol": 1e-12}


def decisions(log_prob, old_log_prob, advantages, mask=None):
    mask = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask
    return Decisions(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, mask=mask)


def draw(seed, *, spread, shape=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    old, noise, advantages = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return (old + spread * noise).requires_grad_(), old, advantages


def test_values_by_hand_on_both_sides_of_both_bounds():
    # clip to [0.9, 1.3]: columns are ratio 0.5, 0.95, 1.2, 2; the row of advantage -1 is stopped below, the row of advantage 2 above
    ratio = torch.tensor([[0.5, 0.95, 1.2, 2.0]], dtype=torch.float64).repeat(2, 1)
    advantages = torch.tensor([[2.0], [-1.0]], dtype=torch.float64).expand(2, 4)
    objective = clipped_surrogate(decisions(ratio.log(), torch.zeros_like(ratio), advantages), clip_low=0.1, clip_high=0.3)
    torch.testing.assert_close(objective.loss, torch.tensor([[-1.0, -1.9, -2.4, -2.6], [0.9, 0.95, 1.2, 2.0]], dtype=torch.float64), **FP64)
    torch.testing.assert_close(objective.metrics["ratio"], ratio, **FP64)
    torch.testing.assert_close(objective.metrics["log_ratio"], ratio.log(), **FP64)
    assert objective.metrics["clipped_high"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert objective.metrics["clipped_low"].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]


def test_the_gradient_is_stopped_exactly_where_the_metrics_say():
    log_prob, old, advantages = draw(0, spread=0.5)
    objective = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=0.2, clip_high=0.1)
    (gradient,) = torch.autograd.grad(objective.loss.sum(), log_prob)
    stopped = (objective.metrics["clipped_low"] + objective.metrics["clipped_high"]) > 0
    assert 0 < int(stopped.sum()) < 20
    assert gradient[stopped].eq(0).all()
    ratio = (log_prob - old).exp().detach()
    torch.testing.assert_close(gradient[~stopped], (-advantages * ratio)[~stopped], **FP64)


def test_the_gradient_matches_finite_differences():
    log_prob, old, advantages = draw(1, spread=0.5)  # no ratio within 1e-5 of a bound
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(decisions(x, old, advantages), clip_low=0.2, clip_high=0.1).loss, log_prob)


@pytest.mark.parametrize("clip", [1e-6, 0.2])
def test_at_ratio_one_the_gradient_is_reinforces(clip):
    log_prob, _, advantages = draw(2, spread=0.0)
    (gradient,) = torch.autograd.grad(clipped_surrogate(decisions(log_prob, log_prob.detach(), advantages), clip_low=clip, clip_high=clip).loss.sum(), log_prob)
    (reinforce,) = torch.autograd.grad(-(advantages * log_prob).sum(), log_prob)
    torch.testing.assert_close(gradient, reinforce, **FP64)


def test_wide_bounds_equal_no_bounds():
    log_prob, old, advantages = draw(3, spread=1.0)
    loss = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=math.inf, clip_high=math.inf).loss
    plain = -advantages * (log_prob - old).exp()
    torch.testing.assert_close(loss, plain, **FP64)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_prob), torch.autograd.grad(plain.sum(), log_prob), **FP64)


def test_masked_decisions_have_no_loss_and_no_gradient_whatever_they_hold():
    log_prob, old, advantages = draw(4, spread=0.5, shape=(2, 4))
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    with torch.no_grad():
        log_prob[0, 1], old[0, 3], advantages[1, 0] = math.nan, -math.inf, math.nan
    objective = clipped_surrogate(decisions(log_prob, old, advantages, mask), clip_low=0.1, clip_high=0.1)
    (gradient,) = torch.autograd.grad(objective.loss.sum(), log_prob)
    assert objective.loss[~mask].eq(0).all()
    assert gradient[~mask].eq(0).all()
    assert gradient.isfinite().all()
    assert gradient[mask].ne(0).any()
    assert objective.metrics["ratio"][~mask].eq(1).all()
    assert objective.metrics["clipped_low"][~mask].eq(0).all()


def test_a_zero_advantage_has_no_loss_and_no_gradient():
    log_prob, old, _ = draw(5, spread=0.5)
    loss = clipped_surrogate(decisions(log_prob, old, torch.zeros_like(old)), clip_low=0.1, clip_high=0.1).loss
    assert loss.eq(0).all()
    assert torch.autograd.grad(loss.sum(), log_prob)[0].eq(0).all()


def test_a_ratio_beyond_float32_stays_clipped():
    # summed log-probabilities of a large latent can move by hundreds of nats in one update
    log_prob = torch.tensor([[200.0, 200.0, -200.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.0, -1.0]])
    loss = clipped_surrogate(decisions(log_prob, torch.zeros(1, 3), advantages), clip_low=0.2, clip_high=0.2).loss
    torch.testing.assert_close(loss, torch.tensor([[-1.2, 0.0, 0.8]]))
    assert torch.autograd.grad(loss.sum(), log_prob)[0].tolist() == [[0.0, 0.0, 0.0]]


def test_a_bad_decision_that_grew_by_more_than_e_to_the_20_moves_nothing():
    log_prob = torch.tensor([[19.0, 30.0, 200.0]], requires_grad=True)
    result = clipped_surrogate(decisions(log_prob, torch.zeros(1, 3), torch.full((1, 3), -1.0)), clip_low=0.2, clip_high=0.2)
    torch.testing.assert_close(result.loss.detach(), torch.tensor([[math.exp(19.0), math.exp(20.0), math.exp(20.0)]]))
    result.loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([[math.exp(19.0), 0.0, 0.0]]))
    assert result.metrics["clipped_high"].tolist() == [[0.0, 1.0, 1.0]]


def test_metrics_carry_no_gradient():
    log_prob, old, advantages = draw(6, spread=0.5)
    objective = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=0.1, clip_high=0.1)
    assert set(objective.metrics) == {"ratio", "log_ratio", "clipped_low", "clipped_high"}
    assert not any(value.requires_grad for value in objective.metrics.values())
    assert objective.loss.requires_grad


def test_decisions_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Decisions.advantages has shape \(2, 3\), the log-probabilities \(2, 4\)"):
        Decisions(log_prob=torch.zeros(2, 4), old_log_prob=torch.zeros(2, 4), advantages=torch.zeros(2, 3), mask=torch.ones(2, 4, dtype=torch.bool))


# --- a bound for each decision ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [1e-6, 1e-4, 0.2, math.inf])
def test_equal_bounds_for_every_decision_are_one_bound_bit_for_bit(clip, dtype):
    _, old, advantages = (x.detach().to(dtype) for x in draw(7, spread=0.0, shape=(8, 50)))
    ratio_minus_one = clip if clip < 1 else 1.0
    generator = torch.Generator().manual_seed(8)
    log_prob = old + ratio_minus_one * torch.randn(old.shape, generator=generator, dtype=dtype)
    one = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=clip, clip_high=2 * clip)
    for shape in ((), (8, 1), (8, 50)):
        low = torch.full(shape, clip, dtype=torch.float64)
        each = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=low, clip_high=2 * low)
        assert each.loss.equal(one.loss)
        assert all(each.metrics[name].equal(one.metrics[name]) for name in one.metrics)
    mixed = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=clip, clip_high=torch.full((8, 1), 2 * clip, dtype=torch.float64))
    assert mixed.loss.equal(one.loss)


def test_every_decision_is_clipped_at_its_own_bounds():
    ratio = torch.tensor([[0.5], [0.5], [2.0], [2.0]], dtype=torch.float64)
    advantages = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=torch.float64)
    low, high = (torch.tensor(bounds, dtype=torch.float64)[:, None] for bounds in ([0.1, 0.6, 0.1, 0.1], [0.3, 0.3, 0.3, 1.5]))
    objective = clipped_surrogate(decisions(ratio.log(), torch.zeros_like(ratio), advantages), clip_low=low, clip_high=high)
    torch.testing.assert_close(objective.loss, torch.tensor([[0.9], [0.5], [-1.3], [-2.0]], dtype=torch.float64), **FP64)
    assert objective.metrics["clipped_low"].flatten().tolist() == [1, 0, 0, 0]
    assert objective.metrics["clipped_high"].flatten().tolist() == [0, 0, 1, 0]


def test_dynamic_bounds_by_hand():
    # sensitivity 0.5 on a clip of 2e-4 and 1e-4: the best node may rise by half more and fall by half less, the worst the other way round
    low, high = dynamic_clip_bounds(torch.tensor([1.0, 0.5, 0.0]), clip_low=2e-4, clip_high=1e-4, sensitivity=0.5)
    assert low.tolist() == pytest.approx([1e-4, 2e-4, 3e-4])
    assert high.tolist() == pytest.approx([1.5e-4, 1e-4, 0.5e-4])


def test_dynamic_bounds_never_fall_below_a_tenth():
    low, high = dynamic_clip_bounds(torch.tensor([1.0, 0.97, 0.9, 0.0]), clip_low=1.0, clip_high=2.0, sensitivity=1.0)
    assert low.tolist() == pytest.approx([0.1, 0.1, 0.2, 2.0])
    assert high.tolist() == pytest.approx([4.0, 3.88, 3.6, 0.2])


def test_without_sensitivity_dynamic_bounds_are_the_fixed_ones():
    low, high = dynamic_clip_bounds(torch.linspace(0, 1, 7, dtype=torch.float64), clip_low=1e-4, clip_high=3e-5, sensitivity=0.0)
    assert low.tolist() == [1e-4] * 7
    assert high.tolist() == [3e-5] * 7


# --- REINFORCE and the table --------------------------------------------------------------------------------------------------------------------


def test_reinforce_by_hand():
    log_ratio, advantages = torch.tensor([[0.0, 0.5, -2.0]]), torch.tensor([[3.0, 2.0, -1.0]])
    objective = reinforce(decisions(log_ratio, torch.zeros(1, 3), advantages), clip_low=1e-4, clip_high=1e-4)
    assert objective.loss.tolist() == [[0.0, -1.0, -2.0]]
    torch.testing.assert_close(objective.metrics["ratio"], log_ratio.exp())
    assert objective.metrics["clipped_low"].eq(0).all()
    assert objective.metrics["clipped_high"].eq(0).all()


def test_reinforces_gradient_is_minus_advantage_at_every_ratio_and_the_surrogates_at_ratio_one():
    log_prob, old, advantages = draw(9, spread=0.5)
    (gradient,) = torch.autograd.grad(reinforce(decisions(log_prob, old, advantages), clip_low=0.1, clip_high=0.1).loss.sum(), log_prob)
    torch.testing.assert_close(gradient, -advantages, **FP64)
    assert torch.autograd.gradcheck(lambda x: reinforce(decisions(x, old, advantages), clip_low=0.1, clip_high=0.1).loss, log_prob)
    log_prob, _, advantages = draw(10, spread=0.0)
    batch = decisions(log_prob, log_prob.detach(), advantages)
    ours, surrogate = (
        torch.autograd.grad(objective(batch, clip_low=0.1, clip_high=0.1).loss.sum(), log_prob)[0] for objective in (reinforce, clipped_surrogate)
    )
    torch.testing.assert_close(ours, surrogate, **FP64)


@pytest.mark.parametrize("clip", [1e-6, 0.5])
def test_reinforce_has_no_clip(clip):
    log_prob, old, advantages = draw(11, spread=2.0)
    loss = reinforce(decisions(log_prob, old, advantages), clip_low=clip, clip_high=clip).loss
    torch.testing.assert_close(loss, -advantages * (log_prob - old), **FP64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_the_same_metrics_and_leaves_masked_decisions_alone(name):
    log_prob, old, advantages = draw(12, spread=0.5, shape=(2, 3))
    mask = torch.tensor([[True, False, True], [False, True, True]])
    with torch.no_grad():
        log_prob[0, 1], advantages[1, 0] = math.nan, math.nan
    objective = OBJECTIVES[name](decisions(log_prob, old, advantages, mask), clip_low=0.1, clip_high=0.1)
    assert set(objective.metrics) == {"ratio", "log_ratio", "clipped_low", "clipped_high"}
    assert all(value.shape == (2, 3) and not value.requires_grad and value.isfinite().all() for value in objective.metrics.values())
    (gradient,) = torch.autograd.grad(objective.loss.sum(), log_prob)
    assert objective.loss[~mask].eq(0).all()
    assert gradient[~mask].eq(0).all()
    assert gradient[mask].isfinite().all()


def test_the_table_names_its_functions():
    assert all(function.__name__ == name for name, function in OBJECTIVES.items())
    assert list(OBJECTIVES) == ["clipped_surrogate", "reinforce", "sapo", "cispo", "gmpo", "vespo", "mdpo", "kimi", "bgpo"]
    assert OBJECTIVES["clipped_surrogate"] is clipped_surrogate
    assert OBJECTIVES["reinforce"] is reinforce


# --- dual clip and a bound of the ratio ---------------------------------------------------------------------------------------------------------


def test_without_dual_clip_and_ratio_max_nothing_changes_bit_for_bit():
    log_prob, old, advantages = draw(20, spread=1.0)
    plain = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=0.2, clip_high=0.1)
    wide = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=0.2, clip_high=0.1, dual_clip=math.inf, ratio_max=math.inf, centre=1.0)
    assert wide.loss.equal(plain.loss)
    assert all(wide.metrics[name].equal(value) for name, value in plain.metrics.items())
    assert torch.autograd.grad(wide.loss.sum(), log_prob)[0].equal(torch.autograd.grad(plain.loss.sum(), log_prob)[0])


def test_the_dual_clip_by_hand():
    # clip to [0.8, 1.2], c = 3: with A = -2 the loss is 2 r between 0.8 and 3, 1.6 below and 6 above; with A = 2 the usual clip
    ratio = torch.tensor([[0.5, 1.0, 2.0, 5.0]], dtype=torch.float64).repeat(2, 1)
    log_prob, advantages = ratio.log().requires_grad_(), torch.tensor([[-2.0], [2.0]], dtype=torch.float64).expand(2, 4)
    objective = clipped_surrogate(decisions(log_prob, torch.zeros_like(ratio), advantages), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    torch.testing.assert_close(objective.loss, torch.tensor([[1.6, 2.0, 4.0, 6.0], [-1.0, -2.0, -2.4, -2.4]], dtype=torch.float64), **FP64)
    (gradient,) = torch.autograd.grad(objective.loss.sum(), log_prob)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 2.0, 4.0, 0.0], [-1.0, -2.0, 0.0, 0.0]], dtype=torch.float64), **FP64)
    assert objective.metrics["clipped_high"].tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert objective.metrics["clipped_low"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("ratio_max", [0.5, 1.05, 1.5, 4.0])
@pytest.mark.parametrize("dual_clip", [None, 1.2, 3.0])
def test_both_bounds_are_the_maxima_and_minima_of_their_definition(dual_clip, ratio_max):
    log_prob, old, advantages = draw(21, spread=1.0, shape=(10, 20))
    loss = clipped_surrogate(decisions(log_prob, old, advantages), clip_low=0.2, clip_high=0.1, dual_clip=dual_clip, ratio_max=ratio_max).loss
    ratio = (log_prob - old).exp()
    expected = torch.maximum(-advantages * ratio.clamp(max=ratio_max), -advantages * ratio.clamp(0.8, 1.1))
    if dual_clip is not None:
        expected = torch.where(advantages < 0, torch.minimum(expected, -advantages * dual_clip), expected)
    torch.testing.assert_close(loss, expected, **FP64)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), log_prob), torch.autograd.grad(expected.sum(), log_prob), **FP64)


# --- DiffusionNFT -------------------------------------------------------------------------------------------------------------------------------


def negative_aware(positive, negative, r, old=None, mask=None):
    mask = torch.ones_like(positive, dtype=torch.bool) if mask is None else mask
    old = torch.zeros_like(positive) if old is None else old
    return Decisions(log_prob=positive, old_log_prob=old, advantages=r, mask=mask, negative_log_prob=negative)


def draw_negative_aware(seed, shape=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    positive, negative, old = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return positive.requires_grad_(), negative.requires_grad_(), torch.rand(shape, generator=generator, dtype=torch.float64), old


def test_nft_by_hand():
    # 5 / 0.5 = 10 times r 2 + (1 - r) 3
    positive, negative, r = torch.tensor([[-2.0] * 4]), torch.tensor([[-3.0] * 4]), torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    objective = nft(negative_aware(positive, negative, r, old=torch.full((1, 4), -1.5)), beta=0.5)
    assert objective.loss.tolist() == [[30.0, 27.5, 25.0, 20.0]]
    assert objective.metrics["log_ratio"].tolist() == [[-0.5] * 4]
    assert objective.metrics["ratio"].tolist() == [[1.0] * 4]
    assert nft(negative_aware(positive, negative, r), beta=0.5, scale=1.0).loss.tolist() == [[6.0, 5.5, 5.0, 4.0]]


def test_nfts_gradient_matches_finite_differences():
    positive, negative, r, old = draw_negative_aware(13)
    assert torch.autograd.gradcheck(lambda x, y: nft(negative_aware(x, y, r, old), beta=0.3).loss, (positive, negative))


def test_nft_of_the_best_and_the_worst_sample_fits_one_implicit_policy_each():
    positive, negative, _, _ = draw_negative_aware(14, (1, 2))
    objective = nft(negative_aware(positive, negative, torch.tensor([[1.0, 0.0]], dtype=torch.float64)), beta=0.1)
    to_positive, to_negative = torch.autograd.grad(objective.loss.sum(), (positive, negative))
    torch.testing.assert_close(to_positive, torch.tensor([[-50.0, 0.0]], dtype=torch.float64), **FP64)
    torch.testing.assert_close(to_negative, torch.tensor([[0.0, -50.0]], dtype=torch.float64), **FP64)


class ToyMatching:
    """A linear velocity and its self-normalised error in the clean sample, sigma^2 <d^2> / stopgrad(sigma <|d|>)."""

    def __init__(self, seed, rows=6, dims=4):
        generator = torch.Generator().manual_seed(seed)
        clean, noise = (torch.randn(rows, dims, generator=generator, dtype=torch.float64) for _ in range(2))
        self.sigma = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        self.x, self.target = (1 - self.sigma) * clean + self.sigma * noise, noise - clean
        self.weight, self.other = (torch.randn(dims, dims, generator=generator, dtype=torch.float64) for _ in range(2))
        self.weight.requires_grad_()
        self.r = torch.tensor([[0.0], [0.2], [0.5], [0.6], [0.9], [1.0]], dtype=torch.float64)

    def log_prob(self, velocity):
        residual = velocity - self.target
        scale = (self.sigma * residual.abs().mean(1, keepdim=True)).detach().clamp_min(1e-5)
        return -self.sigma.square() * residual.square().mean(1, keepdim=True) / scale

    def objective(self, old_weight, beta):
        velocity, old = self.x @ self.weight, (self.x @ old_weight).detach()
        positive, negative = beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity
        return nft(negative_aware(self.log_prob(positive), self.log_prob(negative), self.r), beta=beta)

    def row_gradients(self, values):
        return torch.stack([torch.autograd.grad(value, self.weight, retain_graph=True)[0] for value in values.flatten()])


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_on_policy_nft_pushes_by_2_r_minus_1_whatever_beta(beta):
    toy = ToyMatching(15)
    ours = toy.row_gradients(toy.objective(toy.weight, beta).loss)
    plain = toy.row_gradients(-toy.log_prob(toy.x @ toy.weight))  # the error's own gradient
    torch.testing.assert_close(ours, 5 * (2 * toy.r[..., None] - 1) * plain, **FP64)
    torch.testing.assert_close(ours[2], torch.zeros_like(ours[2]), **FP64)  # r = 1/2


def test_off_policy_beta_matters_and_an_even_sample_holds_the_policy_back():
    toy = ToyMatching(16)
    one, tenth = (toy.row_gradients(toy.objective(toy.other, beta).loss) for beta in (1.0, 0.1))
    assert (one - tenth).abs().amax((1, 2)).gt(1e-3).all()
    step = (toy.weight - toy.other).detach()
    assert (one[2] * step).sum() > 0  # descending the loss leads back to the policy that sampled


def test_masked_decisions_of_nft_have_no_loss_and_no_gradient_whatever_they_hold():
    positive, negative, r, old = draw_negative_aware(17, (2, 3))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with torch.no_grad():
        positive[0, 1], negative[1, 0], r[1, 2], r[0, 1] = math.nan, -math.inf, 7.0, math.nan
    objective = nft(negative_aware(positive, negative, r, old, mask), beta=0.1)
    assert set(objective.metrics) == {"ratio", "log_ratio", "clipped_low", "clipped_high"}
    assert all(value.shape == (2, 3) and not value.requires_grad and value.isfinite().all() for value in objective.metrics.values())
    assert objective.loss[~mask].eq(0).all()
    for gradient in torch.autograd.grad(objective.loss.sum(), (positive, negative)):
        assert gradient[~mask].eq(0).all()
        assert gradient[mask].ne(0).all()


@pytest.mark.parametrize("bad", [-1e-3, 1.001, math.nan])
def test_nft_refuses_advantages_that_are_no_probabilities(bad):
    positive, negative, r, _ = draw_negative_aware(18)
    r[2, 3] = bad
    with pytest.raises(ValueError, match=r"nft takes advantages in \[0, 1\].*advantage.transform=unit_interval"):
        nft(negative_aware(positive, negative, r), beta=1.0)


def test_nft_refuses_decisions_without_the_negative_policy():
    with pytest.raises(ValueError, match="nft needs log-probabilities under the implicit negative policy"):
        nft(decisions(*draw(19, spread=0.1)), beta=1.0)
