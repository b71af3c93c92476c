"""Rollouts as data: several joined into one, or one with a part of its decisions only.

Letters: E trained edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.types import Rollout

__all__ = ["concatenate", "leaves_only", "move", "select_edges"]


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of one plan, sampled in chunks of groups, as one; groups, sets, rows, edges and leaves are numbered on.

    Raises:
        ValueError: no part.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    if len(parts) == 1:
        return parts[0]
    groups = sets = rows = edges = leaves = 0
    shifted: dict[str, list[Tensor]] = {"leaf_group": [], "leaf_set": [], "row_group": [], "edge_row": [], "edge_parent": [], "leaf_edge": []}
    for part in parts:
        shifted["leaf_group"].append(part.leaf_group + groups)
        shifted["leaf_set"].append(part.leaf_set + sets)
        shifted["row_group"].append(part.row_group + groups)
        shifted["edge_row"].append(part.edge_row + rows)
        shifted["edge_parent"].append(torch.where(part.edge_parent < 0, part.edge_parent, part.edge_parent + edges))
        shifted["leaf_edge"].append(part.leaf_edge + torch.tensor([edges, leaves]))
        groups, sets = groups + int(part.leaf_group[-1]) + 1, sets + int(part.leaf_set.max()) + 1
        rows, edges, leaves = rows + len(part.row_sigma), edges + len(part.edge_row), leaves + len(part.leaves)
    fields = {f.name for f in dataclasses.fields(Rollout)} - set(shifted) - {"kernel", "forward_rows", "row_velocity"}
    velocities = [part.row_velocity for part in parts if part.row_velocity is not None]
    return Rollout(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in fields},
        **{name: torch.cat(values) for name, values in shifted.items()},
        row_velocity=torch.cat(velocities) if velocities else None,
        kernel=parts[0].kernel,
        forward_rows=sum(p.forward_rows for p in parts),
    )


def select_edges(rollout: Rollout, keep: Tensor) -> Rollout:
    """The rollout with some of its decisions only; rows that no decision leaves any more are dropped, leaves stay.

    Args:
        keep: [E] bool.
    Raises:
        ValueError: nothing is kept.
    """
    if bool(keep.all()):
        return rollout
    if not bool(keep.any()):
        raise ValueError("no decision is left to train on")
    edge = torch.nonzero(keep).squeeze(1)
    row = rollout.edge_row[edge].unique()
    new_edge = torch.full((len(keep),), -1).scatter_(0, edge, torch.arange(len(edge)))
    new_row = torch.full((len(rollout.row_sigma),), -1).scatter_(0, row, torch.arange(len(row)))
    parent = rollout.edge_parent[edge]
    while bool(((parent >= 0) & ~keep[parent.clamp_min(0)]).any()):  # past dropped decisions, to the nearest one that is kept
        parent = torch.where((parent >= 0) & ~keep[parent.clamp_min(0)], rollout.edge_parent[parent.clamp_min(0)], parent)
    chosen: dict[str, Tensor | None] = {}
    for name in ("row_x", "row_sigma", "row_group", "row_step", "row_velocity"):
        value = getattr(rollout, name)
        chosen[name] = None if value is None else value[row.to(value.device)]
    for field in dataclasses.fields(Rollout):
        if field.name.startswith("edge_"):
            value = getattr(rollout, field.name)
            chosen[field.name] = value[edge.to(value.device)]
    chosen["edge_row"] = new_row[rollout.edge_row[edge]]
    chosen["edge_parent"] = torch.where(parent < 0, parent, new_edge[parent.clamp_min(0)])
    pairs = rollout.leaf_edge[keep[rollout.leaf_edge[:, 0]]]
    chosen["leaf_edge"] = torch.stack([new_edge[pairs[:, 0]], pairs[:, 1]], 1)
    return dataclasses.replace(rollout, **chosen)  # type: ignore[arg-type]


def leaves_only(latents: Tensor, group: Tensor) -> Rollout:
    """Finished samples that no sampler of ours has drawn, as a rollout without rows and edges.

    Args:
        latents: [B, L...]. group: [B] int64, rising from 0.
    """
    none, double, rows = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64), latents[:0].float()
    return Rollout(
        leaves=latents.float(),
        leaf_group=group,
        leaf_set=group,
        row_x=rows,
        row_sigma=double,
        row_group=none,
        row_step=none,
        row_velocity=None,
        edge_row=none,
        edge_x_next=rows,
        edge_sigma=double,
        edge_sigma_next=double,
        edge_sigma_guard=double,
        edge_noise_level=double,
        edge_step=none,
        edge_parent=none,
        edge_old_log_prob=torch.zeros(0, device=latents.device),
        leaf_edge=torch.zeros(0, 2, dtype=torch.int64),
        kernel="ode",
        forward_rows=0,
    )


def move(rollout: Rollout, device: torch.device) -> Rollout:
    """The same with its latents on another device."""
    names = ("leaves", "row_x", "row_velocity", "edge_x_next", "edge_old_log_prob")
    values = {name: getattr(rollout, name) for name in names}
    return dataclasses.replace(rollout, **{name: value.to(device) for name, value in values.items() if value is not None})
