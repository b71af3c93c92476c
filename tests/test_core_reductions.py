"""Reductions are weights: by hand, and the same however decisions are split."""

import pytest
import torch

from flowrl.core.reductions import REDUCTIONS, group_mean_weights, mean_weights


def test_the_mean_weighs_every_decision_the_same():
    assert mean_weights(torch.tensor([0, 0, 2]), 3).tolist() == [1.0, 1.0, 1.0]


def test_the_group_mean_weighs_every_group_the_same():
    group = torch.tensor([0, 2, 0, 2, 2, 0, 3, 2])  # group 1 has no decision in this update
    assert group_mean_weights(group, 5).tolist() == pytest.approx([1 / 3, 1 / 4, 1 / 3, 1 / 4, 1 / 4, 1 / 3, 1.0, 1 / 4])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_groups_of_one_size_make_every_reduction_the_plain_mean(name):
    loss, group = torch.arange(12.0), torch.arange(12) % 3
    weight = REDUCTIONS[name](group, 3)
    assert ((weight * loss).sum() / weight.sum()).item() == pytest.approx(loss.mean().item())


def test_the_reduced_losses_by_hand():
    loss, group = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 0, 1])
    reduced = {name: ((w := weigh(group, 2)) * loss).sum().item() / w.sum().item() for name, weigh in REDUCTIONS.items()}
    assert reduced == pytest.approx({"mean": 4.0, "group_mean": 6.0})  # (2 + 10) / 2


@pytest.mark.parametrize("name", REDUCTIONS)
def test_processes_that_hold_whole_groups_agree_with_one_process(name):
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 6, (50,), generator=generator)
    loss = torch.rand(50, generator=generator)
    whole = REDUCTIONS[name](group, 6)
    parts = [(REDUCTIONS[name](group[mine], 6), loss[mine]) for mine in (group < 2, group >= 2)]
    split = sum((w * values).sum() for w, values in parts) / sum(w.sum() for w, _ in parts)
    torch.testing.assert_close(split, (whole * loss).sum() / whole.sum())
