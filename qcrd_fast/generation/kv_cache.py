"""The key-value cache of the decoder: a slot a row, refilled as rows end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

States = list[tuple[Tensor, Tensor]]  # keys and values [U, heads, L, width] of each layer


class SlotCache(Cache):
    """Keys and values by row and slot.

    Call `at` before each step to set the active rows, the number of slots to attend to, and the slot that each row
    writes.
    """

    def __init__(self, buffers: States):
        super().__init__(layers=[])
        self.buffers = buffers
        self.rows, self.kv_length, self.slot_B = 0, 0, torch.empty(0)

    def at(self, rows: int, kv_length: int, slot_B: Tensor) -> None:
        self.rows, self.kv_length, self.slot_B = rows, kv_length, slot_B

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        found = []
        for buffer, new in zip(self.buffers[layer_idx], (key_states, value_states), strict=True):
            where = self.slot_B[:, None, None, None].expand(-1, buffer.shape[1], 1, buffer.shape[3])
            buffer[: self.rows].scatter_(2, where, new.to(buffer.dtype))
            found.append(buffer[: self.rows, :, : self.kv_length])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def fill(self, rows: Tensor, read: States, of: Tensor) -> None:
        """Copy the keys and values of prompt `of[i]` into row `rows[i]`."""
        for buffers, states in zip(self.buffers, read, strict=True):
            for buffer, new in zip(buffers, states, strict=True):
                buffer[rows, :, : new.shape[2]] = new[of].to(buffer.dtype)

    def move(self, to: Tensor, source: Tensor) -> None:
        for buffers in self.buffers:
            for buffer in buffers:
                buffer[to] = buffer[source]

    @staticmethod
    def like(probe: States, rows: int, slots: int) -> SlotCache:
        """Allocate buffers with the shapes and types of the keys and values of a short prompt."""

        def buffer(states: Tensor) -> Tensor:
            return states.new_zeros(rows, states.shape[1], slots, states.shape[3])

        return SlotCache([(buffer(keys), buffer(values)) for keys, values in probe])


def states_of(cache: Any) -> States:
    return [(layer.keys, layer.values) for layer in cache.layers]


def row_bytes(probe: States, slots: int) -> int:
    return sum(slots * x.shape[1] * x.shape[3] * x.element_size() for layer in probe for x in layer)


class LayerCache:
    """Read-only cache of one attention layer: its keys and values are complete."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
