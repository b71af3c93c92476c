"""From the ``rollout`` section of a run to the plan of an iteration, and to the least rows that such a plan needs.

Where the window starts (arXiv:2507.21802 for MixGRPO's schedules, read in its code; T steps, w = window.size):

| schedule | start of iteration i (counted from 1) |
| --- | --- |
| random | drawn for each iteration, all groups alike; probability of start l proportional to start_decay^l (1 = uniform) |
| progressive | low + stride floor((i - 1) / every), back to low after the last start that fits |
| decay | as progressive, but iterations at a start fall linearly from `every` at the first start to `every_least` at the last |
| exp_decay | as progressive, with ceil(every exp(-exp_rate max(l - exp_after, 0))) iterations at start l |
| frozen | low |
| backward | the last n steps are stochastic, n = backward_first + floor((i - 1) (T - backward_first + 1) / backward_stages), at most T (B2-DiffuRL) |

Deviation from MixGRPO's code: its window loses steps near the end and can become empty; ours always has w steps and starts over instead. The last step of the
grid is never stochastic, so that `backward` trains n - 1 of its n steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowrl.config import Config
from flowrl.core.selection import depth_window
from flowrl.sections import RolloutConfig
from flowrl.seeds import derive_seed
from samplers.nfe import Rows, granular_rows, ode_rows, path_rows, tree_rows, tree_widths
from samplers.plans import Plan, chain_plan, compress_after, granular_plan, ode_plan, tree_plan, window_plan

__all__ = ["build_plan", "kept_latents", "minimum_rows", "trained_rows", "window_of"]


def window_of(config: RolloutConfig, iteration: int, seed: int) -> tuple[int, int]:
    """(start, size) of the window in an iteration.

    Args:
        iteration: >= 1.
        seed: of this iteration; the random schedule draws from it.
    """
    window = config.window
    if window.schedule == "backward":
        grown = (iteration - 1) * (config.num_steps - window.backward_first + 1) // window.backward_stages
        last = min(config.num_steps, window.backward_first + grown)
        return config.num_steps - last, last - 1
    if window.schedule == "frozen":
        return window.low, window.size
    starts = range(window.low, config.window_high - window.size + 1, window.stride if window.schedule != "random" else 1)
    if window.schedule == "random":
        draw = derive_seed("window", seed)
        if window.start_decay == 1:
            return window.low + draw % len(starts), window.size
        weights = [window.start_decay**start for start in starts]
        point = draw % 2**53 / 2**53 * sum(weights)
        for start, weight in zip(starts, weights, strict=True):
            point -= weight
            if point < 0:
                return start, window.size
        return starts[-1], window.size
    stays = [_stay(config, start, position / max(1, len(starts) - 1)) for position, start in enumerate(starts)]
    place = (iteration - 1) % sum(stays)
    for start, stay in zip(starts, stays, strict=True):
        if place < stay:
            return start, window.size
        place -= stay
    raise AssertionError("unreachable")


def _stay(config: RolloutConfig, start: int, position: float) -> int:
    """Iterations that a moving window stays at a start; ``position`` is 0 at the first and 1 at the last start."""
    window = config.window
    if window.schedule == "decay":
        return max(1, round(window.every + (window.every_least - window.every) * position))
    if window.schedule == "exp_decay":
        return math.ceil(window.every * math.exp(-window.exp_rate * max(start - window.exp_after, 0)))
    return window.every


def _tree(config: RolloutConfig, iteration: int, seed: int) -> tuple[int, dict[int, int], dict[int, float]]:
    """(roots, branching, noise levels) of a tree. Without a use for the window its settings may be anything."""
    tree = config.tree
    window = range(0)
    if tree.splits is None or tree.stochastic == "window":
        start, size = window_of(config, iteration, seed)
        window = range(start, start + size)
    splits = list(window) if tree.splits is None else list(tree.splits)
    children = tree.branching * len(splits) if len(tree.branching) == 1 else tree.branching
    steps = {"splits": set(splits), "window": {*splits, *window}, "all": set(range(config.num_steps - 1))}[tree.stochastic]
    levels = dict(zip(sorted(steps), config.noise_levels(len(steps)), strict=True))
    for j, k in enumerate(sorted(splits)):
        levels[k] *= 1 + tree.noise_growth * j / max(1, len(splits) - 1)
    return config.group_size // math.prod(children), dict(zip(splits, children, strict=True)), levels


def build_plan(config: RolloutConfig, sigmas: Sequence[float], *, shift: float, iteration: int, seed: int, kept_steps: Sequence[int] = ()) -> Plan:
    """The plan of an iteration; every group and process gets the same one.

    Args:
        sigmas: the run's grid, ``num_steps`` + 1 levels.
        shift: of the grid, for `after_window.compression`.
        iteration: >= 1.
        seed: of this iteration.
        kept_steps: of the plan `ode`: steps of the grid whose latents become training rows.
    Raises:
        ValueError: kept steps of another plan, whose training rows are those of its decisions.
    """
    if config.plan == "ode":
        return ode_plan(sigmas, config.group_size, solver=config.solver, kept_steps=kept_steps, same_noise=config.same_noise)
    if kept_steps:
        raise ValueError(f"kept_steps belong to the plan ode, not to {config.plan}")
    if config.plan == "chain":
        return chain_plan(
            sigmas,
            config.group_size,
            noise_level=config.noise_levels(config.chain_steps),
            train_fraction=config.train_fraction,
            same_noise=config.same_noise,
            kernel=config.kernel,
        )
    if config.plan == "tree":
        roots, branching, levels = _tree(config, iteration, seed)
        return tree_plan(
            compress_after(sigmas, max(levels) + 1, config.after_window.compression, shift),
            roots=roots,
            branching=branching,
            noise_levels=levels,
            kernel=config.kernel,
            sibling_scale=config.tree.sibling_scale,
            solver=config.after_window.solver,
        )
    start, size = window_of(config, iteration, seed)
    if config.plan == "granular":
        return granular_plan(
            sigmas,
            config.group_size,
            noise_level=config.noise_levels(size),
            steps=range(start, start + size),
            granularities=config.granularities,
            kernel=config.kernel,
        )
    return window_plan(
        compress_after(sigmas, start + size, config.after_window.compression, shift),
        config.group_size,
        noise_level=config.noise_levels(size),
        start=start,
        size=size,
        same_noise=config.same_noise,
        kernel=config.kernel,
        solver=config.after_window.solver,
    )


def minimum_rows(config: RolloutConfig, *, iteration: int, seed: int) -> Rows:
    """The least forward rows of a group in an iteration, (rollout, one training pass over all decisions), by the closed formulas of samplers/nfe.py."""
    if config.plan == "ode":
        return ode_rows(config.num_steps, config.group_size, config.solver)
    if config.plan == "chain":
        return path_rows(config.num_steps, config.group_size, first=0, count=config.chain_steps, same_noise=config.same_noise)
    if config.plan == "tree":
        roots, branching, levels = _tree(config, iteration, seed)
        return tree_rows(_compressed(config, max(levels) + 1), roots=roots, branching=branching, trained=list(levels))
    start, size = window_of(config, iteration, seed)
    if config.plan == "granular":
        return granular_rows(config.num_steps, config.group_size, steps=range(start, start + size), granularities=config.granularities)
    return path_rows(_compressed(config, start + size), config.group_size, first=start, count=size, same_noise=config.same_noise)


def trained_rows(config: Config, iteration: int) -> int | None:
    """The least rows of a group in one training pass over the selected decisions; None where draws or rewards decide how many these are."""
    rollout, selection = config.rollout, config.selection
    seed = derive_seed(config.seed, iteration)
    rows = minimum_rows(rollout, iteration=iteration, seed=seed)[1]
    depth, width = selection.depth, selection.width
    if selection.contrast is not None or (selection.fraction < 1 and rollout.same_noise) or (width is not None and width.mode == "extremes"):
        return None
    if selection.fraction < 1:
        return rollout.group_size * max(1, int(rows // rollout.group_size * selection.fraction))
    if depth is None and width is None:
        return rows
    roots, branching, levels = _tree(rollout, iteration, seed)
    at = tree_widths(rollout.num_steps, roots=roots, branching=branching)
    if width is not None:
        last = max(k for k, children in branching.items() if children > 1)
        kept = math.ceil(width.keep * branching[last] - 1e-9)
        at = [count if k <= last else count * kept // branching[last] for k, count in enumerate(at)]
    trained = set(levels)
    if depth is not None:
        first, end = depth_window(depth.first, depth.last, depth.slide_every, depth.stop, iteration)
        trained -= {*range(first - 1, end)}
    return sum(at[k] for k in trained)


def kept_latents(config: Config, iteration: int, kept_steps: Sequence[int] = ()) -> tuple[int, int, int]:
    """Latents that a group's rollout keeps: (leaves, training rows, trained decisions). ``kept_steps`` as in `build_plan`."""
    rollout = config.rollout
    if rollout.plan == "ode":
        return rollout.group_size, rollout.group_size * len(set(kept_steps)), 0
    seed = derive_seed(config.seed, iteration)
    rows = minimum_rows(rollout, iteration=iteration, seed=seed)[1]
    if rollout.plan == "tree":
        roots, branching, levels = _tree(rollout, iteration, seed)
        at = tree_widths(rollout.num_steps, roots=roots, branching=branching)
        return rollout.group_size, rows, sum(at[k] * branching.get(k, 1) for k in levels)
    if rollout.plan == "granular":
        return rows * rollout.group_size * len(rollout.granularities), rows, rows * rollout.group_size
    steps = rows // rollout.group_size + 1 if rollout.same_noise else rows // rollout.group_size
    return rollout.group_size, rows, steps * rollout.group_size


def _compressed(config: RolloutConfig, kept: int) -> int:
    """Steps of a grid of which all after the first ``kept`` are compressed."""
    return kept + max(1, math.ceil(config.after_window.compression * (config.num_steps - kept) - 1e-9))
