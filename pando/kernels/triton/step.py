"""What happens around the model in a step: one upload and one kernel make its inputs, one kernel enters its tokens.

The host's columns come as one array, so that a step costs one copy: [slots R | starts R | cu_q R+1 | cu_e R+1], where
cu_q and cu_e are the running sums of the rows' tokens and of those that yield one. Legend: R rows, T tokens, E tokens
that yield one, P pages of a table, G page groups, N slots, C context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.ops import Sample, SamplingColumns, StepInputs
from pando.kernels.step_memory import StepMemory
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.logits import apply_token_mask_

BLOCK = 256
"""Tokens, yielding tokens, or page-table entries of a program: loads are scattered, so many small programs."""


@triton.jit
def _row_of(sums_ptr, num_rows, item, steps):
    """The last row that begins at or before `item`: by halving, as rows may be empty."""
    first = tl.zeros_like(item)
    behind = first + num_rows
    for _ in range(steps):
        middle = (first + behind) // 2
        right = (tl.load(sums_ptr + middle) <= item) & (middle > first)
        first = tl.where(right, middle, first)
        behind = tl.where(right, behind, tl.maximum(middle, first + 1))
    return first


@triton.jit
def _tokens(
    columns_ptr, starts_ptr, cu_q_ptr, tokens_ptr, pages_ptr, input_ids_ptr, positions_ptr, first_loc_ptr,
    second_loc_ptr, block, num_rows, num_tokens, steps, token_stride, group_stride, slot_stride,
    PAGE_SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Id, position and places in the cache of a block of tokens."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    row = _row_of(cu_q_ptr, num_rows, tl.minimum(token, num_tokens - 1), steps)
    slot = tl.load(columns_ptr + row)
    position = tl.load(starts_ptr + row) + token - tl.load(cu_q_ptr + row)
    ids = tl.load(tokens_ptr + slot * token_stride + position, mask=inside, other=0)
    tl.store(input_ids_ptr + token, ids.to(tl.int64), mask=inside)
    tl.store(positions_ptr + token, position, mask=inside)
    page, offset = position // PAGE_SIZE, position % PAGE_SIZE
    for group in tl.static_range(GROUPS):
        at = pages_ptr + group * group_stride + slot * slot_stride + page
        where = tl.load(at, mask=inside, other=0).to(tl.int64) * PAGE_SIZE + offset
        tl.store((first_loc_ptr if group == 0 else second_loc_ptr) + token, where, mask=inside)


@triton.jit
def _yielding(
    columns_ptr, starts_ptr, cu_q_ptr, cu_e_ptr, logits_index_ptr, emit_slots_ptr, emit_ends_ptr,
    block, num_rows, num_emitting, steps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Index, slot and end of a block of tokens that yield one."""
    item = block * BLOCK + tl.arange(0, BLOCK)
    inside = item < num_emitting
    row = _row_of(cu_e_ptr, num_rows, tl.minimum(item, num_emitting - 1), steps)
    before = tl.load(cu_e_ptr + row + 1) - item - 1  # the row's last entry lies 0 before the row's end
    begin, end = tl.load(cu_q_ptr + row), tl.load(cu_q_ptr + row + 1)
    tl.store(logits_index_ptr + item, end - 1 - before, mask=inside)
    tl.store(emit_slots_ptr + item, tl.load(columns_ptr + row), mask=inside)
    tl.store(emit_ends_ptr + item, tl.load(starts_ptr + row) + end - begin - before, mask=inside)


@triton.jit
def _pages(
    columns_ptr, starts_ptr, cu_q_ptr, pages_ptr, cu_q_lens_ptr, kv_lens_ptr, first_table_ptr, second_table_ptr,
    number, num_pages, group_stride, slot_stride, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row's page tables; the row's first block also writes its lengths."""
    page_blocks = tl.cdiv(num_pages, BLOCK)
    row, block = number // page_blocks, number % page_blocks
    slot = tl.load(columns_ptr + row)
    begin, end = tl.load(cu_q_ptr + row), tl.load(cu_q_ptr + row + 1)
    first = block == 0
    tl.store(kv_lens_ptr + row, (tl.load(starts_ptr + row) + end - begin).to(tl.int32), mask=first)
    tl.store(cu_q_lens_ptr + row + 1, end.to(tl.int32), mask=first)
    tl.store(cu_q_lens_ptr, 0, mask=first & (row == 0))
    page = block * BLOCK + tl.arange(0, BLOCK)
    inside = page < num_pages
    to = row.to(tl.int64) * num_pages + page
    for group in tl.static_range(GROUPS):
        at = pages_ptr + group * group_stride + slot * slot_stride + page
        ids = tl.load(at, mask=inside, other=0)
        tl.store((first_table_ptr if group == 0 else second_table_ptr) + to, ids, mask=inside)


# The counts change from step to step: a kernel for each kind of divisibility would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_emitting", "num_pages", "steps"])
def _flatten_kernel(
    columns_ptr,
    tokens_ptr,
    pages_ptr,
    input_ids_ptr,
    positions_ptr,
    first_loc_ptr,
    second_loc_ptr,
    cu_q_lens_ptr,
    kv_lens_ptr,
    first_table_ptr,
    second_table_ptr,
    logits_index_ptr,
    emit_slots_ptr,
    emit_ends_ptr,
    num_rows,
    num_tokens,
    num_emitting,
    num_pages,
    steps,
    token_stride,
    group_stride,
    slot_stride,
    PAGE_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs in order: blocks of tokens, blocks of yielding tokens, then each row's blocks of pages."""
    starts_ptr = columns_ptr + num_rows
    cu_q_ptr = starts_ptr + num_rows
    cu_e_ptr = cu_q_ptr + num_rows + 1
    token_blocks = tl.cdiv(num_tokens, BLOCK)
    emit_blocks = tl.cdiv(num_emitting, BLOCK)
    program = tl.program_id(0)
    if program < token_blocks:
        _tokens(
            columns_ptr, starts_ptr, cu_q_ptr, tokens_ptr, pages_ptr, input_ids_ptr, positions_ptr, first_loc_ptr,
            second_loc_ptr, program, num_rows, num_tokens, steps, token_stride, group_stride, slot_stride,
            PAGE_SIZE, GROUPS, BLOCK,
        )  # fmt: skip
    elif program < token_blocks + emit_blocks:
        _yielding(
            columns_ptr, starts_ptr, cu_q_ptr, cu_e_ptr, logits_index_ptr, emit_slots_ptr, emit_ends_ptr,
            program - token_blocks, num_rows, num_emitting, steps, BLOCK,
        )  # fmt: skip
    else:
        _pages(
            columns_ptr, starts_ptr, cu_q_ptr, pages_ptr, cu_q_lens_ptr, kv_lens_ptr, first_table_ptr,
            second_table_ptr, program - token_blocks - emit_blocks, num_pages, group_stride, slot_stride,
            GROUPS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_writes"])
def _write_pages_kernel(columns_ptr, pages_ptr, num_writes, group_stride, slot_stride, BLOCK: tl.constexpr):
    """pages[group, slot, index] = id for columns [groups | slots | indices | ids]; no place comes twice."""
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = item < num_writes
    group = tl.load(columns_ptr + item, mask=inside, other=0)
    slot = tl.load(columns_ptr + num_writes + item, mask=inside, other=0)
    index = tl.load(columns_ptr + 2 * num_writes + item, mask=inside, other=0)
    page = tl.load(columns_ptr + 3 * num_writes + item, mask=inside, other=0)
    tl.store(pages_ptr + group * group_stride + slot * slot_stride + index, page.to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _enter_kernel(
    chosen_ptr, finite_ptr, slots_ptr, ends_ptr, tokens_ptr, out_ptr, num_rows, token_stride, BLOCK: tl.constexpr
):
    """tokens[slot, end] = chosen; out = chosen, then finite."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    token = tl.load(chosen_ptr + row, mask=inside, other=0)
    is_finite = tl.load(finite_ptr + row, mask=inside, other=0)
    slot = tl.load(slots_ptr + row, mask=inside, other=0)
    end = tl.load(ends_ptr + row, mask=inside, other=0)
    tl.store(tokens_ptr + slot * token_stride + end, token.to(tl.int32), mask=inside)
    tl.store(out_ptr + row, token, mask=inside)
    tl.store(out_ptr + num_rows + row, is_finite.to(tl.int64), mask=inside)


class TritonStepTable:
    """`StepTable` on a GPU. Indices are not checked: the scheduler's are right, and asking would mean waiting."""

    def __init__(
        self,
        sample: Sample,
        argmax: Callable[[Tensor], Tensor],
        finite: Callable[[Tensor], Tensor],
        tokens_NC: Tensor,
        pages_GNP: Tensor,
        sampling: SamplingColumns,
        page_size: int,
        upload: Callable[[list[int]], Tensor],
    ) -> None:
        assert pages_GNP.shape[0] in (1, 2), "the kernel knows two page groups"
        assert tokens_NC.stride(1) == pages_GNP.stride(2) == 1
        self._sample, self._argmax, self._finite = sample, argmax, finite
        self._tokens_NC, self._pages_GNP, self._sampling, self._page_size = tokens_NC, pages_GNP, sampling, page_size
        self._upload = upload
        self._memory = StepMemory(tokens_NC.device, pages_GNP.shape[0])

    def reserve(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Keep memory for steps of these shapes."""
        self._memory.reserve(shapes)

    def write_pages(
        self, slots: Sequence[int], indices: Sequence[int], ids: Sequence[int], groups: Sequence[int] = ()
    ) -> None:
        """One write for each place, the last: programs have no order."""
        places = zip(groups or (0,) * len(ids), slots, indices, strict=True)
        writes = dict(zip(places, ids, strict=True))
        columns = self._upload([*chain.from_iterable(zip(*writes, strict=True)), *writes.values()])
        pages, num = self._pages_GNP, len(writes)
        if num:
            _write_pages_kernel[(triton.cdiv(num, BLOCK),)](
                columns, pages, num, pages.stride(0), pages.stride(1), BLOCK=BLOCK, num_warps=4
            )

    def write_tokens(self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> None:
        """All at once; no place comes twice."""
        slot, position, token = self._upload([*slots, *positions, *ids]).view(3, -1).unbind(0)
        self._tokens_NC.index_put_((slot, position), token.to(torch.int32))

    def flatten(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        lens: Sequence[int],
        emits: Sequence[int],
        *,
        num_extra: int,
        num_pages: int,
    ) -> StepInputs:
        """The inputs of a step."""
        columns = self._upload([*slots, *starts, 0, *accumulate(lens), 0, *accumulate(emits)])
        out = self._memory.carve(len(slots), sum(lens), sum(emits), num_extra, num_pages)
        if slots:
            self._launch(columns, out, sum(emits))
        else:
            out.cu_q_lens.zero_()
        return out

    def _launch(self, columns: Tensor, out: StepInputs, num_emitting: int) -> None:
        num_tokens, num_rows = out.input_ids.shape[0], out.kv_lens.shape[0]
        num_pages = out.page_table[0].shape[1]
        blocks = triton.cdiv(num_tokens, BLOCK) + triton.cdiv(num_emitting, BLOCK)
        pages = self._pages_GNP
        _flatten_kernel[(blocks + num_rows * triton.cdiv(num_pages, BLOCK),)](
            columns,
            self._tokens_NC,
            pages,
            out.input_ids,
            out.positions,
            out.out_loc[0],
            out.out_loc[-1],
            out.cu_q_lens,
            out.kv_lens,
            out.page_table[0],
            out.page_table[-1],
            out.logits_index,
            out.emit_slots,
            out.emit_ends,
            num_rows,
            num_tokens,
            num_emitting,
            num_pages,
            num_rows.bit_length(),
            self._tokens_NC.stride(0),
            pages.stride(0),
            pages.stride(1),
            PAGE_SIZE=self._page_size,
            GROUPS=pages.shape[0],
            BLOCK=BLOCK,
            num_warps=4,
        )

    def choose(
        self,
        logits_EV: Tensor,
        slots_E: Tensor,
        ends_E: Tensor,
        *,
        greedy: bool,
        masks_MW: Tensor | None = None,
        masked: Sequence[int] = (),
    ) -> Tensor:
        """Finite or not, a token, and the history. masks [M, W]: what may come in the rows `masked`."""
        finite_E = self._finite(logits_EV)
        if masks_MW is not None:
            logits_EV, rows = logits_EV.clone(), self._upload([*masked])
            part_MV = logits_EV[rows]
            apply_token_mask_(part_MV, masks_MW)
            logits_EV[rows] = part_MV
        if greedy:
            tokens = self._argmax(logits_EV)
        else:
            of, at = self._sampling, slots_E
            columns = of.temperature[at], of.top_k[at], of.top_p[at], of.min_p[at], of.seed[at]
            tokens = self._sample(logits_EV, *columns, ends_E)
        num_rows = logits_EV.shape[0]
        out_2E = torch.empty((2, num_rows), dtype=torch.int64, device=logits_EV.device)
        if num_rows:
            _enter_kernel[(triton.cdiv(num_rows, BLOCK),)](
                tokens,
                finite_E,
                slots_E,
                ends_E,
                self._tokens_NC,
                out_2E,
                num_rows,
                self._tokens_NC.stride(0),
                BLOCK=BLOCK,
                num_warps=4,
            )
        return out_2E


def _case(page_size: int, groups: int) -> None:
    """Every kernel once, of a table of 257 slots."""

    def numbers(values: list[int]) -> Tensor:
        return meta(len(values), dtype=torch.int64)

    def first(logits_EV: Tensor) -> Tensor:
        return meta(logits_EV.shape[0], dtype=torch.int64)

    def is_finite(logits_EV: Tensor) -> Tensor:
        return meta(logits_EV.shape[0], dtype=torch.bool)

    tokens, pages = meta(257, 8193, dtype=torch.int32), meta(groups, 257, 8192 // page_size, dtype=torch.int32)
    columns = SamplingColumns(*(meta(257, dtype=dtype) for dtype in _COLUMN_DTYPES))
    step = TritonStepTable(lambda *_: first(_[0]), first, is_finite, tokens, pages, columns, page_size, numbers)
    step.write_pages([0, 1], [0, 0], [3, 4])
    inputs = step.flatten([0, 1], [5, 0], [1, 7], [1, 0], num_extra=0, num_pages=64)
    step.choose(meta(1, 1000, dtype=torch.float32), inputs.emit_slots, inputs.emit_ends, greedy=True)


_COLUMN_DTYPES = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)

COMPILE_CASES = tuple(
    CompileCase(f"page-{page_size}-groups-{groups}", partial(_case, page_size, groups))
    for page_size, groups in ((1, 1), (16, 2))
)
