"""mean_ci95: values by hand, and the share of simulated intervals that contain the true mean."""

import math
import random

import pytest
import scipy.stats
import torch

from flowrl.statistics import mean_ci95

EXACT = {"rel": 1e-12, "abs": 1e-12}
Z = scipy.stats.norm.ppf(0.975)


def test_independent_values_give_the_standard_error_of_the_mean():
    # mean 2.5, sum of squared residuals 5, variance 5/3, standard error sqrt(5/3/4)
    mean, half = mean_ci95([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(Z * math.sqrt(5 / 12), **EXACT)


def test_clusters_of_equal_size_give_the_standard_error_of_their_means():
    # cluster means 0.5 and 3.5: their standard deviation is 3/sqrt(2), the standard error of two of them 1.5
    mean, half = mean_ci95([0.0, 1.0, 2.0, 5.0], clusters=["red", "red", "blue", "blue"])
    assert mean == 2.0
    assert half == pytest.approx(Z * 1.5, **EXACT)


def test_clusters_of_unequal_size_follow_the_sandwich_formula():
    # mean 2, residual sums -2 and +2, so sqrt(2/1 * (4 + 4)) / 3 = 4/3
    assert mean_ci95([0.0, 3.0, 3.0], clusters=[0, 1, 1]) == (2.0, pytest.approx(Z * 4 / 3, **EXACT))


def test_clusters_of_one_value_change_nothing():
    values = [0.3, 0.1, 0.9, 0.4]
    assert mean_ci95(values, clusters=["a", "b", "c", "d"]) == mean_ci95(values)


def test_tensors_are_labels_by_value_and_not_by_identity():
    values, clusters = torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor([7, 7, 8, 8])
    assert mean_ci95(values, clusters) == mean_ci95([0.0, 1.0, 2.0, 5.0], [0, 0, 1, 1])


def test_the_order_of_the_values_does_not_change_a_single_bit():
    rng = random.Random(0)
    pairs = [(rng.gauss(0, 1), rng.randrange(9)) for _ in range(200)]
    shuffled = rng.sample(pairs, len(pairs))
    first, second = (mean_ci95([v for v, _ in rows], [c for _, c in rows]) for rows in (pairs, shuffled))
    assert first == second


def test_one_value_or_one_cluster_has_no_interval():
    assert mean_ci95([0.5])[0] == 0.5
    assert math.isnan(mean_ci95([0.5])[1])
    assert math.isnan(mean_ci95([0.5, 0.7], clusters=[1, 1])[1])


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [([], None, "at least one"), ([1.0, math.nan], None, "finite"), ([1.0, 2.0], [0], "2 values but 1 cluster labels")],
)
def test_unusable_input_is_refused(values, clusters, message):
    with pytest.raises(ValueError, match=message):
        mean_ci95(values, clusters)


def test_clustered_intervals_cover_the_truth_as_often_as_stated_and_naive_ones_do_not():
    """40 prompts with 4 images each; prompts differ (standard deviation 1) more than the images of a prompt (0.5); the true mean is 0."""
    rng = random.Random(1)
    num_prompts, num_images, rounds = 40, 4, 1000
    clusters = [prompt for prompt in range(num_prompts) for _ in range(num_images)]
    covered = {"clustered": 0, "naive": 0}
    for _ in range(rounds):
        effects = [rng.gauss(0, 1) for _ in range(num_prompts)]
        values = [effects[prompt] + rng.gauss(0, 0.5) for prompt in clusters]
        for name, (mean, half) in {"clustered": mean_ci95(values, clusters), "naive": mean_ci95(values)}.items():
            covered[name] += abs(mean) <= half
    expected = 2 * scipy.stats.t.cdf(Z, num_prompts - 1) - 1  # 0.943: the normal quantile used with an estimated variance
    assert covered["clustered"] / rounds == pytest.approx(expected, abs=0.025)  # 3.4 standard errors of 1000 rounds
    assert covered["naive"] / rounds < 0.8
