"""Rollout plans: which latents a group visits, before any network runs.

A plan is a forest over one prompt's group. Node 0.. are latents; every other node hangs on its parent by one step. Equal states are one node, so
whatever the executor evaluates is evaluated once: a prefix shared by a group is walked once, siblings share their parent's network row.

Letters: N nodes, T steps, G group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Node", "Plan", "chain_plan", "minimum_rows", "window_plan"]


@dataclass(frozen=True, slots=True)
class Node:
    """A latent of the plan and the step that leads to it.

    Attributes:
        parent: index of the parent node, -1 for a start noise.
        step: index into the sigma grid of this latent; a root has step 0.
        noise_level: noise of the edge into this node; 0 = deterministic Euler step.
        trained: whether the edge into this node is a trained decision.
    """

    parent: int
    step: int
    noise_level: float = 0.0
    trained: bool = False


@dataclass(frozen=True)
class Plan:
    """The nodes of one group, parents before children, and the sigma grid that they live on.

    Raises:
        ValueError: a node precedes its parent, goes back in the grid, ends before sigma 0, or is trained without noise.
    """

    sigmas: tuple[float, ...]
    nodes: tuple[Node, ...]
    kernel: str

    def __post_init__(self) -> None:
        last = len(self.sigmas) - 1
        has_child = [False] * len(self.nodes)
        for i, node in enumerate(self.nodes):
            if node.parent >= i or (node.parent < 0) != (node.step == 0):
                raise ValueError(f"node {i}: a parent comes before its child, and exactly the start noises have step 0")
            if node.trained and not node.noise_level > 0:
                raise ValueError(f"node {i}: only a stochastic step can be trained")
            if node.parent >= 0:
                has_child[node.parent] = True
                if node.step <= self.nodes[node.parent].step:
                    raise ValueError(f"node {i}: steps must move towards sigma 0")
        if any(node.step != last and not child for node, child in zip(self.nodes, has_child, strict=True)):
            raise ValueError("every path of a plan must end at sigma 0")

    @cached_property
    def waves(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth: all parents of a wave are in the wave before, so that a wave's rows are one batch."""
        depth: list[int] = []
        for node in self.nodes:
            depth.append(0 if node.parent < 0 else depth[node.parent] + 1)
        return tuple(tuple(i for i, d in enumerate(depth) if d == wave) for wave in range(max(depth) + 1))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Nodes at sigma 0, in order: the samples of the group."""
        return tuple(i for i, node in enumerate(self.nodes) if node.step == len(self.sigmas) - 1)

    @cached_property
    def forward_rows(self) -> int:
        """Network rows of one group's rollout: one for every latent that is not a leaf."""
        return len(self.nodes) - len(self.leaves)

    @cached_property
    def train_rows(self) -> tuple[int, ...]:
        """Nodes with at least one trained child: the rows of a training pass."""
        return tuple(sorted({node.parent for node in self.nodes if node.trained}))


def _grow(sigmas: Sequence[float], group_size: int, noise_levels: Sequence[float], trained: Sequence[bool], same_noise: bool, kernel: str) -> Plan:
    """G paths down the grid. With a shared start noise they stay one path until the first stochastic step."""
    num_steps = len(sigmas) - 1
    stochastic = [k for k in range(num_steps) if noise_levels[k] > 0]
    if same_noise and not stochastic:
        raise ValueError("same_noise with a deterministic plan makes G equal samples; add noise or set same_noise to false")
    split = stochastic[0] if same_noise else 0
    width = 1 if same_noise else group_size
    nodes = [Node(-1, 0) for _ in range(width)]
    tips = list(range(width))
    for k in range(num_steps):
        parents = tips * group_size if same_noise and k == split else tips
        tips = []
        for parent in parents:
            tips.append(len(nodes))
            nodes.append(Node(parent, k + 1, noise_levels[k], trained[k]))
    return Plan(tuple(sigmas), tuple(nodes), kernel)


def chain_plan(sigmas: Sequence[float], group_size: int, *, noise_level: float, train_fraction: float, same_noise: bool, kernel: str) -> Plan:
    """Flow-GRPO: steps 0 .. int(train_fraction T) - 1 are stochastic and trained, the rest Euler (arXiv:2505.05470, `timestep_fraction` 0.99).

    Deviation: the released code adds noise on the untrained last step too; with SD3's grid its std is 0.006, with others it would leave visible
    noise on the picture, so ours is always deterministic.
    """
    num_steps = len(sigmas) - 1
    count = max(1, min(num_steps - 1, int(train_fraction * num_steps)))
    if num_steps < 2:
        raise ValueError("a chain plan needs at least 2 steps: the last one is deterministic")
    active = [k < count for k in range(num_steps)]
    return _grow(sigmas, group_size, [noise_level if a else 0.0 for a in active], active, same_noise, kernel)


def window_plan(sigmas: Sequence[float], group_size: int, *, noise_level: float, start: int, size: int, same_noise: bool, kernel: str) -> Plan:
    """Flow-GRPO-Fast and MixGRPO: ``size`` stochastic, trained steps from ``start``; Euler before and after.

    Raises:
        ValueError: the window leaves steps 0 .. T - 2 (the last step is always deterministic).
    """
    num_steps = len(sigmas) - 1
    if start < 0 or size < 1 or start + size > num_steps - 1:
        raise ValueError(f"a window of {size} from step {start} does not fit into steps 0..{num_steps - 2} (the last step is deterministic)")
    active = [start <= k < start + size for k in range(num_steps)]
    return _grow(sigmas, group_size, [noise_level if a else 0.0 for a in active], active, same_noise, kernel)


def minimum_rows(num_steps: int, group_size: int, *, first: int, count: int, same_noise: bool) -> tuple[int, int]:
    """The least rows (rollout forward, training) per group for ``count`` trained steps from ``first``, in closed form.

    Independent start noise: G T and G W. Shared: s + 1 + G (T - s - 1) and 1 + G (W - 1). Derived in docs/nfe.md; kept apart from the plans on
    purpose, so that a run can print what it used beside what it should have used.
    """
    if same_noise:
        return first + 1 + group_size * (num_steps - first - 1), 1 + group_size * (count - 1)
    return group_size * num_steps, group_size * count
