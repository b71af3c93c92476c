"""What ``flowrl serve-reward`` does: one reward of the registry behind HTTP, with a version that its clients can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import typer

from flowrl import __version__
from flowrl.scoring import pick_device
from flowrl.types import UserError
from rewards import server
from rewards.registry import load_reward

__all__ = ["reward_version", "serve_reward"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def serve_reward(
    name: str,
    args: Mapping[str, Any],
    *,
    host: str,
    port: int,
    device: str,
    dtype: str | None,
    token_env: str | None,
    max_batch: int,
    max_wait_ms: float,
    max_body_mib: float,
    max_queue: int,
    open_to_all: bool = False,
) -> None:
    """Serve a reward until SIGTERM or Ctrl-C; prints the address on stdout once requests can come.

    Args:
        name, args: as in a config. device: ``auto`` or a name of torch. dtype: of its networks; None = what the reward asks for on that device.
        open_to_all: listen on other addresses than this machine's own without a token.
        The others are those of `rewards.server.serve`.
    Raises:
        UserError: an argument that cannot be, an address that cannot be used or may not be without a token, a reward that cannot be loaded.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"serve-reward: dtype must be {', '.join(_DTYPES)}, not {dtype!r}")
    version = reward_version(args, dtype)
    server.serve(
        load_reward(name, args),
        host=host,
        port=port,
        token_env=token_env,
        open_to_all=open_to_all,
        announce=lambda url: typer.echo(f"reward {name}, version {version}, at {url}"),
        version=version,
        device=pick_device(device),
        dtype=None if dtype is None else _DTYPES[dtype],
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_body_mib=max_body_mib,
        max_queue=max_queue,
    )


def reward_version(args: Mapping[str, Any], dtype: str | None) -> str:
    """The package's version, and where args or a dtype are given eight digits of their hash: other settings may give other scores."""
    if not args and dtype is None:
        return __version__
    plain = json.dumps([dict(args), dtype], sort_keys=True, default=str)
    return f"{__version__}+{hashlib.sha256(plain.encode()).hexdigest()[:8]}"
