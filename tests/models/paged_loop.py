"""The smallest loop that decodes with a model over a paged cache: scattered pages, chunked prefill, mixed steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.forward import ForwardBatch, StateBatch
from pando.kernels.ops import OpTable
from pando.models.decoder import DecoderModel

POISON = 1e4
"""What unused cache slots hold: reading one would be seen."""

NUM_STATES = 12


@dataclass
class Row:
    """One sequence: its tokens, how many are in the cache, its pages and its state's slot.

    save_at: position -> slot; the state after that many tokens is saved there when a step passes it.
    """

    tokens: list[int]
    prompt_len: int
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    state: int = -1
    save_at: dict[int, int] = field(default_factory=dict)


class PagedLoop:
    """Runs rows through a model; pages are handed out in random order."""

    def __init__(self, model: DecoderModel, ops: OpTable, page_size: int, num_slots: int = 512) -> None:
        self.model = model
        num_pages = num_slots // page_size
        self.pool = KVPool(model.cache_plan, num_pages, page_size, "cpu", model.dtype, num_states=NUM_STATES)
        for tensor in (*self.pool.k, *self.pool.v, *(tensor for layer in self.pool.states for tensor in layer)):
            tensor.fill_(127 if tensor.itemsize == 1 else POISON)
        self.backend = PagedAttentionBackend(self.pool, ops)
        self.free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(5)).tolist()
        self.free_states = torch.randperm(NUM_STATES, generator=torch.Generator().manual_seed(6)).tolist()

    def step(self, rows: Sequence[Row], counts: Sequence[int]) -> Tensor:
        """Run the next `counts[r]` tokens of each row; hidden states of all tokens."""
        size = self.pool.page_size
        ids, positions, locations, cu, lens = [], [], [], [0], []
        states = self._states(rows, counts)
        for row, count in zip(rows, counts, strict=True):
            end = row.cached + count
            while len(row.pages) * size < end:
                row.pages.append(self.free.pop())
            for position in range(row.cached, end):
                ids.append(row.tokens[position])
                positions.append(position)
                locations.append(row.pages[position // size] * size + position % size)
            row.cached = end
            cu.append(len(ids))
            lens.append(end)
        table = torch.zeros(len(rows), max(len(row.pages) for row in rows), dtype=torch.int32)
        for index, row in enumerate(rows):
            table[index, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
        batch = ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            out_loc=(torch.tensor(locations),),
            cu_q_lens=torch.tensor(cu, dtype=torch.int32),
            kv_lens=torch.tensor(lens, dtype=torch.int32),
            page_table=(table,),
            logits_index=torch.tensor(cu[1:]) - 1,
            page_size=size,
            max_q_len=max(counts),
            max_kv_len=max(lens),
            states=states,
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.backend)

    def _states(self, rows: Sequence[Row], counts: Sequence[int]) -> StateBatch:
        """The rows' working slots, and the saves that fall into the step."""
        saves, start = [], 0
        fresh = [row.state < 0 for row in rows]
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if row.state < 0:
                row.state = self.free_states.pop()
            for position, slot in row.save_at.items():
                if row.cached < position <= row.cached + count:
                    saves.append((start + position - row.cached - 1, index, slot))
            start += count
        token, row_of, slot_of = torch.tensor(saves, dtype=torch.int64).view(-1, 3).unbind(1)
        return StateBatch(torch.tensor([row.state for row in rows]), torch.tensor(fresh), token, row_of, slot_of)


def full_logits(model: DecoderModel, ops: OpTable, ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of one uncached pass over `ids`."""
    loop = PagedLoop(model, ops, page_size=16)
    with torch.inference_mode():
        return model.logits(loop.step([Row(list(ids), len(ids))], [len(ids)]))


def greedy(
    model: DecoderModel, ops: OpTable, prompts: Sequence[Sequence[int]], n: int, *, chunk: int, page_size: int
) -> list[Row]:
    """Greedy decoding of all prompts together; each step gives a row its next `chunk` prompt tokens or one new one."""
    loop = PagedLoop(model, ops, page_size)
    rows = [Row(list(prompt), len(prompt)) for prompt in prompts]
    while active := [row for row in rows if len(row.tokens) < row.prompt_len + n]:
        counts = [min(chunk, len(row.tokens) - row.cached) for row in active]
        hidden = loop.step(active, counts)
        last = torch.tensor(counts).cumsum(0) - 1
        with torch.inference_mode():
            logprobs = model.logits(hidden[last]).log_softmax(-1)
        for row, scores in zip(active, logprobs, strict=True):
            if row.cached == len(row.tokens):
                token = int(scores.argmax())
                row.tokens.append(token)
                row.logprobs.append(float(scores[token]))
    return rows
