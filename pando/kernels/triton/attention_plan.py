"""How a step's attention is cut into work, decided on the device: rows, splits, and which rows share a split.

Rows with few queries are *short* (decode, verification), the others *long*; the two kinds go different ways.

    long row   one tile per block of queries; a tile sweeps all keys it sees.
    short row  its keys are cut into splits of S tokens at multiples of S. S follows from the row's own length, so that
               neither the other rows nor the width of the page table move the borders of a sum:

                   positions   0        S        2S       3S    kv_len
                   splits      |- full -|- full -|- full -|- end -|      full: every query of the row sees all of it

    item       tokens that read one split together. Rows whose page tables name the same pages in a full split have one
               leader there, the first of them, and their tokens are packed into the leader's items, as many tokens as a
               tile holds. The borders of sums are the same with and without sharing, and a query row of a tile product
               does not depend on the other query rows: so neither does a result on what is shared.

All sizes follow from shapes, nothing is read back, and the two kernels here run once per step and kind of layer. Items
are numbered by an atomic counter: their order differs from run to run, what they compute does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 512
"""Tokens of the shortest split: eight blocks of 64, enough to hide the latency of the first."""

MAX_SPLITS = 32
"""Splits of a row; beyond SPLIT * MAX_SPLITS tokens the splits grow, which bounds the memory of partial results."""

ITEM_FIELDS = 8
"""Of an item: row, first key, end of keys, first and end of those all see, tokens, first query's position, queries."""

BLOCK = 256
"""Rows or pages looked at together by the planning kernels."""


@triton.jit
def _row_facts(cu_q_ptr, kv_lens_ptr, row, inside, window, short, FIRST: tl.constexpr, MOST: tl.constexpr):
    """(queries, keys, first key seen, split size, whether short) of rows; no queries outside."""
    begin = tl.load(cu_q_ptr + row, mask=inside, other=0)
    queries = tl.load(cu_q_ptr + row + 1, mask=inside, other=0) - begin
    keys = tl.load(kv_lens_ptr + row, mask=inside, other=0)
    low = tl.where(window > 0, tl.maximum(keys - queries - window + 1, 0), 0)
    size = tl.where(keys > 0, FIRST, FIRST)
    for _ in tl.static_range(8):
        size = tl.where(size * MOST < keys - low, size * 2, size)
    return queries, keys, low, size, (queries > 0) & (queries <= short)


@triton.jit
def _is_full(split, size, queries, keys, window):
    """Whether every query of a row sees all keys of the split, which are older than the step: a tree may hide those."""
    hidden = tl.where(window > 0, keys - window, 0)
    return ((split + 1) * size <= keys - queries) & (split * size >= hidden)


@triton.jit
def _count_rows(
    cu_q_ptr, kv_lens_ptr, sums_ptr, squares_ptr, counter_ptr, num_rows,
    short, TILE_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Running sums over rows: tiles of long rows, tokens of short ones, elements of tree masks."""
    tl.store(counter_ptr, 0)
    tiles, tokens = 0, 0
    squares = tl.zeros((), tl.int64)
    tl.store(sums_ptr, 0)
    tl.store(sums_ptr + num_rows + 1, 0)
    tl.store(squares_ptr, squares)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        queries = tl.load(cu_q_ptr + row + 1, mask=inside, other=0) - tl.load(cu_q_ptr + row, mask=inside, other=0)
        long_tiles = tl.where(queries > short, (queries + TILE_TOKENS - 1) // TILE_TOKENS, 0)
        short_tokens = tl.where(queries <= short, queries, 0)
        square = queries.to(tl.int64) * queries
        tl.store(sums_ptr + 1 + row, tiles + tl.cumsum(long_tiles, 0), mask=inside)
        tl.store(sums_ptr + num_rows + 2 + row, tokens + tl.cumsum(short_tokens, 0), mask=inside)
        tl.store(squares_ptr + 1 + row, squares + tl.cumsum(square, 0), mask=inside)
        tiles += tl.sum(long_tiles, 0)
        tokens += tl.sum(short_tokens, 0)
        squares += tl.sum(square, 0)


@triton.jit
def _find_leader(
    table_ptr, table_stride, cu_q_ptr, kv_lens_ptr, row, split, size, window,
    PAGE: tl.constexpr, short, FIRST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first row with the pages of `row` in a split that is full for both; `row` itself if there is none."""
    first_page, last_page = split * size // PAGE, ((split + 1) * size - 1) // PAGE
    at = table_ptr + row.to(tl.int64) * table_stride
    last = tl.load(at + last_page)
    leader = row
    # In a prefix tree equal last pages mean equal pages, so one look per row finds the only candidate worth a proof.
    for start in range(0, row, BLOCK):
        other = start + tl.arange(0, BLOCK)
        inside = other < row
        queries, keys, _, other_size, is_short = _row_facts(
            cu_q_ptr, kv_lens_ptr, other, inside, window, short, FIRST, MOST
        )
        same = is_short & (other_size == size) & _is_full(split, size, queries, keys, window)
        page = tl.load(table_ptr + other.to(tl.int64) * table_stride + last_page, mask=same, other=-1)
        leader = tl.minimum(leader, tl.min(tl.where(same & (page == last), other, row), 0))
    differing = 0
    if leader < row:
        leader_at = table_ptr + leader.to(tl.int64) * table_stride
        for start in range(first_page, last_page + 1, BLOCK):
            page = start + tl.arange(0, BLOCK)
            inside = page <= last_page
            mine, its = tl.load(at + page, mask=inside, other=0), tl.load(leader_at + page, mask=inside, other=0)
            differing += tl.sum((mine != its).to(tl.int32), 0)
    return tl.where(differing > 0, row, leader)


# Values that change from step to step must not bring a compilation with them when they are 1 or divisible by 16.
@triton.jit(
    do_not_specialize=["table_stride", "num_rows", "num_splits", "window", "short"],
    do_not_specialize_on_alignment=["table_ptr", "cu_q_ptr", "kv_lens_ptr"],
)
def _leaders_kernel(
    table_ptr, table_stride, cu_q_ptr, kv_lens_ptr, sums_ptr, squares_ptr, counter_ptr, leaders_ptr,
    num_rows, num_splits, window,
    PAGE: tl.constexpr, short, TILE_TOKENS: tl.constexpr,
    SHARE: tl.constexpr, FIRST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """leaders [R, splits] of the full splits; -1: none of this row's. The last program makes the running sums."""
    row, local = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    if row == num_rows:
        _count_rows(cu_q_ptr, kv_lens_ptr, sums_ptr, squares_ptr, counter_ptr, num_rows, short, TILE_TOKENS, BLOCK)
    else:
        queries, keys, low, size, is_short = _row_facts(cu_q_ptr, kv_lens_ptr, row, True, window, short, FIRST, MOST)
        split = low // size + local
        leader = row
        if SHARE:
            if is_short & _is_full(split, size, queries, keys, window):
                leader = _find_leader(
                    table_ptr, table_stride, cu_q_ptr, kv_lens_ptr, row, split, size, window,
                    PAGE, short, FIRST, MOST, BLOCK,
                )  # fmt: skip
        has_split = is_short & (split * size < keys)
        tl.store(leaders_ptr + row * num_splits + local, tl.where(has_split, leader, -1))


@triton.jit
def _followers(
    leaders_ptr, cu_q_ptr, kv_lens_ptr, start, end, leader, split, num_splits, window,
    short, FIRST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(row, which split of the row, queries or 0, keys) of a block of rows, with queries only where `leader` leads."""
    row = start + tl.arange(0, BLOCK)
    inside = row < end
    queries, keys, low, size, is_short = _row_facts(cu_q_ptr, kv_lens_ptr, row, inside, window, short, FIRST, MOST)
    local = split - low // size
    has = is_short & (local >= 0) & (local < num_splits)
    its = tl.load(leaders_ptr + row * num_splits + local, mask=has, other=-1)
    return row, local, tl.where(its == leader, queries, 0), keys


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "members_stride", "tokens_stride", "window", "short"],
    do_not_specialize_on_alignment=["cu_q_ptr", "kv_lens_ptr"],
)
def _items_kernel(
    cu_q_ptr, kv_lens_ptr, sums_ptr, counter_ptr, leaders_ptr, items_ptr, members_ptr, tokens_ptr,
    num_rows, num_splits, members_stride, tokens_stride, window,
    short, ITEM_TOKENS: tl.constexpr,
    FIRST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """The items of one leader and split, with their tokens; and once per short row, where its tokens are."""
    row, local = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    queries, keys, low, size, is_short = _row_facts(cu_q_ptr, kv_lens_ptr, row, True, window, short, FIRST, MOST)
    split = low // size + local
    first_short = sums_ptr + num_rows + 1
    if is_short & (local == 0):
        place = tl.load(first_short + row)
        for query in range(0, queries):
            tl.store(tokens_ptr + place + query, tl.load(cu_q_ptr + row) + query)
            tl.store(tokens_ptr + tokens_stride + place + query, (keys + size - 1) // size - low // size)
    if tl.load(leaders_ptr + row * num_splits + local) == row:
        is_full = _is_full(split, size, queries, keys, window)
        end = tl.where(is_full, num_rows, row + 1)
        total = 0
        for start in range(row, end, BLOCK):
            _, _, its_queries, _ = _followers(
                leaders_ptr, cu_q_ptr, kv_lens_ptr, start, end, row, split, num_splits, window,
                short, FIRST, MOST, BLOCK,
            )  # fmt: skip
            total += tl.sum(its_queries, 0)
        num_items = (total + ITEM_TOKENS - 1) // ITEM_TOKENS
        base = tl.atomic_add(counter_ptr, num_items)
        done = 0
        for start in range(row, end, BLOCK):
            other, its_local, its_queries, its_keys = _followers(
                leaders_ptr, cu_q_ptr, kv_lens_ptr, start, end, row, split, num_splits, window,
                short, FIRST, MOST, BLOCK,
            )  # fmt: skip
            rank = done + tl.cumsum(its_queries, 0) - its_queries
            begin = tl.load(cu_q_ptr + other, mask=its_queries > 0, other=0)
            place = tl.load(first_short + other, mask=its_queries > 0, other=0)
            for query in range(0, tl.max(its_queries, 0)):
                at = members_ptr + base * ITEM_TOKENS + rank + query
                is_member = query < its_queries
                tl.store(at, begin + query, mask=is_member)
                tl.store(at + members_stride, (place + query) * num_splits + its_local, mask=is_member)
                tl.store(at + 2 * members_stride, its_keys - its_queries + query, mask=is_member)
            done += tl.sum(its_queries, 0)
        begin_key, end_key = tl.maximum(split * size, low), tl.minimum((split + 1) * size, keys)
        seen_from = tl.where(window > 0, tl.maximum(keys - window, begin_key), begin_key)
        for item in range(0, num_items):
            at = items_ptr + (base + item) * FIELDS
            tl.store(at, row)
            tl.store(at + 1, begin_key)
            tl.store(at + 2, end_key)
            tl.store(at + 3, tl.where(is_full, begin_key, seen_from))
            tl.store(at + 4, tl.where(is_full, end_key, tl.minimum(end_key, keys - queries)))
            tl.store(at + 5, tl.minimum(ITEM_TOKENS, total - item * ITEM_TOKENS))
            tl.store(at + 6, keys - queries)
            tl.store(at + 7, queries)


@dataclass(frozen=True, slots=True)
class Kind:
    """What the work of a layer depends on besides the step.

    tile_tokens: queries in a tile of a long row. item_tokens: in an item. short: queries of the longest short row.
    """

    page_size: int
    window: int
    tile_tokens: int
    item_tokens: int
    short: int
    share: bool


@dataclass(frozen=True, slots=True)
class Work:
    """The plan of a step for one kind of layer; int32 on the device, squares int64.

    sums [2, R+1]: tiles of long rows and tokens of short rows before a row; squares [R+1]: elements of tree masks.
    counter [1]: number of items. items [I, ITEM_FIELDS]. members [3, I * item_tokens]: of each token of an item its
    index in q, the place of its partial result, its position. tokens [2, N]: of each short token its index in q and
    its number of splits.
    """

    num_splits: int
    sums: Tensor
    squares: Tensor
    counter: Tensor
    items: Tensor
    members: Tensor
    tokens: Tensor

    @property
    def num_items(self) -> int:
        """How many items there can be."""
        return self.items.shape[0]


def num_splits(kind: Kind, width: int) -> int:
    """The most splits a short row can have when its page table holds `width` tokens."""
    if kind.window == 0:
        return min(MAX_SPLITS, triton.cdiv(width, SPLIT))
    # A window that is not aligned touches one more.
    return min(MAX_SPLITS, triton.cdiv(min(width, kind.window + kind.short), SPLIT)) + 1


def make_work(kind: Kind, page_table: Tensor, cu_q_lens: Tensor, kv_lens: Tensor, num_tokens: int) -> Work:
    """Plan a step of `num_tokens` queries: two launches."""
    rows, pages = page_table.shape
    splits = num_splits(kind, max(1, pages * kind.page_size))
    short_tokens = min(num_tokens, rows * kind.short)
    # One item at least per row and split, and one more for each that is filled up.
    items = splits * min(short_tokens, rows + short_tokens // kind.item_tokens)

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=cu_q_lens.device)

    work = Work(
        splits,
        sums=empty(2, rows + 1),
        squares=empty(rows + 1, dtype=torch.int64),
        counter=empty(1),
        items=empty(items, ITEM_FIELDS),
        members=empty(3, items * kind.item_tokens),
        tokens=empty(2, short_tokens),
    )
    leaders = empty(rows, splits)
    sizes = {"short": kind.short, "FIRST": SPLIT, "MOST": MAX_SPLITS, "BLOCK": BLOCK}
    _leaders_kernel[(rows * splits + 1,)](
        page_table, page_table.stride(0), cu_q_lens, kv_lens, work.sums, work.squares, work.counter, leaders,
        rows, splits, kind.window,
        PAGE=kind.page_size, TILE_TOKENS=kind.tile_tokens, SHARE=kind.share, **sizes, num_warps=4,
    )  # fmt: skip
    _items_kernel[(rows * splits,)](
        cu_q_lens, kv_lens, work.sums, work.counter, leaders, work.items, work.members, work.tokens,
        rows, splits, work.members.stride(0), work.tokens.stride(0), kind.window,
        ITEM_TOKENS=kind.item_tokens, FIELDS=ITEM_FIELDS, **sizes, num_warps=4,
    )  # fmt: skip
    return work


class Plan:
    """`AttentionPlan`: the work of each kind of layer, made on its first call."""

    __slots__ = ("_works",)

    def __init__(self) -> None:
        self._works: dict[tuple[Kind, int], Work] = {}

    def reset(self) -> None:
        """Forget the step."""
        self._works.clear()

    def work(self, kind: Kind, page_table: Tensor, cu_q_lens: Tensor, kv_lens: Tensor, num_tokens: int) -> Work:
        """The work of a kind of layer in this step."""
        # Layers with a window may have a page table of their own.
        key = kind, page_table.data_ptr()
        found = self._works.get(key)
        if found is None:
            found = self._works[key] = make_work(kind, page_table, cu_q_lens, kv_lens, num_tokens)
        return found
