"""What a run will cost on this machine: seconds and memory, from a few iterations in memory."""

from __future__ import annotations

import math
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, cast

import psutil
import torch

from flowrl.config import Config
from flowrl.engines.diffusion import diffusion_engine
from flowrl.estimate import Estimate, group_rows, units_of_group
from flowrl.picture_groups import PictureGroups
from flowrl.text_estimate import TextEstimate
from flowrl.trainer import Trainer
from flowrl.types import SampleBatch, Scores
from flowrl.versions import cpu_name
from rewards.composite import WeightedRewards

__all__ = ["TIME_HEAD", "Measurement", "measure", "time_lines"]

TIME_HEAD = ("", "seconds", "share")


@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds of an iteration on this machine, from a few iterations with ``measured_prompts`` of its prompts, scaled to all of them.

    Attributes:
        rollout: sampling and decoding, or reading stored pairs. reward: scoring that nothing else is done beside. train: the updates.
        text_encoders: of the whole run. evaluations: of the whole run, from the rollout's time per row and the reward's per picture; without a rollout
            from those of a few evaluated pictures.
        peak_memory: bytes, of the device's allocator or of the process.
        samples: an iteration's, for `images_per_second`. counted: what they are called.
    """

    device: str
    measured_iterations: int
    measured_prompts: int
    prompts: int
    samples: int
    iterations: int
    rollout: float
    reward: float
    train: float
    text_encoders: float
    evaluations: float
    peak_memory: int
    counted: str = "images"

    @property
    def iteration(self) -> float:
        return self.rollout + self.reward + self.train

    @property
    def images_per_second(self) -> float:
        return self.samples / self.iteration

    @property
    def training(self) -> float:
        """Seconds of all iterations."""
        return self.iterations * self.iteration

    @property
    def run(self) -> float:
        """Seconds of the whole run, without loading the model and writing checkpoints."""
        return self.text_encoders + self.training + self.evaluations

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), **{name: getattr(self, name) for name in ("iteration", "images_per_second", "training", "run")}}


def measure(config: Config, expected: Estimate | TextEstimate, seconds: float = 20.0) -> Measurement:
    """Train a few iterations in memory with as few groups as keep it short, and scale their times to whole iterations. Nothing is written.

    Iterations of a language model are whole: the length of answers decides what they cost, and with fewer groups it would be another sample of them.

    All groups are taken where a few such iterations fit into ``seconds``, else at most one batch of the rollout. With a critic they are iterations after
    its warm-up, as in the estimate.

    Args:
        expected: `estimate` of the same config.
    Raises:
        UserError: whatever a run would say at its start.
    """
    if isinstance(expected, TextEstimate):
        return _measure_text(config, expected, seconds)
    trainer = Trainer(config)
    started = time.perf_counter()
    watch = _Stopwatch(trainer.rewards)
    engine = diffusion_engine(trainer.engine, "flowrl estimate --measure")
    trainer.rewards = engine.rewards = cast(WeightedRewards, watch)
    cuda = trainer.policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    if engine.critic is not None:
        engine.critic.opened = 1
    texts = list(dict.fromkeys(prompt.text for prompt in trainer.prompts))[:32]
    trainer.policy.prompt_rows(texts)
    text_encoders = (time.perf_counter() - started) / len(texts)

    groups, widest = config.rollout.groups_per_iteration, max(len(wave) for wave in engine.plan(1).waves)
    batch = min(groups, max(1, config.training.rows_per_forward // widest))
    least = min(groups, max(1, config.objective.updates_per_iteration - units_of_group(config, 1) + 1))  # so that every update has a row
    once = sum(_iterate(trainer, watch, least, 1))  # this one also fills caches and picks kernels
    affordable = int(least * seconds / 4 / once)
    size = groups if affordable >= groups else max(least, min(affordable, batch))
    if cuda and size != least:
        _iterate(trainer, watch, size, 1)
    timed: list[tuple[float, float, float]] = []
    while not timed or (len(timed) < 3 and time.perf_counter() - started + sum(timed[-1]) < seconds):
        timed.append(_iterate(trainer, watch, size, 2 + len(timed)))

    rollout, reward, train = (statistics.fmean(column) for column in zip(*timed, strict=True))
    rows = [group_rows(config, iteration) for iteration in range(2, 2 + len(timed))]
    walked, trained = statistics.fmean(row[0] for row in rows), statistics.fmean(row[1] for row in rows)
    guided = 2 if config.rollout.guidance_scale > 1 else 1
    if walked:
        rollout *= expected.rollout.mean / (guided * size * walked)
        row, scoring = rollout / expected.rollout.mean, reward / watch.pictures
    else:  # stored pairs: nothing is sampled or scored
        rollout *= groups / size
        row, scoring = _evaluate(trainer)
    if walked and size < groups:  # the rewards of a batch are computed while the next one is sampled
        batches, reward = math.ceil(groups / batch), scoring * batch * expected.pictures / groups
        reward += max(0.0, (batches - 1) * (reward - rollout / batches))
    return Measurement(
        device=torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        measured_iterations=len(timed),
        measured_prompts=size,
        prompts=groups,
        samples=expected.samples,
        iterations=expected.iterations,
        rollout=rollout,
        reward=reward,
        train=train * expected.training.mean / (size * trained),
        text_encoders=text_encoders * expected.run_text_encoder_rows,
        evaluations=expected.evaluation_rows * row + expected.evaluation_pictures * scoring,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else _peak_memory_of_process(),
    )


def _measure_text(config: Config, expected: TextEstimate, seconds: float) -> Measurement:
    """Whole iterations, at least one beside the first, as many as fit into ``seconds``; evaluations from the rollout's and the rewards' time per answer."""
    trainer = Trainer(config)
    cuda = trainer.policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    timed: list[dict[str, float]] = []
    try:
        while len(timed) < 2 or (len(timed) < 4 and time.perf_counter() - started + timed[-1]["seconds/total"] < seconds):
            timed.append(trainer.iterate(len(timed) + 1)[1])
    finally:
        trainer.close()
    kept = timed[1:]  # the first one also fills caches and picks kernels
    rollout, reward, train = (statistics.fmean(t[f"seconds/{name}"] for t in kept) for name in ("rollout", "reward_wait", "train"))
    answers = max(1, trainer.samples // len(timed))
    return Measurement(
        device=torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        measured_iterations=len(kept),
        measured_prompts=expected.prompts,
        prompts=expected.prompts,
        samples=answers,
        iterations=expected.iterations,
        rollout=rollout,
        reward=reward,
        train=train,
        text_encoders=0.0,
        evaluations=expected.evaluation_answers * (rollout + reward) / answers if trainer.samples else 0.0,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else _peak_memory_of_process(),
        counted=trainer.engine.counted,
    )


class _Stopwatch:
    """Rewards that note the time and the size of their last call, which nothing is computed beside."""

    def __init__(self, rewards: WeightedRewards) -> None:
        self._rewards = rewards
        self._pool = ThreadPoolExecutor(1)
        self.seconds, self.pictures = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rewards, name)

    def submit(self, batch: SampleBatch) -> Future[dict[str, Scores]]:
        return self._pool.submit(self.score, batch)

    def score(self, batch: SampleBatch) -> dict[str, Scores]:
        started = time.perf_counter()
        scores = self._rewards.score(batch)
        self.seconds, self.pictures = time.perf_counter() - started, len(batch)
        return scores


def _iterate(trainer: Trainer, watch: _Stopwatch, groups: int, iteration: int) -> tuple[float, float, float]:
    """Seconds (rollout, reward, train) of an iteration with that many groups, whose prompts have been encoded before."""
    engine = diffusion_engine(trainer.engine, "flowrl estimate --measure")
    rollout = trainer.config.rollout.model_copy(update={"groups_per_iteration": groups})
    engine.allocation = PictureGroups(trainer.config.model_copy(update={"rollout": rollout}), len(trainer.prompts), engine.assigner.estimator.bounds)
    trainer.policy.prompt_rows([trainer.prompts[index].text for index in engine.groups(iteration)])
    _, timings = trainer.iterate(iteration)
    both = timings["seconds/rollout"] + timings["seconds/reward_wait"]
    return max(0.0, both - watch.seconds), watch.seconds, timings["seconds/train"]


def _evaluate(trainer: Trainer) -> tuple[float, float]:
    """Seconds (per row, with its share of the decoding; per scored picture) of one batch of at most 16 evaluated pictures."""
    config, evaluator = trainer.config.evaluation, diffusion_engine(trainer.engine, "flowrl estimate --measure").evaluator
    watch = _Stopwatch(evaluator.rewards)
    evaluator.rewards = cast(WeightedRewards, watch)
    count, split = min(16, config.final_num_images, trainer.config.training.rows_per_forward), next(iter(trainer.splits))
    trainer.policy.prompt_rows([prompt.text for prompt in trainer.splits[split][:count]])
    started = time.perf_counter()
    evaluator(split, count, config.guidance_scale, 0)
    sampling = time.perf_counter() - started - watch.seconds
    return sampling / (count * config.num_steps * (2 if config.guidance_scale > 1 else 1)), watch.seconds / watch.pictures


def _peak_memory_of_process() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def time_lines(measured: Measurement) -> tuple[list[tuple[str, ...]], list[str]]:
    """(rows of a table under `TIME_HEAD`, notes)."""
    parts = {"rollout": measured.rollout, "reward": measured.reward, "train": measured.train}
    rows: list[tuple[str, ...]] = [
        (name, f"{value:.3g}", f"{value / measured.iteration:.0%}") for name, value in {**parts, "iteration": measured.iteration}.items()
    ]
    run = ", ".join(
        f"{name} {_duration(value)}"
        for name, value in (("iterations", measured.training), ("evaluations", measured.evaluations), ("text encoders", measured.text_encoders))
        if value or name == "iterations"
    )
    whole = measured.measured_prompts == measured.prompts
    notes = [
        f"{measured.counted} per second: {measured.images_per_second:.3g}",
        f"the whole run: {_duration(measured.run)} ({run})",
        f"peak memory: {measured.peak_memory / 2**30:.2f} GiB" + ("" if whole else f" with {measured.measured_prompts} of {measured.prompts} prompts"),
        f"measured: {measured.measured_iterations} iterations with {measured.measured_prompts} of {measured.prompts} prompts on {measured.device}",
    ]
    return rows, notes


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 100 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
