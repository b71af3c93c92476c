"""The processes of a run: one, or several under `accelerate launch` or torchrun."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object

from flowrl.config import Config
from flowrl.types import UserError

__all__ = ["check_agreement", "explain_lost_process", "leave_processes", "make_accelerator"]

_LOGGER = logging.getLogger(__name__)
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process|gloo|nccl|socket", re.IGNORECASE)
"""How torch says that another process does not answer."""


def make_accelerator(device: Literal["auto", "cpu", "cuda"], *, timeout_minutes: float = 30) -> Accelerator:
    """Join the other processes, if there are any.

    Only the config decides on precision and accumulation; what `accelerate config` wrote down for other projects does not.

    Args:
        device: ``auto`` is the CPU where torch sees no accelerator.
        timeout_minutes: how long a process waits for another one. What the first call in a process says holds for all.
    Raises:
        UserError: cuda was asked for and torch sees none, or the launcher asks accelerate to shard the network by itself.
    """
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())  # else accelerate would leave processes on CPUs unconnected
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=False, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
        ],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"the launcher asks for accelerate's own {accelerator.distributed_type.value}, which flowrl does not use; start plain processes "
            "(configs/launch/ has files for `accelerate launch`) and set training.sharding: fsdp2"
        )
    if device == "cuda" and accelerator.device.type != "cuda":
        raise UserError("training.device: cuda was asked for and torch sees none; use auto or cpu")
    asked_for_more = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if asked_for_more and accelerator.num_processes == 1:
        _LOGGER.warning("`accelerate launch --cpu` has started one process only; for several on CPUs: torchrun --nproc_per_node 2 -m flowrl.cli train ...")
    return accelerator


def check_agreement(accelerator: Accelerator, config: Config) -> None:
    """Nothing is done before all processes have the same config; every one must call it.

    Raises:
        UserError: they have not; on every process, and the message names what differs.
    """
    if accelerator.num_processes == 1:
        return
    everywhere = gather_object([_flat(json.loads(config.model_dump_json()))])
    for rank, theirs in enumerate(everywhere):
        differing = [key for key in {**everywhere[0], **theirs} if everywhere[0].get(key) != theirs.get(key)]
        if differing:
            key = differing[0]
            more = f", and {len(differing) - 1} more settings differ" if len(differing) > 1 else ""
            raise UserError(
                f"the processes disagree on the config: {key} is {everywhere[0].get(key)} in process 0 and {theirs.get(key)} in process {rank}{more}; "
                "start all of them, on every machine, with the same config and overrides"
            )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {name: value for key, part in settings.items() for name, value in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


@contextlib.contextmanager
def explain_lost_process(accelerator: Accelerator, timeout_minutes: float, advice: str) -> Iterator[None]:
    """Errors of the connection to other processes as a UserError.

    Args:
        advice: what to do then.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError) or _LOST.search(str(error)) is not None
        if accelerator.num_processes == 1 or isinstance(error, torch.OutOfMemoryError) or not is_lost:
            raise
        raise UserError(
            f"process {accelerator.process_index} has lost another process of the run: it has died (its own output or the system's log may say why), or did "
            f"not answer for {timeout_minutes:g} minutes (training.timeout_minutes); {advice}"
        ) from error


def leave_processes() -> None:
    """At the end of the program: part from the other processes, if there are any.

    Python may otherwise end while the connection's threads still run, which now and then aborts a process whose run is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
