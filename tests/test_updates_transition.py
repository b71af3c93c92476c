"""The objectives of text on SDE steps: ratios of 1 at first, gradients by hand, whole samples however they are cut, the least network rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from drills import Drill, RowCount, assert_same_gradient, begin, by_hand, move, twin
from torch import Tensor

from flowrl.config import Config
from flowrl.likelihoods.transition import select_rows
from flowrl.trainer import Trainer
from flowrl.updates.transition import TransitionUpdate

Configure = Callable[..., Config]

CHAIN = ["rollout={plan: chain, num_steps: 4, same_noise: false}", "ema=null", "advantage={centre: group, scale: group_std}"]
SHARED = [*CHAIN, "rollout.same_noise=true"]
STEPS, SIZE, GROUPS = 3, 4, 3
TEXT = {
    "sapo": ["objective={name: sapo, args: {temperature_positive: 200, temperature_negative: 210}}"],
    "cispo": ["objective.name=cispo"],
    "gmpo": ["objective={name: gmpo, reduction: seq_mean}"],
    "vespo": ["objective={name: vespo, args: {positive: [2, 3], negative: [3, 2]}}"],
    "mdpo": ["objective={name: mdpo, args: {penalty: 100}}"],
    "kimi": ["objective={name: kimi, reduction: seq_mean, args: {tau: 0.5}}"],
    "bgpo": ["objective={name: bgpo, reduction: seq_mean_token_mean}"],
    "dual clip": ["objective={dual_clip: 3, ratio_max: 1.5}"],
    "gspo": ["objective={ratio: seq_mean, reduction: seq_mean}"],
    "gspo-token": ["objective={ratio: seq_mean_token, reduction: seq_mean_token_mean}"],
    "seq_sum": ["objective={ratio: seq_sum, reduction: seq_mean}"],
    "none": ["objective.ratio=none"],
    "dr_grpo": ["objective.reduction=seq_mean_token_sum_norm"],
}
SUMS = ("kimi", "seq_sum")
"""Losses whose gradient at ratio 1 is that of the sum over a sample's steps and not of their mean."""


def started(configure: Configure, name: str, *overrides: str, base: list[str] = CHAIN) -> Drill:
    return begin(Trainer(configure(*base, *TEXT[name], *overrides)))


def log_probs(drill: Drill) -> Tensor:
    """[E] with gradient, of all decisions under the weights of now."""
    trainer, rollout = drill.trainer, drill.rollout
    batch = select_rows(rollout, torch.arange(len(rollout.row_sigma)), trainer.policy.prompt_rows([p.text for p in drill.prompts]))
    out = trainer.engine.likelihood(trainer.policy.velocity(1.0), batch)
    assert batch.edge.tolist() == list(range(len(rollout.edge_row)))
    return out.log_prob


def of_samples(drill: Drill, values: Tensor) -> Tensor:
    """[E] -> [B, S], by a loop over (edge, leaf) pairs."""
    rows: list[list[Tensor]] = [[] for _ in drill.rollout.leaves]
    for edge, leaf in sorted(drill.rollout.leaf_edge.tolist(), key=lambda pair: drill.rollout.edge_step[pair[0]].item()):
        rows[leaf].append(values[edge])
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("base", [CHAIN, SHARED], ids=["own noise", "one noise"])
@pytest.mark.parametrize("name", TEXT)
def test_the_first_update_starts_at_ratio_1_and_takes_the_least_rows(configure: Configure, name: str, base: list[str]) -> None:
    trainer = Trainer(configure(*base, *TEXT[name], "objective.updates_per_iteration=2", "kl.weight=0.05"))
    rows = RowCount(trainer)
    metrics, _ = trainer.iterate(1)
    assert metrics["ratio/max_abs_log_first"] < 1e-6
    assert metrics["updates"] == 2
    assert metrics["nfe/used"] == metrics["nfe/minimum"] == rows.forward + rows.backward
    training = GROUPS * (STEPS * SIZE if base is CHAIN else 1 + (STEPS - 1) * SIZE)
    assert metrics["nfe/backward"] == rows.backward == training


@pytest.mark.parametrize("name", TEXT)
def test_the_first_gradient_is_that_of_reinforce_over_the_steps_of_a_sample(configure: Configure, name: str) -> None:
    drill = started(configure, name)
    loss = -(of_samples(drill, drill.assignment.advantages) * of_samples(drill, log_probs(drill))).mean() * (STEPS if name in SUMS else 1)
    assert_same_gradient(by_hand(drill.trainer, loss), drill.gradient())


def moved(configure: Configure, name: str, *overrides: str) -> tuple[Drill, Tensor, Tensor]:
    """An iteration whose policy is no longer the one that sampled; log-ratios [B, S] with gradient, and the advantage of each sample."""
    drill = started(configure, name, *overrides)
    move(drill.trainer, size=0.1)
    delta = of_samples(drill, log_probs(drill) - drill.rollout.edge_old_log_prob)
    assert delta.abs().max() > 3e-3
    return drill, delta, of_samples(drill, drill.assignment.advantages)[:, 0]


def test_gspo_off_policy_by_hand(configure: Configure) -> None:
    drill, delta, advantage = moved(configure, "gspo", "objective={clip_low: 1e-3, clip_high: 1e-3}")
    total = torch.zeros(())
    assert 0 < int((delta.mean(1).abs() > 1e-3).sum()) < len(advantage)
    for i in range(len(advantage)):
        ratio = delta[i].mean().exp()
        total = total + torch.maximum(-advantage[i] * ratio, -advantage[i] * ratio.clamp(1 - 1e-3, 1 + 1e-3))
    assert_same_gradient(by_hand(drill.trainer, total / len(advantage)), drill.gradient())


def test_gspo_token_has_the_gradient_of_gspo(configure: Configure) -> None:
    drills = [moved(configure, name, "objective={clip_low: 1e-3, clip_high: 1e-3}")[0] for name in ("gspo", "gspo-token")]
    assert_same_gradient(drills[1].gradient(), drills[0].gradient())


def test_sapo_off_policy_by_hand(configure: Configure) -> None:
    drill, delta, advantage = moved(configure, "sapo")
    tau = torch.where(advantage > 0, 200.0, 210.0)[:, None]
    loss = -advantage[:, None] * 4 / tau * torch.sigmoid(tau * (delta.exp() - 1))
    assert_same_gradient(by_hand(drill.trainer, loss.mean()), drill.gradient())


def test_kimi_and_gmpo_off_policy_by_hand(configure: Configure) -> None:
    drill, delta, advantage = moved(configure, "kimi")
    loss = -advantage * delta.sum(1) + 0.25 * delta.sum(1).square()
    assert_same_gradient(by_hand(drill.trainer, loss.mean()), drill.gradient())
    drill, delta, advantage = moved(configure, "gmpo", "objective={clip_low: 2e-3, clip_high: 1e-3}")
    clipped = torch.where(advantage[:, None] > 0, delta.clamp(max=1e-3), delta.clamp(min=-2e-3))
    assert 0 < int((clipped != delta).sum()) < delta.numel()
    assert_same_gradient(by_hand(drill.trainer, (-advantage * clipped.mean(1).exp()).mean()), drill.gradient())


@pytest.mark.parametrize("base", [CHAIN, SHARED], ids=["own noise", "one noise"])
@pytest.mark.parametrize("name", ["gspo", "gmpo", "vespo", "seq_sum", "gspo-token", "dr_grpo"])
def test_micro_batches_and_another_number_of_updates_change_nothing(configure: Configure, name: str, base: list[str]) -> None:
    drill = started(configure, name, base=base)
    small = twin(drill, configure(*base, *TEXT[name], "training.rows_per_backward=9"))
    for trainer in (drill.trainer, small):
        move(trainer, size=0.1)
    parts = Drill(small, 1, drill.plan, drill.rollout, drill.assignment, drill.prompts)
    assert_same_gradient(parts.gradient(), drill.gradient())


@pytest.mark.parametrize(("base", "count"), [(CHAIN, 12), (SHARED, 3)], ids=["own noise", "one noise"])
def test_units_are_whole_samples_or_groups_that_share_a_row(configure: Configure, base: list[str], count: int) -> None:
    drill = started(configure, "gspo", base=base)
    update: Any = drill.material()
    assert isinstance(update, TransitionUpdate)
    assert len(update.unit_group) == count and update.unit_group.tolist() == sorted(update.unit_group.tolist())
    assert update.rows_per_unit == (STEPS if base is CHAIN else 1 + (STEPS - 1) * SIZE)
    for edge, leaf in drill.rollout.leaf_edge.tolist():
        group = int(drill.rollout.leaf_group[leaf])
        assert update.unit_group[update.decision_unit[edge]] == group
        assert update.decision_unit[edge] == (leaf if base is CHAIN else group)
    rows = [set(update._rows(torch.tensor([unit])).tolist()) for unit in range(count)]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(drill.rollout.row_sigma)


def test_a_sample_of_which_an_update_has_less_steps_still_counts_once(configure: Configure) -> None:
    drill = started(configure, "bgpo")
    update: Any = drill.material()
    rows = torch.tensor([0, 1, 2, 3, 4, 5])  # the order of rows is the rollout's: count them by sample
    weight, total = update.weigh(rows, GROUPS)
    chosen = torch.isin(drill.rollout.edge_row, rows)
    by_sample: dict[int, list[int]] = {}
    for edge, leaf in drill.rollout.leaf_edge.tolist():
        if chosen[edge]:
            by_sample.setdefault(leaf, []).append(edge)
    assert total == len(by_sample)
    for edges in by_sample.values():
        assert weight[edges].tolist() == pytest.approx([1 / len(edges)] * len(edges))
    assert weight[~chosen].eq(0).all()


def test_every_edge_of_a_tree_is_a_sequence_of_one(configure: Configure) -> None:
    tree = ["rollout={plan: tree, window: {size: 2, high: 3}, tree: {branching: 2}}", "ema=null", "advantage={centre: group, scale: group_std}"]
    plain = begin(Trainer(configure(*tree)))
    for reduction in ("seq_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"):
        trainer = twin(plain, configure(*tree, f"objective.reduction={reduction}"))
        other = Drill(trainer, 1, plain.plan, plain.rollout, plain.assignment, plain.prompts)
        assert_same_gradient(other.gradient(), plain.gradient(), rtol=1e-6)


def test_the_constant_of_dr_grpo_is_the_number_of_trained_steps_or_what_the_config_says(configure: Configure) -> None:
    drill = started(configure, "dr_grpo")
    trainer = twin(drill, configure(*CHAIN, "objective={reduction: seq_mean_token_sum_norm, max_length: 6}"))
    half = Drill(trainer, 1, drill.plan, drill.rollout, drill.assignment, drill.prompts)
    assert_same_gradient([2 * g for g in half.gradient()], drill.gradient(), rtol=1e-6)


def test_a_subset_of_the_steps_leaves_shorter_samples(configure: Configure) -> None:
    drill = started(configure, "gspo", "selection.fraction=0.7")
    update: Any = drill.material()
    assert (update.rows_per_unit, len(update.unit_group)) == (2, GROUPS * SIZE)
    metrics, _ = Trainer(configure(*CHAIN, *TEXT["gspo"], "selection.fraction=0.7")).iterate(1)
    assert metrics["nfe/used"] == metrics["nfe/minimum"]
    assert metrics["ratio/max_abs_log_first"] < 1e-6


def test_dual_clip_bounds_the_loss_of_bad_samples(configure: Configure) -> None:
    settings = "objective={clip_low: 0.1, clip_high: 0.1, dual_clip: 1.0005, ratio_max: null}"
    drill, delta, advantage = moved(configure, "dual clip", settings)
    ratio = delta.exp()
    plain = torch.maximum(-advantage[:, None] * ratio, -advantage[:, None] * ratio.clamp(0.9, 1.1))
    expected = torch.where(advantage[:, None] < 0, plain.minimum(-advantage[:, None] * 1.0005), plain)
    assert bool((expected < plain - 1e-6).any())
    assert_same_gradient(by_hand(drill.trainer, expected.mean()), drill.gradient())


def test_the_order_of_the_edges_does_not_matter(configure: Configure) -> None:
    drill = moved(configure, "gspo")[0]
    rollout, assignment = drill.rollout, drill.assignment
    order = torch.randperm(len(rollout.edge_row), generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    columns = ("row", "x_next", "sigma", "sigma_next", "sigma_guard", "noise_level", "step", "old_log_prob")
    fields: dict[str, Any] = {f"edge_{name}": getattr(rollout, f"edge_{name}")[order] for name in columns}
    fields["edge_parent"] = torch.where(rollout.edge_parent < 0, -1, place[rollout.edge_parent])[order]
    mixed = replace(rollout, leaf_edge=torch.stack([place[rollout.leaf_edge[:, 0]], rollout.leaf_edge[:, 1]], 1), **fields)
    bounds = {name: getattr(assignment, name)[order] for name in ("advantages", "clip_low", "clip_high")}
    other = replace(drill, rollout=mixed, assignment=replace(assignment, rollout=mixed, **bounds))
    assert_same_gradient(other.gradient(), drill.gradient())
