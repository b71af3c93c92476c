"""A KV cache that is not copied for every token, and whose rows can be moved so that padding stands on their left.

Letters: R rows of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["GrowingCache", "GrowingLayer", "WindowLayer"]

_LEAST = 32


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """transformers joins old and new keys of a layer in a new tensor for every token; here there is room beyond them, which doubles when it is used up.

    ``keys`` and ``values`` [R, heads, held, width] are what was seen of larger tensors; without gradient only.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    @property
    def _held(self) -> int:
        return 0 if self._room is None else self.keys.shape[-2]

    @property
    def _needed(self) -> int:
        """Of the places that are held, the last ones that later tokens may see: all of them."""
        return self._held

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        more, seen = key_states.shape[-2], self._held
        if self._room is None or self._room[0].shape[-2] < seen + more:
            kept = self._needed
            size = max(2 * kept, kept + more + _LEAST)
            room = _room_for(key_states, size), _room_for(value_states, size)
            if kept:
                room[0][..., :kept, :], room[1][..., :kept, :] = self.keys[..., seen - kept :, :], self.values[..., seen - kept :, :]
            self._room, seen = room, kept
        keys, values = self._room
        end = seen + more
        keys[..., seen:end, :], values[..., seen:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; there is room for as many tokens as there was."""
        if self._room is not None:
            kept, rest = self._needed, self._room[0].shape[-2] - self._held
            picked = self.keys[indices, :, self._held - kept :], self.values[indices, :, self._held - kept :]
            self._room = _room_for(picked[0], kept + rest), _room_for(picked[1], kept + rest)
            self._room[0][..., :kept, :], self._room[1][..., :kept, :] = picked
            self.keys, self.values = self._room[0][..., :kept, :], self._room[1][..., :kept, :]

    def move_right(self, by: Tensor) -> None:
        """Each row's places, ``by`` [R] int64 to the right; those that leave on the right come back on the left."""
        for states in (self.keys, self.values):
            place = (torch.arange(states.shape[-2], device=states.device) - by[:, None]) % states.shape[-2]
            states.copy_(states.gather(-2, place[:, None, :, None].expand_as(states)))


class WindowLayer(GrowingLayer):
    """The same of a layer whose tokens see no further back than a window, or a chunk: the model's mask says which. Places that no token will see again are
    left behind when room is made or rows are picked.

    Args:
        window: most tokens that one sees, itself among them.
    """

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self._left = 0  # places that were left behind

    @property
    def _needed(self) -> int:
        return min(self._held, self.window - 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._left += self._leaves(key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._left += self._held - self._needed
        super().batch_select_indices(indices)

    def _leaves(self, more: int) -> int:
        """Places that the next update leaves behind."""
        full = self._room is not None and self._room[0].shape[-2] < self._held + more
        return self._held - self._needed if full else 0

    def get_seq_length(self) -> int:
        return self._left + self._held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(places that the next update returns, number of the first of them)."""
        leaves = self._leaves(query_length)
        return self._held - leaves + query_length, self._left + leaves


def _room_for(states: Tensor, size: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], size, states.shape[-1])


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """An empty cache for a model of a config. Layers that keep anything else than keys and values have transformers' own; their rows cannot be moved."""

    layers: list[Any]

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.layers = [_growing(layer) for layer in self.layers]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, any of them several times."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.batch_select_indices(indices)
            else:
                layer.reorder_cache(indices)  # the same, which layers that keep a state have too

    def move_right(self, by: Tensor) -> None:
        """See `GrowingLayer.move_right`.

        Raises:
            TypeError: a layer keeps something else than keys and values.
        """
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.move_right(by)
            elif type(layer).__name__ != "DummyLayer":  # holds nothing; not every release has the class
                raise TypeError(f"the rows of a {type(layer).__name__} cannot be moved")


def _growing(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    return WindowLayer(layer.sliding_window) if type(layer) is DynamicSlidingWindowLayer else layer
