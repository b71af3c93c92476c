"""Who has which groups of an iteration, and how objects come from one process to another.

Letters: P groups, W processes, U updates.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["dealt", "exchanged"]


def dealt(num_groups: int, place: tuple[int, int], updates: int = 1) -> list[int]:
    """Numbers of the groups of a process, rising: group g is that of process (g + s) mod W, s = (g // lcm(W, U)) mod gcd(W, U).

    In turn, where W and U have no common factor. A group's units are dealt to the updates by its number (`Trainer.split`): one of a single unit belongs to
    update g mod U. Strictly in turn, W = U = 2 would put all groups of an update onto one process, and the other would wait. With the shift s the groups of an
    update are spread as evenly as their number allows: of W of them, one after the other, each is on another process.

    Args:
        place: (number of this process, W). updates: U, of an iteration.
    """
    rank, world = place
    turn, shifts = math.lcm(world, updates), math.gcd(world, updates)
    return [g for g in range(num_groups) if (g + (g // turn) % shifts) % world == rank]


def exchanged(parcels: Sequence[Any], device: torch.device) -> list[Any]:
    """What every process has for this one, in their order; every process must call it. Each object goes to one process alone.

    Args:
        parcels: length W, for each process; anything that can be pickled. device: that of the connection: this process's accelerator, or the CPU.
    """
    if len(parcels) == 1:
        return list(parcels)
    packed = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
    sizes = torch.tensor([len(one) for one in packed], device=device)
    coming = torch.empty_like(sizes)
    torch.distributed.all_to_all_single(coming, sizes)
    found = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    torch.distributed.all_to_all_single(found, torch.cat(packed).to(device), coming.tolist(), sizes.tolist())
    return [pickle.loads(part.cpu().numpy().tobytes()) for part in found.split(coming.tolist())]
