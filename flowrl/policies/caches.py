"""A KV cache that is not copied for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["GrowingLayer", "growing_cache"]

_LEAST = 32


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """transformers joins old and new keys of a layer in a new tensor for every token; here there is room beyond them, which doubles when it is used up.

    ``keys`` and ``values`` [R, heads, seen, width] are what was seen of larger tensors; without gradient only.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        end = seen + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end:
            size = max(2 * seen, end + _LEAST)
            self._room = _room_for(key_states, size), _room_for(value_states, size)
            if seen:
                self._room[0][..., :seen, :], self._room[1][..., :seen, :] = self.keys, self.values
        keys, values = self._room
        keys[..., seen:end, :], values[..., seen:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; there is room for as many tokens as there was."""
        if self._room is not None:
            seen, size = self.get_seq_length(), self._room[0].shape[-2]
            picked = self.keys[indices], self.values[indices]
            self._room = _room_for(picked[0], size), _room_for(picked[1], size)
            self._room[0][..., :seen, :], self._room[1][..., :seen, :] = picked
            self.keys, self.values = self._room[0][..., :seen, :], self._room[1][..., :seen, :]


def _room_for(states: Tensor, size: int) -> Tensor:
    return states.new_empty(*states.shape[:-2], size, states.shape[-1])


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model; layers that see a window, or keep no keys, have transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
