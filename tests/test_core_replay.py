"""Samples used again, and hints: which, how often, in whose place; nothing happens where nothing is needed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import NAN, flags, ids, row, seeded

from flowrl.core.hints import GHPO, GUIDE, SCAF, HintLadder, HintRequest, HintRule, Replacement, unsolved_groups
from flowrl.core.replay import ReplayBuffer, Swap, replay_swaps, resample, resample_weights

# --- PF-PPO -----------------------------------------------------------------------------------------------------------------------------------------

REWARDS, VALID = row(-2, 1, 0.5, 1, NAN), flags(1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("power", [4, 1, 0.25, 1, 0]), ("extremes", [1, 1, 0, 1, 0]), ("best_or_any", [0.1, 0.4, 0.1, 0.4, 0]), ("best", [0, 1, 0, 1, 0])],
)
def test_resampling_weights_e7_by_hand(kind, weights):
    assert resample_weights(REWARDS, VALID, kind=kind).tolist() == pytest.approx(weights)


def test_resampling_weights_e7_know_their_kinds_and_the_power():
    assert resample_weights(REWARDS, VALID, power=1.0).tolist() == [2, 1, 0.5, 1, 0]
    with pytest.raises(ValueError, match="best_or_any"):
        resample_weights(REWARDS, VALID, kind="worst")


@pytest.mark.parametrize("weights", [row(1, 1, 1, 1, 1), row(0, 0, 0, 0, 0)])
def test_resampling_e7_with_equal_weights_is_a_bootstrap_of_who_has_a_score(weights):
    found = resample(weights, VALID, 4000, seeded())
    assert (torch.bincount(found, minlength=5) / 4000).tolist() == pytest.approx([0.25] * 4 + [0], abs=0.03)


def test_resampling_e7_follows_the_weights_and_draws_nothing_from_nobody():
    found = resample(resample_weights(REWARDS, VALID), VALID, 4000, seeded())
    assert (torch.bincount(found, minlength=5) / 4000).tolist() == pytest.approx([0.64, 0.16, 0.04, 0.16, 0], abs=0.03)
    assert len(resample(row(1, 1), flags(0, 0), 5, seeded())) == 0


# --- ARPO -------------------------------------------------------------------------------------------------------------------------------------------


def test_replay_buffer_e7_keeps_the_last_successes_of_each_task():
    buffer = ReplayBuffer(capacity=2).updated(["a", "a", "b", "a", "a", "a"], [1, 2, 3, 4, 5, 6], row(1, 0.5, 0.1, 0, 7, 2), flags(1, 1, 1, 1, 0, 1))
    assert buffer.stored == {"a": (2, 6)}
    assert ReplayBuffer.from_state(json.loads(json.dumps(buffer.state_dict()))) == buffer
    assert ReplayBuffer().stored == {}


def test_replay_swaps_e7_help_groups_that_failed_as_a_whole():
    buffer = ReplayBuffer(stored={"a": ("x",), "b": ("y",), "d": ("z",)})
    tasks = ["a", "b", "c", "d", "a", "b"]
    rewards = row(0, 0, 0, 1, 0, 0, 0, 0, 0.3, 0.3, NAN)
    group = ids(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5)
    valid = flags(1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0)
    # 1 has a success, 2 nothing stored, 3 gives up its sample without a score, 4 has a mean of 0.3, 5 no score
    assert replay_swaps(buffer, tasks, rewards, group, valid, seeded()) == [Swap(0, "x"), Swap(7, "z")]
    assert replay_swaps(ReplayBuffer(), tasks, rewards, group, valid, seeded()) == []  # T: empty buffer


def test_replay_swaps_e7_choose_at_random_below_both_limits():
    buffer = ReplayBuffer(stored={"a": (0, 1, 2, 3)})
    args = (ids(0, 0), flags(1, 1))
    generator = seeded()
    found = torch.tensor([replay_swaps(buffer, ["a"], row(0, 0), *args, generator)[0].handle for _ in range(2000)])
    assert (torch.bincount(found) / 2000).tolist() == pytest.approx([0.25] * 4, abs=0.04)
    assert replay_swaps(buffer, ["a"], row(0.1, 0.21), *args, seeded()) == []  # std (ddof 0) 0.055
    assert len(replay_swaps(buffer, ["a"], row(0.1, 0.19), *args, seeded())) == 1  # std 0.045, mean 0.145
    assert replay_swaps(buffer, ["a"], row(0.2, 0.2), *args, seeded()) == []  # the mean must be below


# --- hints ------------------------------------------------------------------------------------------------------------------------------------------

UNSOLVED = flags(0, 1, 0, 1)
MEMBERS = [[0, 1], [2, 3], [4, 5], [6, 7]]
SIZES = [2, 2, 2, 2]


def test_unsolved_groups_e6():
    rewards, group = row(0, 1, 0, 0, -1, 0, NAN, NAN, 1), ids(0, 0, 1, 1, 2, 2, 2, 3, 3)
    valid = flags(1, 1, 1, 1, 1, 1, 0, 0, 0)
    assert unsolved_groups(rewards, group, valid, 5).tolist() == [False, True, True, False, False]
    assert unsolved_groups(rewards, group, valid, 5, threshold=1.0).tolist() == [True, True, True, False, False]


def test_scaf_e6_asks_all_levels_after_the_warmup():
    assert HintLadder.start(SCAF, UNSOLVED, 50).requests(SCAF, SIZES) == []
    asked = HintLadder.start(SCAF, UNSOLVED, 51).requests(SCAF, SIZES)
    assert asked == [HintRequest(number, level, 1) for number in (1, 3) for level in range(12)]
    assert SCAF.levels[0] == 1 and SCAF.levels[-1] == 12


def test_scaf_e6_puts_the_success_with_the_least_help_in_place_of_one_failure():
    ladder = HintLadder.start(SCAF, UNSOLVED, 51)
    solved = [False] * 24
    solved[5] = solved[9] = True  # group 1: levels 6 and 10; group 3: no level
    replacements, ladder = ladder.advance(SCAF, solved, MEMBERS)
    assert replacements == [Replacement(group=1, level=5, candidate=5, sample=2)]
    assert ladder == HintLadder() and ladder.requests(SCAF, SIZES) == []


def test_ghpo_e6_climbs_until_the_whole_group_can_be_replaced():
    ladder = HintLadder.start(GHPO, UNSOLVED, 1)
    assert ladder.requests(GHPO, SIZES) == [HintRequest(1, 0, 2), HintRequest(3, 0, 2)]
    replacements, ladder = ladder.advance(GHPO, [False, False, False, True], MEMBERS)
    assert replacements == [Replacement(3, 0, 2, 6), Replacement(3, 0, 3, 7)]
    assert ladder.requests(GHPO, SIZES) == [HintRequest(1, 1, 2)]
    assert HintLadder.from_state(json.loads(json.dumps(ladder.state_dict()))) == ladder
    nothing, ladder = ladder.advance(GHPO, [False, False], MEMBERS)
    assert nothing == [] and ladder.requests(GHPO, SIZES) == [HintRequest(1, 2, 2)]
    given_up, ladder = ladder.advance(GHPO, [False, False], MEMBERS)
    assert given_up == [] and ladder == HintLadder()  # E: no hint helps, the group stays as it was
    assert GHPO.levels == (0.25, 0.5, 0.75)


def test_guide_e6_adds_guided_samples_beside_the_group():
    rule = HintRule(levels=(1.0,), climb="step", tries=3, place="append", trains_hinted=False)
    ladder = HintLadder.start(rule, UNSOLVED, 1)
    replacements, ladder = ladder.advance(rule, [True, False, True, False, False, False], MEMBERS)
    assert replacements == [Replacement(1, 0, i, None) for i in range(3)] + [Replacement(3, 0, i, None) for i in range(3, 6)]
    assert ladder == HintLadder()
    assert not GUIDE.trains_hinted and SCAF.trains_hinted and GHPO.trains_hinted


def test_hints_e6_that_ask_all_levels_replace_a_group_by_the_lowest_that_helps():
    rule = HintRule(levels=(0.25, 0.5, 0.75), climb="all", tries=None, place="group", trains_hinted=True)
    ladder = HintLadder.start(rule, flags(0, 1), 1)
    replacements, ladder = ladder.advance(rule, [False, False, False, True, True, True], MEMBERS)
    assert replacements == [Replacement(1, 1, 2, 2), Replacement(1, 1, 3, 3)]
    assert ladder == HintLadder()


@given(st.sampled_from([SCAF, GHPO, GUIDE]), st.integers(1, 100))
def test_hints_e6_that_are_never_needed_change_nothing(rule, step):
    ladder = HintLadder.start(rule, torch.zeros(4, dtype=torch.bool), step)
    assert ladder.requests(rule, SIZES) == []
    assert ladder.advance(rule, [], MEMBERS) == ([], HintLadder())


@given(st.sampled_from([SCAF, GHPO, GUIDE]), st.integers(0, 10_000))
def test_hints_e6_end_and_replace_each_sample_once(rule, seed):
    generator, ladder, replaced, rounds = seeded(seed), HintLadder.start(rule, UNSOLVED, 99), [], 0
    while asked := ladder.requests(rule, SIZES):
        solved = (torch.rand(sum(request.tries for request in asked), generator=generator) < 0.1).tolist()
        new, ladder = ladder.advance(rule, solved, MEMBERS)
        assert len({entry.candidate for entry in new}) == len(new)
        assert all(entry.sample is None or entry.sample in MEMBERS[entry.group] for entry in new)
        replaced += [entry.sample for entry in new if entry.sample is not None]
        rounds += 1
    assert rounds <= len(rule.levels)
    assert len(set(replaced)) == len(replaced)


def test_hints_e6_refuse_a_wrong_number_of_results_and_a_rule_that_cannot_be():
    with pytest.raises(ValueError, match="asked for"):
        HintLadder.start(GHPO, UNSOLVED, 1).advance(GHPO, [True], MEMBERS)
    with pytest.raises(ValueError, match="tries"):
        HintRule(levels=(1.0,), climb="step", tries=2, place="group", trains_hinted=True)
