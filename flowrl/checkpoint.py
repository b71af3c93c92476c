"""Checkpoints: complete, atomic, verified. A checkpoint is a folder that appears under its name only once it is whole and on the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl.policies.base import DiffusionPolicy
from flowrl.sharding import SHARDS, damaged_shard, digest_of, fit_state, split_shards, write_shards
from flowrl.tracking import explain_full_disk
from flowrl.types import UserError

__all__ = ["find_checkpoints", "load_checkpoint", "load_policy", "model_identity", "random_state", "restore_random_state", "save_checkpoint"]

_LOGGER = logging.getLogger(__name__)
_FORMAT = 2


def random_state() -> dict[str, Any]:
    """State of every global generator of this process. flowrl draws from its own seeds; user rewards may not."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(run_dir: Path, iteration: int, state: dict[str, Any], *, identity: dict[str, Any], keep: int) -> Path:
    """Write ``checkpoints/step_<iteration>`` and remove all but this one and the ``keep`` - 1 before it.

    A state with sharded tensors becomes a folder ``shards`` beside ``state.pt``; every process must call this then, and all must see the same run directory.

    Args:
        state: what `load_checkpoint` gives back: tensors and plain Python values.
        identity: facts that a run must share with a checkpoint to resume from it.
    Raises:
        UserError: the disk is full; what was there before is untouched.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step_{iteration:06d}"
    temporary = folder / f".{final.name}.partial"
    plain, shards = split_shards(state)
    is_main = not shards or torch.distributed.get_rank() == 0
    with explain_full_disk(run_dir):
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.partial"):
                shutil.rmtree(leftover)
        try:
            digests: dict[str, str] = {}
            if is_main:
                temporary.mkdir()
            if shards:
                digests = _write_shards(temporary / SHARDS, shards, is_main)
            if not is_main:
                return final
            _write(temporary / "state.pt", plain)
            facts = {"format": _FORMAT, "iteration": iteration, "identity": identity, "sha256": digest_of(temporary / "state.pt")}
            if shards:
                facts[SHARDS] = digests
            (temporary / "checkpoint.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            _sync(temporary / "checkpoint.json")
            if final.exists():
                shutil.rmtree(final)
            temporary.replace(final)
            _sync(folder)
        except OSError:
            if is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    found = find_checkpoints(run_dir)
    place = found.index(final)
    for other in found[:place] + found[place + keep :]:  # a newer one was damaged, or this one would not have been made again
        shutil.rmtree(other)
    return final


def _write_shards(folder: Path, shards: dict[str, torch.Tensor], is_main: bool) -> dict[str, str]:
    if is_main:
        folder.mkdir()
    torch.distributed.barrier()
    digests = write_shards(folder, shards)
    if is_main:
        _sync(folder)
    return digests


def _write(path: Path, state: dict[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch reports a failed write as RuntimeError; the cause decides
        if isinstance(error.__cause__, OSError) or isinstance(error.__context__, OSError):
            cause = error.__cause__ or error.__context__
            assert isinstance(cause, OSError)
            raise cause from error
        if shutil.disk_usage(path.parent).free < 1 << 20:
            import errno

            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete-looking checkpoints of a run, newest first."""
    return sorted((run_dir / "checkpoints").glob("step_[0-9]*"), reverse=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts, state).

    Raises:
        ValueError: the checkpoint is damaged; the message says how.
    """
    try:
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise ValueError(f"has format {facts['format']}, this version of flowrl reads {_FORMAT}")
        shards = facts.get(SHARDS)
        facts = {"iteration": int(facts["iteration"]), "identity": dict(facts["identity"]), "sha256": str(facts["sha256"])}
        if digest_of(folder / "state.pt") != facts["sha256"]:
            raise ValueError("is truncated or damaged (checksum differs)")
        if shards is not None and (problem := damaged_shard(folder / SHARDS, shards)):
            raise ValueError(problem)
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        return facts, state if shards is None else {**state, SHARDS: str(folder / SHARDS)}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"is incomplete ({type(error).__name__}: {error})") from error


def load_checkpoint(run_dir: Path, identity: dict[str, Any], *, which: str = "last") -> tuple[int, dict[str, Any]] | None:
    """The newest usable checkpoint (or the one of an iteration), or None when the run has none yet. Damaged ones are skipped with a warning.

    Raises:
        UserError: every checkpoint is damaged, the asked one is, or one belongs to another model.
    """
    found = find_checkpoints(run_dir)
    if which != "last":
        found = [f for f in found if f.name == f"step_{int(which):06d}"] if which.isdigit() else []
        if not found:
            have = ", ".join(str(int(f.name.removeprefix("step_"))) for f in reversed(find_checkpoints(run_dir))) or "none"
            raise UserError(f"{run_dir} has no checkpoint {which}; it has: {have}")
    for folder in found:
        try:
            facts, state = _read(folder)
        except ValueError as error:
            if folder == found[-1]:
                advice = "start again in a new run directory" if which == "last" else "choose another one"
                raise UserError(f"checkpoint {folder} {error}; {advice}") from error
            _LOGGER.warning("checkpoint %s %s; trying the one before", folder, error)
            continue
        for key, value in identity.items():
            if (other := facts["identity"].get(key)) != value:
                what = "its trainable weights have other names or shapes" if key == "parameters" else f"its {key} is {other}, here it is {value}"
                raise UserError(f"checkpoint {folder} belongs to another run: {what}; use it with the config that it was made with")
        if folder != found[0]:
            _LOGGER.warning("using checkpoint %s instead", folder)
        return facts["iteration"], state
    return None


def model_identity(policy: DiffusionPolicy) -> dict[str, Any]:
    """What a checkpoint's weights must fit: the adapter and the names and shapes of the trainable parameters."""
    shapes = [f"{name}{tuple(p.shape)}" for name, p in policy.network.named_parameters() if p.requires_grad]
    return {"model": policy.config.path, "adapter": policy.config.adapter, "parameters": hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]}


def load_policy(run_dir: Path, policy: DiffusionPolicy, which: str = "last", *, averaged: bool = True) -> int:
    """Put a run's tuned weights into a policy, and say of which iteration they are.

    Args:
        averaged: the average, when the run keeps one; else as they were trained.
    Raises:
        UserError: there is no usable checkpoint.
    """
    loaded = load_checkpoint(run_dir, model_identity(policy), which=which)
    if loaded is None:
        raise UserError(f"{run_dir} has no checkpoint yet; train it first")
    iteration, state = loaded
    wanted = {name: state[name] for name in ("ema" if averaged and state["ema"] is not None else "parameters", SHARDS) if name in state}
    state = fit_state(wanted, policy.trainable())
    weights = state["parameters"] if "parameters" in state else state["ema"]["average"]
    for parameter, value in zip(policy.trainable(), weights, strict=True):
        parameter.data.copy_(value)
    return iteration
