"""The trainer: roll out groups, score them, turn scores into advantages of decisions, and raise or lower the decisions' likelihood.

One iteration: P prompts, G samples each -> rollout forest -> rewards -> advantages -> updates. Everything random follows from (seed, iteration,
group), so a run on more processes, or resumed from a checkpoint, takes the same decisions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from flowrl.checkpoint import load_checkpoint, model_identity, random_state, restore_random_state, save_checkpoint
from flowrl.checks import ratio_is_off
from flowrl.config import Config, RolloutConfig, dump_config
from flowrl.core.advantages import ADVANTAGES, edge_advantages, group_statistics
from flowrl.core.objectives import clipped_surrogate
from flowrl.core.reductions import REDUCTIONS
from flowrl.core.regularizers import gaussian_kl
from flowrl.data import GroupSampler, load_prompts
from flowrl.evaluation import Evaluator, build_rewards, save_grid, sigmas_of
from flowrl.likelihoods.transition import TransitionLikelihood, select_rows
from flowrl.meters import Meters
from flowrl.policies.ema import Ema
from flowrl.policies.sd3 import NetworkRows, Sd3Policy
from flowrl.processes import make_accelerator
from flowrl.progress import TrainingProgress
from flowrl.report import write_report
from flowrl.seeds import derive_seed, generator
from flowrl.tracking import RunLogger, explain_full_disk, replace_file
from flowrl.types import Decisions, Prompt, Rollout, SampleBatch, Scores, UserError
from flowrl.versions import versions
from rewards.composite import ConstantRewardMonitor
from samplers.plans import Plan, chain_plan, minimum_rows, window_plan
from samplers.rollout import concatenate, execute

__all__ = ["Interrupted", "Trainer", "build_plan", "train"]

_LOGGER = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the iteration was finished and a checkpoint saved."""


def build_plan(config: RolloutConfig, sigmas: Sequence[float], seed: int) -> Plan:
    """The plan of an iteration; every group and process gets the same window."""
    common: dict[str, Any] = {"noise_level": config.noise_level, "same_noise": config.same_noise, "kernel": config.kernel}
    if config.plan == "chain":
        return chain_plan(sigmas, config.group_size, train_fraction=config.train_fraction, **common)
    low, size = config.window.low, config.window.size
    start = low + derive_seed("window", seed) % (config.window_high - size - low + 1)
    return window_plan(sigmas, config.group_size, start=start, size=size, **common)


class Trainer:
    """State and steps of one run. `train` drives it; tests may drive it step by step.

    Raises:
        UserError: the model, prompts or rewards cannot be loaded, or there are fewer groups than processes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = make_accelerator(config.training.device)
        world = self.accelerator.num_processes
        if config.rollout.groups_per_iteration < world:
            groups = config.rollout.groups_per_iteration
            raise UserError(f"rollout.groups_per_iteration: {groups} groups cannot be shared by {world} processes; use more groups")
        set_seed(derive_seed(config.seed, "init") % 2**32)  # initial LoRA weights, and whatever a reward draws from global generators
        self.prompts = load_prompts(config.data.train)
        self.splits = {name: load_prompts(path) for name, path in config.data.eval.items()}
        self.rewards = build_rewards(config.rewards)
        eval_rewards = build_rewards(config.evaluation.rewards) if config.evaluation.rewards else self.rewards
        self.policy = Sd3Policy(config.model, self.accelerator.device, rows_per_forward=config.training.rows_per_forward, keep_reference=config.kl.weight > 0)
        self.policy.training_module = self.accelerator.prepare(self.policy.transformer)
        self.sigmas = sigmas_of(config.rollout, config.rollout.num_steps, self.policy)
        self.likelihood = TransitionLikelihood(config.rollout.kernel, config.rollout.log_prob_reduction)
        self.sampler = GroupSampler(len(self.prompts), config.rollout.groups_per_iteration, config.seed)
        self.parameters = self.policy.trainable()
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        e = config.ema
        self.ema = Ema(self.parameters, decay=e.decay, every=e.every, warmup=e.warmup) if e is not None else None
        self.evaluator = Evaluator(
            self.policy,
            self.splits,
            eval_rewards,
            sigmas=sigmas_of(config.rollout, config.evaluation.num_steps, self.policy),
            seed=config.evaluation.seed,
            accelerator=self.accelerator,
        )
        self.monitor = ConstantRewardMonitor()
        self.num_updates = 0
        self.images = 0
        self.rows_total = 0
        self.elapsed = 0.0

    # --- one iteration ---

    def iterate(self, iteration: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Train one iteration (>= 1).

        Returns:
            metrics (reproducible) and timings (seconds), as written to metrics.jsonl and timings.jsonl.
        """
        started = time.perf_counter()
        config, rows = self.config, self.policy.rows
        before = NetworkRows(rows.forward, rows.backward)
        plan = build_plan(config.rollout, self.sigmas, derive_seed(config.seed, iteration))
        indices = self.sampler.groups(iteration - 1)
        mine = list(range(self.accelerator.process_index, len(indices), self.accelerator.num_processes))
        prompts = [self.prompts[indices[g]] for g in mine]
        rollout, futures = self.roll_out(plan, prompts, mine, iteration)
        sampled = time.perf_counter()
        scores = _join([future.result() for future in futures])
        scored = time.perf_counter()
        advantages, metrics = self.advantages(scores, rollout.leaf_group, len(prompts))
        meters = self.update(rollout, advantages, prompts, mine, iteration)
        finished = time.perf_counter()

        self.images += len(indices) * config.rollout.group_size
        used_forward = int(self._sum(rows.forward - before.forward))
        used_backward = int(self._sum(rows.backward - before.backward))
        self.rows_total += used_forward + used_backward
        values: dict[str, Any] = {"iteration": iteration, **metrics, **meters}
        values["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        values["nfe/forward"], values["nfe/backward"] = used_forward, used_backward
        values["nfe/used"], values["nfe/minimum"] = used_forward + used_backward, self.minimum_nfe(plan, len(indices))
        values["nfe/total"], values["images"] = self.rows_total, self.images
        seconds = {"rollout": sampled - started, "reward_wait": scored - sampled, "train": finished - scored, "total": finished - started}
        self.elapsed += seconds["total"]
        timings = {"iteration": iteration, **{f"seconds/{k}": round(v, 4) for k, v in seconds.items()}, "elapsed": round(self.elapsed, 2)}
        return values, timings

    def minimum_nfe(self, plan: Plan, num_groups: int) -> int:
        """Least forward and backward rows of an iteration, by the closed formulas of docs/nfe.md: c [F + K W] + r c W forward and K W backward."""
        config = self.config
        steps = [node.step - 1 for node in plan.nodes if node.trained]
        forward, rows = minimum_rows(
            config.rollout.num_steps,
            config.rollout.group_size,
            first=min(steps),
            count=max(steps) - min(steps) + 1,
            same_noise=config.rollout.same_noise,
        )
        guided = 2 if config.rollout.guidance_scale > 1 else 1
        reference = 1 if config.kl.weight > 0 else 0
        epochs = config.objective.inner_epochs
        return num_groups * (guided * (forward + (epochs + reference) * rows) + epochs * rows)

    def roll_out(self, plan: Plan, prompts: list[Prompt], numbers: list[int], iteration: int) -> tuple[Rollout, list[Future[dict[str, Scores]]]]:
        """Sample this process's groups. While one chunk of groups is sampled, the rewards of the chunk before are computed in a thread."""
        config = self.config
        prompt_rows = self.policy.prompt_rows([p.text for p in prompts])
        velocity = self.policy.velocity(config.rollout.guidance_scale)
        chunk = max(1, config.training.rows_per_forward // max(len(wave) for wave in plan.waves))
        parts: list[Rollout] = []
        futures: list[Future[dict[str, Scores]]] = []
        with ThreadPoolExecutor(1) as pool:
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
                )
                parts.append(part)
                shown = [prompts[start + g] for g in part.leaf_group.tolist()]
                batch = SampleBatch(shown, images=self.policy.decode(part.leaves), group=part.leaf_group + start)
                futures.append(pool.submit(self.rewards.score, batch))
        return concatenate(parts), futures

    def advantages(self, scores: dict[str, Scores], group: Tensor, num_groups: int) -> tuple[Tensor, dict[str, Any]]:
        """Advantages [B] of this process's samples, and the iteration's reward metrics over all processes."""
        config, total = self.config.advantage, scores["total"]
        everywhere: dict[str, Scores] = scores
        if self.accelerator.num_processes > 1:
            everywhere = _join(gather_object([scores]))
        self.monitor.update(everywhere)
        valid = everywhere["total"].values[everywhere["total"].valid].double()
        if not len(valid):
            raise UserError("no sample of the iteration could be scored; see the rewards' own messages")
        spread = valid.std(correction=config.ddof) if len(valid) > config.ddof else torch.zeros(())
        raw = ADVANTAGES[config.name](total.values.double(), group, total.valid, num_groups, eps=config.eps, ddof=config.ddof, global_spread=spread)
        clamped = raw.clamp(-config.clip, config.clip)
        _, std, count = group_statistics(total.values.double(), group, total.valid, num_groups, config.ddof)
        metrics: dict[str, Any] = {}
        for name, score in everywhere.items():
            values = score.values[score.valid].double()
            metrics[f"reward/{name}/mean"] = values.mean().item() if len(values) else None
            metrics[f"reward/{name}/std"] = values.std(correction=0).item() if len(values) else None
        metrics["reward/invalid"] = int((~everywhere["total"].valid).sum())
        metrics["reward/zero_std_groups"] = int(self._sum(int(((std == 0) | (count < 2)).sum())))
        metrics["advantage/abs_mean"] = self._sum(clamped.abs().sum().item()) / self._sum(len(clamped))
        metrics["advantage/clamped"] = self._sum((raw != clamped).sum().item()) / self._sum(len(clamped))
        return clamped.float(), metrics

    def update(self, rollout: Rollout, advantages: Tensor, prompts: list[Prompt], numbers: list[int], iteration: int) -> dict[str, Any]:
        """Optimiser updates on this process's decisions; gradients are averaged over all processes' decisions."""
        config = self.config
        edge_advantage = edge_advantages(advantages, rollout.leaf_edge, len(rollout.edge_row))
        prompt_rows = self.policy.prompt_rows([p.text for p in prompts])
        reference = self.reference_velocity(rollout, prompt_rows)
        meters = Meters(rollout.edge_step.unique().tolist())
        first = True
        for epoch in range(config.objective.inner_epochs):
            parts = self.split(rollout, numbers, (iteration, epoch))
            for rows in parts:
                self.step(rollout, rows, edge_advantage, prompt_rows, reference, meters, first=first)
                first = False
        return meters.result(self.accelerator)

    def split(self, rollout: Rollout, numbers: list[int], key: tuple[int, int]) -> list[Tensor]:
        """Training rows of each update. A group's rows are dealt out in an order that follows from the group's number, not from the process."""
        num_updates = self.config.objective.updates_per_iteration
        per_group = len(rollout.row_sigma) // len(numbers)
        if num_updates == 1:
            return [torch.arange(len(rollout.row_sigma))]
        part = torch.empty(len(rollout.row_sigma), dtype=torch.int64)
        for position, number in enumerate(numbers):
            order = torch.randperm(per_group, generator=generator(self.config.seed, "split", *key, number))
            part[position * per_group : (position + 1) * per_group] = (order + number) % num_updates
        parts = [torch.nonzero(part == u).squeeze(1) for u in range(num_updates)]
        if any(len(p) == 0 for p in parts):
            raise UserError(f"objective.updates_per_iteration: {num_updates} updates are more than this process has rows to train on; use fewer")
        return parts

    def reference_velocity(self, rollout: Rollout, prompt_rows: Tensor) -> Tensor | None:
        """The reference's velocities [R, L...] on all training rows, once per iteration; None without KL."""
        if self.config.kl.weight == 0:
            return None
        with self.policy.reference():
            velocity = self.policy.velocity(self.config.rollout.guidance_scale)
            return velocity(rollout.row_x, rollout.row_sigma, prompt_rows[rollout.row_group])

    def step(
        self, rollout: Rollout, rows: Tensor, edge_advantage: Tensor, prompt_rows: Tensor, reference: Tensor | None, meters: Meters, *, first: bool
    ) -> None:
        """One optimiser update on some rows, in micro-batches."""
        config, device = self.config, self.policy.device
        edge_group = rollout.row_group[rollout.edge_row]
        member = torch.zeros(len(rollout.row_sigma), dtype=torch.bool)
        member[rows] = True
        chosen = member[rollout.edge_row]
        weight = torch.zeros(len(rollout.edge_row))
        weight[chosen] = REDUCTIONS[config.objective.reduction](edge_group[chosen], len(prompt_rows))
        scale = self.accelerator.num_processes / self._sum(float(weight.sum()))
        velocity = self.policy.velocity(config.rollout.guidance_scale)
        chunks = rows.split(config.training.rows_per_backward)
        for number, chunk in enumerate(chunks):
            last = number == len(chunks) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy.training_module):
                batch = select_rows(rollout, chunk, prompt_rows)
                out = self.likelihood(velocity, batch)
                decisions = Decisions(
                    log_prob=out.log_prob[:, None],
                    old_log_prob=rollout.edge_old_log_prob[batch.edge.to(device)][:, None],
                    advantages=edge_advantage[batch.edge].to(device)[:, None],
                    mask=torch.ones_like(out.log_prob, dtype=torch.bool)[:, None],
                )
                objective = clipped_surrogate(decisions, clip_low=config.objective.clip_low, clip_high=config.objective.clip_high)
                loss = objective.loss[:, 0]
                kl = None
                if reference is not None:
                    ref_edge, ref_transition = self.likelihood.transition(batch, reference[chunk.to(device)])
                    kl = gaussian_kl(
                        config.kl.form,
                        mean=out.transition.mean,
                        ref_mean=ref_transition.mean,
                        velocity=out.edge_velocity,
                        ref_velocity=ref_edge,
                        std=out.transition.std,
                        length=batch.step.sigma - batch.step.sigma_next,
                    )
                    loss = loss + config.kl.weight * kl
                self.accelerator.backward((loss * weight[batch.edge].to(device)).sum() * scale)
            meters.add(objective.metrics, loss.detach(), kl, rollout.edge_step[batch.edge], first=first)
        self._apply_gradients(meters)

    def _apply_gradients(self, meters: Meters) -> None:
        o = self.config.optimizer
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.max_grad_norm)
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
                    for reward, (mean, ci95, n) in result.summary(len(prompts)).items():
                        row = {"iteration": iteration, "split": split, "policy": policy, "guidance_scale": scale, "reward": reward}
                        rows.append({**row, "mean": mean, "ci95": ci95, "n": n})
        for record in rows:
            logger.log_eval(record)
        return rows

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, on the main process; every process must call it."""
        states = gather_object([random_state()])
        return {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "monitor": self.monitor.state_dict(),
            "random": states,
            "counters": {"num_updates": self.num_updates, "images": self.images, "rows_total": self.rows_total, "elapsed": self.elapsed},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.data.copy_(value)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)  # the config may have been changed on purpose
        if (self.ema is None) != (state["ema"] is None):
            raise UserError("the checkpoint and the config disagree on whether an average of the weights (ema) is kept")
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.monitor.load_state_dict(state["monitor"])
        if len(state["random"]) == self.accelerator.num_processes:
            restore_random_state(state["random"][self.accelerator.process_index])
        else:
            _LOGGER.warning("resuming on another number of processes: global random states are not restored (flowrl's own draws do not need them)")
        counters = state["counters"]
        self.num_updates, self.images, self.rows_total, self.elapsed = (counters[k] for k in ("num_updates", "images", "rows_total", "elapsed"))


def _join(parts: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """Scores of several batches as one."""
    return {
        name: Scores(
            torch.cat([p[name].values for p in parts]),
            torch.cat([p[name].valid for p in parts]),
            {key: torch.cat([p[name].raw[key] for p in parts]) for key in parts[0][name].raw},
        )
        for name in parts[0]
    }


@contextlib.contextmanager
def _interrupt_after_iteration() -> Iterator[list[bool]]:
    """The first Ctrl-C only sets a flag; a second one stops at once."""
    flag: list[bool] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if flag:
            raise KeyboardInterrupt
        flag.append(True)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: leave signals alone
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def train(config: Config, resume: Path | None = None) -> Path:
    """Run a whole training.

    Args:
        config: a resolved run.
        resume: the run directory to go on with, or None to start ``config.run_dir``.
    Returns:
        The run directory.
    Raises:
        UserError: a mistake in the input; nothing is written then.
        Interrupted: after Ctrl-C, with a checkpoint saved.
    """
    run_dir = resume if resume is not None else Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run directory {run_dir} is a file; choose another run_dir")
    if resume is None and run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"run directory {run_dir} exists already; go on with: flowrl train --resume {run_dir}, or choose another run_dir")
    trainer = Trainer(config)
    main = trainer.accelerator.is_main_process
    identity = model_identity(trainer.policy)
    start = 0
    fresh = True
    if resume is not None:
        loaded = load_checkpoint(run_dir, identity)
        if loaded is not None:
            start, state = loaded
            trainer.load_state(state)
            fresh = False
        elif main:
            _LOGGER.warning("%s has no checkpoint yet: starting at iteration 0", run_dir)
    trainer.accelerator.wait_for_everyone()
    plain = json.loads(config.model_dump_json())
    logger = RunLogger(run_dir, is_main=main, tensorboard=config.logging.tensorboard, wandb_project=config.logging.wandb_project, config=plain)
    progress = TrainingProgress(config.training.iterations, start=start, enabled=main)
    with logger, progress, _interrupt_after_iteration() as stop:
        try:
            if main:
                with explain_full_disk(run_dir):
                    replace_file(run_dir / "config.yaml", dump_config(config).encode())
                    replace_file(run_dir / "versions.json", (json.dumps(versions(trainer.policy.device), indent=1) + "\n").encode())
            if resume is not None:
                logger.truncate_to(-1 if fresh else start)
                if main:
                    _remove_leftovers(run_dir, -1 if fresh else start)
            _loop(trainer, logger, progress, identity, start, stop, fresh=fresh)
        except UserError:
            if main and resume is None and not (run_dir / "metrics.jsonl").exists():
                logger.close(failed=True)
                _remove_start(run_dir)
            raise
        if main:
            with trainer.ema.applied() if trainer.ema is not None else contextlib.nullcontext(), explain_full_disk(run_dir):
                trainer.policy.export(run_dir / "export")
    if main:
        write_report(run_dir)
    return run_dir


def _remove_leftovers(run_dir: Path, iteration: int) -> None:
    """What a killed process left behind: unfinished files, and sample grids after the iteration that a resumed run starts from."""
    for file in run_dir.rglob(".*.tmp"):
        file.unlink()
    for folder in (run_dir / "samples").glob("iteration_[0-9]*"):
        if int(folder.name.removeprefix("iteration_")) > iteration:
            shutil.rmtree(folder)


def _remove_start(run_dir: Path) -> None:
    """Undo the start of a run that failed before its first iteration was done, so that the same command can be given again."""
    for name in ("config.yaml", "versions.json", "evals.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("samples", "tensorboard", "wandb"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        run_dir.rmdir()


def _loop(trainer: Trainer, logger: RunLogger, progress: TrainingProgress, identity: dict[str, Any], start: int, stop: list[bool], *, fresh: bool) -> None:
    """Iterations, evaluations and checkpoints from ``start`` to the end, or to the first Ctrl-C."""
    config = trainer.config
    e, total = config.evaluation, config.training.iterations
    main = trainer.accelerator.is_main_process
    all_scales = [e.guidance_scale, *(s for s in e.compare_guidance_scales if s != e.guidance_scale)]

    def evaluate(iteration: int) -> None:
        ends = iteration in (0, total)
        rows = trainer.evaluate(
            iteration,
            logger,
            num_images=e.final_num_images if ends else e.num_images,
            guidance_scales=all_scales if ends else all_scales[:1],
            policy="tuned" if iteration else "base",
        )
        shown = [f"{r['split']} {r['reward']} {r['mean']:.3f} ± {r['ci95']:.3f}" for r in rows if r["guidance_scale"] == e.guidance_scale]
        progress.print(f"evaluation at iteration {iteration}: " + ", ".join(shown))

    def save(iteration: int) -> None:
        state = trainer.state()
        if main:
            save_checkpoint(logger.run_dir, iteration, state, identity=identity, keep=config.training.keep_checkpoints)
        trainer.accelerator.wait_for_everyone()

    if fresh:
        evaluate(0)
    warned: set[str] = set()
    for iteration in range(start + 1, total + 1):
        metrics, timings = trainer.iterate(iteration)
        logger.log_metrics(metrics)
        logger.log_timings(timings)
        progress.update(metrics, timings)
        for warning in _warnings(trainer, metrics):
            if warning[0] not in warned:
                warned.add(warning[0])
                progress.print(f"warning: {warning[1]}")
        interrupted = bool(trainer._sum(float(bool(stop))))
        if iteration % e.every == 0 or iteration == total:
            evaluate(iteration)
        if iteration % config.training.checkpoint_every == 0 or iteration == total or interrupted:
            save(iteration)
        if interrupted and iteration < total:
            raise Interrupted(f"stopped after iteration {iteration}; go on with: flowrl train --resume {logger.run_dir}")
    if start >= total:
        progress.print(f"{logger.run_dir} has already done {start} of its {total} iterations")


def _warnings(trainer: Trainer, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, message) of what looks wrong in an iteration; each kind is shown once."""
    off, clip_low, clip_high = metrics["ratio/max_abs_log_first"], trainer.config.objective.clip_low, trainer.config.objective.clip_high
    if ratio_is_off(off, clip_low, clip_high):
        yield (
            "ratio",
            f"the ratio of the first update is not 1 (|log ratio| up to {off:.1e}, clip range {min(clip_low, clip_high):.0e}): rollout and training disagree; "
            "use a higher precision",
        )
    if metrics["nfe/used"] != metrics["nfe/minimum"]:
        yield "nfe", f"{metrics['nfe/used']} network rows were used where {metrics['nfe/minimum']} suffice; please report this"
    if metrics["iteration"] in (10, trainer.config.training.iterations):
        for line in trainer.monitor.warnings():
            yield f"constant {line}", line
    if metrics["reward/invalid"]:
        yield "invalid", f"{metrics['reward/invalid']} samples of iteration {metrics['iteration']} could not be scored and were left out"
