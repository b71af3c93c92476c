"""Credit: from values of leaves to values of the nodes above them, and from there to advantages of the edges (decisions) that lead to the nodes.

Two orders are in use. Advantages of leaves first, then averaged over the leaves below each edge (`integrate`): chains, G2RPO. Or rewards first, backed
up to the child node of every edge (`backup`), then compared within a layer (`layer_advantages`: BranchGRPO) or among siblings (`sibling_advantages`).

Letters: B leaves, E trained edges, M (edge, leaf) pairs, R rows (parent nodes). A layer is the edges of one (group, step). Index tensors are int64 on the
CPU; values are float64 and an edge's value is its child node's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.core.advantages import edge_advantages, group_statistics

__all__ = ["LEAST_STD", "backup", "integrate", "layer_advantages", "layer_position", "sibling_advantages"]

LEAST_STD = 1e-6
"""A layer whose values have a smaller standard deviation has nothing to compare."""


def backup(
    kind: Literal["mean", "path", "level"],
    values: Tensor,
    valid: Tensor,
    *,
    leaf_edge: Tensor,
    edge_parent: Tensor,
    log_prob: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Value R(n) of every edge's child node n from the valid leaves below it.

    | kind | R(n) |
    | --- | --- |
    | mean | the mean of the leaves below |
    | path | sum_l w_l R_l, w = softmax over the leaves l of temperature * logpath(l given n); logpath sums log_prob of the edges strictly below n |
    | level | bottom up: sum_c w_c R(c), w = softmax over the child edges c of temperature * log_prob(c); just above the leaves their mean |

    With temperature 0, path is the mean, and so is level where siblings have equally many leaves. Leaves and children without a value have no weight,
    the others share it. Equal leaf values are exactly the value of every node above them.

    Args:
        values: [B] float; anything, NaN too, where not valid. valid: [B] bool, samples whose reward is known.
        leaf_edge: [M, 2], all pairs (edge, leaf below it).
        edge_parent: [E], the nearest trained edge above, -1 if there is none; smaller than the edge's own number.
        log_prob: [E] float, per-element mean log-probability under the sampling policy, finite; unused by ``mean``.
        temperature: >= 0.
    Returns:
        value [E] float64, 0 where not known; known [E] bool, some valid leaf is below.
    Raises:
        ValueError: unknown kind; or for ``level``, an edge has both child edges and leaves of its own.
    Source:
        BranchGRPO, arXiv:2509.06040: path is the paper's reward fusion (from notes that transcribe it), mean and level are the released code's two
        variants (train_branchgrpo_flux.py, `compute_node_rewards_from_leaves`, temperature 1). ``level`` on advantages instead of rewards is our reading
        of TreeGRPO, arXiv:2512.08153. Deviation: an unscored leaf is left out; the released code has none.
    """
    if kind not in ("mean", "path", "level"):
        raise ValueError(f"unknown backup {kind!r}; known: mean, path, level")
    size = len(edge_parent)
    edge, leaf = leaf_edge.unbind(1)
    known = torch.zeros(size, dtype=torch.bool)
    known[edge[valid[leaf]]] = True
    values, log_prob = values.double(), log_prob.double()
    if kind == "mean":
        return _softmax_mean(torch.zeros(len(edge), dtype=torch.float64), values[leaf], edge, valid[leaf], size), known
    if kind == "path":
        # whole paths will do: the part above a node is the same for all leaves below it and cancels in the softmax
        path = torch.zeros(len(values), dtype=torch.float64).index_add_(0, leaf, log_prob[edge])
        return _softmax_mean(temperature * path[leaf], values[leaf], edge, valid[leaf], size), known

    depth = _depth(edge_parent)
    lowest = torch.full((len(values),), -1).scatter_reduce_(0, leaf, depth[edge], "amax")
    own = depth[edge] == lowest[leaf]  # pairs without a further trained edge between edge and leaf
    has_child = torch.zeros(size, dtype=torch.bool)
    has_child[edge_parent[edge_parent >= 0]] = True
    if bool(has_child[edge[own]].any()):
        raise ValueError("a level-by-level backup needs edges with either child edges or leaves of their own; some have both")
    value = _softmax_mean(torch.zeros(int(own.sum()), dtype=torch.float64), values[leaf[own]], edge[own], valid[leaf[own]], size)
    for level in range(int(depth.max()), 0, -1):
        child = torch.nonzero(depth == level).squeeze(1)
        value += _softmax_mean(temperature * log_prob[child], value[child], edge_parent[child], known[child], size)  # 0 for all but their parents, which had 0
    return value, known


def layer_advantages(values: Tensor, known: Tensor, *, group: Tensor, step: Tensor, eps: float, ddof: int) -> Tensor:
    """(R(child) - mean of the layer) / (std of the layer + eps), [E].

    Exactly 0 where the value is not known, where the layer has fewer than two known values, and where its std is below 1e-6: such differences are
    rounding errors of the rewards. With one step it is otherwise GRPO's group z-score.

    Args:
        values, known: [E], see `backup`. group, step: [E], which layer the edge is in.
        eps: > 0. ddof: BranchGRPO uses eps 1e-8 with ddof 1.
    Source:
        BranchGRPO, arXiv:2509.06040, verified in the released code, the bound on the std too.
        "layer" for Dynamic-TreeRPO, arXiv:2509.23352, is our reading.
    """
    layer, count = _layers(group, step)
    mean, std, _ = group_statistics(values, layer, known, count, ddof)
    return torch.where(known & (std[layer] >= LEAST_STD), (values - mean[layer]) / (std[layer] + eps), torch.zeros_like(values))


def sibling_advantages(values: Tensor, known: Tensor, *, row: Tensor, group: Tensor, step: Tensor, eps: float, ddof: int) -> Tensor:
    """(R(child) - mean of the siblings) / (std of the layer + eps), [E]: without the luck of the prefix that the siblings share.

    The scale is the layer's: a std of two siblings would make every advantage +1 or -1. Exactly 0 for an only child (so a stochastic step that does not
    branch gets no gradient), where the value is not known, where siblings are equal, and in layers with a std below 1e-6. Siblings' advantages sum to 0.

    Args:
        row: [E] int64 >= 0, the parent node; siblings share it. Others as in `layer_advantages`.
    Source:
        Our reading of Dynamic-TreeRPO, arXiv:2509.23352.
    """
    layer, count = _layers(group, step)
    _, std, _ = group_statistics(values, layer, known, count, ddof)
    mean, _, _ = group_statistics(values, row, known, int(row.max()) + 1, ddof)
    return torch.where(known & (std[layer] >= LEAST_STD), (values - mean[row]) / (std[layer] + eps), torch.zeros_like(values))


def integrate(kind: Literal["mean", "sum"], leaf_advantages: Tensor, leaf_edge: Tensor, num_edges: int) -> Tensor:
    """Advantage of an edge from the advantages of the leaves below it, [E]: their mean (`edge_advantages`) or their sum.

    In a granular plan the leaves below an edge are one child finished on several step grids, and this is G2RPO's multi-granularity integration; the sum
    of J granularities is J times the mean, before the clamp of advantages.

    Args:
        leaf_advantages: [B]; a leaf whose reward is not known has 0 and counts. leaf_edge: [M, 2].
    Raises:
        ValueError: unknown kind.
    Source:
        Granular-GRPO, arXiv:2510.01982, verified in the released code (sum).
    """
    if kind == "mean":
        return edge_advantages(leaf_advantages, leaf_edge, num_edges)
    if kind == "sum":
        edge, leaf = leaf_edge.unbind(1)
        return torch.zeros(num_edges, dtype=leaf_advantages.dtype).index_add_(0, edge, leaf_advantages[leaf])
    raise ValueError(f"unknown integration {kind!r}; known: mean, sum")


def layer_position(values: Tensor, known: Tensor, *, group: Tensor, step: Tensor) -> Tensor:
    """Where a node stands in its layer: (R - min) / (max - min + 1e-8), [E] in [0, 1]; 0.5 where unknown and where the layer has one value only.

    Source:
        Our reading of the normalised reward of Dynamic-TreeRPO's clipping, arXiv:2509.23352; the exception for one value is ours: such a node is neither
        the best nor the worst.
    """
    layer, count = _layers(group, step)
    low = torch.full((count,), torch.inf, dtype=values.dtype).scatter_reduce_(0, layer, torch.where(known, values, torch.inf), "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce_(0, layer, torch.where(known, values, -torch.inf), "amax")
    position = (values - low[layer]) / (high - low + 1e-8)[layer]
    return torch.where(known & (low < high)[layer], position, torch.full_like(values, 0.5))


def _layers(group: Tensor, step: Tensor) -> tuple[Tensor, int]:
    """Number the (group, step) pairs: the layer of each edge, [E], and how many there are."""
    pairs, layer = torch.stack((group, step)).unique(dim=1, return_inverse=True)
    return layer, pairs.shape[1]


def _depth(edge_parent: Tensor) -> Tensor:
    """Trained edges above each edge, [E] int64."""
    depth, above = torch.zeros_like(edge_parent), edge_parent
    while bool((above >= 0).any()):
        depth += above >= 0
        above = torch.where(above >= 0, edge_parent[above], above)
    return depth


def _softmax_mean(score: Tensor, value: Tensor, index: Tensor, use: Tensor, size: int) -> Tensor:
    """Mean of the used values of each index with weights softmax(score), [size]; 0 where nothing is used. Arguments are [N]; scores of any size are safe."""
    top = torch.full((size,), -torch.inf, dtype=value.dtype).scatter_reduce_(0, index, torch.where(use, score, -torch.inf), "amax")
    low = torch.full_like(top, torch.inf).scatter_reduce_(0, index, torch.where(use, value, torch.inf), "amin")
    high = torch.full_like(top, -torch.inf).scatter_reduce_(0, index, torch.where(use, value, -torch.inf), "amax")
    weight = torch.where(use, (score - top[index]).exp(), torch.zeros_like(score))
    weighted = weight * torch.where(use, value, torch.zeros_like(value))
    total = torch.zeros_like(top).index_add_(0, index, weight)  # at least 1 where anything is used: the top score's weight
    mean = torch.zeros_like(top).index_add_(0, index, weighted) / total.clamp_min(1)
    return torch.where(total > 0, mean.clamp(low, high), torch.zeros_like(mean))  # equal values are exactly their mean, whatever the rounding
