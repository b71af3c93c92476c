"""What an engine of pictures looks at before its first iteration, so that a mistake costs seconds and not hours."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate.utils import gather_object

from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.likelihood_agreement import trains_steps
from flowrl.planning import kept_latents, trained_rows
from flowrl.types import UserError
from flowrl.updates.direct import kept_steps
from flowrl.updates.matching import needs_old_velocity
from samplers.kernels import check_noise_level, load_kernel

if TYPE_CHECKING:
    from flowrl.engines.diffusion import DiffusionEngine

__all__ = ["check_kernel", "check_memory", "check_pairs", "check_shaping", "check_updates"]

_LOGGER = logging.getLogger(__name__)


def check_pairs(engine: DiffusionEngine) -> None:
    """Every pair that the run will train on is read once before, each process its share; a bad one stops all processes."""
    assert engine.pairs is not None
    rank, world = engine.accelerator.process_index, engine.accelerator.num_processes
    met = sorted(engine.sampler.met(engine.config.training.iterations))
    problem = ""
    try:
        engine.pairs.check(engine.policy.image_size, engine.policy.latent_shape, met[rank::world])
    except UserError as error:
        problem = str(error)
    if found := [message for message in (gather_object([problem]) if world > 1 else [problem]) if message]:
        raise UserError(found[0])
    if engine.pairs.dropped and engine.accelerator.is_main_process:
        _LOGGER.warning("data.pairs: %d undecided pairs were left out", engine.pairs.dropped)


def check_kernel(engine: DiffusionEngine) -> None:
    """A kernel that does not fit the network's prediction is an error, noise that destroys the picture a warning."""
    rollout, prediction = engine.config.rollout, engine.policy.prediction
    after, tuning = rollout.after_window, engine.config.layer_tuning
    if prediction != "flow" and (rollout.plan == "ode" or engine.config.likelihood == "matching"):
        raise UserError(
            f"model.path: {engine.policy.title} predicts {prediction}, and matching, ODE plans and what builds on them need a flow model; train its steps: "
            "likelihood transition, kernel ddim, plan chain, window or tree"
        )
    if prediction != "flow" and (after.solver != "ode" or after.compression < 1 or (tuning.weight > 0 and tuning.target != "best_velocity")):
        raise UserError(
            f"model.path: {engine.policy.title} predicts {prediction}, and rollout.after_window and a straight layer_tuning.target need a flow model; "
            "use after_window: {solver: ode, compression: 1}, and layer_tuning.target: best_velocity or weight: 0"
        )
    if rollout.plan == "ode":
        return
    try:
        load_kernel(rollout.kernel, prediction)
    except ValueError as error:
        raise UserError(f"rollout.kernel: {error}") from error
    growth = 1 + rollout.tree.noise_growth if rollout.plan == "tree" else 1
    warning = check_noise_level(rollout.kernel, max(rollout.noise_level) * growth)
    if warning is not None and engine.accelerator.is_main_process:
        _LOGGER.warning("rollout.noise_level: %s", warning)


def check_memory(engine: DiffusionEngine) -> None:
    """Latents of an iteration that would not fit into memory are an error before the first of them is sampled."""
    config = engine.config
    parts = config.rollout.group_shards
    share = math.ceil(config.rollout.groups_per_iteration * parts / engine.accelerator.num_processes)
    groups = engine.allocation.most_samples(share) / config.rollout.group_size
    ends = (1, config.training.iterations)  # a window may grow
    leaves, rows, edges = max((kept_latents(config, iteration, kept_steps(config, iteration)) for iteration in ends), key=sum)
    kept = leaves + edges + rows * (2 if engine.assigner.keep_velocity else 1)
    if config.likelihood == "matching":  # the noise, and what other policies say at it
        noised = 2 if config.objective.name in PAIR_OBJECTIVES else leaves
        kept += noised * config.matching.num_times * (1 + int(config.kl.weight > 0) + int(needs_old_velocity(config)) + int(config.critic is not None))
    needed = groups * kept * 4 * math.prod(engine.policy.latent_shape)
    device = torch.device("cpu") if config.training.offload_rollouts else engine.policy.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"rollout: {leaves:,} samples a prompt and their {kept - leaves:,} training states, for {groups:g} prompts, take "
            f"{needed / 2**30:.3g} GiB of latents, and {free / 2**30:.3g} GiB are free; lower rollout.tree.branching, group_size or groups_per_iteration"
        )


def check_shaping(engine: DiffusionEngine) -> None:
    """Negative rewards would be shaped the wrong way round: a warning."""
    if engine.shapers and engine.assigner.estimator.bounds[0] < 0 and engine.accelerator.is_main_process:
        _LOGGER.warning("shaping: rank_unlikely takes a share off rewards of likely samples, which raises those below 0; use rewards that are never negative")


def check_updates(engine: DiffusionEngine) -> None:
    """Iterations that could train nothing, or fewer rows than updates, are an error before the first of them."""
    config, updates = engine.config, engine.config.objective.updates_per_iteration
    if not trains_steps(config):
        return
    for iteration in range(1, config.training.iterations + 1):
        rows = trained_rows(config, iteration)
        if rows == 0:
            raise UserError(f"selection: in iteration {iteration} pruning leaves no decision to train; use a narrower selection.depth or another window")
        if rows is not None and rows * config.rollout.groups_per_iteration < updates:
            total = rows * config.rollout.groups_per_iteration
            raise UserError(f"objective.updates_per_iteration: {updates} updates are more than the {total} training rows of an iteration; use fewer")
