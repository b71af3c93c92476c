"""The trainer: roll out groups, score them, turn scores into advantages of decisions, and raise or lower the decisions' likelihood.

One iteration: P prompts, G samples each -> rollout forest -> rewards -> advantages -> updates. Everything random follows from (seed, iteration,
group), so a run on more processes, or resumed from a checkpoint, takes the same decisions.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from flowrl.assignment import Assigner, Assignment, Samples
from flowrl.checkpoint import random_state, restore_random_state
from flowrl.config import Config
from flowrl.core.advantages import group_statistics
from flowrl.core.reductions import REDUCTIONS
from flowrl.critic import Critic, critic_advantages
from flowrl.data import GroupSampler, load_prompts
from flowrl.evaluation import Evaluator, build_rewards, save_grid, sigmas_of
from flowrl.likelihood_agreement import trains_steps
from flowrl.likelihoods.transition import TransitionLikelihood
from flowrl.memory import halved
from flowrl.meters import Meters
from flowrl.optimizers import make_optimizer
from flowrl.pairs import load_pairs
from flowrl.planning import build_plan, minimum_rows, trained_rows
from flowrl.policies.base import NetworkRows
from flowrl.policies.ema import Ema, OldPolicy
from flowrl.policies.families import make_policy
from flowrl.preflight import check_kernel, check_memory, check_pairs, check_updates
from flowrl.processes import check_agreement, make_accelerator
from flowrl.reward_metrics import check_valid, join_scores, reward_metrics
from flowrl.reward_weights import RewardWeights
from flowrl.rollout_log import SavedRollout
from flowrl.sections import SelectionConfig
from flowrl.seeds import derive_seed, generator
from flowrl.sharding import clip_gradients, fit_state, local, whole
from flowrl.tracking import RunLogger, explain_full_disk
from flowrl.types import Prompt, Rollout, SampleBatch, Scores, UserError
from flowrl.updates.base import Update, Weights
from flowrl.updates.direct import DIRECT_OBJECTIVES, DirectUpdate, kept_steps
from flowrl.updates.matching import MatchingUpdate
from flowrl.updates.minimum import least_rows, units_of_samples
from flowrl.updates.noised import NoisedSamples
from flowrl.updates.pairs import PairUpdate, needs_reference
from flowrl.updates.transition import TransitionUpdate
from rewards.composite import ConstantRewardMonitor, Pending, WeightedRewards
from samplers.forest import concatenate, leaves_only, move
from samplers.plans import Plan
from samplers.rollout import execute

__all__ = ["Trainer"]

_LOGGER = logging.getLogger(__name__)
_WAITING = 4
"""Batches of pictures that wait for their scores while sampling goes on."""


class Trainer:
    """State and steps of one run. `flowrl.run.train` drives it; tests may drive it step by step.

    Raises:
        UserError: the model, prompts or rewards cannot be loaded, or there are fewer groups than processes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = make_accelerator(config.training.device, timeout_minutes=config.training.timeout_minutes)
        check_agreement(self.accelerator, config)
        world = self.accelerator.num_processes
        if config.rollout.groups_per_iteration < world:
            groups = config.rollout.groups_per_iteration
            raise UserError(f"rollout.groups_per_iteration: {groups} groups cannot be shared by {world} processes; use more groups")
        set_seed(derive_seed(config.seed, "init") % 2**32)  # initial LoRA weights, and whatever a reward draws from global generators
        self.pairs = load_pairs(config.data.pairs) if config.data.pairs is not None else None
        self.prompts = load_prompts(config.data.train) if self.pairs is None else self.pairs.prompts
        self.splits = {name: load_prompts(path) for name, path in config.data.eval.items()}
        self.rewards, eval_rewards = self._load_rewards()
        rows, keep = config.training.rows_per_forward, needs_reference(config)
        self.sharded = config.training.sharding == "fsdp2" and world > 1  # one process has nobody to share with
        at_first = torch.device("cpu") if self.sharded else self.accelerator.device
        self.policy = make_policy(config.model, at_first, rows_per_forward=rows, keep_reference=keep)
        if self.sharded:
            if config.optimizer.name != "adamw":
                raise UserError(f"optimizer.name: {config.optimizer.name} cannot work on sharded weights; use adamw with training.sharding: fsdp2")
            self.policy.shard(self.accelerator.device, config.training.timeout_minutes)
        every = [self.prompts, *self.splits.values()]
        self.policy.finish_prompts([prompt.text for prompts in every for prompt in prompts])
        if not self.sharded:
            self.policy.training_module = self.accelerator.prepare(self.policy.network)
        check_kernel(self)
        self.sigmas = sigmas_of(config.rollout, config.rollout.num_steps, self.policy)
        self.shift = self.policy.shift_for(config.rollout.num_steps) if config.rollout.shift is None else config.rollout.shift
        self.likelihood = TransitionLikelihood(config.rollout.kernel, config.rollout.log_prob_reduction, self.policy.prediction)
        self.reward_weights = RewardWeights(config)
        self.assigner = Assigner(config, self._sum, self.reward_weights)
        self.sampler = GroupSampler(len(self.prompts), config.rollout.groups_per_iteration, config.seed)
        self.parameters = self.policy.trainable()
        self.optimizer = make_optimizer(config.optimizer, self.parameters)
        self.rows_per_backward = config.training.rows_per_backward
        e = config.ema
        self.ema = Ema(self.parameters, decay=e.decay, every=e.every, warmup=e.warmup) if e is not None else None
        old = config.old_policy
        self.old_policy: OldPolicy | None = None
        if old is not None:
            self.old_policy = OldPolicy(self.parameters, every=old.every, decay_slope=old.decay_slope, decay_start=old.decay_start, decay_max=old.decay_max)
            self.old_policy.in_step = self.policy.in_step
        self.critic: Critic | None = None
        if config.critic is not None:
            channels, pooled_dim = self.policy.latent_shape[0], self.policy.pooled.shape[1]
            self.critic = Critic(config.critic, channels=channels, pooled_dim=pooled_dim, device=self.policy.device, seed=config.seed)
        self.evaluator = Evaluator(
            self.policy,
            self.splits,
            eval_rewards,
            sigmas=sigmas_of(config.rollout, config.evaluation.num_steps, self.policy),
            seed=config.evaluation.seed,
            accelerator=self.accelerator,
        )
        self.monitor = ConstantRewardMonitor()
        self.sampled: SavedRollout | None = None  # of the last iteration, where the config asks for it
        self.num_updates = 0
        self.images = 0
        self.rows_total = 0
        self.idle_rows = 0  # of this process, see `step`
        self.elapsed = 0.0
        check_memory(self)
        check_updates(self)
        if self.pairs is not None:
            check_pairs(self)

    def _load_rewards(self) -> tuple[WeightedRewards, WeightedRewards]:
        """Those of training and those of evaluation, which share what is the same, after a look at all prompts."""
        config = self.config
        rewards = build_rewards(config.rewards)
        if config.objective.name in DIRECT_OBJECTIVES:
            rewards.require_differentiable()
        eval_rewards = build_rewards(config.evaluation.rewards, share=config.rewards, of=rewards) if config.evaluation.rewards else rewards
        if self.pairs is None:
            rewards.check_prompts(self.prompts)
        for split in self.splits.values():
            eval_rewards.check_prompts(split)
        for each in (rewards, eval_rewards):
            each.load(self.accelerator.device)
        return rewards, eval_rewards

    def close(self) -> None:
        """Give back what rewards hold: threads, processes, connections."""
        for rewards in (self.rewards, self.evaluator.rewards):
            rewards.close()

    # --- one iteration ---

    def iterate(self, iteration: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Train one iteration (>= 1).

        Returns:
            metrics (reproducible) and timings (seconds), as written to metrics.jsonl and timings.jsonl.
        """
        started = time.perf_counter()
        rows = self.policy.rows
        before, idle_before = replace(rows), self.idle_rows
        indices = self.sampler.groups(iteration - 1)
        mine = list(range(self.accelerator.process_index, len(indices), self.accelerator.num_processes))
        prompts = [self.prompts[indices[g]] for g in mine]
        plan = self.plan(iteration)
        if self.pairs is None:
            rollout, pending = self.roll_out(plan, prompts, mine, iteration)
            sampled = time.perf_counter()
            scores = join_scores([part.result() for part in pending])
            self.rewards.rest()
        else:
            rollout, scores = self.read_pairs([indices[g] for g in mine])
            sampled = time.perf_counter()
        scored = time.perf_counter()
        every = self.config.logging.rollouts_every
        self.sampled = self._gather(iteration, rollout, scores, prompts, mine) if every is not None and iteration % every == 0 else None
        assignment, metrics = self.assign(plan, rollout, scores, indices, mine, iteration)
        measured = replace(rows)
        if self.reward_weights.due(iteration):
            self.reward_weights.learn(self._reward_gradients(plan, rollout, scores, prompts, mine, iteration))
            self.rewards.weights = self.reward_weights.weights
        measured = NetworkRows(rows.forward - measured.forward, rows.backward - measured.backward, rows.idle - measured.idle)
        meters = self.update(plan, assignment, prompts, mine, iteration)
        finished = time.perf_counter()
        if self.old_policy is not None:
            self.old_policy.update(iteration, self.num_updates)

        self.images += len(indices) * len(plan.leaves) if self.pairs is None else 0
        used_forward = int(self._sum(rows.forward - before.forward - measured.forward))
        used_backward = int(self._sum(rows.backward - before.backward - measured.backward))
        of_weights = int(self._sum(measured.forward + measured.backward))
        self.rows_total += used_forward + used_backward + of_weights
        values: dict[str, Any] = {"iteration": iteration, **metrics, **meters}
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["nfe/forward"], values["nfe/backward"] = used_forward, used_backward
        values["nfe/used"] = used_forward + used_backward
        values["nfe/minimum"] = self.minimum_nfe(assignment, len(indices), iteration, self.idle_rows - idle_before, metrics["reward/invalid"] == 0)
        values["nfe/minimum"] += int(self._sum(rows.idle - before.idle - measured.idle))  # of sharded networks, see `Company`
        if self.config.reward_weights.kind == "gradient":
            values["nfe/reward_weights"] = of_weights
        values["nfe/total"], values["images"] = self.rows_total, self.images
        seconds = {"rollout": sampled - started, "reward_wait": scored - sampled, "train": finished - scored, "total": finished - started}
        self.elapsed += seconds["total"]
        timings = {"iteration": iteration, **{f"seconds/{k}": round(v, 4) for k, v in seconds.items()}, "elapsed": round(self.elapsed, 2)}
        return values, timings

    def plan(self, iteration: int) -> Plan:
        """The plan of an iteration (>= 1), the same on every process."""
        seed = derive_seed(self.config.seed, iteration)
        kept = kept_steps(self.config, iteration)
        return build_plan(self.config.rollout, self.sigmas, shift=self.shift, iteration=iteration, seed=seed, kept_steps=kept)

    def minimum_nfe(self, assignment: Assignment | Samples, num_groups: int, iteration: int, idle_rows: int, all_valid: bool) -> int:
        """Least forward and backward rows of an iteration, by the closed formulas of docs/nfe.md.

        Where draws, rewards or their absence decide what is trained, N is the number of distinct latents that the selected decisions leave, or of pairs.
        ``idle_rows`` keep this process in step with others that have something to train.
        """
        config = self.config
        forward, _ = minimum_rows(config.rollout, iteration=iteration, seed=derive_seed(config.seed, iteration)) if self.pairs is None else (0, 0)
        placeholders = int(self._sum(float(assignment.placeholder)))
        if isinstance(assignment, Assignment):
            rows, selected = trained_rows(config, iteration), int(self._sum(assignment.rows))
            units = num_groups * rows if rows is not None and all_valid else selected
        elif assignment.pairs is not None:
            units = int(self._sum(0.0 if assignment.placeholder else float(len(assignment.pairs))))
        else:
            units = units_of_samples(config, num_groups) if self._strength(iteration) > 0 else 0
        idle = int(self._sum(idle_rows))
        return sum(least_rows(config, iteration, rollout=num_groups * forward, units=units, idle_rows=idle, placeholders=placeholders))

    def _strength(self, iteration: int) -> float:
        """How much of its advantages the policy is trained with, see `Critic.strength`."""
        return 1.0 if self.critic is None else self.critic.strength(iteration)

    def read_pairs(self, indices: Sequence[int]) -> tuple[Rollout, dict[str, Scores]]:
        """Stored preference pairs as a rollout of groups of two: the chosen sample has reward 1, the rejected one 0."""
        assert self.pairs is not None
        found = self.pairs.load(indices, self.policy.image_size, self.policy.latent_shape).flatten(0, 1)
        latents = found.to(self.policy.device) if self.pairs.is_latent else self.policy.encode(found)
        rewards = torch.tensor([1.0, 0.0]).repeat(len(indices))
        return leaves_only(latents, torch.arange(len(indices)).repeat_interleave(2)), {"total": Scores(rewards, torch.ones(len(rewards), dtype=torch.bool))}

    def roll_out(self, plan: Plan, prompts: list[Prompt], numbers: list[int], iteration: int) -> tuple[Rollout, list[Pending]]:
        """Sample this process's groups. While one chunk of groups is sampled, the rewards of those before are computed in threads, or elsewhere."""
        config = self.config
        prompt_rows = self.policy.prompt_rows([p.text for p in prompts])
        velocity = self.policy.velocity(config.rollout.guidance_scale)
        chunk = max(1, config.training.rows_per_forward // max(len(wave) for wave in plan.waves))
        parts: list[Rollout] = []
        pending: list[Pending] = []
        with self._sampling_policy(), self.policy.in_step():
            for start in range(0, len(prompts), chunk):
                stop = min(start + chunk, len(prompts))
                part = execute(
                    velocity,
                    plan,
                    prompt_rows[start:stop],
                    [generator(config.seed, "noise", iteration, g) for g in numbers[start:stop]],
                    self.policy.latent_shape,
                    device=self.policy.device,
                    reduction=config.rollout.log_prob_reduction,
                    keep_velocity=self.assigner.keep_velocity,
                    prediction=self.policy.prediction,
                )
                parts.append(move(part, torch.device("cpu")) if config.training.offload_rollouts else part)
                shown = [prompts[start + g] for g in part.leaf_group.tolist()]
                batch = SampleBatch(shown, images=self.policy.decode(part.leaves), group=part.leaf_group + start)
                pending.append(self.rewards.submit(batch))
                if len(pending) > _WAITING:  # pictures of more batches would pile up in memory
                    pending[-1 - _WAITING].result()
        return concatenate(parts), pending

    def _gather(self, iteration: int, rollout: Rollout, scores: dict[str, Scores], prompts: Sequence[Prompt], numbers: Sequence[int]) -> SavedRollout:
        """The samples of all processes, in the order of their groups."""
        shown = [prompts[g] for g in rollout.leaf_group.tolist()]
        part = (shown, rollout.leaves.cpu(), torch.tensor(numbers)[rollout.leaf_group], scores)
        parts = gather_object([part]) if self.accelerator.num_processes > 1 else [part]
        group = torch.cat([p[2] for p in parts])
        order = group.argsort(stable=True)
        every = [prompt for p in parts for prompt in p[0]]
        joined = {name: Scores(s.values[order], s.valid[order]) for name, s in join_scores([p[3] for p in parts]).items()}
        return SavedRollout(iteration, [every[i] for i in order.tolist()], torch.cat([p[1] for p in parts])[order], group[order], joined)

    def _sampling_policy(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the weights are those that sample."""
        old = self.config.old_policy
        return self.old_policy.applied() if self.old_policy is not None and old is not None and old.rollout else contextlib.nullcontext()

    def assign(
        self, plan: Plan, rollout: Rollout, scores: dict[str, Scores], indices: Sequence[int], mine: Sequence[int], iteration: int
    ) -> tuple[Assignment | Samples, dict[str, Any]]:
        """What this process's decisions or samples are trained with, and the iteration's reward metrics over all processes.

        Args:
            indices: prompt number of every group of the iteration; ``mine``: the groups of this process.
        """
        config, group = self.config.advantage, rollout.leaf_group
        here = torch.tensor([derive_seed("prompt", self.prompts[indices[g]].text) % 2**62 for g in mine])[group]
        everywhere, there = scores, here
        if self.accelerator.num_processes > 1:
            gathered = gather_object([(scores, here)])
            everywhere, there = join_scores([part for part, _ in gathered]), torch.cat([numbers for _, numbers in gathered])
        self.monitor.update(everywhere)
        check_valid(self.config, everywhere["total"], iteration)
        total = scores["total"]
        assignment: Assignment | Samples
        if trains_steps(self.config):
            assignment = self.assigner(plan, rollout, scores, everywhere, prompts=(here, there), numbers=mine, iteration=iteration)
        else:
            assignment = self.assigner.samples(rollout, scores, everywhere, prompts=(here, there))
        sets = rollout.leaf_set
        _, std, count = group_statistics(total.values.double(), sets, total.valid, int(sets.max()) + 1, config.ddof)
        metrics = reward_metrics(self.config, everywhere, self.reward_weights)
        metrics["reward/zero_std_groups"] = int(self._sum(int(((std == 0) | (count < 2)).sum())))
        sums = {name: self._sum(value) for name, value in assignment.sums.items()}
        metrics["advantage/abs_mean"] = sums["abs_advantage"] / sums["all"]
        metrics["advantage/clamped"] = sums["clamped"] / sums["all"]
        if self.config.selection != SelectionConfig():
            metrics["selection/kept"] = sums["kept"] / sums["all"]
        if isinstance(assignment, Assignment) and assignment.tuning is not None:
            metrics["tuning/rows"] = sums["tuned"] / sums["rows"]
        if isinstance(assignment, Samples) and assignment.pairs is not None:
            metrics["pair/count"] = int(self._sum(0.0 if assignment.placeholder else float(len(assignment.pairs))))
        return assignment, metrics

    def _reward_gradients(self, plan: Plan, rollout: Rollout, scores: dict[str, Scores], prompts: list[Prompt], numbers: list[int], iteration: int) -> Tensor:
        """[K, P] the policy gradient of each reward that has a weight, from its own advantages; the policy stays as it is."""
        everywhere, found = scores, []
        if self.accelerator.num_processes > 1:
            everywhere = join_scores(gather_object([scores]))
        assigner = Assigner(self.config.model_copy(update={"rewards": self.config.rewards[:1]}), self._sum)
        for name in self.reward_weights.names:
            here, there = ({"total": Scores(part[name].values, part[name].valid & part["total"].valid)} for part in (scores, everywhere))
            if not bool(there["total"].valid.any()):  # an optional reward that had nothing to score
                found.append(torch.cat([torch.zeros_like(p).flatten() for p in self.parameters]))
                continue
            nobody = torch.zeros(0, dtype=torch.int64)
            if trains_steps(self.config):
                one: Assignment | Samples = assigner(plan, rollout, here, there, prompts=(nobody, nobody), numbers=numbers, iteration=iteration)
            else:
                one = assigner.samples(rollout, here, there, prompts=(nobody, nobody))
            update, _ = self.material(plan, one, prompts, numbers, iteration)
            assert update is not None
            units = torch.arange(len(update.unit_group))
            with self.policy.in_step():
                update.prepare([units])
            self.backward(update, units, len(prompts), first=False)
            found.append(torch.cat([whole(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]))
            self.optimizer.zero_grad()
        return torch.stack(found)

    def update(self, plan: Plan, assignment: Assignment | Samples, prompts: list[Prompt], numbers: list[int], iteration: int) -> dict[str, Any]:
        """Optimiser updates on this process's decisions; gradients are averaged over all processes' decisions."""
        update, metrics = self.material(plan, assignment, prompts, numbers, iteration)
        if update is None:
            return metrics | Meters([], ratio=False).result(self.accelerator)
        first = True
        for epoch in range(self.config.objective.inner_epochs):
            parts = self.split(update.unit_group, numbers, (iteration, epoch))
            if epoch == 0:
                with self.policy.in_step():
                    update.prepare(parts)
            for units in parts:
                self.step(update, units, len(prompts), first=first)
                first = False
        return metrics | update.meters.result(self.accelerator)

    def material(
        self, plan: Plan, assignment: Assignment | Samples, prompts: list[Prompt], numbers: list[int], iteration: int
    ) -> tuple[Update | None, dict[str, Any]]:
        """What the updates train on, and what the critic says of it; None while the critic learns alone."""
        config, policy = self.config, self.policy
        prompt_rows = policy.prompt_rows([p.text for p in prompts])
        if isinstance(assignment, Assignment):
            return TransitionUpdate(config, policy, self.likelihood, plan, assignment, prompt_rows), {}
        rollout, sigmas = assignment.rollout, tuple(self.sigmas)
        if config.objective.name in DIRECT_OBJECTIVES:
            update = DirectUpdate(
                config, policy, self.rewards, rollout, prompts=prompts, prompt_rows=prompt_rows, numbers=numbers, iteration=iteration, sigmas=sigmas
            )
            return update, {}
        pairs = assignment.pairs
        leaves = torch.arange(len(rollout.leaves)) if pairs is None else pairs.flatten()
        slots = leaves if pairs is None else torch.arange(len(pairs)).repeat_interleave(2)
        noised = NoisedSamples(
            config, policy, rollout, leaves, slots, prompt_rows=prompt_rows, numbers=numbers, iteration=iteration, sigmas=sigmas, shift=self.shift
        )
        if pairs is not None:
            return PairUpdate(config, policy, noised, placeholder=assignment.placeholder), {}
        advantages, metrics = self._criticise(noised, assignment, numbers, iteration)
        if self._strength(iteration) == 0:
            return None, metrics
        weights = self.assigner.weights(advantages, rollout.leaf_group, assignment.valid).float()
        return MatchingUpdate(config, policy, noised, weights, assignment.valid, self.old_policy), metrics

    def _criticise(self, noised: NoisedSamples, samples: Samples, numbers: Sequence[int], iteration: int) -> tuple[Tensor, dict[str, Any]]:
        """Advantages [N, S] of samples at their noise levels: without a critic those of the samples, else less its value. The critic learns too."""
        shaped, count = samples.advantages, self.config.matching.num_times
        if self.critic is None:
            return shaped[:, None].expand(-1, count), {}
        x, sigma, prompt_row = noised.states(), noised.sigma[noised.slots].flatten(), noised.prompt_row.repeat_interleave(count)
        value = self.critic.value(x, sigma, prompt_row, pooled=self.policy.pooled)
        width = len(shaped) // len(numbers) * count  # groups are equally large
        metrics: dict[str, Any] = dict(
            self.critic.fit(
                x,
                sigma,
                prompt_row,
                shaped.float().repeat_interleave(count),
                samples.valid.repeat_interleave(count),
                pooled=self.policy.pooled,
                generator=generator(self.config.seed, "critic", iteration),
                accelerator=self.accelerator,
                numbers=(torch.tensor(numbers)[:, None] * width + torch.arange(width)).flatten(),
                value=value,
            )
        )
        self.critic.update_gate(iteration)
        strength = self.critic.strength(iteration)
        metrics["critic/strength"] = strength
        return strength * critic_advantages(shaped.float(), value.view(-1, count), self.critic.config.advantage_clip), metrics

    def split(self, unit_group: Tensor, numbers: list[int], key: tuple[int, int]) -> list[Tensor]:
        """Units of each update. A group's units are dealt out in an order that follows from the group's number, not from the process.

        An update may have no units here; it is made all the same if another process has some, see `step`.
        """
        num_updates = self.config.objective.updates_per_iteration
        if num_updates == 1:
            return [torch.arange(len(unit_group))]
        part = torch.empty(len(unit_group), dtype=torch.int64)
        counts = torch.bincount(unit_group, minlength=len(numbers)).tolist()
        start = 0
        for number, count in zip(numbers, counts, strict=True):
            order = torch.randperm(count, generator=generator(self.config.seed, "split", *key, number))
            part[start : start + count] = (order + number) % num_updates
            start += count
        return [torch.nonzero(part == u).squeeze(1) for u in range(num_updates)]

    def step(self, update: Update, units: Tensor, num_groups: int, *, first: bool) -> None:
        """One optimiser update on some units; none where no process has anything to learn from."""
        if self.backward(update, units, num_groups, first=first):
            self._apply_gradients(update.meters)

    def backward(self, update: Update, units: Tensor, num_groups: int, *, first: bool) -> bool:
        """The gradient of some units, in micro-batches. False: no process has anything to learn from, and there is no gradient."""
        config = self.config
        member = torch.zeros(len(update.unit_group), dtype=torch.bool)
        member[units] = True
        chosen = member[update.decision_unit]
        weight = torch.zeros(len(update.decision_unit))
        idle = update.placeholder or not len(units)
        if not idle:
            weight[chosen] = REDUCTIONS[config.objective.reduction](update.unit_group[update.decision_unit[chosen]], num_groups)
        total, total_units = self._sum(float(weight.sum())), self._sum(0.0 if idle else float(len(units)))
        if total == 0:
            return False  # the weights and the optimiser stay as they are
        if idle:  # the other processes wait for this one in their backward pass: one unit, without weight
            units = torch.zeros(1, dtype=torch.int64)
            self.idle_rows += update.rows_per_unit
        world = self.accelerator.num_processes
        weights = Weights(weight, world / total, 0.0 if idle else world / total_units)
        mark, rows = update.meters.mark(), NetworkRows(self.policy.rows.forward, self.policy.rows.backward)
        while True:
            try:
                self._in_micro_batches(update, units, weights, first=first, idle=idle)
                return True
            except torch.OutOfMemoryError as error:
                if world > 1:
                    raise UserError(
                        f"training.rows_per_backward: {self.rows_per_backward} do not fit into the memory of {self.policy.device}, and the processes cannot "
                        "step back together; the last checkpoint is kept: go on with a smaller number, or with model.gradient_checkpointing: true"
                    ) from error
            # outside of the handler, so that nothing holds on to the tensors of the failed attempt
            self.optimizer.zero_grad()
            update.meters.rewind(mark)
            self.policy.rows.forward, self.policy.rows.backward = rows.forward, rows.backward
            fitting = min(self.rows_per_backward, len(units) * update.rows_per_unit)
            help = "set model.gradient_checkpointing: true, model.dtype: bfloat16, adapter: lora, or smaller pictures"
            self.rows_per_backward = halved("training.rows_per_backward", fitting, self.policy.device, help=help)

    def _in_micro_batches(self, update: Update, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> None:
        chunks = units.split(max(1, self.rows_per_backward // update.rows_per_unit))
        company, rows = self.policy.company, self.policy.rows
        missing = 0 if company is None else company.most(len(chunks)) - len(chunks)  # micro-batches that another process has and this one has not
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            # A sharded network's gradients are averaged after every micro-batch: whole ones would not fit.
            with contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(self.policy.training_module):
                self.accelerator.backward(update.loss(chunk, weights, first=first, idle=idle))
        nothing = Weights(torch.zeros_like(weights.decision), 0.0, 0.0)
        for _ in range(missing):
            before = rows.forward + rows.backward
            self.accelerator.backward(update.loss(torch.zeros(1, dtype=torch.int64), nothing, first=first, idle=True))
            rows.idle += rows.forward + rows.backward - before

    def _apply_gradients(self, meters: Meters) -> None:
        o = self.config.optimizer
        norm = clip_gradients(self.parameters, o.max_grad_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient became {norm.item()} at update {self.num_updates + 1}; the last checkpoint is intact: lower optimizer.learning_rate, "
                "raise precision (model.dtype) or look at the rewards"
            )
        meters.add_grad_norm(norm)
        warm = min(1.0, (self.num_updates + 1) / o.warmup_updates) if o.warmup_updates else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = o.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_updates += 1
        if self.ema is not None:
            self.ema.update()

    def _sum(self, value: float) -> float:
        """A number summed over processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(float(value), dtype=torch.float64, device=self.accelerator.device), "sum"))

    # --- evaluation, state ---

    def evaluate(self, iteration: int, logger: RunLogger, *, num_images: int, guidance_scales: Sequence[float], policy: str) -> list[dict[str, Any]]:
        """Evaluate every prompt set (with the averaged weights, if any), log the rows and save the sample grids of the first guidance scale."""
        rows: list[dict[str, Any]] = []
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            for split, prompts in self.splits.items():
                for scale in guidance_scales:
                    keep = self.config.evaluation.grid_images if scale == guidance_scales[0] else 0
                    result = self.evaluator(split, num_images, scale, keep)
                    if self.accelerator.is_main_process and keep:
                        with explain_full_disk(logger.run_dir):
                            save_grid(logger.run_dir / "samples" / f"iteration_{iteration:06d}", split, result)
                    summary = result.summary(len(prompts))
                    if scale == guidance_scales[0]:
                        self.reward_weights.evaluated(split, {name: mean for name, (mean, _, _) in summary.items()})
                    for reward, (mean, ci95, n) in summary.items():
                        row = {"iteration": iteration, "split": split, "policy": policy, "guidance_scale": scale, "reward": reward}
                        rows.append({**row, "mean": mean, "ci95": ci95, "n": n})
        for record in rows:
            logger.log_eval(record)
        return rows

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, on the main process; every process must call it. Sharded tensors stay where they are."""
        states = gather_object([random_state()])
        return {
            "parameters": [p.detach() if self.sharded else p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "old_policy": None if self.old_policy is None else self.old_policy.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "monitor": self.monitor.state_dict(),
            "reward_weights": self.reward_weights.state_dict(),
            "assigner": self.assigner.state_dict(),
            "random": states,
            "fitting": {"rows_per_forward": self.policy.rows_per_forward, "rows_per_backward": self.rows_per_backward},
            "counters": {"num_updates": self.num_updates, "images": self.images, "rows_total": self.rows_total, "elapsed": self.elapsed},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`, or that of a run whose network was sharded in another way."""
        state = fit_state(state, self.parameters)
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            local(parameter.detach()).copy_(local(value))
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)  # the config may have been changed on purpose
        if (self.ema is None) != (state["ema"] is None):
            raise UserError("the checkpoint and the config disagree on whether an average of the weights (ema) is kept")
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        for name, part in (("old_policy", self.old_policy), ("critic", self.critic)):
            if (part is None) != (state.get(name) is None):
                raise UserError(f"the checkpoint and the config disagree on whether there is a {name}")
            if part is not None:
                part.load_state_dict(state[name])
        self.monitor.load_state_dict(state["monitor"])
        self.assigner.load_state_dict(state.get("assigner"))
        if "reward_weights" in state and self.config.reward_weights.kind != "fixed":
            self.reward_weights.load_state_dict(state["reward_weights"])
            self.rewards.weights = self.reward_weights.weights
        fitting = state.get("fitting", {})  # what an earlier process found to fit into memory
        self.policy.rows_per_forward = min(self.policy.rows_per_forward, fitting.get("rows_per_forward", self.policy.rows_per_forward))
        self.rows_per_backward = min(self.rows_per_backward, fitting.get("rows_per_backward", self.rows_per_backward))
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index])
        else:
            _LOGGER.warning("resuming on another number of processes: global random states are not restored (flowrl's own draws do not need them)")
        counters = state["counters"]
        self.num_updates, self.images, self.rows_total, self.elapsed = (counters[k] for k in ("num_updates", "images", "rows_total", "elapsed"))
