"""The smallest values among the tokens of all processes, found with nothing but sums over processes.

Letters: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["smallest"]

_SIGN = 0x7FFFFFFF


def smallest(value: Tensor, among: Tensor, count: float, add: Callable[[float], float]) -> Tensor:
    """Which values belong to the ``count`` smallest, [B, T] bool; those equal to the last of them belong too. count below 1: none.

    A search for the largest of them over the 2^32 numbers that there are: 32 sums, whatever the count.

    Args:
        value: [B, T] float32, no NaN. among: [B, T] bool, values that take part.
        count: of all processes, the same number on each. add: a number summed over processes.
    """
    bits = (value.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0: there is one zero
    order = torch.where(bits < 0, bits ^ _SIGN, bits)[among]
    low, high = -_SIGN - 1, _SIGN
    while low < high:
        middle = (low + high) // 2
        enough = add(float((order <= middle).sum())) >= count
        low, high = (low, middle) if enough else (middle + 1, high)
    chosen = torch.zeros_like(among)
    chosen[among] = order <= low
    return chosen
