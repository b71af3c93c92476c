"""Credit of turns: by hand, special cases and identities of text.md (G1 to G4, G9, D15, section 12), edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.core.agent_credit import (
    gigpo,
    implicit_step_rewards,
    merged_advantages,
    number_keys,
    span_advantages,
    step_bonus,
    step_zscore,
    turn_advantages,
    turn_gains,
)
from flowrl.core.estimators import centre, scale

FP64 = {"rtol": 1e-11, "atol": 1e-12}
NAN = float("nan")
GROUP = torch.tensor([0, 0, 0, 1, 1])
PRESENT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
VALID = torch.ones(5, dtype=torch.bool)
UNIQUE = torch.arange(15).view(5, 3)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grpo(rewards, group=GROUP, valid=VALID, *, normalize=True, eps=1e-6, ddof=1):
    centred = centre("group", rewards, group, valid, 2)
    return scale("group_std" if normalize else "none", centred, rewards, group, valid, 2, eps=eps, ddof=ddof)


def spread(advantages, present=PRESENT):
    return torch.where(present, advantages[:, None], 0.0)


# --- keys ----------------------------------------------------------------------------------------------------------------------------------------


def test_equal_keys_of_one_group_have_equal_numbers():
    numbers, count = number_keys([["a", "b"], ["b"], ["a", ("c", 1)]], [0, 0, 1], 3)
    assert numbers.tolist() == [[0, 1, 0], [1, 0, 0], [2, 3, 0]]
    assert count == 4
    assert number_keys([[]], [0], 2)[0].tolist() == [[0, 0]]


# --- GiGPO, G1 -----------------------------------------------------------------------------------------------------------------------------------


def test_gigpo_by_hand():
    # episodes 1 and 3: -1 and 1. Step rewards 0, 1 | 2: returns with gamma 1/2 are 1/2, 1 | 2; the first steps share a state: -3/4, 3/4
    options = {"gamma": 0.5, "weight": 2.0}
    anchor, present = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[True, True], [True, False]])
    arguments = (tensor([1.0, 3.0]), tensor([[0.0, 1.0], [2.0, NAN]]), torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), present, anchor, 1, 2)
    assert gigpo(*arguments, **options).tolist() == [[-2.5, -1.0], [2.5, 0.0]]
    normalised = gigpo(*arguments, **options, normalize=True, eps=0.0, ddof=0)
    torch.testing.assert_close(normalised, tensor([[-3.0, -1.0], [3.0, 0.0]]), **FP64)


def test_gigpo_over_steps_lets_long_trajectories_weigh_more():
    anchor, present = torch.tensor([[0, 1, 2], [3, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]])
    arguments = (tensor([0.0, 4.0]), noise(2, 3), torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), present, anchor, 1, 4)
    assert gigpo(*arguments, episode_over="steps").tolist() == [[-1.0, -1.0, -1.0], [3.0, 0.0, 0.0]]  # mean of 0, 0, 0, 4
    assert gigpo(*arguments).tolist() == [[-2.0, -2.0, -2.0], [2.0, 0.0, 0.0]]


@pytest.mark.parametrize("normalize", [False, True])
def test_identity_33_gigpo_without_repeated_states_is_the_episodes_advantage(normalize):
    rewards = noise(5)
    result = gigpo(rewards, noise(5, 3, seed=1), GROUP, VALID, PRESENT, UNIQUE, 2, 15, normalize=normalize)
    torch.testing.assert_close(result, spread(grpo(rewards, normalize=normalize)), **FP64)


def test_g1_with_weight_0_repeated_states_do_not_matter():
    rewards, anchor = noise(5), torch.tensor([[0] * 3] * 3 + [[1] * 3] * 2)
    result = gigpo(rewards, noise(5, 3), GROUP, VALID, PRESENT, anchor, 2, 2, weight=0.0)
    torch.testing.assert_close(result, spread(grpo(rewards, normalize=False)), **FP64)
    assert not torch.allclose(gigpo(rewards, noise(5, 3), GROUP, VALID, PRESENT, anchor, 2, 2), result)


def test_g1_a_single_trajectory_has_0_or_its_reward():
    arguments = (tensor([5.0]), tensor([[1.0, 2.0]]), torch.tensor([0]), torch.tensor([True]), torch.tensor([[True, True]]), torch.tensor([[0, 1]]), 1, 2)
    for episode_over in ("trajectories", "steps"):
        assert gigpo(*arguments, episode_over=episode_over).tolist() == [[0.0, 0.0]]
    assert gigpo(*arguments, singleton="raw").tolist() == [[5.0, 5.0]]
    one = (tensor([5.0]), tensor([[1.0]]), torch.tensor([0]), torch.tensor([True]), torch.tensor([[True]]), torch.tensor([[0]]), 1, 1)
    assert gigpo(*one, episode_over="steps", singleton="raw").tolist() == [[5.0]]


def test_an_unknown_episode_is_named():
    with pytest.raises(ValueError, match="unknown episode_over 'tokens'"):
        gigpo(noise(5), noise(5, 3), GROUP, VALID, PRESENT, UNIQUE, 2, 15, episode_over="tokens")


# --- merged steps, G2 and G9, and G5 ---------------------------------------------------------------------------------------------------------------


def test_merged_steps_have_the_mean_advantage_by_hand():
    key = torch.tensor([[0, 1, 2], [0, 1, 0], [0, 0, 0], [3, 4, 5], [6, 4, 0]])
    result = merged_advantages(tensor([2.0, 1.0, -3.0, 1.0, -2.0]), key, PRESENT, VALID, 7)
    torch.testing.assert_close(result, tensor([[0.0, 1.5, 2.0], [0.0, 1.5, 0.0], [0.0, 0.0, 0.0], [1.0, -0.5, 1.0], [-2.0, -0.5, 0.0]]), **FP64)


def test_g2_salt_without_shared_edges_is_grpo_and_so_is_g9_without_branches():
    advantages = grpo(noise(5))
    torch.testing.assert_close(merged_advantages(advantages, UNIQUE, PRESENT, VALID, 15), spread(advantages), **FP64)


def test_g2_an_edge_that_all_share_has_0():
    advantages = grpo(noise(5))
    key = torch.where(torch.arange(3) == 0, GROUP[:, None], UNIQUE + 2)
    result = merged_advantages(advantages, key, PRESENT, VALID, 17)
    torch.testing.assert_close(result[:, 0], torch.zeros(5, dtype=torch.float64), **FP64)
    torch.testing.assert_close(result[:, 1:], spread(advantages)[:, 1:], **FP64)


def test_merged_steps_do_not_count_trajectories_without_a_reward():
    key = torch.zeros(3, 1, dtype=torch.int64)
    result = merged_advantages(tensor([1.0, 3.0, NAN]), key, torch.ones(3, 1, dtype=torch.bool), torch.tensor([True, True, False]), 1)
    assert result.tolist() == [[2.0], [2.0], [0.0]]


# --- IGPO, G3 ------------------------------------------------------------------------------------------------------------------------------------


def test_turn_gains_by_hand():
    log_prob = tensor([[0.1, 0.4, 0.3], [0.2, 0.7, NAN], [0.5, NAN, NAN]]).log()
    torch.testing.assert_close(turn_gains(log_prob, PRESENT[:3]), tensor([[0.3, -0.1, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]), **FP64)


@given(st.integers(0, 1000))
@settings(max_examples=25)
def test_identity_34_turn_gains_telescope(seed):
    log_prob = -noise(5, 3, seed=seed).abs()
    last = log_prob.gather(1, PRESENT.sum(1, keepdim=True) - 1)[:, 0]
    torch.testing.assert_close(turn_gains(log_prob, PRESENT).sum(1), last.exp() - log_prob[:, 0].exp(), **FP64)


def turns(gains, outcome, **options):
    return turn_advantages(gains, outcome, GROUP, VALID, PRESENT, 2, **options)


def test_turn_advantages_by_hand():
    # prompt 1: rewards 1, 2, 10 and 3, 20; returns 13, 12, 10 and 23, 20
    gains = torch.cat([torch.zeros(3, 3, dtype=torch.float64), tensor([[1.0, 2.0, 99.0], [3.0, 99.0, 99.0]])])
    gains = torch.where(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]).bool(), gains, 0.0)  # as turn_gains gives them
    outcome = tensor([0.0, 0.0, 0.0, 5.0, 10.0])
    result = turns(gains, outcome, outcome_weight=2.0)
    torch.testing.assert_close(result[3:], tensor([[-5.0, -4.0, 5.0], [5.0, 4.0, 0.0]]), **FP64)  # means 18, 16, 5: the second is over
    result = turns(gains, outcome, outcome_weight=2.0, form="first", ddof=0, eps=0.0)
    torch.testing.assert_close(result[3:], tensor([[-1.0, -1.2, -1.6], [1.0, 0.4, 0.0]]), **FP64)  # mean 18, std 5
    rewards = tensor([1.0, 2.0, 10.0, 3.0, 20.0])
    result = turns(gains, outcome, outcome_weight=2.0, form="joint", gamma=0.5, eps=0.0)
    z = (rewards - rewards.mean()) / rewards.std()
    expected = torch.stack([z[0] + 0.5 * z[1] + 0.25 * z[2], z[1] + 0.5 * z[2], z[2], z[3] + 0.5 * z[4], z[4], tensor(0.0)]).view(2, 3)
    torch.testing.assert_close(result[3:], expected, **FP64)
    assert (result[:3] == 0).all()


def test_g3_constant_gold_probability_is_grpo_on_the_outcome():
    outcome, gains = noise(5), turn_gains(torch.full((5, 3), -0.7, dtype=torch.float64), PRESENT)
    torch.testing.assert_close(turns(gains, outcome, form="first"), spread(grpo(outcome)), **FP64)
    full = torch.ones_like(PRESENT)
    result = turn_advantages(gains, outcome, GROUP, VALID, full, 2)
    torch.testing.assert_close(result, spread(grpo(outcome, normalize=False), full), **FP64)


def test_g3_a_single_turn_has_the_outcome_only():
    outcome, present = noise(5), torch.arange(3).expand(5, 3) < 1
    gains = turn_gains(noise(5, 3), present)
    for form, normalize in (("position", False), ("first", True), ("joint", True)):
        result = turn_advantages(gains, outcome, GROUP, VALID, present, 2, form=form)
        torch.testing.assert_close(result, spread(grpo(outcome, normalize=normalize), present), **FP64)


@pytest.mark.parametrize("form", ["position", "first", "joint"])
def test_g3_one_valid_trajectory_has_0_and_invalid_ones_do_not_count(form):
    gains, outcome = noise(5, 3), noise(5)
    outcome[4] = NAN
    result = turn_advantages(gains, outcome, GROUP, ~outcome.isnan(), PRESENT, 2, form=form)
    assert (result[3:] == 0).all()
    torch.testing.assert_close(result[:3], turns(gains, noise(5), form=form)[:3], **FP64)


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="unknown form 'last'"):
        turns(noise(5, 3), noise(5), form="last")


# --- iStar, G4 -----------------------------------------------------------------------------------------------------------------------------------


def test_implicit_step_rewards_by_hand():
    step, mask = torch.tensor([[0, 0, 1, 5]]), torch.tensor([[True, True, True, False]])
    result = implicit_step_rewards(tensor([[-1.0, -2.0, -3.0, NAN]]), tensor([[-2.0, -4.0, -2.0, 0.0]]), step, mask, 3, beta=0.5)
    assert result.tolist() == [[1.5, -0.5, 0.0]]


def test_a_step_bonus_by_hand():
    present, valid, group = torch.tensor([[True, True], [True, False]]), torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    result = step_bonus(tensor([1.0, -1.0]), tensor([[0.0, 1.0], [2.0, NAN]]), group, valid, present, 1, weight=0.5, eps=0.0)
    torch.testing.assert_close(result, tensor([[0.5, 1.0], [-0.5, 0.0]]), **FP64)  # mean 1, std 1


def test_g4_with_weight_0_it_is_grpo():
    advantages = grpo(noise(5))
    torch.testing.assert_close(step_bonus(advantages, noise(5, 3), GROUP, VALID, PRESENT, 2, weight=0.0), spread(advantages), **FP64)


# --- Step-GRPO and Step-SRPO, D15 ----------------------------------------------------------------------------------------------------------------


def test_d15_steps_are_compared_with_the_same_step_of_those_that_have_it():
    rewards = tensor([[1.0, 5.0, 9.0], [2.0, 7.0, NAN], [6.0, NAN, NAN], [0.0, 1.0, 2.0], [4.0, 1.0, NAN]])
    result = step_zscore(rewards, GROUP, VALID, PRESENT, 2, normalize=False)
    torch.testing.assert_close(result, tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [3.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), **FP64)
    result = step_zscore(rewards, GROUP, VALID, PRESENT, 2, eps=0.0, ddof=0)
    torch.testing.assert_close(result[:, 1], tensor([-1.0, 1.0, 0.0, 0.0, 0.0]), **FP64)


def test_d15_one_step_is_grpo():
    rewards, present = noise(5), torch.ones(5, 1, dtype=torch.bool)
    torch.testing.assert_close(step_zscore(rewards[:, None], GROUP, VALID, present, 2)[:, 0], grpo(rewards), **FP64)


def test_d15_the_judges_span_gets_both_advantages():
    is_judge, mask = torch.tensor([[True, True, False, False]]), torch.tensor([[True, True, True, False]])
    assert span_advantages(tensor([1.0]), tensor([-0.25]), is_judge, mask).tolist() == [[0.75, 0.75, -0.25, 0.0]]


# --- edges -----------------------------------------------------------------------------------------------------------------------------------------

EVERY = {
    "gigpo": lambda r, s, g, v, p, k: gigpo(r, s, g, v, p, k, 2, 15, normalize=True),
    "gigpo steps": lambda r, s, g, v, p, k: gigpo(r, s, g, v, p, k, 2, 15, episode_over="steps"),
    "merged": lambda r, s, g, v, p, k: merged_advantages(r, k, p, v, 15),
    "position": lambda r, s, g, v, p, k: turn_advantages(s, r, g, v, p, 2),
    "first": lambda r, s, g, v, p, k: turn_advantages(s, r, g, v, p, 2, form="first", gamma=0.5),
    "joint": lambda r, s, g, v, p, k: turn_advantages(s, r, g, v, p, 2, form="joint"),
    "bonus": lambda r, s, g, v, p, k: step_bonus(r, s, g, v, p, 2),
    "zscore": lambda r, s, g, v, p, k: step_zscore(s, g, v, p, 2),
}
SHARED = torch.tensor([[0, 1, 2], [0, 3, 0], [0, 0, 0], [4, 5, 6], [4, 7, 0]])


@pytest.mark.parametrize("name", EVERY)
def test_trajectories_without_a_reward_and_missing_steps_get_0_and_do_not_move_the_others(name):
    rewards, steps = noise(5), noise(5, 3)
    clean = EVERY[name](rewards, steps, GROUP, VALID, PRESENT, SHARED)
    more = (torch.cat([rewards, tensor([NAN])]), torch.cat([torch.where(PRESENT, steps, NAN), torch.full((1, 3), NAN, dtype=torch.float64)]))
    result = EVERY[name](
        *more, torch.cat([GROUP, torch.tensor([0])]), torch.tensor([True] * 5 + [False]), torch.cat([PRESENT, PRESENT[:1]]), torch.cat([SHARED, SHARED[:1]])
    )
    torch.testing.assert_close(result[:5], clean, **FP64)
    assert (result[5] == 0).all()
    assert (result[:5][~PRESENT] == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_identity_29_the_order_of_trajectories_does_not_matter(name):
    order = torch.tensor([3, 1, 4, 0, 2])
    everything = (noise(5), noise(5, 3), GROUP, VALID, PRESENT, SHARED)
    torch.testing.assert_close(EVERY[name](*(part[order] for part in everything)), EVERY[name](*everything)[order], **FP64)


@pytest.mark.parametrize("name", EVERY)
def test_equal_rewards_teach_nothing(name):
    # the forms of IGPO compare turns that are not equal where trajectories are of unequal length, or discounted
    present = torch.arange(3).expand(5, 3) < 1 if name in ("position", "first", "joint") else PRESENT
    rewards = torch.full((5,), 0.0 if name in ("merged", "bonus") else 0.1, dtype=torch.float64)  # these two are given advantages
    result = EVERY[name](rewards, torch.zeros(5, 3, dtype=torch.float64), GROUP, VALID, present, SHARED)
    assert torch.equal(result, torch.zeros(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", EVERY)
def test_float32_stays_float32(name):
    assert EVERY[name](noise(5).float(), noise(5, 3).float(), GROUP, VALID, PRESENT, SHARED).dtype == torch.float32
