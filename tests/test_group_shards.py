"""Groups that are sampled and trained in parts: each part may be another process's, what is compared are whole groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from drills import begin, move

from flowrl.config import Config
from flowrl.trainer import Trainer
from flowrl.types import UserError

Configure = Callable[..., Config]
PARTS = "rollout={plan: chain, num_steps: 4, groups_per_iteration: 2, group_size: 4, group_shards: 2}"
ZSCORE = "advantage={centre: group, scale: group_std, eps: 1.0e-12}"
REWARDS = [1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 0.0]


def test_the_advantages_of_two_parts_are_those_of_the_whole_group(configure: Configure) -> None:
    trainer = Trainer(configure(PARTS, ZSCORE))
    drill = begin(trainer, rewards=REWARDS)
    expected = (torch.tensor(REWARDS[:4], dtype=torch.float64) - 3) / 3.5**0.5  # deviations -2, -1, 0, 3: variance 14 / 4
    edge, leaf = drill.rollout.leaf_edge.unbind(1)
    assert len(edge) == 8 * 3
    torch.testing.assert_close(drill.assignment.advantages[edge], torch.cat([expected, torch.zeros(4, dtype=torch.float64)])[leaf].float())


@pytest.mark.parametrize(
    "settings",
    [
        [PARTS, "objective={updates_per_iteration: 2, inner_epochs: 2}", "kl.weight=0.1"],
        ["method=awm", PARTS.replace("chain", "ode"), "matching.num_times=2", "objective.updates_per_iteration=3"],
        [PARTS, "selection.fraction=0.5"],
    ],
    ids=["chain", "awm", "fraction"],
)
def test_no_row_is_evaluated_twice(configure: Configure, settings: list[str]) -> None:
    trainer = Trainer(configure(*settings))
    for iteration in (1, 2):
        metrics, _ = trainer.iterate(iteration)
        assert metrics["nfe/used"] == metrics["nfe/minimum"]
    assert metrics["images"] == 16
    assert metrics["reward/zero_std_groups"] == 0


def test_groups_without_spread_are_counted_as_groups(configure: Configure) -> None:
    trainer = Trainer(configure(PARTS, "rewards=[toys:constant]"))
    metrics, _ = trainer.iterate(1)
    assert metrics["reward/zero_std_groups"] == 2  # and not 4 parts


def test_the_gradient_is_that_of_whole_groups(configure: Configure) -> None:
    """The same samples, dealt to two parts of two: the loss knows nothing of parts."""
    settings = [ZSCORE, "objective.updates_per_iteration=1", "ema=null"]
    drill = begin(move(Trainer(configure(PARTS, *settings))), rewards=REWARDS)
    r = drill.rollout
    joined = dataclasses.replace(r, leaf_group=r.leaf_group // 2, leaf_set=r.leaf_set // 2, row_group=r.row_group // 2)
    whole = begin(move(Trainer(configure(PARTS.replace("group_shards: 2", "group_shards: 1"), *settings))), rewards=REWARDS, rollout=joined)
    parts = drill.gradient()
    for a, b in zip(parts, whole.gradient(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert max(a.abs().max() for a in parts) > 1e-4


def test_both_parts_of_a_group_have_its_prompt_and_other_noise(configure: Configure) -> None:
    trainer = Trainer(configure(PARTS))
    groups = trainer.engine.groups(1)
    assert len(groups) == 4 and groups[0] == groups[1] and groups[2] == groups[3]
    leaves = begin(trainer).rollout.leaves
    assert len({tuple(leaf.flatten().tolist()) for leaf in leaves}) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rollout={group_size: 4, group_shards: 3}"], "4 samples cannot be shared by 3 parts; use a divisor of group_size"),
        (["rollout={plan: window, group_size: 4, group_shards: 2, same_noise: true}"], "samples with the same start noise share network rows"),
        (["method=dynamic_treerpo", "rollout.group_shards=2"], "rollout.group_shards: samples with the same start noise share network rows and stay together"),
        (["method=flow_dpo", "rollout={plan: ode, group_size: 4, group_shards: 2}"], "the two samples of a pair stay together"),
        ([PARTS, "objective.reduction=group_mean"], "objective.reduction: group_mean looks at whole groups, which rollout.group_shards: 2 takes apart"),
        ([PARTS, "rewards={toys:brightness: 1, toys:redness: 1}", "advantage.aggregate=gdpo"], "advantage.aggregate: gdpo looks at whole groups"),
    ],
)
def test_what_needs_a_whole_group_is_refused(configure: Configure, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configure(*settings)


def test_a_reward_that_compares_samples_is_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.composite.WeightedRewards.compares", True)
    with pytest.raises(UserError, match="a reward compares the samples of a group, which must stay together then"):
        Trainer(configure(PARTS))
