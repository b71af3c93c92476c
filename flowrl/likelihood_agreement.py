"""Which likelihood goes with which objective, plan and regulariser: one line for each choice that cannot work. A part of `flowrl.agreement`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowrl.objective_names import names_of

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["DIRECT_NAMES", "PAIR_NAMES", "likelihood_disagreements", "trains_steps"]

DIRECT_NAMES = names_of("direct")
PAIR_NAMES = names_of("pair", "matching")


def trains_steps(config: Config) -> bool:
    """Whether decisions within the rollout are trained, and not finished samples."""
    return config.likelihood == "transition" and config.objective.name not in DIRECT_NAMES


def likelihood_disagreements(config: Config) -> Iterator[str]:
    """One line for every pair of values that do not go together, with what to do."""
    name = config.objective.name
    if name in DIRECT_NAMES:
        yield from _direct(config)
    elif config.likelihood == "matching":
        yield from _matching(config)
    elif config.likelihood == "transition":
        yield from _transition(config)
    if config.data.pairs is not None:
        yield from _pairs_file(config)
    if config.advantage.transform == "unit_interval" and name != "nft":
        yield f"advantage.transform: unit_interval makes the probabilities that objective nft takes; with {name} use another one"
    a = config.advantage
    if a.transform != "identity" and config.credit.normalize != "leaf":
        yield f"advantage.transform: {a.transform} weighs whole samples, and credit.normalize: {config.credit.normalize} compares nodes; use identity, or leaf"
    if a.transform == "exp" and a.clip / a.temperature > 60:
        yield f"advantage.temperature: exp({a.clip:g} / {a.temperature:g}) is beyond all numbers; raise it, or lower advantage.clip"
    old = config.old_policy
    if old is not None and not old.rollout and config.anchor.weight == 0 and name != "nft":
        yield "old_policy: it is kept and never used; set old_policy.rollout: true or anchor.weight, or old_policy: null"


def _transition(config: Config) -> Iterator[str]:
    if config.rollout.plan == "ode":
        yield "rollout.plan: ode has no random step that could be trained; set likelihood: matching, or another plan"
    if config.kl.weight > 0 and config.kl.form == "v_elbo":
        yield "kl.form: v_elbo belongs to the matching likelihood; use fg_code, exact_mean, v_mse or x_mse"
    if config.anchor.weight > 0:
        yield "anchor.weight: the old policy anchors velocities at noised samples; set likelihood: matching, or leave it out"
    if config.critic is not None:
        yield "critic: it judges noised samples; set likelihood: matching, or critic: null"


def _only_of_steps(config: Config, why: str) -> Iterator[str]:
    """Settings of SDE steps in a run that trains none."""
    o = config.objective
    for key, value, idle in (("ratio", o.ratio, "plain"), ("step_weight", o.step_weight, "none"), ("dynamic_clip", o.dynamic_clip, 0.0)):
        if value != idle:
            yield f"objective.{key}: {value} belongs to SDE steps; with {why} leave it out"
    for section in ("credit", "selection"):
        part = getattr(config, section)
        if part != type(part)():
            yield f"{section}: decisions within a rollout are not trained with {why}; leave it out"
    if config.layer_tuning.weight > 0:
        yield f"layer_tuning.weight: the supervised term belongs to SDE steps; with {why} leave it out"


def _matching(config: Config) -> Iterator[str]:
    name, m, rollout = config.objective.name, config.matching, config.rollout
    yield from _only_of_steps(config, "likelihood: matching")
    if rollout.plan == "granular":
        yield "rollout.plan: the samples of a granular plan differ in their steps, not only in their noise; with likelihood: matching use another plan"
    if config.kl.weight > 0 and config.kl.form not in ("v_mse", "v_elbo"):
        yield f"kl.form: {config.kl.form} compares SDE steps; with likelihood: matching use v_mse or v_elbo"
    if m.times == "grid" and rollout.num_steps >= 2:
        yield from _grid_times(config)
    if m.times == "grid" and rollout.after_window.compression < 1:
        yield "rollout.after_window.compression: the sampler then leaves the grid that matching.times: grid draws from; use uniform times, or compression 1"
    if m.times == "uniform" and m.low >= m.high:
        yield f"matching.low: {m.low} is not below matching.high = {m.high}"
    if name == "nft":
        if config.advantage.transform != "unit_interval":
            yield "advantage.transform: nft takes probabilities in [0, 1]; use unit_interval"
        if config.old_policy is None:
            yield "old_policy: nft mirrors the policy about the old one; give it, for example old_policy: {rollout: true}"
    together = m.num_times if m.combine == "sum_first" else 1
    rows = together * (2 if name in PAIR_NAMES else 1)
    if config.training.rows_per_backward < rows:
        what = "pair" if name in PAIR_NAMES else "sample"
        yield (
            f"training.rows_per_backward: {config.training.rows_per_backward} is less than the {rows} rows of a {what}, which are trained together; use at "
            f"least {rows}" + (", a smaller matching.num_times, or matching.combine: exp_first" if together > 1 else "")
        )
    if config.anchor.weight > 0 and config.old_policy is None:
        yield "anchor.weight: there is no old policy to anchor to; give old_policy, or weight 0"
    if name in PAIR_NAMES:
        for key, used in (("anchor", config.anchor.weight > 0), ("critic", config.critic is not None)):
            if used:
                yield f"{key}: {name} compares the best and the worst sample of a group, there is no {key}; leave it out"
        units = rollout.groups_per_iteration * (1 if m.combine == "sum_first" else m.num_times)
        if config.objective.updates_per_iteration > units:
            what = "pairs" if m.combine == "sum_first" else "pairs and noise levels"
            yield f"objective.updates_per_iteration: {config.objective.updates_per_iteration} is more than the {units} {what} of an iteration; use fewer"


def _grid_times(config: Config) -> Iterator[str]:
    m, num_steps = config.matching, config.rollout.num_steps
    first, count = (max(1, m.first_time), m.num_times - 1) if m.include_first else (m.first_time, m.num_times)
    stop = int(num_steps * m.time_fraction + 1e-9)
    if count > max(0, stop - first):
        yield (
            f"matching.num_times: {m.num_times} noise levels do not fit into the {max(0, stop - first)} of the grid from step {first} to below {stop} "
            f"(matching.time_fraction of rollout.num_steps); use fewer, more steps, or matching.times: uniform"
        )


def _direct(config: Config) -> Iterator[str]:
    name, d, rollout = config.objective.name, config.direct, config.rollout
    yield from _only_of_steps(config, f"objective {name}")
    if rollout.plan != "ode":
        yield f"rollout.plan: {name} differentiates deterministic steps; use plan: ode"
    for key, used in (("kl.weight", config.kl.weight > 0), ("anchor.weight", config.anchor.weight > 0), ("critic", config.critic is not None)):
        if used:
            yield f"{key}: {name} follows the reward's gradient alone; leave it out"
    if config.data.pairs is not None:
        yield f"data.pairs: {name} needs its own samples; leave data.pairs out"
    high = rollout.num_steps if d.high is None else d.high
    if name == "refl" and not d.low < high <= rollout.num_steps:
        yield f"direct.low: steps {d.low}..{high - 1} are not within 0..{rollout.num_steps - 1}; lower direct.low or direct.high"
    if name == "draft" and d.last_steps > rollout.num_steps:
        yield f"direct.last_steps: {d.last_steps} is more than the {rollout.num_steps} steps of the rollout"
    if name == "draft" and not d.renoise and rollout.solver != "ode":
        yield f"rollout.solver: draft differentiates Euler steps from the sampled latent, and {rollout.solver} takes others; use ode, or direct.renoise"
    if name == "draft" and d.renoise and d.recompute:
        yield "direct.recompute: from a sample with fresh noise there is one step, which keeps no more than itself; use recompute: false"
    if name == "draft" and d.renoise and (d.last_steps > 1 or d.random_steps):
        yield "direct.renoise: a sample with fresh noise takes one step to the picture; use last_steps: 1 and random_steps: false"
    if name == "direct_align":
        if d.sigma_low > d.sigma_high:
            yield f"direct.sigma_low: {d.sigma_low} is above direct.sigma_high = {d.sigma_high}"
        if d.sigma_jump > d.sigma_low:
            yield f"direct.sigma_jump: a step of {d.sigma_jump} from direct.sigma_low = {d.sigma_low} would end below 0; lower it, or raise sigma_low"
        if d.inversion and d.sigma_high + d.sigma_jump >= 1:
            yield f"direct.sigma_high: {d.sigma_high} and a step of {d.sigma_jump} towards noise leave nothing of the picture; keep their sum below 1"


def _pairs_file(config: Config) -> Iterator[str]:
    if config.likelihood != "matching" and config.objective.name not in DIRECT_NAMES:
        yield "data.pairs: stored samples have no SDE steps; set likelihood: matching"
    if config.advantage.aggregate != "rewards":
        yield "advantage.aggregate: stored pairs have no rewards of which each could have an advantage; use aggregate: rewards"
    if config.rollout.group_size != 2:
        yield f"rollout.group_size: a stored pair is a group of 2, not of {config.rollout.group_size}; set rollout.group_size: 2"
    if config.old_policy is not None and config.old_policy.rollout:
        yield "old_policy.rollout: stored pairs are not sampled; leave it out"
    if config.critic is not None:
        yield "critic: stored pairs have no rewards that a critic could learn; set critic: null"
    if config.logging.rollouts_every is not None:
        yield "logging.rollouts_every: stored pairs are not sampled; leave it out"
