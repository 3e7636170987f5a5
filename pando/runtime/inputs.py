"""A batch as the model sees it.

Legend: E positions that yield a token, L rows whose logits are read (those, then prompt positions whose logprobs are
wanted).
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from operator import add

from pando.core.batch import Batch
from pando.forward import ForwardBatch, StateBatch
from pando.kernels.ops import StepInputs, StepRows
from pando.runtime.logprobs import PromptSpan
from pando.runtime.table import RequestTable

PAGE_STEP = 64
"""Page tables are this many pages wide, or a multiple: a longer sequence seldom changes the shape of a step."""


def build_inputs(
    batch: Batch,
    table: RequestTable,
    spans: list[PromptSpan],
    num_pages: int | None = None,
    recorded: Hashable | None = None,
) -> tuple[ForwardBatch, StepInputs]:
    """The step on the device, once its pages and new sequences are in the table; valid until the next call.

    num_pages: width of the page tables; None = what the longest row needs, rounded up. recorded: see `StepRows`.
    """
    page = table.page_size
    kv_lens = list(map(add, batch.start, batch.num_tokens))
    max_kv_len = max(kv_lens)
    width = -(-max_kv_len // (page * PAGE_STEP)) * PAGE_STEP
    extra = _span_positions(batch, spans) if spans else []
    inputs = table.step.flatten(
        batch.slot,
        batch.start,
        batch.num_tokens,
        batch.num_yield,
        num_extra=len(extra),
        num_pages=min(width, table.num_pages) if num_pages is None else num_pages,
    )
    if extra:
        inputs.logits_index[-len(extra) :] = table.device.upload(extra)
    forward = ForwardBatch(
        inputs.input_ids,
        inputs.positions,
        inputs.out_loc,
        inputs.cu_q_lens,
        inputs.kv_lens,
        inputs.page_table,
        inputs.logits_index,
        page,
        max(batch.num_tokens),
        max_kv_len,
        rows=StepRows(batch.num_tokens, kv_lens, recorded),
    )
    return forward, inputs


def build_states(batch: Batch, table: RequestTable) -> StateBatch:
    """The recurrent states of a step: where its rows keep theirs, and what is saved on the way."""
    firsts = [0, *accumulate(batch.num_tokens)]
    saved = zip(batch.save_row, batch.save_position, strict=True)
    tokens = [firsts[row] + position - batch.start[row] - 1 for row, position in saved]
    slots = [table.states[slot] for slot in batch.slot]
    fresh = [int(start == 0) for start in batch.start]
    num_rows, num_saves = len(slots), len(tokens)
    columns = table.device.upload([*slots, *fresh, *tokens, *batch.save_row, *batch.save_slot])
    by_row, by_save = columns[: 2 * num_rows].view(2, -1), columns[2 * num_rows :].view(3, num_saves)
    return StateBatch(by_row[0], by_row[1].bool(), by_save[0], by_save[1], by_save[2])


def _span_positions(batch: Batch, spans: list[PromptSpan]) -> list[int]:
    """Indices into the step's tokens of the prompt positions whose logits are wanted."""
    wanted: list[int] = []
    for span in spans:
        first = sum(batch.num_tokens[: span.row])
        wanted.extend(range(first + span.begin, first + span.end))
    return wanted
