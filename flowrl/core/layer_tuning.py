"""LayerTuning-RL of Dynamic-TreeRPO, arXiv:2509.23352: a supervised term that pulls every node's velocity towards the path to the group's best leaf.

    L = mean over rows n of w_n <(v(x_n) - T_n)^2>

| target | T_n | source |
| --- | --- | --- |
| best_velocity | the old velocity at the row of the same layer on the best leaf's path (`rows_of_best`) | the paper's structure; details our reading |
| to_best_x0 | (x_n - x0 of the best leaf) / sigma_n (`straight_velocity`) | ours: well posed for every node, not only the best path's |

The paper's text gives the target's idea and a weight in front; the weights w_n, the guard and the targets' exact form here are our reading.

Letters: R rows (nodes with a trained step), P groups, N (row, leaf) pairs, L... latent axes. Index tensors are int64 on the CPU; <.> is the mean over latent
elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["progress_weights", "rows_of_best", "straight_velocity", "velocity_regression"]


def progress_weights(row_reward: Tensor, row_group: Tensor, best: Tensor, worst: Tensor, mean: Tensor, std: Tensor, guard: float) -> Tensor:
    """w_n = clip((R* - R(n)) / (R* - Rmin + 1e-8), 0, 1): how far a node is behind the best leaf, [R] in [0, 1].

    0 for the rows of a group whose best leaf does not stand out, R* - mean <= guard std: the best of a bad group is not worth imitating. Our reading.

    Args:
        row_reward: [R] float64, mean reward of the valid leaves below; NaN where there is none, and then the weight is 0. row_group: [R] in 0..P-1.
        best, worst, mean, std: [P] float64 over the group's valid leaves; best NaN or -inf where there is none.
        guard: >= 0, default 0.5.
    """
    stands_out = best - mean > guard * std
    weight = ((best[row_group] - row_reward) / (best - worst + 1e-8)[row_group]).clamp(0, 1)
    return torch.where(stands_out[row_group] & ~row_reward.isnan(), weight, torch.zeros_like(weight))


def rows_of_best(row_leaf: Tensor, row_group: Tensor, row_step: Tensor, best_leaf: Tensor) -> Tensor:
    """For each row the row of the same group and step on the path to the group's best leaf, [R]; -1 where that path has no row at the step.

    Args:
        row_leaf: [N, 2], all pairs (row, leaf below it), repeats allowed. row_group, row_step: [R]. best_leaf: [P], -1 for a group without a valid leaf.
    """
    row, leaf = row_leaf.unbind(1)
    on_path = row[leaf == best_leaf[row_group[row]]]
    layers, layer = torch.stack((row_group, row_step)).unique(dim=1, return_inverse=True)
    found = torch.full((layers.shape[1],), -1)
    found[layer[on_path]] = on_path
    return found[layer]


def straight_velocity(x: Tensor, sigma: Tensor, x0_best: Tensor) -> Tensor:
    """(x - x0) / sigma: the velocity that leads straight from a node to the best leaf, [R, L...] in the dtype of x.

    For x = (1 - sigma) x0 + sigma noise it is noise - x0, the flow-matching target.

    Args:
        x: [R, L...]. sigma: [R], > 0. x0_best: [R, L...], clean latent of the best leaf of the row's group.
    Raises:
        ValueError: a sigma is 0: a clean latent has nowhere to go.
    """
    if not bool((sigma > 0).all()):
        raise ValueError("a clean latent (sigma 0) has no velocity to another one")
    return (x - x0_best) / sigma.to(x).view(-1, *[1] * (x.ndim - 1))


def velocity_regression(velocity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """w_n <(v - T)^2> per row, [R], with the gradient of the velocity only. A row of weight 0 has no loss and no gradient, whatever its target holds.

    Args:
        velocity, target: [R, L...]. weight: [R], see `progress_weights`.
    """
    weight = weight.to(velocity)
    used = (weight != 0).view(-1, *[1] * (velocity.ndim - 1))
    difference = velocity - torch.where(used, target, velocity).detach()
    return weight * difference.square().flatten(1).mean(1)
