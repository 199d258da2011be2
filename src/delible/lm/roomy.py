"""A key-value cache with room, so that a token costs no copy of what was said before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer

from delible.lm.body import Body
from delible.lm.forward import empty_cache

#: Tokens by which a full cache grows at once: growing copies it.
ROOM = 64


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values with room behind them, so that tokens come and rows go without a copy."""

    room: list[Tensor] | None = None
    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, width]; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        wanted = length + key_states.shape[2]
        if self.room is None or wanted > self.room[0].shape[2]:
            states = zip((self.keys, self.values), (key_states, value_states), strict=True)
            self.room = [_roomy(old if length else new[:, :, :0], wanted) for old, new in states]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:wanted] = new
        self.keys, self.values = (room[:, :, :wanted] for room in self.room)
        return self.keys, self.values

    def lay(self, keys: Tensor, values: Tensor) -> None:
        """Puts keys and values of all rows in the place of what is there."""
        self.keys, self.values, self.room = keys, values, None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self.room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at these places; moves only those that are elsewhere."""
        if self.room is None or len(indices) > len(self.room[0]):
            super().batch_select_indices(indices)
            self.room = None
            return
        places = torch.arange(len(indices), device=indices.device)
        moved = places[indices != places]
        for room in self.room:
            room[moved] = room[indices[moved]]
        self.room = [room[: len(indices)] for room in self.room]
        length = self.get_seq_length()
        self.keys, self.values = (room[:, :, :length] for room in self.room)


def _roomy(states: Tensor, wanted: int) -> Tensor:
    batch, heads, length, width = states.shape
    room = states.new_empty(batch, heads, wanted + ROOM, width)
    room[:, :, :length] = states
    return room


def roomy_cache(lm: Body) -> DynamicCache:
    """An empty key-value cache; layers that keep only a window stay the library's."""
    cache = empty_cache(lm.core)
    cache.layers = [RoomyLayer() if type(one) is DynamicLayer else one for one in cache.layers]
    return cache
