"""Which samples of a batch belong together, for rewards that compare the samples of a prompt.

Letters: B samples, n members of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.types import SampleBatch

__all__ = ["groups_of"]


def groups_of(batch: SampleBatch) -> list[Tensor]:
    """Indices [n] int64, ascending, of the samples of each group; groups in the order of their first sample.

    Samples with the same number in ``batch.group`` form a group; where that is None, samples with the same prompt text.
    """
    keys = [prompt.text for prompt in batch.prompts] if batch.group is None else batch.group.tolist()
    members: dict[str | int, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return [torch.tensor(indices) for indices in members.values()]
