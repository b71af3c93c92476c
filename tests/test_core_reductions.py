"""Reductions are weights: by hand, and the same however decisions are split."""

import pytest
import torch

from flowrl.core.reductions import REDUCTIONS, SEQUENCE_REDUCTIONS, group_mean_weights, mean_weights, sequence_weights


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


# --- sequences ----------------------------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
LOSS = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 99.0, 7.0, 99.0], [99.0] * 4, [99.0, 8.0, 99.0, 99.0]])
GROUP = torch.tensor([0, 0, 1, 1])


def settings(kind):
    return {"group_mean": {"group": GROUP, "num_groups": 3}, "seq_mean_token_sum_norm": {"max_length": 5.0}}.get(kind, {})


def reduce(kind, loss, mask, **more):
    weight, total = sequence_weights(kind, mask, **(settings(kind) | more))
    return (weight * loss).sum().item() / total.item()


def test_reduced_losses_of_sequences_by_hand():
    # sums 10, 12, 8 of 4, 2 and 1 decisions; means 2.5, 6, 8; the third sequence is empty and group 2 has no sequence; groups: 22 / 6 and 8
    expected = {"mean": 30 / 7, "group_mean": (22 / 6 + 8) / 2, "seq_mean": 16.5 / 3, "seq_mean_token_mean": 16.5 / 3}
    expected |= {"seq_mean_token_sum": 10.0, "seq_mean_token_sum_norm": 2.0}
    assert {kind: reduce(kind, LOSS, MASK) for kind in SEQUENCE_REDUCTIONS} == pytest.approx(expected)


def test_weights_of_sequences_by_hand():
    assert sequence_weights("seq_mean", MASK).weight.tolist() == [[0.25] * 4, [0.5, 0.0, 0.5, 0.0], [0.0] * 4, [0.0, 1.0, 0.0, 0.0]]
    assert sequence_weights("seq_mean_token_sum_norm", MASK, max_length=4.0).weight[1].tolist() == [0.25, 0.0, 0.25, 0.0]
    assert [sequence_weights(kind, MASK, **settings(kind)).total.item() for kind in SEQUENCE_REDUCTIONS] == [7.0, 2.0, 3.0, 3.0, 3.0, 3.0]


def test_the_loss_of_a_whole_sequence_counts_once():
    values = torch.tensor([3.0, 5.0, 1e9, 10.0])[:, None].expand(4, 4)
    assert reduce("seq_mean", values, MASK) == pytest.approx(6.0)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_item_1_with_one_length_all_reductions_are_proportional(length):
    loss = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(5).expand(6, 5) < length
    group = {"group": torch.tensor([0, 0, 1, 1, 2, 2]), "num_groups": 3}
    mean = reduce("mean", loss, mask)
    factor = {"seq_mean_token_sum": length, "seq_mean_token_sum_norm": length / 5.0}
    for kind in SEQUENCE_REDUCTIONS:
        assert reduce(kind, loss, mask, **(group if kind == "group_mean" else {})) == pytest.approx(mean * factor.get(kind, 1))


@pytest.mark.parametrize("kind", SEQUENCE_REDUCTIONS)
def test_item_28_parts_with_their_totals_added_are_the_whole(kind):
    parts = [sequence_weights(kind, MASK[rows], **(settings(kind) | ({"group": GROUP[rows]} if kind == "group_mean" else {}))) for rows in ([0, 1], [2, 3])]
    assert torch.cat([part.weight for part in parts]).equal(sequence_weights(kind, MASK, **settings(kind)).weight)
    assert sum(part.total for part in parts).item() == sequence_weights(kind, MASK, **settings(kind)).total.item()


@pytest.mark.parametrize("kind", SEQUENCE_REDUCTIONS)
def test_item_26_nothing_that_counts_is_0_and_finite(kind):
    weight, total = sequence_weights(kind, torch.zeros(4, 4, dtype=torch.bool), **settings(kind))
    assert weight.eq(0).all()
    assert total.item() == 0


@pytest.mark.parametrize("kind", ["mean", "group_mean"])
def test_single_decisions_are_reduced_like_edges_of_a_tree(kind):
    group, loss = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    edges = REDUCTIONS[kind](group, 3)
    weight, total = sequence_weights(kind, torch.ones(5, 1, dtype=torch.bool), group=group, num_groups=3)
    assert ((weight[:, 0] * loss).sum() / total).item() == pytest.approx(((edges * loss).sum() / edges.sum()).item())


def test_weights_have_the_dtype_that_is_asked_for():
    for kind in SEQUENCE_REDUCTIONS:
        weight, total = sequence_weights(kind, MASK, **settings(kind), dtype=torch.float64)
        assert weight.dtype == total.dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("token_mean", "unknown reduction 'token_mean'; known: mean, group_mean, seq_mean, "),
        ("group_mean", "needs the group of every sequence"),
        ("seq_mean_token_sum_norm", "needs max_length > 0"),
    ],
)
def test_a_reduction_without_its_argument_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        sequence_weights(kind, MASK)
