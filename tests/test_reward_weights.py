"""Weights of rewards that change during training: what evaluations and gradients do to them, their state, and what they do to advantages."""

import math

import pytest
import torch

from flowrl.config import Config
from flowrl.reward_weights import RewardWeights


def weights_of(rewards, **section):
    return RewardWeights(Config.model_validate({"run_dir": "unused", "rewards": rewards, "reward_weights": section}))


def test_fixed_weights_are_those_of_the_config():
    fixed = weights_of({"scene": 2.0, "ink": 0.0})
    fixed.evaluated("train", {"scene": 5.0, "ink": 1.0})
    assert (fixed.weights, fixed.names, fixed.factor, fixed.due(5)) == ({"scene": 2.0, "ink": 0.0}, ("scene",), 1.0, False)


def test_the_factor_follows_what_an_evaluation_adds_to_the_front():
    rule = weights_of({"scene": 1.0, "jpeg_compressibility": -2.0, "ink": 0.0}, kind="hypervolume", split="eval")
    rule.evaluated("train", {"scene": 9.0, "jpeg_compressibility": -9.0, "ink": 1.0})  # another split says nothing
    assert rule.factor == 1
    rule.evaluated("eval", {"scene": 1.0, "jpeg_compressibility": 4.0, "ink": 1.0})  # the reference
    assert rule.factor == 1
    rule.evaluated("eval", {"scene": 1.5, "jpeg_compressibility": 3.0, "ink": 0.0})  # 0.5 higher, and 1 lower where low is good: volume 0.5
    assert rule.factor == pytest.approx(0.5 + 1.5 * math.tanh(0.5))
    rule.evaluated("eval", {"scene": 1.2, "jpeg_compressibility": 3.5, "ink": 0.0})  # dominated
    assert rule.factor == 0.5
    again = weights_of({"scene": 1.0, "jpeg_compressibility": -2.0, "ink": 0.0}, kind="hypervolume", split="eval")
    again.load_state_dict(rule.state_dict())
    for each in (rule, again):
        each.evaluated("eval", {"scene": 2.0, "jpeg_compressibility": 3.5, "ink": 0.0})  # 1 x 0.5, of which 0.5 x 0.5 is known
        assert each.factor == pytest.approx(0.5 + 1.5 * math.tanh(0.25))


def test_a_configured_reference_counts_from_the_first_evaluation():
    rule = weights_of({"scene": 1.0, "ink": 1.0}, kind="hypervolume", reference={"scene": 0.0, "ink": 0.0})
    rule.evaluated("train", {"scene": 2.0, "ink": 1.0})
    assert rule.factor == pytest.approx(0.5 + 1.5 * math.tanh(2))


def test_gradients_move_the_weights_and_keep_their_sum():
    rule = weights_of({"scene": 1.0, "ink": 3.0, "scene_strict": 0.0}, kind="gradient", every=3, rate=0.1)
    assert [iteration for iteration in range(1, 10) if rule.due(iteration)] == [3, 6, 9]
    rule.learn(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))  # influences 4 + 2 and 2 + 2
    raw = 0.25 * math.exp(0.6), 0.75 * math.exp(0.4)
    assert rule.weights == {"scene": pytest.approx(4 * raw[0] / sum(raw)), "ink": pytest.approx(4 * raw[1] / sum(raw)), "scene_strict": 0.0}
    again = weights_of({"scene": 1.0, "ink": 3.0, "scene_strict": 0.0}, kind="gradient")
    again.load_state_dict(rule.state_dict())
    assert again.weights == rule.weights
