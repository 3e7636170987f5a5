"""The flattened inputs of a step, in device memory that is kept from step to step.

Steps run in the order they are launched, so what a step reads may be overwritten as soon as it is sampled. As long as
the shape of the steps does not change (the same number of rows decode), not even the views are made anew.

Legend: T tokens of the step, R rows, E emitting rows, P pages per row, L rows whose logits are read (emitting ones,
then prompt positions whose logprobs are wanted).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add

import torch
from torch import Tensor

from pando.core.batch import Batch
from pando.forward import ForwardBatch
from pando.kernels.ops import StepInputs
from pando.runtime.logprobs import PromptSpan
from pando.runtime.table import RequestTable

PAGE_STEP = 64
"""Page tables are this many pages wide, or a multiple: a longer sequence seldom changes the shape of a step."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """One step on the device. slots_E and ends_E: where the emitting rows' tokens will stand in the history."""

    forward: ForwardBatch
    slots_E: Tensor
    ends_E: Tensor


class InputBuilder:
    """Builds the inputs of one step after the other."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._longs = _Block(torch.int64, table.device.name)
        self._ints = _Block(torch.int32, table.device.name)
        self._carve(0, 0, 0, 0, 1)

    def __call__(self, batch: Batch, spans: list[PromptSpan]) -> Inputs:
        """The step's inputs, valid until the next call. Its pages and new sequences are in the table already."""
        table, page = self._table, self._table.page_size
        max_kv_len = max(map(add, batch.start, batch.num_tokens))
        extra = _span_positions(batch, spans) if spans else []
        width = -(-max_kv_len // (page * PAGE_STEP)) * PAGE_STEP
        shape = (
            len(batch.slot),
            batch.total_tokens,
            sum(batch.emit),
            len(extra),
            min(width, table.pages_NP.shape[1]),
        )
        if shape != self._shape:
            self._carve(*shape)
        out = self._out
        columns = table.device.upload([*batch.slot, *batch.start, *batch.num_tokens, *batch.emit])
        table.ops.fill_step_(out, columns, table.tokens_NC, table.pages_NP, page)
        if extra:
            self._logits_index[out.last.shape[0] :] = table.device.upload(extra)
        forward = ForwardBatch(
            input_ids=out.input_ids,
            positions=out.positions,
            out_loc=out.out_loc,
            cu_q_lens=out.cu_q_lens,
            kv_lens=out.kv_lens,
            page_table=out.page_table,
            logits_index=self._logits_index,
            page_size=page,
            max_q_len=max(batch.num_tokens),
            max_kv_len=max_kv_len,
        )
        return Inputs(forward, out.emit_slots, out.emit_ends)

    def _carve(self, rows: int, tokens: int, emitting: int, extra: int, width: int) -> None:
        """Views of the sizes of a step."""
        ids, positions, out_loc, slots, ends, index = self._longs.split(
            tokens, tokens, tokens, emitting, emitting, emitting + extra
        )
        cu_q_lens, kv_lens, pages = self._ints.split(rows + 1, rows, rows * width)
        page_table = pages.view(rows, width)
        self._out = StepInputs(ids, positions, out_loc, cu_q_lens, kv_lens, page_table, index[:emitting], slots, ends)
        self._logits_index = index
        self._shape = (rows, tokens, emitting, extra, width)


class _Block:
    """Memory that grows."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._memory = torch.zeros(1024, dtype=dtype, device=device)

    def split(self, *sizes: int) -> tuple[Tensor, ...]:
        """Tensors of these sizes, next to each other; those of an earlier call are no longer valid."""
        total = sum(sizes)
        if total > self._memory.shape[0]:
            self._memory = self._memory.new_zeros(total + total // 4)
        return self._memory[:total].split(sizes)


def _span_positions(batch: Batch, spans: list[PromptSpan]) -> list[int]:
    """Indices into the step's tokens of the prompt positions whose logits are wanted."""
    wanted: list[int] = []
    for span in spans:
        first = sum(batch.num_tokens[: span.row])
        wanted.extend(range(first + span.begin, first + span.end))
    return wanted
