"""The device-side request table: one row per slot. Token history, page table, sampling state.

Prompts are written once, sampled tokens are written by the sampler, pages as the scheduler assigns them; so a step
names only slots and positions. Legend: N slots, C context length, P pages per sequence, G page groups.
"""

from __future__ import annotations

import torch

from pando.core.batch import Batch, NewSlot
from pando.device import Device
from pando.kernels.ops import OpTable, SamplingColumns

INT32_MAX = 2**31 - 1


class RequestTable:
    """All per-sequence state on the device, addressed by slot."""

    def __init__(
        self, num_slots: int, context_length: int, page_size: int, device: Device, ops: OpTable, num_groups: int = 1
    ) -> None:
        self.device = device
        self.page_size = page_size
        self.context_length = context_length
        where = device.name
        # One more column than the context: the last sampled token of a full sequence is written behind it.
        self.tokens_NC = torch.zeros(num_slots, context_length + 1, dtype=torch.int32, device=where)
        self.num_pages = (context_length + page_size - 1) // page_size
        self.pages_GNP = torch.zeros(num_groups, num_slots, self.num_pages, dtype=torch.int32, device=where)
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int64, device=where)
        self.sampling = SamplingColumns(
            temperature=torch.zeros(num_slots, dtype=torch.float32, device=where),
            top_k=torch.zeros(num_slots, dtype=torch.int32, device=where),
            top_p=torch.zeros(num_slots, dtype=torch.float32, device=where),
            min_p=torch.zeros(num_slots, dtype=torch.float32, device=where),
            seed=torch.zeros(num_slots, dtype=torch.int64, device=where),
        )
        self.step = ops.step_table(self.tokens_NC, self.pages_GNP, self.sampling, page_size, device.upload)
        self.states: list[int] = [0] * num_slots
        """Host-side: the recurrent-state slot that each slot was given."""
        self.entries: list[NewSlot | None] = [None] * num_slots
        """Host-side copy of what each slot was given."""
        self.prompt_scored: set[int] = set()
        """Slots whose requests ask for logprobs of their prompt."""

    def apply(self, batch: Batch) -> None:
        """Enter new sequences and write page assignments, before the step runs."""
        for slot in batch.freed_slots:
            self.entries[slot] = None
            self.prompt_scored.discard(slot)
        if batch.new_slots:
            self._enter(batch.new_slots)
        if batch.page_slot:
            self.step.write_pages(batch.page_slot, batch.page_index, batch.page_id, batch.page_group)
        if batch.token_slot:
            self.step.write_tokens(batch.token_slot, batch.token_position, batch.token_id)

    def _enter(self, entries: list[NewSlot]) -> None:
        for entry in entries:
            self.entries[entry.slot] = entry
            self.states[entry.slot] = entry.state
            if entry.logprobs is not None and entry.logprobs.start >= 0:
                self.prompt_scored.add(entry.slot)
            else:
                self.prompt_scored.discard(entry.slot)
            self.tokens_NC[entry.slot, : len(entry.tokens)] = self.device.upload(entry.tokens, torch.int32)
        columns, sampling = self.sampling, [entry.sampling for entry in entries]
        integers = self.device.upload(
            [entry.slot for entry in entries]
            + [entry.prompt_len for entry in entries]
            + [min(params.top_k, INT32_MAX) for params in sampling]
            + [entry.seed for entry in entries]
        )
        slots, prompt_len, top_k, seed = integers.view(4, -1).unbind(0)
        self.prompt_len.index_copy_(0, slots, prompt_len)
        columns.top_k.index_copy_(0, slots, top_k.to(torch.int32))
        columns.seed.index_copy_(0, slots, seed)
        names = ("temperature", "top_p", "min_p")
        values = self.device.upload([getattr(params, name) for name in names for params in sampling], torch.float32)
        for name, column in zip(names, values.view(3, -1).unbind(0), strict=True):
            getattr(columns, name).index_copy_(0, slots, column)
