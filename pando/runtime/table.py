"""The device-side request table: one row per slot. Token history, page table, sampling state.

Prompts are written once, sampled tokens are written by the sampler, pages as the scheduler assigns them; so a step
names only slots and positions. Legend: N slots, C context length, P pages per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.core.batch import Batch, NewSlot
from pando.device import Device

INT32_MAX = 2**31 - 1


class RequestTable:
    """All per-sequence state on the device, addressed by slot."""

    def __init__(self, num_slots: int, context_length: int, page_size: int, device: Device) -> None:
        self.device = device
        self.page_size = page_size
        self.context_length = context_length
        where = device.name
        # One more column than the context: the last sampled token of a full sequence is written behind it.
        self.tokens_NC = torch.zeros(num_slots, context_length + 1, dtype=torch.int32, device=where)
        num_pages = (context_length + page_size - 1) // page_size
        self.pages_NP = torch.zeros(num_slots, num_pages, dtype=torch.int32, device=where)
        self.floats = {name: torch.zeros(num_slots, dtype=torch.float32, device=where) for name in _FLOATS}
        self.ints = {name: torch.zeros(num_slots, dtype=torch.int64, device=where) for name in _INTS}
        self.entries: list[NewSlot | None] = [None] * num_slots
        """Host-side copy of what each slot was given."""

    def apply(self, batch: Batch) -> None:
        """Enter new sequences and write page assignments, before the step runs."""
        for slot in batch.freed_slots:
            self.entries[slot] = None
        for entry in batch.new_slots:
            self._enter(entry)
        if batch.page_slot:
            upload = self.device.upload
            where = (upload(batch.page_slot), upload(batch.page_index))
            self.pages_NP.index_put_(where, upload(batch.page_id, torch.int32))

    def _enter(self, entry: NewSlot) -> None:
        slot, sampling = entry.slot, entry.sampling
        self.entries[slot] = entry
        self.tokens_NC[slot, : len(entry.tokens)] = self.device.upload(entry.tokens, torch.int32)
        self.ints["seed"][slot] = entry.seed
        self.ints["prompt_len"][slot] = entry.prompt_len
        self.ints["top_k"][slot] = min(sampling.top_k, INT32_MAX)  # the op takes int32
        self.floats["temperature"][slot] = sampling.temperature
        self.floats["top_p"][slot] = sampling.top_p
        self.floats["min_p"][slot] = sampling.min_p

    def gather(self, names: Sequence[str], slots: Tensor) -> list[Tensor]:
        """Sampling columns of the given slots, each [R]."""
        return [(self.floats if name in self.floats else self.ints)[name][slots] for name in names]


_FLOATS = ("temperature", "top_p", "min_p")
_INTS = ("seed", "prompt_len", "top_k")
