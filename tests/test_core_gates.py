"""Gates: by hand, finite differences, special cases, the identities of text.md section 12, masks."""

import math
from functools import partial

import pytest
import torch
from estimates import group_mean, group_zscore
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.gates import bgpo, cispo, gmpo, kimi, lp_reg, mdpo, mirror_penalty, mixed_origin, rl_plus_off_policy, rover, sapo, token_nft, vespo
from flowrl.core.group_gates import drpo, gradient_weights, gvpo, reg_grpo
from flowrl.core.objectives import OBJECTIVES, clipped_surrogate, reinforce
from flowrl.core.ratio_levels import at_level
from flowrl.core.reductions import sequence_weights
from flowrl.types import Decisions

FP64 = {"rtol": 1e-10, "atol": 1e-12}
SHAPE = (6, 5)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()


def draw(seed, *, spread, shape=SHAPE):
    """Log-probabilities of tokens, all below 0, old ones, and advantages that are equal within a sequence and sum to 0 in a group."""
    generator = torch.Generator().manual_seed(seed)
    old, noise = -1 - torch.rand(shape, generator=generator, dtype=torch.float64), torch.randn(shape, generator=generator, dtype=torch.float64)
    rewards = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    advantages = group_mean(rewards, GROUP, torch.ones(6, dtype=torch.bool), 2, eps=0.0, ddof=0) if shape[0] == 6 else rewards
    return (old + spread * noise).requires_grad_(), old, advantages[:, None].expand(shape)


def batch(log_prob, old, advantages, mask=None):
    return Decisions(log_prob, old, advantages, torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask)


def reduced(loss, mask, kind):
    weight, total = sequence_weights(kind, mask, dtype=loss.dtype)
    return (weight * loss).sum() / total


def gradient(loss, log_prob):
    return torch.autograd.grad(loss.sum(), log_prob, retain_graph=True)[0]


NEXT = 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
RATE = torch.tensor([0.25, 0.25, 0.25, 0.6, 0.6, 0.6], dtype=torch.float64)
GROUPED = {"group": GROUP, "num_groups": 2}
ALL = {
    "sapo": sapo,
    "cispo": partial(cispo, clip_low=0.2, clip_high=0.3),
    "gmpo": partial(gmpo, clip_low=0.4, clip_high=0.4),
    "vespo": vespo,
    "mdpo": partial(mdpo, penalty=0.7),
    "kimi": partial(kimi, tau=0.3),
    "bgpo": bgpo,
    "rover": partial(rover, next_value=NEXT),
    "token_nft": lambda d: token_nft(Decisions(d.log_prob, d.old_log_prob, (d.advantages > 0).to(d.advantages), d.mask), success_rate=RATE),
    "rl_plus": rl_plus_off_policy,
    "reg_grpo": partial(reg_grpo, **GROUPED),
    "reg_grpo_std": partial(reg_grpo, **GROUPED, form="std"),
    "reg_grpo_std_sg": partial(reg_grpo, **GROUPED, form="std_sg"),
    "gvpo": partial(gvpo, **GROUPED, ref_log_prob=NEXT - 1.5),
    "drpo": partial(drpo, **GROUPED, temperature=2.0, max_length=8.0),
    "clipped_surrogate": partial(clipped_surrogate, clip_low=0.2, clip_high=0.3, dual_clip=3.0, ratio_max=4.0),
}
DETACHED = {"cispo", "vespo", "reg_grpo_std_sg", "drpo", "rl_plus", "rover", "token_nft"}
"""Their losses hold a part of log_prob constant, so that finite differences of the loss are not its gradient; each has a test of its own."""


# --- of every gate ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name not in DETACHED])
def test_the_gradient_matches_finite_differences(name):
    log_prob, old, advantages = draw(0, spread=0.25)
    assert torch.autograd.gradcheck(lambda x: ALL[name](batch(x, old, advantages, MASK)).loss, log_prob)


@pytest.mark.parametrize("name", ALL)
def test_masked_decisions_have_no_loss_and_no_gradient_whatever_they_hold(name):
    log_prob, old, advantages = draw(1, spread=0.25)
    advantages = advantages.clone()
    mask = MASK.clone()
    mask[2] = False  # a whole sequence
    expected = ALL[name](batch(log_prob, old, advantages, mask)).loss.detach()
    with torch.no_grad():
        log_prob[1, 3], old[2, 0], advantages[2, 1], log_prob[5, 0], advantages[5, 4] = math.nan, -math.inf, math.nan, math.inf, math.nan
    objective = ALL[name](batch(log_prob, old, advantages, mask))
    slope = gradient(objective.loss, log_prob)
    assert objective.loss.equal(expected)
    assert objective.loss[~mask].eq(0).all()
    assert slope[~mask].eq(0).all()
    assert slope.isfinite().all()
    assert slope[mask].ne(0).any()
    assert set(objective.metrics) == {"ratio", "log_ratio", "clipped_low", "clipped_high"}
    assert all(value.shape == SHAPE and not value.requires_grad and value.isfinite().all() for value in objective.metrics.values())
    assert objective.metrics["clipped_low"][~mask].eq(0).all()
    assert objective.metrics["clipped_high"][~mask].eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_item_26_with_an_empty_mask_the_loss_is_0_with_zero_gradients(name):
    log_prob, old, advantages = draw(2, spread=0.25)
    loss = ALL[name](batch(log_prob, old, advantages, torch.zeros_like(MASK))).loss
    assert loss.requires_grad
    assert loss.eq(0).all()
    assert gradient(loss, log_prob).eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_item_29_the_order_of_sequences_does_not_matter(name):
    log_prob, old, advantages = draw(3, spread=0.25)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    permuted = {"rover": {"next_value": NEXT[order]}, "gvpo": {"ref_log_prob": NEXT[order] - 1.5, "group": GROUP[order]}}.get(name, {})
    if "reg" in name or name == "drpo":
        permuted = {"group": GROUP[order]}
    ours = ALL[name](batch(log_prob, old, advantages, MASK)).loss[order]
    if name == "token_nft":
        moved = token_nft(batch(log_prob[order], old[order], (advantages > 0).double()[order], MASK[order]), success_rate=RATE[order])
    else:
        moved = ALL[name](batch(log_prob[order], old[order], advantages[order], MASK[order]), **permuted)
    torch.testing.assert_close(moved.loss, ours, **FP64)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith(("reg", "gvpo", "drpo", "token_nft", "rover"))])
def test_item_28_micro_batches_with_the_global_total_add_to_one_batch(name):
    log_prob, old, advantages = draw(4, spread=0.25)
    for reduction in ("mean", "seq_mean", "seq_mean_token_sum"):
        whole = gradient(reduced(ALL[name](batch(log_prob, old, advantages, MASK)).loss, MASK, reduction), log_prob)
        _, total = sequence_weights(reduction, MASK, dtype=torch.float64)
        split = torch.zeros_like(whole)
        for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
            weight, _ = sequence_weights(reduction, MASK[rows], dtype=torch.float64)
            split += gradient(weight * ALL[name](batch(log_prob[rows], old[rows], advantages[rows], MASK[rows])).loss, log_prob) / total
        torch.testing.assert_close(split, whole, **FP64)


@pytest.mark.parametrize("name", ["reg_grpo", "reg_grpo_std", "reg_grpo_std_sg", "gvpo", "drpo", "kimi"])
def test_item_28_gradient_weights_train_groups_in_any_micro_batches(name):
    log_prob, old, advantages = draw(5, spread=0.25)
    weight, total = sequence_weights("seq_mean", MASK, dtype=torch.float64)
    whole = gradient(reduced(ALL[name](batch(log_prob, old, advantages, MASK)).loss, MASK, "seq_mean"), log_prob)
    with torch.no_grad():
        coefficients = gradient_weights(ALL[name], batch(log_prob, old, advantages, MASK), weight / total)
    assert not coefficients.requires_grad
    split = sum(gradient(coefficients[rows] * log_prob[rows], log_prob) for rows in (slice(0, 2), slice(2, 6)))
    torch.testing.assert_close(split, whole, **FP64)


@pytest.mark.parametrize("name", ["sapo", "cispo", "gmpo", "vespo", "mdpo", "bgpo", "kimi", "reg_grpo", "drpo"])
def test_item_27_groups_of_equal_rewards_teach_nothing_on_policy(name):
    log_prob, _, _ = draw(6, spread=0.0)
    loss = ALL[name](batch(log_prob, log_prob.detach(), torch.zeros(SHAPE, dtype=torch.float64), MASK)).loss
    assert gradient(loss, log_prob).eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_no_gate_waits_for_the_device(name, monkeypatch):
    """Tensors without data: a look at a value, .item() or bool(), would raise."""
    log_prob, old, advantages = (x.to("meta") for x in draw(37, spread=0.25))
    for constant in ("GROUP", "NEXT", "RATE", "MASK"):
        monkeypatch.setitem(globals(), constant, globals()[constant].to("meta"))
    arguments = ALL[name].keywords if isinstance(ALL[name], partial) else {}
    gate = ALL[name].func if isinstance(ALL[name], partial) else ALL[name]
    moved = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    objective = gate(batch(log_prob, old, advantages, MASK), **moved)
    assert objective.loss.is_meta
    assert objective.loss.shape == SHAPE
    assert gradient(objective.loss, log_prob).shape == SHAPE


# --- gradients at ratio 1 -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-6, 0.2, 5.0])
def test_item_6_ppo_at_ratio_1_has_the_gradient_minus_a_over_n_for_every_clip(clip):
    log_prob, _, advantages = draw(7, spread=0.0)
    loss = clipped_surrogate(batch(log_prob, log_prob.detach(), advantages, MASK), clip_low=clip, clip_high=clip).loss
    expected = torch.where(MASK, -advantages / MASK.sum(1, keepdim=True), 0.0) / 6
    torch.testing.assert_close(gradient(reduced(loss, MASK, "seq_mean_token_mean"), log_prob), expected, **FP64)
    torch.testing.assert_close(loss, torch.where(MASK, -advantages, 0.0), **FP64)


@pytest.mark.parametrize("tau", [0.1, 1.0, 1.05, 7.0])
def test_item_8_sapo_at_ratio_1_has_the_gradient_minus_a_for_every_tau(tau):
    log_prob, _, advantages = draw(8, spread=0.0)
    loss = sapo(batch(log_prob, log_prob.detach(), advantages), temperature_positive=tau, temperature_negative=2 * tau).loss
    torch.testing.assert_close(gradient(loss, log_prob), -advantages, **FP64)
    torch.testing.assert_close(loss.detach(), torch.where(advantages > 0, -2 * advantages / tau, -advantages / tau), **FP64)  # not -A: text.md 15.7


def test_item_9_cispo_at_ratio_1_is_reinforce():
    log_prob, _, advantages = draw(9, spread=0.0)
    ours, theirs = (
        gradient(objective(batch(log_prob, log_prob.detach(), advantages), clip_low=0.2, clip_high=0.2).loss, log_prob) for objective in (cispo, reinforce)
    )
    torch.testing.assert_close(ours, theirs, **FP64)


@pytest.mark.parametrize("name", ["cispo", "vespo", "mdpo", "bgpo", "sapo"])
def test_on_policy_every_gate_of_decisions_is_reinforce(name):
    log_prob, _, advantages = draw(10, spread=0.0)
    torch.testing.assert_close(gradient(ALL[name](batch(log_prob, log_prob.detach(), advantages)).loss, log_prob), -advantages, **FP64)


# --- one by one ---------------------------------------------------------------------------------------------------------------------------------


def one(ratio, advantage, **more):
    ratio = torch.tensor([ratio], dtype=torch.float64)
    return batch(ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, advantage), **more)


def test_sapo_by_hand():
    # tau 2 where A > 0: -A 2 sigmoid(2 (1.5 - 1)); tau 4 where A < 0: -A sigmoid(4 (0.5 - 1))
    positive = sapo(one([1.5], 3.0), temperature_positive=2.0, temperature_negative=4.0).loss.item()
    negative = sapo(one([0.5], -2.0), temperature_positive=2.0, temperature_negative=4.0).loss.item()
    assert positive == pytest.approx(-6 / (1 + math.exp(-1)))
    assert negative == pytest.approx(2 / (1 + math.exp(2)))


def test_sapos_weight_is_symmetric_and_decays_but_never_stops():
    distance = torch.linspace(0, 0.9, 10, dtype=torch.float64)
    weights = []
    for sign in (1, -1):
        ratio = (1 + sign * distance)[None].requires_grad_()
        weights.append(gradient(sapo(batch(ratio.log(), torch.zeros_like(ratio), torch.ones_like(ratio)), temperature_positive=5.0).loss, ratio)[0])
    torch.testing.assert_close(weights[0], weights[1], **FP64)
    assert weights[0][0].item() == pytest.approx(-1.0)
    assert (weights[0].diff() > 0).all()
    assert (weights[0] < 0).all()


def test_sapo_of_small_tau_is_the_unclipped_surrogate():
    log_prob, old, advantages = draw(11, spread=0.5)
    loss = sapo(batch(log_prob, old, advantages), temperature_positive=1e-6, temperature_negative=1e-6).loss
    torch.testing.assert_close(gradient(loss, log_prob), -advantages * (log_prob - old).exp().detach(), rtol=1e-9, atol=1e-12)


def test_cispo_by_hand_caps_the_ratio_and_keeps_the_gradient():
    log_prob = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    old = log_prob.detach() - torch.tensor([[0.5, 1.1, 7.0]], dtype=torch.float64).log()
    objective = cispo(batch(log_prob, old, torch.tensor([[2.0, -1.0, 1.0]], dtype=torch.float64)), clip_low=0.2, clip_high=4.0)
    torch.testing.assert_close(objective.loss.detach(), torch.tensor([[1.6, -2.2, 15.0]], dtype=torch.float64), **FP64)  # weights 0.8, 1.1, 5
    torch.testing.assert_close(gradient(objective.loss, log_prob), torch.tensor([[-1.6, 1.1, -5.0]], dtype=torch.float64), **FP64)
    assert objective.metrics["clipped_low"].tolist() == [[1.0, 0.0, 0.0]]
    assert objective.metrics["clipped_high"].tolist() == [[0.0, 0.0, 1.0]]


def test_cispo_without_bounds_is_importance_weighted_reinforce():
    log_prob, old, advantages = draw(12, spread=1.0)
    loss = cispo(batch(log_prob, old, advantages, MASK), clip_low=1.0, clip_high=math.inf).loss
    torch.testing.assert_close(gradient(loss, log_prob), torch.where(MASK, -advantages * (log_prob - old).exp().detach(), 0.0), **FP64)


def test_gmpo_by_hand():
    # A > 0: log-ratios 0.1, 0.9 -> 0.4, -2 stays: mean -0.5; A < 0: 0.1, 0.9 stays, -2 -> -0.4: mean 0.2
    delta = torch.tensor([[0.1, 0.9, -2.0, 5.0]] * 2, dtype=torch.float64)
    advantages = torch.tensor([[2.0], [-3.0]], dtype=torch.float64).expand(2, 4)
    mask = torch.tensor([[True, True, True, False]] * 2)
    objective = gmpo(batch(delta, torch.zeros_like(delta), advantages, mask), clip_low=0.4, clip_high=0.4)
    expected = [[-2 * math.exp(-0.5)] * 3 + [0.0], [3 * math.exp(0.2)] * 3 + [0.0]]
    torch.testing.assert_close(objective.loss, torch.tensor(expected, dtype=torch.float64), **FP64)
    assert objective.metrics["clipped_high"].tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    assert objective.metrics["clipped_low"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]


def test_gmpo_without_bounds_is_gspo_without_bounds():
    log_prob, old, advantages = draw(13, spread=0.5)
    ours = reduced(gmpo(batch(log_prob, old, advantages, MASK), clip_low=math.inf, clip_high=math.inf).loss, MASK, "seq_mean")
    gspo = at_level(batch(log_prob, old, advantages, MASK), "seq_mean")
    theirs = reduced(clipped_surrogate(gspo, clip_low=math.inf, clip_high=math.inf).loss, MASK, "seq_mean")
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, log_prob), gradient(theirs, log_prob), **FP64)


def test_vespo_by_hand():
    # W = 2 0.75 = 1.5: W^2 exp(3 (1 - 1.5)) where A > 0, W^3 exp(2 (1 - 1.5)) where A < 0
    for advantage, weight in ((2.0, 1.5**2 * math.exp(-1.5)), (-2.0, 1.5**3 * math.exp(-1.0))):
        objective = vespo(one([2.0, 0.75], advantage))
        expected = -weight * advantage * torch.tensor([[2.0, 0.75]], dtype=torch.float64).log()
        torch.testing.assert_close(objective.loss, expected, **FP64)


def test_vespos_weight_is_constant_and_1_at_ratio_1():
    log_prob, old, advantages = draw(14, spread=0.3)
    w = torch.where(MASK, log_prob - old, 0.0).detach().sum(1, keepdim=True).exp()
    weight = torch.where(advantages > 0, w**2 * (3 * (1 - w)).exp(), w**3 * (2 * (1 - w)).exp())
    torch.testing.assert_close(gradient(vespo(batch(log_prob, old, advantages, MASK)).loss, log_prob), torch.where(MASK, -weight * advantages, 0.0), **FP64)


def test_mdpo_by_hand_and_its_schedule():
    assert mdpo(one([2.0], 3.0), penalty=0.5).loss.item() == pytest.approx(-6 + 0.5 * (0.5 - 1 + math.log(2)))
    assert [mirror_penalty(k, 4) for k in range(4)] == pytest.approx([1, 4 / 3, 2, 4])
    with pytest.raises(ValueError, match=r"iteration 4 is not in 0\.\.3"):
        mirror_penalty(4, 4)


def test_mdpo_without_penalty_is_the_unclipped_surrogate():
    log_prob, old, advantages = draw(15, spread=0.5)
    ours, theirs = mdpo(batch(log_prob, old, advantages), penalty=0.0).loss, -advantages * (log_prob - old).exp()
    torch.testing.assert_close(ours, theirs, **FP64)


def test_kimi_by_hand():
    # D = log 2 + log 3, A = 2, tau = 0.5
    d = math.log(6)
    objective = kimi(one([2.0, 3.0], 2.0), tau=0.5)
    assert objective.loss.tolist() == [pytest.approx([-2 * d + 0.25 * d * d] * 2)]


def test_kimi_without_tau_is_reinforce_over_trajectories_and_a_square_otherwise():
    log_prob, old, advantages = draw(16, spread=0.5)
    ours = gradient(reduced(kimi(batch(log_prob, old, advantages, MASK), tau=0.0).loss, MASK, "seq_mean"), log_prob)
    plain = reinforce(batch(log_prob, old, advantages, MASK), clip_low=1.0, clip_high=1.0).loss
    torch.testing.assert_close(ours, gradient(reduced(plain, MASK, "seq_mean_token_sum"), log_prob), **FP64)
    d = torch.where(MASK, log_prob - old, 0.0).sum(1)
    square = ((advantages[:, 0] - 0.4 * d) ** 2 / 0.8).mean()
    ours = gradient(reduced(kimi(batch(log_prob, old, advantages, MASK), tau=0.4).loss, MASK, "seq_mean"), log_prob)
    torch.testing.assert_close(ours, gradient(square, log_prob), **FP64)


def test_kimi_of_single_decisions_is_verls_dro():
    log_prob, old, advantages = draw(17, spread=0.5)
    loss = kimi(batch(*(x.reshape(-1, 1) for x in (log_prob, old, advantages))), tau=0.2).loss
    delta = (log_prob - old).reshape(-1, 1)
    torch.testing.assert_close(loss, -(delta * advantages.reshape(-1, 1) - 0.1 * delta**2), **FP64)


@given(st.integers(0, 10_000), st.sampled_from([-1.7, 0.6]))
def test_item_15_bgpos_bound_never_lies_above_the_objective(seed, advantage):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(1, 7, generator=generator, dtype=torch.float64)
    bound = -bgpo(batch(delta, torch.zeros_like(delta), torch.full_like(delta, advantage))).loss.mean()
    assert bound <= advantage * delta.mean().exp() + 1e-12


@pytest.mark.parametrize("advantage", [-1.7, 0.6])
def test_item_15_bgpos_bound_touches_the_objective_under_the_old_policy(advantage):
    estimates = torch.randn(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    ours = bgpo(batch(estimates, estimates.detach(), torch.full((1, 7), advantage, dtype=torch.float64))).loss.mean()
    theirs = -advantage * (estimates - estimates.detach()).mean().exp()
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, estimates), gradient(theirs, estimates), **FP64)


def test_bgpo_by_hand():
    assert bgpo(one([2.0], 3.0)).loss.item() == pytest.approx(-3 * (1 + math.log(2)))
    assert bgpo(one([2.0], -3.0)).loss.item() == pytest.approx(6.0)


def test_rover_by_hand():
    # Q = 2 log 2, y = 0.5 + 2 0.25 = 1
    objective = rover(one([2.0], 0.5), next_value=torch.tensor([[0.25]], dtype=torch.float64), kappa=2.0)
    assert objective.loss.item() == pytest.approx((2 * math.log(2) - 1) ** 2)


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_item_30_rover_on_policy_has_the_gradient_minus_2_kappa_r(kappa):
    log_prob, _, advantages = draw(18, spread=0.0)
    loss = rover(batch(log_prob, log_prob.detach(), advantages, MASK), next_value=torch.zeros(SHAPE, dtype=torch.float64), kappa=kappa).loss
    torch.testing.assert_close(gradient(loss, log_prob), torch.where(MASK, -2 * kappa * advantages, 0.0), **FP64)


def test_rovers_gradient_off_policy_and_its_target_is_constant():
    log_prob, old, advantages = draw(19, spread=0.5)
    next_value = NEXT.clone().requires_grad_()
    loss = rover(batch(log_prob, old, advantages), next_value=next_value, kappa=0.7).loss
    expected = 2 * 0.7 * (0.7 * (log_prob - old) - advantages - 0.7 * NEXT).detach()
    torch.testing.assert_close(gradient(loss, log_prob), expected, **FP64)
    assert not torch.autograd.grad(loss.sum(), next_value, allow_unused=True)[0]


def verdicts(group_answers):
    """[B] binary rewards, groups, and success rates of samples."""
    y = torch.tensor([answer for answers in group_answers for answer in answers], dtype=torch.float64)
    group = torch.tensor([i for i, answers in enumerate(group_answers) for _ in answers])
    rate = torch.tensor([sum(answers) / len(answers) for answers in group_answers], dtype=torch.float64)[group]
    return y, group, rate


@pytest.mark.parametrize(("omega", "estimator"), [("grpo", group_zscore), ("dr_grpo", group_mean)])
def test_item_10_nft_on_policy_is_grpo_and_dr_grpo(omega, estimator):
    y, group, rate = verdicts([[1, 0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 1]])
    log_prob = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    loss = token_nft(batch(log_prob, log_prob.detach(), y[:, None].expand(12, 3)), success_rate=rate, omega=omega).loss
    advantages = estimator(y, group, torch.ones(12, dtype=torch.bool), 3, eps=0.0, ddof=0)
    torch.testing.assert_close(gradient(loss, log_prob), -advantages[:, None].expand(12, 3), **FP64)


def test_nft_by_hand_on_both_sides_of_the_floor():
    # q = 1/2, omega 1; right: -log r; wrong: (1 - r / 2) / (1 / 2) = 2 - r, floored at 1 for r > 1
    rate = torch.tensor([0.5, 0.5], dtype=torch.float64)
    ratio = torch.tensor([[0.5, 1.5], [0.5, 1.5]], dtype=torch.float64)
    log_prob, y = ratio.log().requires_grad_(), torch.tensor([[1.0], [0.0]], dtype=torch.float64).expand(2, 2)
    loss = token_nft(batch(log_prob, torch.zeros_like(ratio), y), success_rate=rate, omega="grpo").loss
    expected = torch.tensor([[math.log(2), -math.log(1.5)], [-math.log(1.5), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected, **FP64)
    # through the floor the gradient goes on, r / value: 0.5 / 1.5, and 1.5 / 1
    torch.testing.assert_close(gradient(loss, log_prob), torch.tensor([[-1.0, -1.0], [1 / 3, 1.5]], dtype=torch.float64), **FP64)


def test_nft_drops_one_sided_groups_and_without_negative_weight_wrong_answers():
    y, _, rate = verdicts([[1, 1], [0, 0], [1, 0]])
    log_prob, old, _ = draw(20, spread=0.3)
    decisions = batch(log_prob, old, y[:, None].expand(SHAPE))
    assert token_nft(decisions, success_rate=rate).loss.ne(0).any(1).tolist() == [False] * 4 + [True, True]
    assert token_nft(decisions, success_rate=rate, negative_weight=0.0).loss.ne(0).any(1).tolist() == [False] * 4 + [True, False]
    with pytest.raises(ValueError, match="unknown omega 'half'; known: grpo, dr_grpo"):
        token_nft(decisions, success_rate=rate, omega="half")


def test_nft_is_finite_for_ratios_far_away():
    log_prob = torch.tensor([[300.0, -300.0], [300.0, -300.0]], requires_grad=True)
    loss = token_nft(batch(log_prob, torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])), success_rate=torch.tensor([0.5, 0.5])).loss
    assert loss.isfinite().all()
    assert loss[0].tolist() == [-10.0, 60.0]  # cut at 10 above, as released, and at -60
    assert gradient(loss, log_prob).isfinite().all()


def test_rl_plus_by_hand():
    # p = 1/2, p_old = 1/5: rho = 1.25, (1 - p)^(1/2) = sqrt(1/2)
    log_prob = torch.tensor([[0.5]], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([[0.2]], dtype=torch.float64).log()
    for exponent, factor in ((0.5, math.sqrt(0.5)), (0.0, 1.0)):
        objective = rl_plus_off_policy(batch(log_prob, old, torch.full((1, 1), 2.0, dtype=torch.float64)), exponent=exponent)
        assert objective.loss.item() == pytest.approx(-2.5 * factor)
        assert gradient(objective.loss, log_prob).item() == pytest.approx(-2.5 * factor)  # the factor is constant, and d rho / d log p = rho
        assert objective.metrics["ratio"].item() == pytest.approx(1.25)


def test_item_19_rl_plus_without_foreign_decisions_is_ppo():
    log_prob, old, advantages = draw(21, spread=0.5)
    decisions = batch(log_prob, old, advantages, MASK)
    ppo = clipped_surrogate(decisions, clip_low=0.2, clip_high=0.2)
    mixed = mixed_origin(ppo, rl_plus_off_policy(decisions), torch.zeros_like(MASK))
    assert mixed.loss.equal(ppo.loss)
    assert gradient(mixed.loss, log_prob).equal(gradient(ppo.loss, log_prob))


def test_decisions_of_mixed_origin_each_have_their_own_loss():
    log_prob, old, advantages = draw(22, spread=0.5)
    foreign = torch.tensor([True, False, False, True, False])
    decisions = batch(log_prob, old, advantages)
    own, other = clipped_surrogate(decisions, clip_low=0.2, clip_high=0.2), rl_plus_off_policy(decisions)
    mixed = mixed_origin(own, other, foreign.expand(SHAPE))
    assert mixed.loss[:, foreign].equal(other.loss[:, foreign])
    assert mixed.loss[:, ~foreign].equal(own.loss[:, ~foreign])
    assert mixed.metrics["ratio"][:, foreign].equal(other.metrics["ratio"][:, foreign])


def test_lp_reg_by_hand_and_elsewhere_the_clipped_loss():
    log_prob, old, advantages = draw(23, spread=0.5)
    proxy, selected = old + 0.3, torch.zeros_like(MASK)
    decisions = batch(log_prob, old, advantages, MASK)
    base = clipped_surrogate(decisions, clip_low=1.0, clip_high=0.1)
    assert lp_reg(decisions, base, selected=selected, proxy_log_prob=proxy).loss.equal(base.loss)
    selected[0, 1] = selected[1, 4] = True  # the second one is masked
    objective = lp_reg(decisions, base, selected=selected, proxy_log_prob=proxy, weight=0.7)
    d = proxy[0, 1] - log_prob[0, 1]
    expected = -advantages[0, 1] * (log_prob - old)[0, 1].exp() + 0.7 * (d.exp() - 1 - d)
    torch.testing.assert_close(objective.loss[0, 1], expected, **FP64)
    torch.testing.assert_close(gradient(objective.loss[0, 1], log_prob), gradient(expected, log_prob), **FP64)
    others = torch.ones_like(MASK)
    others[0, 1] = False
    assert objective.loss[others].equal(base.loss[others])


def test_lp_regs_gradient_matches_finite_differences():
    log_prob, old, advantages = draw(23, spread=0.25)

    def loss(x):
        decisions = batch(x, old, advantages, MASK)
        return lp_reg(decisions, clipped_surrogate(decisions, clip_low=1.0, clip_high=0.1), selected=advantages < 0, proxy_log_prob=old + 0.3).loss

    assert torch.autograd.gradcheck(loss, log_prob)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_table_keeps_float32(name):
    log_prob, old, advantages = (x.detach().float() for x in draw(36, spread=0.5))
    objective = OBJECTIVES[name](batch(log_prob.requires_grad_(), old, advantages, MASK), clip_low=0.2, clip_high=0.2)
    assert objective.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in objective.metrics.values())
