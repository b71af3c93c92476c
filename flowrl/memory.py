"""When a device's memory runs out: do the same in smaller parts, say so once, and remember."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from flowrl.types import UserError

__all__ = ["fitting_parts", "halved", "shortage"]

_LOGGER = logging.getLogger(__name__)


def halved(setting: str, size: int, device: torch.device, *, help: str) -> int:
    """Half of a size that did not fit, rounded up, after giving back what torch holds in reserve.

    Args:
        setting: the config key, for the message.
        size: what did not fit, >= 1.
        help: what else would make it fit.
    Raises:
        UserError: the size is 1 already; the message says ``help``.
    """
    with contextlib.suppress(RuntimeError):
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if size <= 1:
        raise UserError(f"{setting}: the memory of {device} does not hold even 1; {help}")
    smaller = (size + 1) // 2
    _LOGGER.warning("%s: %d do not fit into the memory of %s; from now on %d", setting, size, device, smaller)
    return smaller


def fitting_parts(count: int, size: Callable[[], int], work: Callable[[slice], Tensor], shrink: Callable[[int], None]) -> Tensor:
    """``work`` on ``count`` rows, as many at a time as fit, joined.

    Args:
        size: rows at a time, asked anew for each part.
        work: of the rows of a slice, one result a row.
        shrink: called with a number of rows that did not fit, when nothing of the failed attempt is held any more; it makes ``size`` smaller, or raises.
    """
    parts: list[Tensor] = []
    start = 0
    while start < count:
        stop = min(start + size(), count)
        fits = True
        try:
            parts.append(work(slice(start, stop)))
        except torch.OutOfMemoryError:
            fits = False  # and out of the handler, whose error keeps the tensors of the attempt alive
        if fits:
            start = stop
        else:
            shrink(stop - start)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def shortage(error: Exception) -> str | None:
    """What to say where memory ran out and there is no smaller part to step back to: loading, prompts, the first update. None = another error."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    said = str(error).partition(". ")[0].rstrip(".")
    return (
        f"a device's memory ran out ({said}), where no smaller part would help; set model.text_encoders: offload, model.dtype: bfloat16, adapter: lora, "
        "optimizer.name: adamw_8bit, smaller pictures or shorter answers, or shard the model over several devices; `flowrl estimate CONFIG` predicts what a "
        "run takes"
    )
