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

from flowrl.checkpoint import random_state, restore_random_state
from flowrl.config import Config
from flowrl.core.advantages import group_statistics
from flowrl.dealing import dealt
from flowrl.engines import engine_of
from flowrl.engines.base import Assigned, Engine, RolledOut, Setting
from flowrl.evaluation import build_rewards
from flowrl.memory import halved
from flowrl.meters import Meters
from flowrl.optimizers import make_optimizer
from flowrl.policies.base import NetworkRows
from flowrl.policies.ema import Ema, OldPolicy
from flowrl.policies.families import family_of, make_policy
from flowrl.processes import check_agreement, make_accelerator
from flowrl.reward_metrics import check_valid, join_scores, reward_metrics
from flowrl.reward_weights import RewardWeights
from flowrl.seeds import derive_seed, generator
from flowrl.sharding import clip_gradients, fit_state, local, whole
from flowrl.tracking import RunLogger, explain_full_disk
from flowrl.types import Prompt, Scores, UserError
from flowrl.updates.base import Update, Weights
from flowrl.updates.direct import DIRECT_OBJECTIVES
from rewards.composite import ConstantRewardMonitor, WeightedRewards

__all__ = ["Trainer"]

_LOGGER = logging.getLogger(__name__)


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
        groups, shards = config.rollout.groups_per_iteration, config.rollout.group_shards
        if groups * shards < world:
            parts = f" in {shards} parts each" if shards > 1 else ""
            advice = "use more groups, or share a group among processes with rollout.group_shards"
            raise UserError(f"rollout.groups_per_iteration: {groups} groups{parts} cannot be shared by {world} processes; {advice}")
        set_seed(derive_seed(config.seed, "init") % 2**32)  # initial LoRA weights, and whatever a reward draws from global generators
        engine = engine_of(config.model)
        data = engine.load_data(config)
        self.prompts, self.splits, self.samples_stored = data.prompts, data.splits, data.pairs is not None
        self.rewards, eval_rewards = self._load_rewards()
        rows, keep = config.training.rows_per_forward, engine.needs_reference(config)
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
        self.reward_weights = RewardWeights(config)
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
        self.engine: Engine = engine(
            Setting(
                config=config,
                accelerator=self.accelerator,
                policy=self.policy,
                data=data,
                rewards=self.rewards,
                eval_rewards=eval_rewards,
                reward_weights=self.reward_weights,
                parameters=self.parameters,
                old_policy=self.old_policy,
                add=self._sum,
            )
        )
        self.eval_rewards = eval_rewards
        self.monitor = ConstantRewardMonitor()
        self.sampled: Any = None  # samples of the last iteration, where the config asks for it
        self.num_updates = 0
        self.samples = 0
        self.rows_total = 0
        self.idle_rows = 0  # of this process, see `step`
        self.elapsed = 0.0

    def _load_rewards(self) -> tuple[WeightedRewards, WeightedRewards]:
        """Those of training and those of evaluation, which share what is the same, after a look at all prompts."""
        config = self.config
        rewards = build_rewards(config.rewards)
        if config.objective.name in DIRECT_OBJECTIVES:
            rewards.require_differentiable()
        eval_rewards = build_rewards(config.evaluation.rewards, share=config.rewards, of=rewards) if config.evaluation.rewards else rewards
        medium = family_of(config.model).medium
        for each in (rewards, eval_rewards):
            each.require_medium(medium)
        if not self.samples_stored:
            rewards.check_prompts(self.prompts)
        for split in self.splits.values():
            eval_rewards.check_prompts(split)
        for each in (rewards, eval_rewards):
            each.load(self.accelerator.device)
            each.require_medium(medium)  # one behind an endpoint knows only now what it reads
        return rewards, eval_rewards

    def close(self) -> None:
        """Give back what rewards hold: threads, processes, connections."""
        for rewards in (self.rewards, self.eval_rewards):
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
        indices = self.engine.groups(iteration)
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        mine = dealt(len(indices), place, self.config.objective.updates_per_iteration)
        prompts = [self.prompts[indices[g]] for g in mine]
        rolled_out, pending = self.engine.roll_out(prompts, [indices[g] for g in mine], mine, iteration)
        sampled = time.perf_counter()
        scores = join_scores([part.result() for part in pending])
        self.rewards.rest()
        scored = time.perf_counter()
        every = self.config.logging.rollouts_every
        due = every is not None and iteration % every == 0
        self.sampled = self.engine.keep(iteration, rolled_out, scores, prompts, mine) if due else None
        assigned, metrics = self.assign(rolled_out, scores, prompts, mine, iteration)
        measured = replace(rows)
        if self.reward_weights.due(iteration):
            self.reward_weights.learn(self._reward_gradients(rolled_out, scores, prompts, mine, iteration))
            self.rewards.weights = self.reward_weights.weights
        measured = NetworkRows(rows.forward - measured.forward, rows.backward - measured.backward, rows.idle - measured.idle, rows.padding - measured.padding)
        meters = self.update(rolled_out, assigned, prompts, mine, iteration)
        finished = time.perf_counter()
        if self.old_policy is not None:
            self.old_policy.update(iteration, self.num_updates)

        self.samples += int(self._sum(rolled_out.num_sampled))
        used_forward = int(self._sum(rows.forward - before.forward - measured.forward))
        used_backward = int(self._sum(rows.backward - before.backward - measured.backward))
        of_weights = int(self._sum(measured.forward + measured.backward))
        self.rows_total += used_forward + used_backward + of_weights
        values: dict[str, Any] = {"iteration": iteration, **metrics, **meters}
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["nfe/forward"], values["nfe/backward"] = used_forward, used_backward
        values["nfe/used"] = used_forward + used_backward
        idle, all_valid = self.idle_rows - idle_before, metrics.get("trained/reward/invalid", metrics["reward/invalid"]) == 0
        values["nfe/minimum"] = self.engine.minimum_nfe(assigned, len(indices), iteration, idle, all_valid)
        values["nfe/minimum"] += int(self._sum(rows.idle - before.idle - measured.idle))  # of sharded networks, see `Company`
        if self.config.reward_weights.kind == "gradient":
            values["nfe/reward_weights"] = of_weights
        values["nfe/total"], values[self.engine.counted] = self.rows_total, self.samples
        seconds = {"rollout": sampled - started, "reward_wait": scored - sampled, "train": finished - scored, "total": finished - started}
        self.elapsed += seconds["total"]
        timings = {"iteration": iteration, **{f"seconds/{k}": round(v, 4) for k, v in seconds.items()}, "elapsed": round(self.elapsed, 2)}
        return values, timings

    def assign(
        self, rolled_out: RolledOut, scores: dict[str, Scores], prompts: Sequence[Prompt], mine: Sequence[int], iteration: int
    ) -> tuple[Assigned, dict[str, Any]]:
        """What this process's decisions or samples are trained with, and the iteration's reward metrics over all processes.

        Args:
            prompts: of this process's groups, whose numbers within the iteration are ``mine``.
        """
        config, group = self.config.advantage, rolled_out.group
        here = torch.tensor([derive_seed("prompt", prompt.text) % 2**62 for prompt in prompts])[group]
        everywhere, there = scores, here
        if self.accelerator.num_processes > 1:
            gathered = gather_object([(scores, here)])
            everywhere, there = join_scores([part for part, _ in gathered]), torch.cat([numbers for _, numbers in gathered])
        self.monitor.update(everywhere)
        check_valid(self.config, everywhere["total"], iteration)
        total = scores["total"]
        assigned, more = self.engine.assign(rolled_out, scores, everywhere, prompts=(here, there), numbers=mine, iteration=iteration)
        sets = rolled_out.compared
        _, std, count = group_statistics(total.values.double(), sets, total.valid, int(sets.max()) + 1, config.ddof)
        metrics = reward_metrics(self.config, everywhere, self.reward_weights)
        metrics["reward/zero_std_groups"] = int(self._sum(int(((std == 0) | (count < 2)).sum())))
        sums = {name: self._sum(assigned.sums[name]) for name in ("abs_advantage", "clamped", "all")}
        metrics["advantage/abs_mean"] = sums["abs_advantage"] / sums["all"]
        metrics["advantage/clamped"] = sums["clamped"] / sums["all"]
        return assigned, metrics | more

    def _reward_gradients(self, rolled_out: RolledOut, scores: dict[str, Scores], prompts: list[Prompt], numbers: list[int], iteration: int) -> Tensor:
        """[K, P] the policy gradient of each reward that has a weight, from its own advantages; the policy stays as it is."""
        everywhere, found = scores, []
        if self.accelerator.num_processes > 1:
            everywhere = join_scores(gather_object([scores]))
        for name in self.reward_weights.names:
            here, there = ({"total": Scores(part[name].values, part[name].valid & part["total"].valid)} for part in (scores, everywhere))
            if not bool(there["total"].valid.any()):  # an optional reward that had nothing to score
                found.append(torch.cat([torch.zeros_like(p).flatten() for p in self.parameters]))
                continue
            one = self.engine.assign_alone(rolled_out, here, there, numbers, iteration)
            update, _ = self.engine.update(rolled_out, one, prompts, numbers, iteration)
            assert update is not None
            units = torch.arange(len(update.unit_group))
            with self.policy.in_step():
                update.prepare([units])
            self.backward(update, units, len(prompts), first=False)
            found.append(torch.cat([whole(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]))
            self.optimizer.zero_grad()
        return torch.stack(found)

    def update(self, rolled_out: RolledOut, assigned: Assigned, prompts: list[Prompt], numbers: list[int], iteration: int) -> dict[str, Any]:
        """Optimiser updates on this process's decisions; gradients are averaged over all processes' decisions."""
        update, metrics = self.engine.update(rolled_out, assigned, prompts, numbers, iteration)
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
        self.engine.finish(assigned)
        return metrics | update.meters.result(self.accelerator)

    def split(self, unit_group: Tensor, numbers: list[int], key: tuple[int, int]) -> list[Tensor]:
        """Units of each update. A group's units are dealt out in an order that follows from the group's number, not from the process.

        Which groups a process has is `dealt` so that the units of an update are spread over the processes. An update may have no units here; it is made all
        the same if another process has some, see `step`.
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
        idle = update.placeholder or not len(units)
        weight, here = update.weigh(units[:0] if idle else units, num_groups)
        total, total_units = self._sum(here), self._sum(0.0 if idle else float(len(units)))
        if total == 0:
            return False  # the weights and the optimiser stay as they are
        if idle:  # the other processes wait for this one in their backward pass: one unit, without weight
            units = torch.zeros(1, dtype=torch.int64)
            self.idle_rows += update.rows_per_unit
        world = self.accelerator.num_processes
        weights = Weights(weight, world / total, 0.0 if idle else world / total_units)
        mark, rows = update.meters.mark(), replace(self.policy.rows)
        while True:
            failed = ""
            try:
                self._in_micro_batches(update, units, weights, first=first, idle=idle)
            except torch.OutOfMemoryError as error:
                failed = str(error).partition("\n")[0]
                if self.sharded:  # the others wait within the network
                    raise UserError(
                        f"training.rows_per_backward: {self.rows_per_backward} do not fit into the memory of {self.policy.device}, and the processes of a "
                        "sharded network cannot step back together; the last checkpoint is kept: go on with a smaller number, or with "
                        "model.gradient_checkpointing: true"
                    ) from error
            # outside of the handler, so that nothing holds on to the tensors of the failed attempt
            if not self._sum(float(bool(failed))):
                break
            self.optimizer.zero_grad()
            update.meters.rewind(mark)
            self.policy.rows.forward, self.policy.rows.backward, self.policy.rows.padding = rows.forward, rows.backward, rows.padding
            fitting = min(self.rows_per_backward, len(units) * update.rows_per_unit) if failed else self.rows_per_backward
            fitting = -int(self._most(-fitting))  # the least of all processes
            help = "set model.gradient_checkpointing: true, model.dtype: bfloat16, adapter: lora, smaller pictures or shorter answers"
            self.rows_per_backward = halved("training.rows_per_backward", fitting, self.policy.device, help=help)
        self._average_gradients()
        return True

    def _average_gradients(self) -> None:
        """Over processes that hold the whole network each. Not within the backward pass: one that ran out of memory there would leave the others waiting."""
        if self.accelerator.num_processes == 1 or self.sharded:
            return
        for parameter in self.parameters:  # the same ones everywhere, though not every micro-batch meets all
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _in_micro_batches(self, update: Update, units: Tensor, weights: Weights, *, first: bool, idle: bool) -> None:
        chunks = units.split(max(1, self.rows_per_backward // update.rows_per_unit))
        company, rows = self.policy.company, self.policy.rows
        missing = 0 if company is None else company.most(len(chunks)) - len(chunks)  # micro-batches that another process has and this one has not
        for chunk in chunks:
            # A sharded network's gradients are averaged after every micro-batch: whole ones would not fit.
            with contextlib.nullcontext() if self.sharded else self.accelerator.no_sync(self.policy.training_module):
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

    def _most(self, value: float) -> float:
        """The largest of a number over processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.gather(torch.tensor([float(value)], dtype=torch.float64, device=self.accelerator.device)).max())

    # --- evaluation, state ---

    def evaluate(self, iteration: int, logger: RunLogger, *, num_images: int, guidance_scales: Sequence[float], policy: str) -> list[dict[str, Any]]:
        """Evaluate every prompt set (with the averaged weights, if any), log the rows and save the sample grids of the first guidance scale."""
        rows: list[dict[str, Any]] = []
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            for split, prompts in self.splits.items():
                for scale in guidance_scales:
                    keep = self.config.evaluation.grid_images if scale == guidance_scales[0] else 0
                    result = self.engine.evaluate(split, num_images, scale, keep)
                    if self.accelerator.is_main_process and keep:
                        with explain_full_disk(logger.run_dir):
                            result.save(logger.run_dir / "samples" / f"iteration_{iteration:06d}", split)
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
            "monitor": self.monitor.state_dict(),
            "reward_weights": self.reward_weights.state_dict(),
            "engine": self.engine.state_dict(),
            "random": states,
            "fitting": {"rows_per_forward": self.policy.rows_per_forward, "rows_per_backward": self.rows_per_backward},
            "counters": {"num_updates": self.num_updates, "samples": self.samples, "rows_total": self.rows_total, "elapsed": self.elapsed},
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
        if (self.old_policy is None) != (state["old_policy"] is None):
            raise UserError("the checkpoint and the config disagree on whether there is an old_policy")
        if self.old_policy is not None:
            self.old_policy.load_state_dict(state["old_policy"])
        self.monitor.load_state_dict(state["monitor"])
        self.engine.load_state_dict(state["engine"])
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
        self.num_updates, self.samples, self.rows_total, self.elapsed = (counters[k] for k in ("num_updates", "samples", "rows_total", "elapsed"))
