"""Executes a plan for many groups at once: every distinct latent is one network row, and the rows of a wave are one batch.

Noise is drawn per group from that group's own generator, in plan order, so a group's images do not depend on which process, batch or neighbour
it was sampled with.

Letters: P groups, N nodes of the plan, L... latent axes, R training rows, E trained edges.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl.types import Rollout, Velocity
from samplers.kernels import Step, expand, load_kernel
from samplers.plans import Plan

__all__ = ["concatenate", "execute", "sample_ode"]


def _steps(plan: Plan, parents: Sequence[int], children: Sequence[int], repeat: int) -> Step:
    """The steps parents -> children as float64 [len * repeat], children fastest."""
    pairs = list(zip(parents, children, strict=True))
    sigma = torch.tensor([plan.sigmas[plan.nodes[p].step] for p, _ in pairs], dtype=torch.float64)
    sigma_next = torch.tensor([plan.sigmas[plan.nodes[c].step] for _, c in pairs], dtype=torch.float64)
    noise = torch.tensor([plan.nodes[c].noise_level for _, c in pairs], dtype=torch.float64)
    guard = torch.full_like(sigma, plan.sigmas[1])
    return Step(*(column.repeat(repeat) for column in (sigma, sigma_next, guard, noise)))


@torch.no_grad()
def execute(
    velocity: Velocity,
    plan: Plan,
    prompt_rows: Tensor,
    generators: Sequence[torch.Generator],
    latent_shape: Sequence[int],
    *,
    device: torch.device,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
) -> Rollout:
    """Sample P groups.

    Args:
        velocity: the policy; called once a wave with all of the wave's rows.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
        generators: one per group; they fix all noise of the group, on the generator's own device.
        latent_shape: L... .
        reduction: log-probability over latent elements, "mean" or "sum".
        dtype: of latents; log-probabilities are float32.
    Returns:
        The rollout; leaves are ordered group by group.
    """
    num_groups, nodes = len(generators), plan.nodes
    kernel, euler = load_kernel(plan.kernel), load_kernel("ode")
    keep = set(plan.train_rows)
    trained = [i for i, node in enumerate(nodes) if node.trained]
    edge_slot = {i: slot for slot, i in enumerate(trained)}
    row_slot = {i: slot for slot, i in enumerate(plan.train_rows)}
    leaf_slot = {i: slot for slot, i in enumerate(plan.leaves)}
    shape = tuple(latent_shape)

    def buffer(count: int) -> Tensor:
        return torch.empty(num_groups, count, *shape, dtype=dtype, device=device)

    row_x, x_next, leaves = buffer(len(keep)), buffer(len(trained)), buffer(len(plan.leaves))
    old_log_prob = torch.empty(num_groups, len(trained), device=device)

    def noise(count: int) -> Tensor:
        """[P, count, L...]"""
        drawn = [torch.randn(count, *shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
        return torch.stack(drawn).to(device=device, dtype=dtype)

    rows = 0
    wave = list(plan.waves[0])
    x = noise(len(wave))  # [P, n, L...]
    for following in plan.waves[1:]:
        live = [i for i in wave if i not in leaf_slot]
        if len(live) < len(wave):
            x = x[:, [wave.index(i) for i in live]]
        for i in live:
            if i in keep:
                row_x[:, row_slot[i]] = x[:, live.index(i)]
        sigma = torch.tensor([plan.sigmas[nodes[i].step] for i in live], dtype=torch.float64).repeat(num_groups)
        v = velocity(x.flatten(0, 1), sigma, prompt_rows.repeat_interleave(len(live))).view_as(x)
        rows += num_groups * len(live)

        parents = [nodes[c].parent for c in following]
        position = [live.index(p) for p in parents]
        same = position == list(range(len(live)))
        x_from, v_from = (x, v) if same else (x[:, position], v[:, position])
        step = _steps(plan, parents, following, num_groups)
        noisy = [j for j, c in enumerate(following) if nodes[c].noise_level > 0]
        if not noisy:
            x = euler.moments(x_from.flatten(0, 1), v_from.flatten(0, 1), step).mean.view_as(x_from)
        elif len(noisy) == len(following):
            transition = kernel.moments(x_from.flatten(0, 1), v_from.flatten(0, 1), step)
            drawn = noise(len(following)).flatten(0, 1)
            sampled = transition.mean + expand(transition.std, drawn) * drawn
            log_prob = kernel.log_prob(sampled, transition, reduction)  # type: ignore[arg-type]
            x = sampled.view_as(x_from)
            picks = [j for j, c in enumerate(following) if c in edge_slot]
            if picks:
                slots = [edge_slot[following[j]] for j in picks]
                x_next[:, slots] = x[:, picks]
                old_log_prob[:, slots] = log_prob.view(num_groups, -1)[:, picks].float()
        else:
            raise ValueError("a wave mixes stochastic and deterministic steps; give each its own wave")
        for j, c in enumerate(following):
            if c in leaf_slot:
                leaves[:, leaf_slot[c]] = x[:, j]
        wave = list(following)

    def tile(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat(num_groups)

    def offsets(count: int, width: int) -> Tensor:
        return torch.arange(num_groups).repeat_interleave(count) * width

    edge_step = _steps(plan, [nodes[i].parent for i in trained], trained, num_groups)
    below = [(edge_slot[a], leaf_slot[leaf]) for leaf in plan.leaves for a in _ancestors(plan, leaf) if a in edge_slot]
    pairs = torch.tensor(below, dtype=torch.int64).view(-1, 2)
    span = torch.tensor([len(trained), len(plan.leaves)])
    return Rollout(
        leaves=leaves.flatten(0, 1),
        leaf_group=torch.arange(num_groups).repeat_interleave(len(plan.leaves)),
        row_x=row_x.flatten(0, 1),
        row_sigma=tile([plan.sigmas[nodes[i].step] for i in plan.train_rows]),
        row_group=torch.arange(num_groups).repeat_interleave(len(keep)),
        edge_row=torch.tensor([row_slot[nodes[i].parent] for i in trained]).repeat(num_groups) + offsets(len(trained), len(keep)),
        edge_x_next=x_next.flatten(0, 1),
        edge_sigma=edge_step.sigma,
        edge_sigma_next=edge_step.sigma_next,
        edge_sigma_guard=edge_step.sigma_guard,
        edge_noise_level=edge_step.noise_level,
        edge_step=torch.tensor([nodes[nodes[i].parent].step for i in trained], dtype=torch.int64).repeat(num_groups),
        edge_old_log_prob=old_log_prob.flatten(),
        leaf_edge=(pairs[None] + torch.arange(num_groups)[:, None, None] * span).flatten(0, 1),
        kernel=plan.kernel,
        forward_rows=rows,
    )


def _ancestors(plan: Plan, node: int) -> list[int]:
    """The node itself and everything above it, down to but without the root."""
    out = []
    while plan.nodes[node].parent >= 0:
        out.append(node)
        node = plan.nodes[node].parent
    return out


@torch.no_grad()
def sample_ode(velocity: Velocity, noise: Tensor, sigmas: Sequence[float], prompt_rows: Tensor) -> Tensor:
    """Euler samples of the flow ODE.

    Args:
        noise: [B, L...] start noise at sigmas[0].
        prompt_rows: [B] int64.
    Returns:
        [B, L...] clean latents.
    """
    euler, x = load_kernel("ode"), noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        here, after = (torch.full((len(x),), s, dtype=torch.float64) for s in (sigma, sigma_next))
        x = euler.moments(x, velocity(x, here, prompt_rows), Step(here, after, torch.full_like(here, sigmas[1]), torch.zeros_like(here))).mean
    return x


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of one plan, sampled in chunks of groups, as one; groups, rows, edges and leaves are numbered on.

    Raises:
        ValueError: no part.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    if len(parts) == 1:
        return parts[0]
    groups = rows = edges = leaves = 0
    shifted: dict[str, list[Tensor]] = {"leaf_group": [], "row_group": [], "edge_row": [], "leaf_edge": []}
    for part in parts:
        shifted["leaf_group"].append(part.leaf_group + groups)
        shifted["row_group"].append(part.row_group + groups)
        shifted["edge_row"].append(part.edge_row + rows)
        shifted["leaf_edge"].append(part.leaf_edge + torch.tensor([edges, leaves]))
        groups += int(part.leaf_group[-1]) + 1
        rows, edges, leaves = rows + len(part.row_sigma), edges + len(part.edge_row), leaves + len(part.leaves)
    fields = {f.name for f in dataclasses.fields(Rollout)} - set(shifted) - {"kernel", "forward_rows"}
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    return Rollout(
        **joined, **{name: torch.cat(values) for name, values in shifted.items()}, kernel=parts[0].kernel, forward_rows=sum(p.forward_rows for p in parts)
    )
