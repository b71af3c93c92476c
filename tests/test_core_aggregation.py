"""Hard constraints, hypervolumes and weights that change: by hand, against a slow reference, and their invariances."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.aggregation import batch_standardised, gate, hypervolume, hypervolume_gain, influences, meta_reward, mirror_descent, pareto_front

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
VALUES = torch.tensor([5.0, 1.0, 3.0, 9.0, 2.0, 7.0, 4.0, 6.0], dtype=torch.float64)
GOOD = torch.tensor([True, True, False, False, False, False, True, True])
VALID = torch.ones(8, dtype=torch.bool)


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# --- hard constraints


def test_violations_rank_below_everything_that_keeps_the_constraint():
    # group 0: the satisfying samples have 5 and 1, so violations get 1 - (5 - 1); group 1 has only violations, group 2 none
    assert gate(VALUES, GOOD, GROUP, VALID, 3).tolist() == [5, 1, -3, -3, 2, 7, 4, 6]


def test_one_satisfying_sample_stays_above_the_violations():
    satisfied = torch.tensor([True, False])
    assert gate(points([3.0, 100.0])[0], satisfied, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), 1).tolist() == [3, 2]


def test_a_sample_without_a_score_is_no_measure_for_violations():
    valid = VALID.clone()
    valid[1] = False
    values = VALUES.clone()
    values[1] = math.nan
    found = gate(values, GOOD, GROUP, valid, 3)
    assert found[2:4].tolist() == [4, 4]  # 5 alone satisfies: 5 - 1
    assert math.isnan(found[1])


@given(st.floats(-10, 10), st.floats(0.1, 10))
def test_the_gate_knows_no_scale_and_no_origin(shift, scale):
    group = torch.zeros(4, dtype=torch.int64)
    moved = gate(VALUES[:4] * scale + shift, GOOD[:4], group, VALID[:4], 1)
    torch.testing.assert_close(moved, gate(VALUES[:4], GOOD[:4], group, VALID[:4], 1) * scale + shift)


def test_standardisation_leaves_out_what_is_not_valid():
    valid = torch.tensor([True, True, False])
    found = batch_standardised(torch.tensor([1.0, 3.0, 77.0]), valid, mean=2.0, std=0.5, eps=0.5)
    assert found.tolist() == [-1, 1, 0]


# --- hypervolume


def test_hypervolumes_by_hand():
    origin = torch.zeros(2, dtype=torch.float64)
    assert hypervolume(points([2, 1]), origin) == 2
    assert hypervolume(points([2, 1], [1, 3]), origin) == 4  # 2 + 3 - the common unit square
    assert hypervolume(points([2, 1], [1, 3], [1, 1]), origin) == 4
    assert hypervolume(points([2, 1], [5, -1]), origin) == 2  # not above the reference everywhere
    assert hypervolume(points([-1, 5]), origin) == 0
    assert hypervolume(points([3, 4]), points([1, 1])[0]) == 6
    assert hypervolume(points([1, 1, 1], [2, 0.5, 0.5]), torch.zeros(3, dtype=torch.float64)) == 1.25  # 1 + 0.5 - 0.25
    assert hypervolume(points([3], [2]), torch.zeros(1, dtype=torch.float64)) == 3


@given(st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_hypervolume_is_that_of_inclusion_and_exclusion(dimensions, count, random):
    cloud = points(*[[random.randint(0, 4) / 2 for _ in range(dimensions)] for _ in range(count)])
    slow = 0.0
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            slow += (-1) ** (size + 1) * cloud[list(chosen)].amin(0).clamp_min(0).prod().item()
    assert hypervolume(cloud, torch.zeros(dimensions, dtype=torch.float64)) == pytest.approx(slow)


def test_a_dominated_point_adds_nothing_and_a_better_one_its_volume():
    front, origin = points([2, 1], [1, 3]), torch.zeros(2, dtype=torch.float64)
    assert hypervolume_gain(front, points([1, 1])[0], origin) == 0
    assert hypervolume_gain(front, points([2, 2])[0], origin) == 1
    assert hypervolume_gain(torch.zeros(0, 2, dtype=torch.float64), points([2, 2])[0], origin) == 4
    assert meta_reward(0) == 0.5
    assert meta_reward(1) == pytest.approx(0.5 + 1.5 * math.tanh(1))
    assert meta_reward(1e9) == 2


def test_the_front_keeps_what_nothing_dominates_and_one_of_equals():
    cloud = points([1, 3], [2, 1], [1, 1], [2, 1], [0, 4])
    assert pareto_front(cloud).tolist() == [[1, 3], [2, 1], [0, 4]]


# --- gradients


def test_influences_are_row_sums_of_the_gram_matrix():
    gradients = points([1, 0, 2], [3, 1, 0])  # Gram [[5, 3], [3, 10]]
    assert influences(gradients).tolist() == [8, 13]


def test_mirror_descent_by_hand_and_on_the_simplex():
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = mirror_descent(weights, points([math.log(3), 0])[0], 1.0)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5], dtype=torch.float64))  # 0.25 * 3 = 0.75
    torch.testing.assert_close(mirror_descent(weights, points([4, 4])[0], 2.0), weights)
    assert mirror_descent(weights, points([1, 9])[0], 0.3).sum().item() == pytest.approx(1)
