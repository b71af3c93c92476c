"""Credit on forests: by hand on a small tree, against a recursive reference on random ones, and the identities that tie the variants together."""

import math
from dataclasses import dataclass

import pytest
import torch
from estimates import group_zscore

from flowrl.core.advantages import edge_advantages
from flowrl.core.credit import backup, integrate, layer_advantages, layer_position, sibling_advantages

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")
KINDS = ("mean", "path", "level")


@dataclass
class Forest:
    """Trees of trained edges, edge by edge; every edge is a step and its child node, and leaves hang on the last step's edges."""

    parent: list[int]
    step: list[int]
    group: list[int]
    row: list[int]
    leaves: list[int]  # the edge just above each leaf

    @property
    def columns(self):
        return {name: torch.tensor(getattr(self, name)) for name in ("row", "group", "step")}

    @property
    def layer(self):
        return {name: torch.tensor(getattr(self, name)) for name in ("group", "step")}

    @property
    def edge_parent(self):
        return torch.tensor(self.parent)

    @property
    def leaf_edge(self):
        pairs = []
        for leaf, edge in enumerate(self.leaves):
            while edge >= 0:
                pairs.append((edge, leaf))
                edge = self.parent[edge]
        return torch.tensor(pairs)

    def draw(self, seed=0, scale=1.0):
        """values [B], log_prob [E]."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(len(self.leaves), generator=generator, dtype=torch.float64)
        return values, scale * torch.randn(len(self.parent), generator=generator, dtype=torch.float64)

    def back_up(self, kind, values, log_prob, *, valid=None, temperature=1.0):
        valid = torch.ones(len(self.leaves), dtype=torch.bool) if valid is None else torch.tensor(valid)
        return backup(kind, values, valid, leaf_edge=self.leaf_edge, edge_parent=self.edge_parent, log_prob=log_prob, temperature=temperature)


def grow(num_groups, width_of):
    """A tree per group; width_of(step, number of the node) is how many children it gets, 0 ends the tree (its last edges carry a leaf each)."""
    forest = Forest([], [], [], [], [])
    rows = 0
    for g in range(num_groups):
        tips, k = [-1], 0
        while width_of(k, 0) > 0:
            following = []
            for number, tip in enumerate(tips):
                for _ in range(width_of(k, number)):
                    following.append(len(forest.parent))
                    forest.parent.append(tip)
                    forest.step.append(k)
                    forest.group.append(g)
                    forest.row.append(rows)
                rows += 1
            tips, k = following, k + 1
        forest.leaves += tips
    return forest


def regular(num_groups, *widths):
    return grow(num_groups, lambda step, number: (*widths, 0)[step])


def crooked(num_groups=3):
    """Nodes of one layer have 1, 2 or 3 children, so unequal numbers of leaves."""
    return grow(num_groups, lambda step, number: 0 if step == 4 else 1 + (step + number) % 3)


def reference(forest, kind, values, log_prob, valid, temperature):
    """The definitions, node by node and in plain recursion."""
    children = [[e for e, p in enumerate(forest.parent) if p == edge] for edge in range(len(forest.parent))]

    def paths(edge):
        """(leaf, log-probability of the edges strictly below) for all leaves below an edge."""
        own = [(leaf, 0.0) for leaf, above in enumerate(forest.leaves) if above == edge]
        return own + [(leaf, logpath + log_prob[child].item()) for child in children[edge] for leaf, logpath in paths(child)]

    def weighted(entries):
        weights = [math.exp(temperature * score) for score, _ in entries]
        return sum(w * v for w, (_, v) in zip(weights, entries, strict=True)) / sum(weights) if entries else None

    def value(edge):
        if kind == "level" and children[edge]:
            below = [(log_prob[child].item(), value(child)) for child in children[edge]]
            return weighted([(score, v) for score, v in below if v is not None])
        entries = [(logpath if kind == "path" else 0.0, values[leaf].item()) for leaf, logpath in paths(edge) if valid[leaf]]
        return weighted(entries)

    return [value(edge) for edge in range(len(forest.parent))]


# --- backup -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # log-probabilities 0, ln 3 under edge 0, and 0, ln 2 under edge 1: weights 1/4, 3/4 and 1/3, 2/3
        ("mean", [3.0, 7.0, 2.0, 4.0, 6.0, 8.0]),
        ("path", [0.25 * 2 + 0.75 * 4, (6 + 2 * 8) / 3, 2.0, 4.0, 6.0, 8.0]),
        ("level", [0.25 * 2 + 0.75 * 4, (6 + 2 * 8) / 3, 2.0, 4.0, 6.0, 8.0]),
    ],
)
def test_a_two_level_tree_by_hand(kind, expected):
    forest = Forest([-1, -1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6, [0, 0, 1, 1, 2, 2], [2, 3, 4, 5])
    log_prob = torch.tensor([5.0, -3.0, 0.0, math.log(3), 0.0, math.log(2)], dtype=torch.float64)
    value, known = forest.back_up(kind, torch.tensor([2.0, 4.0, 6.0, 8.0]), log_prob)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), **FP64)
    assert known.all()


def test_path_and_level_weigh_a_long_path_differently():
    # edge 0 has children 1 (log p 0) and 2 (log p ln 3); 1 leads through 3 (log p ln 5) to leaf 0, 2 through 4 (log p 0) to leaf 1:
    # path weights 5 and 3, level weights 1 and 3
    forest = Forest([-1, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0] * 5, [0, 1, 1, 2, 3], [3, 4])
    log_prob, values = torch.tensor([9.0, 0.0, math.log(3), math.log(5), 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0])
    assert forest.back_up("path", values, log_prob)[0].tolist() == pytest.approx([5 / 8, 1.0, 0.0, 1.0, 0.0])
    assert forest.back_up("level", values, log_prob)[0].tolist() == pytest.approx([1 / 4, 1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forest", [crooked(), regular(2, 2, 1, 3, 2), regular(3, 1, 1)], ids=["crooked", "regular", "chain"])
def test_every_backup_is_its_recursive_definition(kind, forest, temperature):
    values, log_prob = forest.draw(1)
    valid = [leaf % 4 != 1 and leaf > 3 for leaf in range(len(forest.leaves))]  # some leaves unscored, and some nodes with none
    value, known = forest.back_up(kind, torch.where(torch.tensor(valid), values, NAN), log_prob, valid=valid, temperature=temperature)
    expected = reference(forest, kind, values, log_prob, valid, temperature)
    assert known.tolist() == [v is not None for v in expected]
    torch.testing.assert_close(value, torch.tensor([v or 0.0 for v in expected], dtype=torch.float64), **FP64)


@pytest.mark.parametrize("kind", ["path", "level"])
def test_at_temperature_zero_every_backup_is_the_mean_where_leaf_counts_are_equal(kind):
    forest = regular(3, 2, 3, 1, 2)
    values, log_prob = forest.draw(2)
    torch.testing.assert_close(forest.back_up(kind, values, log_prob, temperature=0.0)[0], forest.back_up("mean", values, log_prob)[0], **FP64)


def test_at_temperature_zero_level_weighs_children_and_path_weighs_leaves():
    forest = Forest([-1, 0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2, 2], [0] * 7, [0, 1, 1, 2, 2, 2, 3], [3, 4, 5, 6])
    values, log_prob = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(7)
    assert forest.back_up("path", values, log_prob, temperature=0.0)[0][0].item() == pytest.approx(1 / 4)
    assert forest.back_up("level", values, log_prob, temperature=0.0)[0][0].item() == pytest.approx(1 / 2)


def test_with_the_mean_a_nodes_value_is_the_mean_of_its_childrens_where_leaf_counts_are_equal():
    forest = regular(2, 2, 3, 2)
    value, _ = forest.back_up("mean", *forest.draw(3))
    inner = forest.edge_parent >= 0
    children = torch.zeros(len(value), dtype=torch.float64).index_add_(0, forest.edge_parent[inner], value[inner])
    count = torch.bincount(forest.edge_parent[inner], minlength=len(value))
    torch.testing.assert_close(value[count > 0], (children / count)[count > 0], **FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_exchanging_the_leaves_below_an_edge_exchanges_nothing_above_if_their_log_probabilities_are_equal(kind):
    forest = regular(1, 2, 2, 3)
    values, log_prob = forest.draw(4)
    log_prob[torch.tensor(forest.step) == 2] = 0.3
    exchanged = values.clone()
    exchanged[:3] = values[[2, 0, 1]]
    upper = torch.tensor(forest.step) < 2
    torch.testing.assert_close(forest.back_up(kind, exchanged, log_prob)[0][upper], forest.back_up(kind, values, log_prob)[0][upper], **FP64)


@pytest.mark.parametrize("kind", ["path", "level"])
def test_only_differences_of_log_probabilities_between_siblings_matter(kind):
    forest = regular(2, 2, 3, 2)
    values, log_prob = forest.draw(5)
    shift = torch.tensor(forest.step) * 7.0 + torch.tensor(forest.group)
    torch.testing.assert_close(forest.back_up(kind, values, log_prob + shift)[0], forest.back_up(kind, values, log_prob)[0], **FP64)


@pytest.mark.parametrize("kind", ["path", "level"])
def test_log_probabilities_beyond_exp_pick_the_likeliest_leaf(kind):
    forest = regular(1, 1, 2, 2)
    value, _ = forest.back_up(kind, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, -1e5, 1e5, -2e4, 2e4, 1e5, 3e5]))
    assert value.tolist() == [4.0, 2.0, 4.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.7, 0.1])
def test_equal_rewards_are_exactly_the_value_of_every_node_so_that_no_advantage_grows_from_rounding(kind, reward):
    forest = crooked()
    values, log_prob = forest.draw(6)
    value, known = forest.back_up(kind, torch.full_like(values, reward), log_prob)
    assert value.tolist() == [reward] * len(value)
    assert layer_advantages(value, known, **forest.layer, eps=1e-30, ddof=0).eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unscored_leaf_counts_for_nothing(kind):
    forest, without = regular(1, 1, 3), Forest([-1, 0, 0], [0, 1, 1], [0] * 3, [0, 1, 1], [1, 2])
    log_prob = torch.tensor([0.1, 0.2, 0.9, 0.4], dtype=torch.float64)
    value, known = forest.back_up(kind, torch.tensor([1.0, NAN, 5.0]), log_prob, valid=[True, False, True])
    assert known.tolist() == [True, True, False, True]
    torch.testing.assert_close(value[[0, 1, 3]], without.back_up(kind, torch.tensor([1.0, 5.0]), log_prob[[0, 1, 3]])[0], **FP64)
    assert value[2] == 0


def test_a_backup_without_a_name_is_refused():
    forest = regular(1, 2)
    with pytest.raises(ValueError, match="unknown backup 'max'; known: mean, path, level"):
        forest.back_up("max", torch.zeros(2), torch.zeros(2))


def test_level_by_level_refuses_an_edge_with_both_children_and_leaves_of_its_own():
    forest = Forest([-1, 0], [0, 1], [0, 0], [0, 1], [0, 1])
    assert forest.back_up("mean", torch.tensor([1.0, 3.0]), torch.zeros(2))[0].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="some have both"):
        forest.back_up("level", torch.tensor([1.0, 3.0]), torch.zeros(2))


# --- advantages of layers and siblings ----------------------------------------------------------------------------------------------------------


def test_the_advantages_of_layers_and_siblings_by_hand():
    # step 0 of group 0: 1 and 3; step 1: siblings 0, 2 and siblings 2, 4 (mean 2, squares 4 + 0 + 0 + 4, std sqrt 2); group 1: one node per step
    forest = Forest([-1, -1, 0, 0, 1, 1, -1, 6], [0, 0, 1, 1, 1, 1, 0, 1], [0] * 6 + [1] * 2, [0, 0, 1, 1, 2, 2, 3, 4], [2, 3, 4, 5, 7])
    values, known = torch.tensor([1.0, 3.0, 0.0, 2.0, 2.0, 4.0, 5.0, 5.0], dtype=torch.float64), torch.ones(8, dtype=torch.bool)
    root2 = math.sqrt(2)
    layer = layer_advantages(values, known, **forest.layer, eps=0.5, ddof=0)
    assert layer.tolist() == pytest.approx([-1 / 1.5, 1 / 1.5, -2 / (root2 + 0.5), 0, 0, 2 / (root2 + 0.5), 0, 0])
    sibling = sibling_advantages(values, known, **forest.columns, eps=0.5, ddof=0)
    assert sibling.tolist() == pytest.approx([-1 / 1.5, 1 / 1.5, -1 / (root2 + 0.5), 1 / (root2 + 0.5), -1 / (root2 + 0.5), 1 / (root2 + 0.5), 0, 0])
    assert layer_advantages(values, known, **forest.layer, eps=0.5, ddof=1)[0].item() == pytest.approx(-1 / (root2 + 0.5))


@pytest.mark.parametrize("ddof", [0, 1])
def test_on_chains_the_layers_advantages_are_the_samples_zscores_at_every_step(ddof):
    forest = grow(2, lambda step, number: (5, 1, 1, 0)[step])  # one root with five paths: a chain plan with shared start noise
    values, log_prob = forest.draw(7)
    value, known = forest.back_up("path", values, log_prob)
    group = torch.arange(2).repeat_interleave(5)
    leaf = group_zscore(values, group, torch.ones(10, dtype=torch.bool), 2, eps=1e-4, ddof=ddof)
    expected = edge_advantages(leaf, forest.leaf_edge, len(value))
    torch.testing.assert_close(layer_advantages(value, known, **forest.layer, eps=1e-4, ddof=ddof), expected, **FP64)


def test_where_all_nodes_of_a_layer_are_siblings_both_normalisations_agree():
    forest = regular(3, 4)
    values, log_prob = forest.draw(8)
    value, known = forest.back_up("mean", values, log_prob)
    layer = layer_advantages(value, known, **forest.layer, eps=1e-4, ddof=1)
    torch.testing.assert_close(sibling_advantages(value, known, **forest.columns, eps=1e-4, ddof=1), layer, **FP64)


def test_siblings_advantages_sum_to_zero_and_forget_the_luck_of_their_prefix():
    forest = regular(2, 2, 3, 2)
    values, log_prob = forest.draw(9)
    value, known = forest.back_up("mean", values, log_prob)
    advantages = sibling_advantages(value, known, **forest.columns, eps=1e-4, ddof=0)
    row = torch.tensor(forest.row)
    torch.testing.assert_close(torch.zeros(int(row.max()) + 1, dtype=torch.float64).index_add_(0, row, advantages).abs().max().item(), 0.0, rtol=0, atol=1e-12)
    lucky = value + 3.0 * (row == row[-1])  # the last two siblings both gain
    after = sibling_advantages(lucky, known, **forest.columns, eps=1e-4, ddof=0)[-2:]
    assert after.sign().tolist() == advantages[-2:].sign().tolist()
    assert after.sum().item() == pytest.approx(0.0, abs=1e-12)
    assert layer_advantages(lucky, known, **forest.layer, eps=1e-4, ddof=0)[-2:].gt(0).all()


def test_an_only_child_has_no_sibling_advantage():
    forest = regular(2, 3, 1)
    value, known = forest.back_up("mean", *forest.draw(10))
    advantages = sibling_advantages(value, known, **forest.columns, eps=1e-4, ddof=0)
    assert advantages[torch.tensor(forest.step) == 1].eq(0).all()
    assert advantages[torch.tensor(forest.step) == 0].ne(0).all()


@pytest.mark.parametrize("name", ["layer", "sibling"])
def test_a_node_without_a_value_gets_zero_and_does_not_move_the_others(name):
    forest, without = regular(1, 4), regular(1, 3)
    known = torch.tensor([True, True, False, True])
    values = torch.tensor([1.0, 5.0, 0.0, 3.0], dtype=torch.float64)

    def advantages(forest, values, known):
        if name == "layer":
            return layer_advantages(values, known, **forest.layer, eps=1e-4, ddof=1)
        return sibling_advantages(values, known, **forest.columns, eps=1e-4, ddof=1)

    result = advantages(forest, values, known)
    assert result[2] == 0
    torch.testing.assert_close(result[known], advantages(without, values[known], known[known]), **FP64)
    lone = advantages(forest, values, torch.tensor([False, True, False, False]))
    assert lone.tolist() == [0.0] * 4


def test_groups_and_steps_are_separate_layers_whatever_the_order_of_edges():
    forest = crooked()
    value, known = forest.back_up("mean", *forest.draw(11))
    order = torch.randperm(len(value), generator=torch.Generator().manual_seed(0))
    columns = {name: column[order] for name, column in forest.columns.items()}
    layer = {name: columns[name] for name in ("group", "step")}
    pairs = [
        (layer_advantages(value[order], known, **layer, eps=1e-4, ddof=0), layer_advantages(value, known, **forest.layer, eps=1e-4, ddof=0)),
        (sibling_advantages(value[order], known, **columns, eps=1e-4, ddof=0), sibling_advantages(value, known, **forest.columns, eps=1e-4, ddof=0)),
        (layer_position(value[order], known, **layer), layer_position(value, known, **forest.layer)),
    ]
    for shuffled, plain in pairs:
        torch.testing.assert_close(shuffled, plain[order], **FP64)
    far = {"group": forest.layer["group"] * 1000 + 5, "step": forest.layer["step"]}
    torch.testing.assert_close(layer_advantages(value, known, **far, eps=1e-4, ddof=0), pairs[0][1], **FP64)


# --- granularities ------------------------------------------------------------------------------------------------------------------------------


def test_the_sum_over_granularities_is_their_number_times_the_mean():
    leaf_edge = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 3], [0, 4], [1, 5]])  # two children, each finished on three grids
    advantages = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, 0.5])
    assert integrate("sum", advantages, leaf_edge, 2).tolist() == [6.0, -2.5]
    torch.testing.assert_close(3 * integrate("mean", advantages, leaf_edge, 2), integrate("sum", advantages, leaf_edge, 2))


def test_the_mean_over_granularities_is_the_edge_advantage_and_on_a_chain_so_is_the_sum():
    forest = crooked()
    advantages, _ = forest.draw(12)
    size = len(forest.parent)
    assert integrate("mean", advantages, forest.leaf_edge, size).equal(edge_advantages(advantages, forest.leaf_edge, size))
    chain = grow(1, lambda step, number: (4, 1, 0)[step])
    assert integrate("sum", advantages[:4], chain.leaf_edge, 8).equal(integrate("mean", advantages[:4], chain.leaf_edge, 8))


def test_an_integration_without_a_name_is_refused():
    with pytest.raises(ValueError, match="unknown integration 'max'; known: mean, sum"):
        integrate("max", torch.zeros(1), torch.tensor([[0, 0]]), 1)


# --- positions ----------------------------------------------------------------------------------------------------------------------------------


def test_the_position_in_a_layer_by_hand():
    values = torch.tensor([1.0, 3.0, 1.5, 0.0, 7.0, 9.0, 9.0, 0.0], dtype=torch.float64)
    known = torch.tensor([True, True, True, False, True, True, True, False])
    group, step = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 0, 0, 0])
    # group 0 step 0 spans 1..3 and has an unknown node; step 1 has one node; group 1 has one value, twice, and an unknown node
    assert layer_position(values, known, group=group, step=step).tolist() == pytest.approx([0.0, 1.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5], abs=1e-8)


def test_positions_stay_in_range_and_ignore_shift_and_scale_of_rewards():
    forest = crooked()
    value, known = forest.back_up("mean", *forest.draw(13))
    position = layer_position(value, known, **forest.layer)
    assert position.ge(0).all()
    assert position.le(1).all()
    torch.testing.assert_close(layer_position(100 * value + 7, known, **forest.layer), position, rtol=0, atol=1e-6)
