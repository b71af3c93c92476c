"""A whole training: checks, iterations, evaluations, checkpoints, the export and the report, and what happens on Ctrl-C or on a resume."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import signal
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from flowrl.agreement import settings_without_effect
from flowrl.checkpoint import load_checkpoint, model_identity, save_checkpoint
from flowrl.checks import ratio_is_off
from flowrl.config import Config, dump_config
from flowrl.processes import explain_lost_process
from flowrl.progress import TrainingProgress
from flowrl.report import write_report
from flowrl.tracking import RunLogger, explain_full_disk, replace_file
from flowrl.trainer import Trainer
from flowrl.types import UserError
from flowrl.versions import versions

__all__ = ["Interrupted", "train"]

_LOGGER = logging.getLogger(__name__)

_STILLBORN = ".config.yaml.*.tmp"
"""All that a run leaves which is killed while it writes its first file; its directory may be used again."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the iteration was finished and a checkpoint saved."""


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
    if resume is None and run_dir.exists() and not all(fnmatch(path.name, _STILLBORN) for path in run_dir.iterdir()):
        raise UserError(f"run directory {run_dir} exists already; go on with: flowrl train --resume {run_dir}, or choose another run_dir")
    trainer = Trainer(config)
    main = trainer.accelerator.is_main_process
    if main:
        for line in settings_without_effect(config):
            _LOGGER.warning("%s", line)
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
                    for leftover in run_dir.glob(_STILLBORN):
                        leftover.unlink()
                    replace_file(run_dir / "config.yaml", dump_config(config).encode())
                    replace_file(run_dir / "versions.json", (json.dumps(versions(trainer.policy.device), indent=1) + "\n").encode())
            if resume is not None:
                logger.truncate_to(-1 if fresh else start)
                if main:
                    _remove_leftovers(run_dir, -1 if fresh else start)
            advice = f"the last checkpoint is whole: go on with flowrl train --resume {run_dir}, with as many processes as there are"
            with explain_lost_process(trainer.accelerator, config.training.timeout_minutes, advice):
                _loop(trainer, logger, progress, identity, start, stop, fresh=fresh)
        except UserError:
            if main and resume is None and not (run_dir / "metrics.jsonl").exists():
                logger.close(failed=True)
                _remove_start(run_dir)
            raise
        finally:
            trainer.close()
        averaged = trainer.ema.applied() if trainer.ema is not None else contextlib.nullcontext()
        with averaged, trainer.policy.gathered(keep=main), explain_full_disk(run_dir):
            if main:
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
    for file in (run_dir / "rollouts").glob("iteration_[0-9]*"):
        if int(file.stem.removeprefix("iteration_")) > iteration:
            file.unlink()


def _remove_start(run_dir: Path) -> None:
    """Undo the start of a run that failed before its first iteration was done, so that the same command can be given again."""
    for name in ("config.yaml", "versions.json", "evals.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    for name in ("samples", "rollouts", "tensorboard", "wandb"):
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
        if main or trainer.sharded:
            save_checkpoint(logger.run_dir, iteration, state, identity=identity, keep=config.training.keep_checkpoints)
        trainer.accelerator.wait_for_everyone()

    if fresh:
        evaluate(0)
    warned: set[str] = set()
    for iteration in range(start + 1, total + 1):
        metrics, timings = trainer.iterate(iteration)
        if main and trainer.sampled is not None:
            trainer.engine.save_rollout(logger.run_dir, trainer.sampled)
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
    off, clip_low, clip_high = metrics.get("ratio/max_abs_log_first", 0.0), trainer.config.objective.clip_low, trainer.config.objective.clip_high
    if ratio_is_off(off, clip_low, clip_high):
        yield (
            "ratio",
            f"the ratio of the first update is not 1 (|log ratio| up to {off:.1e}, clip range {min(clip_low, clip_high):.0e}): rollout and training disagree; "
            "use a higher precision",
        )
    if metrics["nfe/used"] != metrics["nfe/minimum"]:
        yield "nfe", f"{metrics['nfe/used']} network evaluations were used where {metrics['nfe/minimum']} suffice; please report this"
    if metrics["iteration"] in (10, trainer.config.training.iterations):
        for line in trainer.monitor.warnings():
            yield f"constant {line}", line
    invalid = max(metrics["reward/invalid"], metrics.get("trained/reward/invalid", 0))
    if invalid:
        yield "invalid", f"{invalid} samples of iteration {metrics['iteration']} could not be scored and were left out"
