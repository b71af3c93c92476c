"""Rules that make pairs of groups: by hand, against each other, caps and seeds, edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.pairing_rules import PAIRING_RULES, constrained_pairs, make_pairs
from flowrl.core.selection import best_and_worst

REWARDS = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 4.0, 7.0, 0.5], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3])
VALID = torch.tensor([True] * 8)
ALL = [(1, 0), (1, 2), (2, 0), (3, 5), (4, 5)]


def pairs(rule, rewards=REWARDS, group=GROUP, valid=VALID, **settings):
    winner, loser = make_pairs(rewards, group, valid, rule=rule, **settings)
    assert winner.dtype == loser.dtype == torch.int64
    return list(zip(winner.tolist(), loser.tolist(), strict=True))


@pytest.mark.parametrize(
    ("rule", "settings", "expected"),
    [
        ("best_worst", {}, [(1, 0), (3, 5)]),  # of the equally good the first
        ("all", {}, ALL),
        ("threshold", {"threshold": 0.0}, ALL),
        ("threshold", {"threshold": 1.0}, [(1, 0)]),  # a difference of exactly 1 is not more than 1
        ("threshold", {"threshold": 9.0}, []),
        ("levels", {}, [(0, 1), (0, 2), (2, 1), (5, 3), (5, 4)]),
    ],
)
def test_rules_by_hand(rule, settings, expected):
    assert pairs(rule, **settings) == expected


def test_levels_of_trpa():
    # 1 format and answer right .. 4 format wrong: every better level against every worse one
    level = torch.tensor([1, 4, 2, 1, 2])
    assert pairs("levels", level, torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool)) == [
        (0, 1), (0, 2), (0, 4), (2, 1), (3, 1), (3, 2), (3, 4), (4, 1)
    ]  # fmt: skip


def test_best_worst_is_the_selection():
    generator = torch.Generator().manual_seed(0)
    rewards, group = torch.randint(0, 4, (30,), generator=generator).double(), torch.randint(0, 6, (30,), generator=generator)
    valid = torch.rand(30, generator=generator) < 0.8
    expected = best_and_worst(rewards, group, valid, 6).tolist()
    assert [list(pair) for pair in pairs("best_worst", rewards, group, valid)] == expected
    # the loop that knows samples that may only win, and contents, agrees with it
    everyone, different = torch.ones(30, dtype=torch.bool), torch.arange(30)
    assert [list(pair) for pair in pairs("best_worst", rewards, group, valid, may_lose=everyone)] == expected
    assert [list(pair) for pair in pairs("best_worst", rewards, group, valid, content=different)] == expected


def test_best_random_pairs_the_best_with_each_it_beats():
    group, valid = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool)
    rewards = torch.tensor([1.0, 4.0, 3.0, 4.0, 2.0])
    seen = {pairs("best_random", rewards, group, valid, seed=seed)[0] for seed in range(60)}
    assert seen == {(1, 0), (1, 2), (1, 4)}


def test_random_draws_each_pair_and_no_other():
    seen = [pairs("random", seed=seed) for seed in range(60)]
    assert all(len(found) == 2 for found in seen)
    assert {pair for found in seen for pair in found} == set(ALL)


def test_a_cap_is_a_subset_of_each_group_and_a_seed_repeats_it():
    generator = torch.Generator().manual_seed(1)
    rewards, group = torch.randn(40, generator=generator), torch.arange(4).repeat_interleave(10)
    valid = torch.ones(40, dtype=torch.bool)
    everything = pairs("all", rewards, group, valid)
    assert len(everything) == 4 * 45
    found = pairs("all", rewards, group, valid, cap=7, seed=3)
    assert set(found) < set(everything)
    assert [sum(group[w] == g for w, _ in found) for g in range(4)] == [7] * 4
    assert found == sorted(found, key=lambda pair: (group[pair[0]], *pair))
    assert found == pairs("all", rewards, group, valid, cap=7, seed=3)
    assert found != pairs("all", rewards, group, valid, cap=7, seed=4)
    assert pairs("random", rewards, group, valid, cap=7, seed=3) == found
    assert pairs("all", rewards, group, valid, cap=45) == everything


def test_a_groups_draw_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(2)
    rewards, group, valid = torch.randn(20, generator=generator), torch.arange(2).repeat_interleave(10), torch.ones(20, dtype=torch.bool)
    both = pairs("all", rewards, group, valid, cap=5, seed=9)
    alone = pairs("all", rewards, group, group == 1, cap=5, seed=9)
    assert [pair for pair in both if pair[0] >= 10] == alone


def test_dno_prct_a_teachers_answer_wins_and_never_loses():
    may_lose = torch.tensor([True, True, False, True, False, True, True, True])
    assert pairs("threshold", may_lose=may_lose) == [(1, 0), (2, 0), (3, 5), (4, 5)]
    # the worst is the teacher's: the best is paired with the worst of the others
    rewards, group, valid = torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    assert pairs("best_worst", rewards, group, valid, may_lose=torch.tensor([True, False, True])) == [(0, 2)]
    assert pairs("best_worst", rewards, group, valid, may_lose=torch.zeros(3, dtype=torch.bool)) == []


def test_identical_responses_are_no_pair_whatever_the_judge_says():
    content = torch.tensor([7, 7, 8, 9, 9, 9, 1, 1])
    assert pairs("all", content=content) == [(1, 2), (2, 0)]
    assert pairs("best_worst", content=content) == [(1, 2)]


@pytest.mark.parametrize("rule", PAIRING_RULES)
def test_ties_singletons_and_samples_without_a_reward_give_no_pair(rule):
    same, group = torch.ones(4), torch.tensor([0, 0, 0, 1])
    assert pairs(rule, same, group, torch.ones(4, dtype=torch.bool)) == []
    assert pairs(rule, torch.arange(4.0), group, torch.tensor([False, True, False, True])) == []
    assert pairs(rule, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool)) == []
    nan = torch.tensor([torch.nan, 1.0, 2.0, torch.nan])
    assert set(pairs(rule, nan, torch.zeros(4, dtype=torch.int64), torch.tensor([False, True, True, False]))) <= {(2, 1), (1, 2)}


def test_item_29_pairs_follow_a_permutation():
    order = torch.tensor([5, 2, 7, 0, 3, 1, 6, 4])
    moved = pairs("all", REWARDS[order], GROUP[order], VALID[order])
    assert {(order[i].item(), order[j].item()) for i, j in moved} == set(ALL)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=14), st.sampled_from(PAIRING_RULES), st.integers(0, 3))
def test_every_rule_makes_honest_pairs(samples, rule, seed):
    rewards = torch.tensor([float(s[0]) for s in samples])
    group, valid = torch.tensor([s[1] for s in samples], dtype=torch.int64), torch.tensor([s[2] for s in samples], dtype=torch.bool)
    sign = -1 if rule == "levels" else 1
    every = {
        (i, j)
        for i in range(len(samples))
        for j in range(len(samples))
        if valid[i] and valid[j] and group[i] == group[j] and sign * rewards[i] > sign * rewards[j]
    }
    found = pairs(rule, rewards, group, valid, seed=seed)
    assert len(found) == len(set(found))
    assert set(found) <= every
    if rule in ("all", "threshold", "levels"):
        assert set(found) == every
    else:
        assert {group[i].item() for i, _ in found} == {group[i].item() for i, _ in every}
        assert len(found) == len({group[i].item() for i, _ in every})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "worst"}, "unknown pairing rule 'worst'; known: best_worst, best_random, all, threshold, random, levels"),
        ({"rule": "all", "cap": 0}, "threshold >= 0 and cap >= 1, got 0.0 and 0"),
        ({"rule": "threshold", "threshold": -1.0}, "threshold >= 0 and cap >= 1, got -1.0 and None"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_pairs(REWARDS, GROUP, VALID, **settings)


def test_f20_codpo_pairs_the_best_that_keeps_the_rules_with_the_worst_that_breaks_one():
    satisfied = torch.tensor([True, False, False, True, True, True, False, False])
    valid = VALID.clone()
    winner, loser = constrained_pairs(REWARDS, satisfied, GROUP, valid)
    # group 0: the only good one scores lowest, and wins; groups 1 .. 3 lack one kind
    assert (winner.tolist(), loser.tolist()) == ([0], [2])
    satisfied = torch.tensor([True, True, False, True, True, False, False, False])
    winner, loser = constrained_pairs(REWARDS, satisfied, GROUP, valid)
    assert (winner.tolist(), loser.tolist()) == ([1, 3], [2, 5])
    valid[5] = False
    winner, loser = constrained_pairs(REWARDS, satisfied, GROUP, valid)
    assert (winner.tolist(), loser.tolist()) == ([1], [2])
    winner, loser = constrained_pairs(REWARDS, torch.zeros(8, dtype=torch.bool), GROUP, valid)
    assert winner.shape == loser.shape == (0,)
    assert winner.dtype == torch.int64
