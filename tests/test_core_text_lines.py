"""Lines of text.md that are not the gradient of one policy: reductions, empty and cut batches (section 12), and special cases of its entries; in float64."""

import math

import pytest
import torch
from estimates import group_mean, group_zscore
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.agent_credit import gigpo
from flowrl.core.aggregation import hypervolume, hypervolume_gain
from flowrl.core.estimators import centre, combine_heads, scale
from flowrl.core.gates import lp_reg, mixed_origin, rl_plus_off_policy, rover, token_nft
from flowrl.core.list_losses import win_rates
from flowrl.core.objectives import clipped_surrogate, reinforce
from flowrl.core.pair_losses import PAIR_LOSSES
from flowrl.core.pair_tokens import guide_weights, sum_tokens
from flowrl.core.preference import dpo
from flowrl.core.ratio_levels import RATIO_LEVELS, at_level, log_ratio
from flowrl.core.reductions import SEQUENCE_REDUCTIONS, sequence_weights
from flowrl.core.regularizers import kl_barrier, sft_loss
from flowrl.core.shaping import constraint_gate, preferences, win_rate
from flowrl.core.soft_values import a_star_po, oreo_actor, oreo_critic
from flowrl.core.token_advantages import gae, length_lambda, outcome_rewards, token_returns, tree_advantages, value_loss, whiten
from flowrl.types import Decisions, Pairs

FP64 = {"rtol": 1e-11, "atol": 1e-12}
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0]]).bool()
EVERYONE = torch.ones(6, dtype=torch.bool)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(seed, *, spread=0.5, mask=MASK):
    """Log-probabilities of tokens around old ones, and advantages of sequences."""
    old = -1 - normal(6, 4, seed=seed).abs()
    log_prob = (old + spread * normal(6, 4, seed=seed + 1)).requires_grad_()
    return Decisions(log_prob, old, normal(6, seed=seed + 2)[:, None].expand(6, 4), mask)


def gradient(loss, decisions):
    return torch.autograd.grad(loss.sum(), decisions.log_prob, retain_graph=True)[0]


# --- section 12: reductions, empty masks, micro-batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("kind", SEQUENCE_REDUCTIONS)
def test_item_1_with_one_length_values_and_gradients_of_all_reductions_are_proportional(kind, length):
    mask = torch.arange(4).expand(6, 4) < length
    decisions = draw(0, mask=mask)
    loss = clipped_surrogate(decisions, clip_low=0.2, clip_high=0.2).loss
    found = []
    for name in ("mean", kind):
        weight, total = sequence_weights(name, mask, group=GROUP, num_groups=2, max_length=5.0, dtype=torch.float64)
        found.append((weight * loss).sum() / total)
    factor = {"seq_mean_token_sum": float(length), "seq_mean_token_sum_norm": length / 5}.get(kind, 1.0)
    torch.testing.assert_close(found[1], factor * found[0], **FP64)
    torch.testing.assert_close(gradient(found[1], decisions), factor * gradient(found[0], decisions), **FP64)


def tgdpo(decisions):
    """DPO of the first three sequences over the others, on weighted sums."""
    rows, sides = (slice(0, 3), slice(3, 6)), []
    for row, side in zip(rows, ("chosen", "rejected"), strict=True):
        weight = guide_weights(decisions.old_log_prob[row] - 0.1, decisions.old_log_prob[row], alpha=0.5, beta=0.3, side=side)
        sides.append([sum_tokens(x[row], decisions.mask[row], weight) for x in (decisions.log_prob, decisions.old_log_prob)])
    known = decisions.mask[rows[0]].any(1, keepdim=True)
    return dpo(Pairs(sides[0][0], sides[1][0], sides[0][1], sides[1][1], known), beta=0.3, margin=0.0, sft_weight=0.0, label_smoothing=0.0).loss


def oreo(loss, decisions):
    value = decisions.log_prob if loss is oreo_critic else decisions.old_log_prob
    return loss(value, decisions.log_prob, decisions.old_log_prob, decisions.mask, decisions.mask, decisions.advantages[:, 0])


def foreign(decisions):
    own = clipped_surrogate(decisions, clip_low=0.2, clip_high=0.2)
    return mixed_origin(own, rl_plus_off_policy(decisions), torch.arange(6)[:, None].expand(6, 4) > 3).loss


def held(decisions):
    base = clipped_surrogate(decisions, clip_low=1.0, clip_high=9.0)
    return lp_reg(decisions, base, selected=decisions.advantages < 0, proxy_log_prob=decisions.old_log_prob + 0.3).loss


MORE_LOSSES = {
    "reinforce": lambda d: reinforce(d, clip_low=1.0, clip_high=1.0).loss,
    "two-sided clip": lambda d: clipped_surrogate(d, clip_low=0.2, clip_high=0.2, dual_clip=3.0, ratio_max=4.0).loss,
    "lp_reg": held,
    "rl_plus": foreign,
    "a_star_po": lambda d: a_star_po(d, group=GROUP, num_groups=2, ref_log_prob=d.old_log_prob - 0.1).loss,
    "oreo critic": lambda d: oreo(oreo_critic, d),
    "oreo actor": lambda d: oreo(oreo_actor, d),
    "value": lambda d: value_loss(d.log_prob, d.old_log_prob, d.advantages, d.mask),
    "kl barrier": lambda d: kl_barrier(d.log_prob, d.old_log_prob, d.mask, mean_kl=torch.tensor(1.0)),
    "supervised": lambda d: sft_loss(d.log_prob, d.mask),
    "tgdpo": tgdpo,
    **{f"clipped at {level}": lambda d, level=level: clipped_surrogate(at_level(d, level), clip_low=0.2, clip_high=0.2).loss for level in RATIO_LEVELS},
}


@pytest.mark.parametrize("name", MORE_LOSSES)
def test_item_26_losses_of_nothing_are_0_with_gradient_0_and_of_something_are_not(name):
    full = draw(3)
    assert gradient(MORE_LOSSES[name](full), full).ne(0).any()
    empty = draw(3, mask=torch.zeros_like(MASK))
    with torch.no_grad():
        empty.log_prob[2, 1], empty.log_prob[4, 0] = math.nan, -math.inf
    loss = MORE_LOSSES[name](empty)
    assert loss.requires_grad
    assert loss.eq(0).all()
    assert gradient(loss, empty).eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"])
@pytest.mark.parametrize("name", ["rover", "token_nft", "lp_reg", "rl_plus", "two-sided clip"])
def test_item_28_values_and_gradients_of_parts_add_to_those_of_one_batch(name, reduction):
    decisions, ahead, rate = draw(5), normal(6, 4, seed=9), torch.tensor([0.25] * 3 + [0.6] * 3, dtype=torch.float64)

    def loss(rows):
        d = Decisions(decisions.log_prob[rows], decisions.old_log_prob[rows], decisions.advantages[rows], MASK[rows])
        if name == "rover":
            return rover(d, next_value=ahead[rows], kappa=0.7).loss
        if name == "token_nft":
            return token_nft(Decisions(d.log_prob, d.old_log_prob, (d.advantages > 0).double(), d.mask), success_rate=rate[rows]).loss
        if name == "lp_reg":
            base = clipped_surrogate(d, clip_low=1.0, clip_high=9.0)
            return lp_reg(d, base, selected=d.advantages < 0, proxy_log_prob=d.old_log_prob + 0.3).loss
        if name == "rl_plus":
            own = clipped_surrogate(d, clip_low=0.2, clip_high=0.2)
            return mixed_origin(own, rl_plus_off_policy(d), (torch.arange(6) > 3)[rows, None].expand_as(MASK[rows])).loss
        return clipped_surrogate(d, clip_low=0.2, clip_high=0.2, dual_clip=3.0).loss

    def share(rows):
        weight, here = sequence_weights(reduction, MASK[rows], max_length=7.0, dtype=torch.float64)
        return (weight * loss(rows)).sum(), here

    value, total = share(slice(0, 6))
    parts = [share(rows) for rows in (slice(0, 1), slice(1, 5), slice(5, 6))]
    added = sum(part for part, _ in parts) / sum(here for _, here in parts)
    torch.testing.assert_close(added, value / total, **FP64)
    torch.testing.assert_close(gradient(added, decisions), gradient(value / total, decisions), **FP64)


def test_item_27_a_token_whitening_is_silent_where_the_whole_batch_is_equal_and_centres_otherwise():
    """A3's line holds for a batch of equal rewards. Beside a group with spread, whitening takes the mean over tokens off every sample, also off those that the
    centre has made 0: the silent group is moved by -mean / std, and by nothing where lengths are equal."""
    equal = torch.full((6,), 0.1, dtype=torch.float64)
    plain = whiten(token_returns(outcome_rewards(equal, MASK), MASK), MASK)
    baseline = whiten(centre("group", equal, GROUP, EVERYONE, 2), MASK)
    assert plain.eq(0).all() and baseline.eq(0).all()
    mixed = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0, 0.0], dtype=torch.float64)
    centred = centre("group", mixed, GROUP, EVERYONE, 2)
    assert centred[:3].eq(0).all()
    tokens = centred[:, None].expand(6, 4)[MASK]
    moved = whiten(centred, MASK, eps=0.0)[:3][MASK[:3]]
    torch.testing.assert_close(moved, torch.full_like(moved, float(-tokens.mean() / tokens.std())), **FP64)
    even = torch.ones(6, 4, dtype=torch.bool)
    torch.testing.assert_close(whiten(centred, even)[:3], torch.zeros(3, 4, dtype=torch.float64), **FP64)


def test_item_25_a_dominated_point_of_three_rewards_adds_nothing():
    front, origin = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.5, 0.5]], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert hypervolume(front, origin) == 1.25
    for point, gain in (
        ([1.0, 0.5, 1.0], 0.0),
        ([2.0, 0.5, 0.25], 0.0),
        ([1.0, 1.0, 1.0], 0.0),
        ([1.0, 1.0, 3.0], 2.0),
        ([3.0, 0.5, 0.5], 0.25),
        ([2.0, -1.0, 9.0], 0.0),
    ):
        assert hypervolume_gain(front, torch.tensor(point, dtype=torch.float64), origin) == pytest.approx(gain, abs=1e-15)


# --- estimators -----------------------------------------------------------------------------------------------------------------------------------


def test_a9_one_reward_without_whitening_is_grpo_and_two_are_not_the_sum():
    rewards = normal(2, 6)
    heads = torch.stack([scale("group_std", centre("group", r, GROUP, EVERYONE, 2), r, GROUP, EVERYONE, 2, eps=0.0, ddof=1) for r in rewards])
    r = rewards[0].view(2, 3)
    written = ((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)).flatten()
    torch.testing.assert_close(combine_heads(heads[:1], torch.ones(1)), written, **FP64)
    summed = group_zscore(rewards.sum(0), GROUP, EVERYONE, 2, ddof=1)
    assert (combine_heads(heads, torch.ones(2)) - summed).abs().max() > 0.1


@given(st.integers(0, 1000), st.integers(1, 3))
def test_a16_and_section_8_branches_at_the_beginning_are_an_ordinary_group(seed, deeper):
    """Leaves that share nothing but the prompt: every one is alone below it."""
    rewards = normal(6, seed=seed)
    below = 2 + torch.arange(6 * deeper).view(6, deeper)
    found = tree_advantages(rewards, torch.cat([GROUP[:, None], below], 1), EVERYONE, 2 + 6 * deeper)
    torch.testing.assert_close(found, group_mean(rewards, GROUP, EVERYONE, 2), **FP64)


def test_a18_the_last_delta_of_an_unfinished_sample_is_the_last_reward_at_gamma_1():
    rewards, values, done = normal(6, 4, seed=1), normal(6, 4, seed=2), torch.tensor([True, False] * 3)
    last = MASK & (MASK.flip(1).cumsum(1).flip(1) == 1)
    for gamma in (1.0, 0.9):
        found = gae(rewards, values, MASK, gamma=gamma, lam=0.7, done=done).advantages
        bootstrapped = rewards + gamma * (~done).double()[:, None] * values - values
        torch.testing.assert_close(found[last], bootstrapped[last], **FP64)
    unfinished = last & ~done[:, None]
    torch.testing.assert_close(gae(rewards, values, MASK, gamma=1.0, lam=0.7, done=done).advantages[unfinished], rewards[unfinished], **FP64)


def test_a19_lambda_goes_to_1_with_the_length():
    found = length_lambda(torch.arange(20000) < torch.tensor([[20], [200], [2000], [20000]]), dtype=torch.float64)
    torch.testing.assert_close(found, 1 - torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64), **FP64)


# --- objectives -----------------------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1.3, 3.0, None]))
def test_b1_the_gradient_is_0_exactly_beyond_the_bounds_of_the_sign(seed, dual_clip):
    decisions = draw(seed, spread=1.0, mask=torch.ones(6, 4, dtype=torch.bool))
    loss = clipped_surrogate(decisions, clip_low=0.2, clip_high=0.28, dual_clip=dual_clip).loss
    r, a = (decisions.log_prob - decisions.old_log_prob).exp().detach(), decisions.advantages
    stopped = ((a > 0) & (r > 1.28)) | ((a < 0) & (r < 0.8)) | ((a < 0) & (r > (dual_clip or math.inf)))
    found = gradient(loss, decisions)
    assert found[stopped].eq(0).all()
    torch.testing.assert_close(found[~stopped], (-a * r)[~stopped], **FP64)
    step = 1e-7  # differences, in one go: a decision's loss depends on its own log-probability alone
    ends = [
        clipped_surrogate(
            Decisions(decisions.log_prob.detach() + sign * step, decisions.old_log_prob, a, decisions.mask), clip_low=0.2, clip_high=0.28, dual_clip=dual_clip
        ).loss
        for sign in (1, -1)
    ]
    bounds = torch.tensor([0.8, 1.28, dual_clip or 9e9], dtype=torch.float64)
    away = (r[..., None] - bounds).abs().amin(-1) > 1e-5
    torch.testing.assert_close(((ends[0] - ends[1]) / (2 * step))[away], found[away], rtol=1e-5, atol=1e-6)


def test_b16_without_the_next_value_rover_is_the_regression_of_single_decisions():
    decisions = draw(11)
    ours = rover(decisions, next_value=torch.zeros(6, 4, dtype=torch.float64), kappa=0.3).loss
    flat = [x.reshape(24, 1) for x in (decisions.log_prob, decisions.old_log_prob, decisions.advantages, MASK)]
    theirs = a_star_po(Decisions(*flat), group=torch.arange(24), num_groups=24, ref_log_prob=flat[1], beta=0.3).loss.view(6, 4)
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, decisions), gradient(theirs, decisions), **FP64)


def test_section_10_without_bias_and_with_scale_1_a_normalised_ratio_is_ppos():
    decisions = draw(13)
    plain = log_ratio(decisions.log_prob, decisions.old_log_prob, MASK, "token", bias=0.0, scale=torch.ones(4))
    moved = Decisions(plain, torch.zeros(6, 4, dtype=torch.float64), decisions.advantages, MASK)
    ours, theirs = (clipped_surrogate(d, clip_low=0.2, clip_high=0.28).loss for d in (moved, decisions))
    torch.testing.assert_close(ours, theirs, **FP64)
    torch.testing.assert_close(gradient(ours, decisions), gradient(theirs, decisions), **FP64)


# --- shaping, games, agents -----------------------------------------------------------------------------------------------------------------------


def test_d11_without_constraints_cgpo_is_reinforce_on_the_calibrated_reward_less_the_batch_mean():
    decisions, rewards, baseline = draw(15, spread=0.0), normal(6, seed=1), normal(2, seed=2)[GROUP]
    away = torch.where(MASK, decisions.log_prob.detach() - decisions.old_log_prob + 1, 0.0).sum(1)
    shaped = constraint_gate(rewards, baseline, torch.zeros(6, 0, dtype=torch.bool), away, kl_max=math.inf)
    advantages = centre("batch", shaped, GROUP, EVERYONE, 2)
    weight, total = sequence_weights("seq_mean_token_sum", MASK, dtype=torch.float64)
    d = Decisions(decisions.log_prob, decisions.old_log_prob, advantages[:, None].expand(6, 4), MASK)
    calibrated = 1 / (1 + (baseline - rewards).exp())
    expected = torch.where(MASK, -(calibrated - calibrated.mean())[:, None] / 6, 0.0)
    torch.testing.assert_close(gradient(weight * reinforce(d, clip_low=1.0, clip_high=1.0).loss / total, decisions), expected, **FP64)


def test_f19_against_the_other_samples_nash_mp_plays_itself():
    """The opponent is the policy of the iteration: self-play, whose rewards are SPPO's win rates, the mean over the two others of a group."""
    preference = preferences(normal(6), temperature=0.7)
    rewards, valid = win_rates(preference, (GROUP[:, None] == GROUP) & ~torch.eye(6, dtype=torch.bool))
    blocks = torch.stack([preference[:3, :3], preference[3:, 3:]])
    others = (blocks.sum(2) - blocks.diagonal(dim1=1, dim2=2)).flatten() / 2
    assert valid.all()
    torch.testing.assert_close(rewards, others, **FP64)
    torch.testing.assert_close(win_rate(preference, GROUP, EVERYONE), others, **FP64)


@pytest.mark.parametrize("normalize", [False, True])
def test_g1_without_weight_it_is_dr_grpo_or_grpo(normalize):
    rewards, present = normal(6, seed=1), torch.arange(3) < torch.tensor([3, 1, 2, 3, 2, 1])[:, None]
    anchor = torch.zeros(6, 3, dtype=torch.int64) + GROUP[:, None]
    found = gigpo(rewards, normal(6, 3, seed=2), GROUP, EVERYONE, present, anchor, 2, 2, weight=0.0, normalize=normalize, eps=0.0)
    whole = group_zscore(rewards, GROUP, EVERYONE, 2, ddof=1) if normalize else group_mean(rewards, GROUP, EVERYONE, 2)
    torch.testing.assert_close(found, torch.where(present, whole[:, None], 0.0), **FP64)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_item_28_pair_losses_add_over_parts(name):
    columns = {
        field: normal(4, 1, seed=number)
        for number, field in enumerate(
            (
                *("chosen", "rejected", "reference_chosen", "reference_rejected", "previous_chosen", "previous_rejected", "chosen_reward", "rejected_reward"),
                *("calibration", "revising_chosen", "revising_rejected"),
            )
        )
    }
    columns["chosen"].requires_grad_()
    columns |= {"preference": torch.rand(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64), "mask": torch.ones(4, 1, dtype=torch.bool)}
    whole = PAIR_LOSSES[name](Pairs(**columns), beta=0.3).loss.mean()
    parts = sum(
        PAIR_LOSSES[name](Pairs(**{key: value[rows] for key, value in columns.items()}), beta=0.3).loss.sum() / 4 for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(parts, whole, **FP64)
    one, other = (torch.autograd.grad(value, columns["chosen"])[0] for value in (parts, whole))
    torch.testing.assert_close(one, other, **FP64)
    assert one.ne(0).any()
