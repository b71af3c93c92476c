"""Executes a plan for many groups at once: every distinct latent is one network row, and the rows of a wave are one batch.

Noise is drawn per group from that group's own generator, in plan order, so a group's images do not depend on which process, batch or neighbour
it was sampled with.

Letters: P groups, N nodes of the plan, L... latent axes, R training rows, E trained edges.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.types import Rollout, Velocity
from samplers.dpmpp import dpmpp_2m_step
from samplers.kernels import PREDICTIONS, Step, expand, load_kernel
from samplers.ode import heun_correction, noiseless_kernel
from samplers.plans import Plan, Solver

__all__ = ["execute", "sample_ode"]

_SOLVERS: dict[Solver, str] = {"ode": "Euler", "heun": "Heun", "dpm++": "DPM-Solver++"}


def _steps(plan: Plan, parents: Sequence[int], children: Sequence[int], repeat: int) -> Step:
    """The steps parents -> children as float64 [len * repeat], children fastest."""
    pairs = list(zip(parents, children, strict=True))
    sigma = torch.tensor([plan.sigmas[plan.nodes[p].step] for p, _ in pairs], dtype=torch.float64)
    sigma_next = torch.tensor([plan.sigmas[plan.nodes[c].step] for _, c in pairs], dtype=torch.float64)
    noise = torch.tensor([plan.nodes[c].noise_level for _, c in pairs], dtype=torch.float64)
    guard = torch.full_like(sigma, plan.sigmas[1])
    return Step(*(column.repeat(repeat) for column in (sigma, sigma_next, guard, noise)))


@dataclass(slots=True)
class _Wave:
    """The live latents of one depth of the plan: nodes, [P, n, L...] latents, and what second-order steps remember of the wave before."""

    nodes: list[int]
    x: Tensor
    denoised: Tensor | None = None

    def pick(self, nodes: Sequence[int]) -> _Wave:
        if len(nodes) == len(self.nodes):
            return self
        index = [self.nodes.index(i) for i in nodes]
        return _Wave(list(nodes), self.x[:, index])


class _Executor:
    """State of one `execute`; the methods are its stages."""

    def __init__(
        self, plan: Plan, generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, prediction: str
    ) -> None:
        self.plan, self.generators, self.shape, self.device, self.dtype = plan, generators, shape, device, dtype
        self.kernel, self.noiseless = load_kernel(plan.kernel, prediction), noiseless_kernel(prediction)
        self.multistep = any(node.solver == "dpm++" for node in plan.nodes)
        if prediction != "flow" and any(node.solver != "ode" for node in plan.nodes):
            raise ValueError(f"{_SOLVERS['heun']} and {_SOLVERS['dpm++']} steps need a flow velocity; this network predicts {PREDICTIONS[prediction]}")

    def noise(self, count: int) -> Tensor:
        """[P, count, L...], each group from its own generator."""
        drawn = [torch.randn(count, *self.shape, generator=g, device=g.device, dtype=torch.float32) for g in self.generators]
        return torch.stack(drawn).to(device=self.device, dtype=self.dtype)

    def sibling_noise(self, children: Sequence[int]) -> Tensor:
        """Noise of stochastic edges; siblings share a part of theirs where the plan says so."""
        own, scale = self.noise(len(children)), self.plan.sibling_scale
        parents = [self.plan.nodes[c].parent for c in children]
        families = sorted({p for p in parents if parents.count(p) > 1})
        if scale is None or not families:
            return own
        alone = torch.tensor([p not in families for p in parents], device=self.device).view(1, -1, *[1] * len(self.shape))
        shared = self.noise(len(families))[:, [families.index(p) if p in families else 0 for p in parents]]
        return torch.where(alone, own, (shared + scale * own) / math.sqrt(1 + scale**2))

    def deterministic(self, wave: _Wave, before: _Wave | None, v: Tensor, children: Sequence[int]) -> Tensor:
        """[P, n, L...] latents of deterministic edges: first order, or with the memory of the wave before DPM-Solver++ or Heun's correction."""
        nodes, count = self.plan.nodes, len(self.generators)
        position = [wave.nodes.index(nodes[c].parent) for c in children]
        same = position == list(range(len(wave.nodes)))
        x, velocity = (wave.x, v) if same else (wave.x[:, position], v[:, position])
        step = _steps(self.plan, [nodes[c].parent for c in children], children, count)
        solvers = {nodes[c].solver for c in children}
        if len(solvers) > 1:
            raise ValueError(f"a wave mixes {' and '.join(text for name, text in _SOLVERS.items() if name in solvers)} steps; give each its own wave")
        if "ode" in solvers:
            return self.noiseless.moments(x.flatten(0, 1), velocity.flatten(0, 1), step).mean.view_as(x)
        above = [nodes[nodes[c].parent].parent for c in children]
        assert before is not None
        if "heun" in solvers:
            start = before.x[:, [before.nodes.index(a) for a in above]]
            step = _steps(self.plan, above, children, count)
            return heun_correction(start.flatten(0, 1), x.flatten(0, 1), velocity.flatten(0, 1), step).view_as(x)
        assert before.denoised is not None and wave.denoised is not None
        previous = before.denoised[:, [before.nodes.index(a) for a in above]]
        sigma_previous = torch.tensor([self.plan.sigmas[nodes[a].step] for a in above], dtype=torch.float64).repeat(count)
        denoised = wave.denoised if same else wave.denoised[:, position]
        out = dpmpp_2m_step(x.flatten(0, 1), denoised.flatten(0, 1), previous.flatten(0, 1), step.sigma, step.sigma_next, sigma_previous)
        return out.view_as(x)

    def stochastic(self, wave: _Wave, v: Tensor, children: Sequence[int], reduction: str) -> tuple[Tensor, Tensor]:
        """[P, n, L...] sampled latents of stochastic edges, and their log-probabilities [P, n]."""
        position = [wave.nodes.index(self.plan.nodes[c].parent) for c in children]
        same = position == list(range(len(wave.nodes)))
        x, velocity = (wave.x, v) if same else (wave.x[:, position], v[:, position])
        step = _steps(self.plan, [self.plan.nodes[c].parent for c in children], children, len(self.generators))
        transition = self.kernel.moments(x.flatten(0, 1), velocity.flatten(0, 1), step)
        drawn = self.sibling_noise(children).flatten(0, 1)
        sampled = transition.mean + expand(transition.std, drawn) * drawn
        log_prob = self.kernel.log_prob(sampled, transition, reduction)  # type: ignore[arg-type]
        return sampled.view_as(x), log_prob.view(len(self.generators), -1).float()


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
    keep_velocity: bool = False,
    prediction: str = "flow",
) -> Rollout:
    """Sample P groups.

    Args:
        velocity: the policy's prediction; called once a wave with all of the wave's rows.
        prompt_rows: [P] int64, what the policy calls each group's prompt.
        generators: one per group; they fix all noise of the group, on the generator's own device.
        latent_shape: L... .
        reduction: log-probability over latent elements, "mean" or "sum".
        dtype: of latents; log-probabilities are float32.
        keep_velocity: keep the velocity of every training row.
        prediction: what ``velocity`` predicts, a key of PREDICTIONS; for epsilon and v_prediction deterministic steps are DDIM's.
    Returns:
        The rollout; leaves are ordered group by group. Rows of kept steps have no edge; a plan that trains no edge leaves all edge tensors empty.
    Raises:
        ValueError: the plan's kernel or solver does not understand the prediction.
    """
    num_groups, nodes, shape = len(generators), plan.nodes, tuple(latent_shape)
    run = _Executor(plan, generators, shape, device, dtype, prediction)
    trained = [i for i, node in enumerate(nodes) if node.trained]
    edge_slot = {i: slot for slot, i in enumerate(trained)}
    row_slot = {i: slot for slot, i in enumerate(plan.train_rows)}
    leaf_slot = {i: slot for slot, i in enumerate(plan.leaves)}

    def buffer(count: int) -> Tensor:
        return torch.empty(num_groups, count, *shape, dtype=dtype, device=device)

    row_x, x_next, leaves = buffer(len(row_slot)), buffer(len(trained)), buffer(len(plan.leaves))
    row_velocity = buffer(len(row_slot)) if keep_velocity else None
    old_log_prob = torch.empty(num_groups, len(trained), device=device)

    rows = 0
    before: _Wave | None = None
    wave = _Wave(list(plan.waves[0]), run.noise(len(plan.waves[0])))
    for following in plan.waves[1:]:
        wave = wave.pick([i for i in wave.nodes if i not in leaf_slot])
        live = wave.nodes
        sigma = torch.tensor([plan.sigmas[nodes[i].step] for i in live], dtype=torch.float64).repeat(num_groups)
        v = velocity(wave.x.flatten(0, 1), sigma, prompt_rows.repeat_interleave(len(live))).view_as(wave.x)
        rows += num_groups * len(live)
        if run.multistep:
            wave.denoised = (wave.x.flatten(0, 1) - expand(sigma, wave.x.flatten(0, 1)) * v.flatten(0, 1)).view_as(wave.x)
        for j, i in enumerate(live):
            if i in row_slot:
                row_x[:, row_slot[i]] = wave.x[:, j]
                if row_velocity is not None:
                    row_velocity[:, row_slot[i]] = v[:, j]

        noisy = [c for c in following if nodes[c].noise_level > 0]
        calm = [c for c in following if not nodes[c].noise_level > 0]
        parts: list[Tensor] = []
        if noisy:
            sampled, log_prob = run.stochastic(wave, v, noisy, reduction)
            parts.append(sampled)
            picks = [j for j, c in enumerate(noisy) if c in edge_slot]
            slots = [edge_slot[noisy[j]] for j in picks]
            x_next[:, slots], old_log_prob[:, slots] = sampled[:, picks], log_prob[:, picks]
        if calm:
            parts.append(run.deterministic(wave, before, v, calm))
        before, wave = wave, _Wave([*noisy, *calm], parts[0] if len(parts) == 1 else torch.cat(parts, 1))
        for j, c in enumerate(wave.nodes):
            if c in leaf_slot:
                leaves[:, leaf_slot[c]] = wave.x[:, j]

    def tile(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat(num_groups)

    def steps_of(indices: Sequence[int]) -> Tensor:
        return torch.tensor([nodes[i].step for i in indices], dtype=torch.int64).repeat(num_groups)

    def offsets(count: int, width: int) -> Tensor:
        return torch.arange(num_groups).repeat_interleave(count) * width

    edge_step = _steps(plan, [nodes[i].parent for i in trained], trained, num_groups)
    above = {i: [a for a in _ancestors(plan, i) if a in edge_slot] for i in [*trained, *plan.leaves]}  # nearest first, the node itself included
    pairs = torch.tensor([(edge_slot[a], leaf_slot[leaf]) for leaf in plan.leaves for a in above[leaf]], dtype=torch.int64).view(-1, 2)
    parent = torch.tensor([edge_slot[above[i][1]] if len(above[i]) > 1 else -1 for i in trained], dtype=torch.int64).repeat(num_groups)
    span = torch.tensor([len(trained), len(plan.leaves)])
    numbers = sorted({nodes[i].comparison for i in plan.leaves})
    comparison = torch.tensor([numbers.index(nodes[i].comparison) for i in plan.leaves], dtype=torch.int64)
    return Rollout(
        leaves=leaves.flatten(0, 1),
        leaf_group=torch.arange(num_groups).repeat_interleave(len(plan.leaves)),
        leaf_set=comparison.repeat(num_groups) + offsets(len(plan.leaves), len(numbers)),
        row_x=row_x.flatten(0, 1),
        row_sigma=tile([plan.sigmas[nodes[i].step] for i in plan.train_rows]),
        row_group=torch.arange(num_groups).repeat_interleave(len(row_slot)),
        row_step=steps_of(plan.train_rows),
        row_velocity=None if row_velocity is None else row_velocity.flatten(0, 1),
        edge_row=torch.tensor([row_slot[nodes[i].parent] for i in trained], dtype=torch.int64).repeat(num_groups) + offsets(len(trained), len(row_slot)),
        edge_x_next=x_next.flatten(0, 1),
        edge_sigma=edge_step.sigma,
        edge_sigma_next=edge_step.sigma_next,
        edge_sigma_guard=edge_step.sigma_guard,
        edge_noise_level=edge_step.noise_level,
        edge_step=steps_of([nodes[i].parent for i in trained]),
        edge_parent=torch.where(parent < 0, parent, parent + offsets(len(trained), len(trained))),
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
def sample_ode(velocity: Velocity, noise: Tensor, sigmas: Sequence[float], prompt_rows: Tensor, *, prediction: str = "flow") -> Tensor:
    """Deterministic samples: Euler steps of the flow ODE, or DDIM with eta 0.

    Args:
        noise: [B, L...] start noise at sigmas[0]: N(0, 1), also where sigmas[0] of an epsilon or v network lies below 1, as diffusers starts there.
        prompt_rows: [B] int64.
        prediction: what ``velocity`` predicts, a key of samplers.kernels.PREDICTIONS.
    Returns:
        [B, L...] clean latents.
    """
    kernel, x = noiseless_kernel(prediction), noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        here, after = (torch.full((len(x),), s, dtype=torch.float64) for s in (sigma, sigma_next))
        x = kernel.moments(x, velocity(x, here, prompt_rows), Step(here, after, torch.full_like(here, sigmas[1]), torch.zeros_like(here))).mean
    return x
