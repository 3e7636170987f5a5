"""Paged attention: long rows tile by tile, short rows split by split with what they share read once.

`attention_plan` says how a step is cut; `attention_tile` is the inside of both kernels. Three launches, two where the
step has no more queries than rows, or too few for a long row:

    split    persistent programs take (item, KV head) after (item, KV head); partial results [token, split]
    merge    the partial results of a short token, weighted and summed in the order of the splits
    extend   tiles of long rows

KV may be stored in another dtype than the queries (float8 without scales, int8 rows): it is converted as it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando import env
from pando.kernels.int8_rows import SCALE_BYTES, row_size
from pando.kernels.ops import AttentionPlan
from pando.kernels.triton.attention_plan import ITEM_FIELDS, Kind, Plan, Work
from pando.kernels.triton.attention_tile import attend, load_q
from pando.kernels.triton.int8_cache import as_words
from pando.kernels.triton.launch import CompileCase, capability, meta, num_sms

SHARE = env.read("PANDO_SHARED_PREFIX") != "0"
"""Whether KV that short rows share is read once. No result depends on it."""

LOG2E = math.log2(math.e)

SHORT = 8
"""Queries of the longest short row: drafts of seven tokens. More would make room for partial results nobody writes."""


# A value that changes from step to step must not bring a compilation with it when it is 1 or divisible by 16.
@triton.jit(do_not_specialize=["table_row", "members_stride"], do_not_specialize_on_alignment=["table_ptr", "mask_ptr"])
def _split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, mask_ptr, squares_ptr, items_ptr, members_ptr, counter_ptr, acc_ptr, sums_ptr,
    q_token, q_head, k_slot, k_head, v_slot, v_head, table_row, members_stride,
    log_scale, cap_in, window, kv_heads, parts,
    H: tl.constexpr, G: tl.constexpr, HT: tl.constexpr, TOKENS: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LATENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial results of short rows: acc [place, H, DV] and sums [place, H, 2] (largest score, sum), not divided."""
    tile_row = tl.arange(0, BLOCK_M)
    token_of, head_of = tile_row // HT, tile_row % HT
    work_end = tl.load(counter_ptr) * kv_heads * parts
    for work in range(tl.program_id(0), work_end, tl.num_programs(0)):
        kv_head, part = (work // parts) % kv_heads, work % parts
        item = work // (parts * kv_heads)
        field = items_ptr + item * FIELDS
        row = tl.load(field).to(tl.int64)
        low, high = tl.load(field + 1), tl.load(field + 2)
        seen_from, seen_to = tl.load(field + 3), tl.load(field + 4)
        in_group = part * HT + head_of
        is_row = (token_of < tl.load(field + 5)) & (token_of < TOKENS) & (in_group < G)
        head = kv_head * G + in_group
        member = members_ptr + item * TOKENS + token_of
        token = tl.load(member, mask=is_row, other=0).to(tl.int64)
        place = tl.load(member + members_stride, mask=is_row, other=0).to(tl.int64)
        position = tl.load(member + 2 * members_stride, mask=is_row, other=-1)
        row_at = token * q_token + head * q_head
        q1 = load_q(q_ptr, row_at, is_row, 0, D1, D)
        q2 = load_q(q_ptr, row_at, is_row, D1, D2, D) if D2 > 0 else q1
        own_mask = mask_ptr + tl.load(squares_ptr + row) if HAS_TREE else mask_ptr
        acc1, acc2, most, total = attend(
            q1, q2, position, low, high, seen_from, seen_to,
            table_ptr + row * table_row, k_ptr + kv_head.to(tl.int64) * k_head, v_ptr + kv_head.to(tl.int64) * v_head,
            k_slot, v_slot, log_scale, cap_in, window, own_mask, tl.load(field + 6), tl.load(field + 7),
            BLOCK_M, PAGE, BLOCK_N, D, D1, D2, DV, V1, V2, LATENT, HAS_CAP, HAS_WINDOW, HAS_TREE, STAGES,
        )  # fmt: skip
        at = place * H + head
        dim = tl.arange(0, V1)
        tl.store(acc_ptr + at[:, None] * DV + dim[None, :], acc1, mask=is_row[:, None] & (dim[None, :] < DV))
        if V2 > 0:
            dim = V1 + tl.arange(0, V2)
            tl.store(acc_ptr + at[:, None] * DV + dim[None, :], acc2, mask=is_row[:, None] & (dim[None, :] < DV))
        tl.store(sums_ptr + at * 2, most, mask=is_row)
        tl.store(sums_ptr + at * 2 + 1, total, mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "tokens_stride"])
def _merge_kernel(
    acc_ptr, sums_ptr, tokens_ptr, rows_ptr, sinks_ptr, out_ptr, num_rows, num_splits, tokens_stride,
    H: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, CHUNK: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One head of one short token: its splits, CHUNK at a time; what a chunk sums does not depend on other tokens."""
    place, head = tl.program_id(0), tl.program_id(1)
    if place < tl.load(rows_ptr + 2 * num_rows + 1):
        token = tl.load(tokens_ptr + place).to(tl.int64)
        used = tl.load(tokens_ptr + tokens_stride + place)
        first = place.to(tl.int64) * num_splits
        dim = tl.arange(0, DVP)
        acc = tl.zeros((DVP,), tl.float32)
        most, total = float("-inf"), 0.0
        for start in range(0, used, CHUNK):
            split = start + tl.arange(0, CHUNK)
            at = (first + split) * H + head
            its_most = tl.load(sums_ptr + at * 2, mask=split < used, other=float("-inf"))
            its_total = tl.load(sums_ptr + at * 2 + 1, mask=split < used, other=0.0)
            its_acc = tl.load(
                acc_ptr + at[:, None] * DV + dim[None, :],
                mask=(split < used)[:, None] & (dim[None, :] < DV),
                other=0.0,
            )
            higher = tl.maximum(most, tl.max(its_most, 0))
            # A tree can hide a whole split.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            fade, weight = tl.exp2(most - shift), tl.exp2(its_most - shift)
            total = total * fade + tl.sum(its_total * weight, 0)
            acc = acc * fade + tl.sum(its_acc * weight[:, None], 0)
            most = higher
        if HAS_SINKS:
            total += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634 - most)
        out = out_ptr + (token * H + head) * DV + dim
        tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=dim < DV)


@triton.jit
def _find_tile(tiles_ptr, tile, num_rows, BLOCK: tl.constexpr):
    """The row of a tile: how many rows end at or before it."""
    row = 0
    for start in range(0, num_rows, BLOCK):
        other = start + tl.arange(0, BLOCK)
        end = tl.load(tiles_ptr + 1 + other, mask=other < num_rows, other=2147483647)
        row += tl.sum((end <= tile).to(tl.int32), 0)
    return row


@triton.jit
def _tile_rows(
    tiles_ptr, cu_q_ptr, row, tile, part,
    G: tl.constexpr, HT: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Of a tile of a long row: (its first query in q, its queries, which tile), and [BLOCK_M] (query, head, exists).

    AGAIN: to the compiler, these are other numbers than those it has.
    """
    begin = tl.load(cu_q_ptr + row, volatile=AGAIN)
    queries = tl.load(cu_q_ptr + row + 1, volatile=AGAIN) - begin
    block = tl.load(tiles_ptr + row + 1, volatile=AGAIN) - 1 - tile
    tile_row = tl.arange(0, BLOCK_M)
    if AGAIN:
        tile_row *= 1 + begin - tl.load(cu_q_ptr + row, volatile=True)
    query, in_group = block * TOKENS + tile_row // HT, part * HT + tile_row % HT
    return begin, queries, block, query, in_group, (tile_row < TOKENS * HT) & (query < queries) & (in_group < G)


@triton.jit(
    do_not_specialize=["table_row", "num_rows"],
    do_not_specialize_on_alignment=["table_ptr", "mask_ptr", "cu_q_ptr", "kv_lens_ptr"],
)
def _extend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, mask_ptr, squares_ptr, tiles_ptr, cu_q_ptr, kv_lens_ptr, sinks_ptr, out_ptr,
    q_token, q_head, k_slot, k_head, v_slot, v_head, table_row,
    log_scale, cap_in, window, num_rows, parts,
    H: tl.constexpr, G: tl.constexpr, HT: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    LATENT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr,
    HAS_SINKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of a long row: TOKENS queries of one KV head; a row's last tiles, which see most, start first."""
    kv_head, part, tile = tl.program_id(0) // parts, tl.program_id(0) % parts, tl.program_id(1)
    if tile < tl.load(tiles_ptr + num_rows):
        row = _find_tile(tiles_ptr, tile, num_rows, BLOCK)
        begin, queries, block, query, in_group, is_row = _tile_rows(
            tiles_ptr, cu_q_ptr, row, tile, part, G, HT, TOKENS, BLOCK_M, False
        )
        keys = tl.load(kv_lens_ptr + row)
        step_start = keys - queries
        head = kv_head * G + in_group
        position = tl.where(is_row, step_start + query, -1)
        row_at = (begin + query).to(tl.int64) * q_token + head * q_head
        q1 = load_q(q_ptr, row_at, is_row, 0, D1, D)
        q2 = load_q(q_ptr, row_at, is_row, D1, D2, D) if D2 > 0 else q1
        first = step_start + block * TOKENS
        last = tl.minimum(first + TOKENS, keys) - 1
        low = tl.maximum(first - window + 1, 0) if HAS_WINDOW else 0
        own_mask = mask_ptr
        if HAS_TREE:
            own_mask = mask_ptr + tl.load(squares_ptr + row)
            low = tl.minimum(low, step_start)
        at_row = row.to(tl.int64) * table_row
        acc1, acc2, most, total = attend(
            q1, q2, position, low, keys if HAS_TREE else last + 1,
            tl.maximum(last - window + 1, 0) if HAS_WINDOW else 0, step_start if HAS_TREE else first + 1,
            table_ptr + at_row, k_ptr + kv_head.to(tl.int64) * k_head, v_ptr + kv_head.to(tl.int64) * v_head,
            k_slot, v_slot, log_scale, cap_in, window, own_mask, step_start, queries,
            BLOCK_M, PAGE, BLOCK_N, D, D1, D2, DV, V1, V2, LATENT, HAS_CAP, HAS_WINDOW, HAS_TREE, STAGES,
        )  # fmt: skip
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32)
            total += tl.exp2(sink * 1.4426950408889634 - most)
        share = 1.0 / total
        if V1 + V2 > 256:
            # Half of the registers are sums: what says where they go is not held all through the loops, but read again.
            begin, queries, block, query, in_group, is_row = _tile_rows(
                tiles_ptr, cu_q_ptr, row, tile, part, G, HT, TOKENS, BLOCK_M, True
            )
            head = kv_head * G + in_group
        at = ((begin + query).to(tl.int64) * H + head) * DV
        dim = tl.arange(0, V1)
        out = (acc1 * share[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] + dim[None, :], out, mask=is_row[:, None] & (dim[None, :] < DV))
        if V2 > 0:
            dim = V1 + tl.arange(0, V2)
            out = (acc2 * share[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at[:, None] + dim[None, :], out, mask=is_row[:, None] & (dim[None, :] < DV))


def dim_parts(dim: int) -> tuple[int, int]:
    """A head dim as a power of two and a rest (0: none), at least 16 each: what a matrix unit takes."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole if whole == dim or whole == 16 else whole // 2
    rest = 0 if first >= dim else max(16, triton.next_power_of_2(dim - first))
    return (whole, 0) if rest == first else (first, rest)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a kernel is launched. programs: of the split kernel, per multiprocessor."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int = 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What a tiling depends on: dtypes of queries and of the cache, dims of the wider of keys and values, in two parts
    or not, with a tree mask or not, and the device's compute capability.
    """

    dtype: torch.dtype
    kept: torch.dtype
    width: int
    in_parts: bool
    has_tree: bool
    capability: int


def split_tiling(shape: Shape) -> Tiling:
    """Of short rows.

    What a multiprocessor must keep under way is bandwidth * latency: 4.8 TB/s * 0.8 us / 132 = 29 KB on an H200, 11 KB
    on an A100. A block of keys and values is 2 * block_n * width * 2 bytes, and of `stages` buffers one is being used:
    64 x 128 is 32 KB, so that even one program would do, and two (242 registers * 128 threads, 112 KB each) cover each
    other's softmax. A tile has 64 rows though a row alone fills 4 or 8 of them: wgmma takes no fewer, 64 x 64 x 128 is
    a third of the time its 32 KB take to arrive, and one tile for all is what makes sharing change no bit.
    In two parts or with a tree mask it is half the block: the addresses of more loads do not fit.
    256 dims: 4 warps spill. 8 warps on 64 rows do the first product twice, which takes 3/4 of the time of the bytes.
    576: 64 x 512 sums are half the registers there are; the values are read with the keys, 36 KB a block.
    Before Hopper products take their second operand from registers: shorter blocks. With a tree mask 16 keys, of which
    three blocks are under way: 24 KB.
    int8 rows begin at words: four times the addresses, and the scales. Half the block, and for 256 dims half the rows.
    """
    hopper, integers, width = shape.capability >= 90, shape.kept is torch.int8, shape.width
    if shape.dtype == torch.float32:
        return Tiling(16, 16, 8, 1, 2) if width > 256 else Tiling(16, 32 if width <= 128 else 16, 4, 2, 2)
    if width <= 128:
        if not hopper and shape.has_tree:
            return Tiling(64, 16, 4, 4, 2)
        if not hopper and integers:
            return Tiling(64, 16, 4, 3, 2)
        return Tiling(64, 64 if hopper and not (shape.in_parts or shape.has_tree or integers) else 32, 4, 3, 2)
    if width <= 256:
        return Tiling(32 if integers else 64, 32, 8, 3)
    return Tiling(64, 32 if hopper else 16, 8, 3)


def extend_tiling(shape: Shape) -> Tiling:
    """Of long rows.

    As many query rows as registers hold sums for, because keys are read once per tile. 128 x 128 sums and 128 x 64
    scores are 64 and 32 registers of each of 256 threads; with the addresses of two blocks 194 in all, one program of
    8 warps per multiprocessor and 128 KB of buffers.
    Half of the keys before Hopper where they have 8 bits, because what these are widened to are operands in registers,
    and with a tree mask.
    """
    hopper, integers, width = shape.capability >= 90, shape.kept is torch.int8, shape.width
    if shape.dtype == torch.float32:
        return Tiling(16, 16, 8, 1) if width > 256 else Tiling(16, 32 if width <= 128 else 16, 4, 2)
    if width <= 128:
        if not hopper and (shape.kept.itemsize == 1 or shape.has_tree):
            return Tiling(128, 16, 8, 3 if integers else 4)
        return Tiling(128, 64 if hopper and not (shape.in_parts or shape.has_tree) else 32, 8, 3)
    if width <= 256:
        return Tiling(128 if hopper and not integers else 64, 16 if integers else 32, 8, 3)
    return Tiling(64, 32 if hopper else 16, 8, 3)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a call that both kernels take, as the kernels take them."""

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    numbers: tuple[float | int, ...]
    constants: dict[str, int | bool]
    heads: int
    kv_heads: int
    v_dim: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    def packing(self, tiling: Tiling) -> tuple[int, int, int]:
        """(heads, tokens) of a tile, and tiles for the heads of a KV head."""
        parts = triton.cdiv(self.group, tiling.block_m)
        heads = triton.cdiv(self.group, parts)
        return heads, tiling.block_m // heads, parts


def _is_latent(k_cache: Tensor, v_cache: Tensor, first_dims: int) -> bool:
    """Whether the values are the first dims of the keys, so that a block read for one serves the other."""
    return (
        k_cache.untyped_storage()._cdata == v_cache.untyped_storage()._cdata
        and k_cache.storage_offset() == v_cache.storage_offset()
        and k_cache.stride() == v_cache.stride()
        and v_cache.shape[2] == first_dims
    )


def _prepare(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    tree_mask: Tensor | None,
    page_size: int,
    numbers: tuple[float, float, int],
) -> _Call:
    scale, softcap, window = numbers
    dim, v_dim = q_THD.shape[2], row_size(v_cache)
    k_cache, v_cache = as_words(k_cache), as_words(v_cache)
    (d1, d2), (v1, v2) = dim_parts(dim), dim_parts(v_dim)
    has_cap = softcap > 0
    # tanh(x) = 1 - 2 / (1 + 2 ** (2 log2(e) x))
    log_scale = LOG2E * (softcap if has_cap else scale)
    cap_in = 2 * LOG2E * scale / softcap if has_cap else 0.0
    mask = page_table if tree_mask is None else tree_mask.view(torch.uint8)
    return _Call(
        tensors=(q_THD, k_cache, v_cache, page_table, mask),
        strides=(*q_THD.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], page_table.stride(0)),
        numbers=(log_scale, cap_in, window),
        constants={
            "H": q_THD.shape[1],
            "G": q_THD.shape[1] // k_cache.shape[1],
            "PAGE": page_size,
            "D": dim,
            "D1": d1,
            "D2": d2,
            "DV": v_dim,
            "V1": v1,
            "V2": v2,
            "LATENT": d1 == v1 and v2 == 0 and _is_latent(k_cache, v_cache, d1),
            "HAS_CAP": has_cap,
            "HAS_WINDOW": window > 0,
            "HAS_TREE": tree_mask is not None,
        },
        heads=q_THD.shape[1],
        kv_heads=k_cache.shape[1],
        v_dim=v_dim,
    )


def _attend_short(call: _Call, tiling: Tiling, work: Work, sinks: Tensor | None, out: Tensor) -> None:
    """The split and the merge kernel."""
    heads, tokens, parts = call.packing(tiling)
    q, num_short = call.tensors[0], work.tokens.shape[1]
    places = num_short * work.num_splits
    acc = torch.empty((places, call.heads, call.v_dim), dtype=torch.float32, device=q.device)
    sums = torch.empty((places, call.heads, 2), dtype=torch.float32, device=q.device)
    programs = min(work.num_items * call.kv_heads * parts, num_sms(q.device) * tiling.programs)
    _split_kernel[(programs,)](
        *call.tensors, work.squares, work.items, work.members, work.counter, acc, sums,
        *call.strides, work.members.stride(0), *call.numbers, call.kv_heads, parts,
        HT=heads, TOKENS=tokens, FIELDS=ITEM_FIELDS, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        STAGES=tiling.stages, num_warps=tiling.warps, **call.constants,
    )  # fmt: skip
    width = triton.next_power_of_2(call.v_dim)
    _merge_kernel[(num_short, call.heads)](
        acc, sums, work.tokens, work.sums, sums if sinks is None else sinks, out,
        work.sums.shape[1] - 1, work.num_splits, work.tokens.stride(0),
        H=call.heads, DV=call.v_dim, DVP=width, CHUNK=8, HAS_SINKS=sinks is not None,
        num_warps=max(1, min(4, width // 32)),
    )  # fmt: skip


def _attend_long(
    call: _Call,
    tiling: Tiling,
    work: Work,
    ragged: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    out: Tensor,
    short: int,
) -> None:
    """The extend kernel, with room for as many tiles as the queries could make."""
    heads, tokens, parts = call.packing(tiling)
    num_tokens = out.shape[0]
    # Every row with more than `short` queries has one tile that is not full at most.
    tiles = num_tokens // tokens + min(num_tokens // (short + 1), work.sums.shape[1] - 1)
    _extend_kernel[(call.kv_heads * parts, tiles)](
        *call.tensors, work.squares, work.sums, *ragged, out if sinks is None else sinks, out,
        *call.strides, *call.numbers, work.sums.shape[1] - 1, parts,
        HT=heads, TOKENS=tokens, BLOCK=256, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        HAS_SINKS=sinks is not None, STAGES=tiling.stages, num_warps=tiling.warps, **call.constants,
    )  # fmt: skip


def paged_attention(
    q_THD: Tensor,
    k_cache_SKD: Tensor,
    v_cache_SKD: Tensor,
    page_table_RP: Tensor,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    *,
    page_size: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """`PagedAttention`. q and the caches may be strided views with a contiguous last dim; scale must be positive."""
    num_tokens, num_heads, dim = q_THD.shape
    out = torch.empty((num_tokens, num_heads, row_size(v_cache_SKD)), dtype=q_THD.dtype, device=q_THD.device)
    if num_tokens == 0 or num_heads == 0:
        return out
    assert scale > 0 and k_cache_SKD.dtype is v_cache_SKD.dtype, (scale, k_cache_SKD.dtype, v_cache_SKD.dtype)
    assert isinstance(plan, Plan | None), "the plan of another op table"
    assert q_THD.stride(2) == k_cache_SKD.stride(2) == v_cache_SKD.stride(2) == page_table_RP.stride(1) == 1
    call = _prepare(q_THD, k_cache_SKD, v_cache_SKD, page_table_RP, tree_mask, page_size, (scale, softcap, window))
    shape = Shape(
        q_THD.dtype,
        k_cache_SKD.dtype,
        max(dim, out.shape[2]),
        in_parts=call.constants["D2"] + call.constants["V2"] > 0,
        has_tree=tree_mask is not None,
        capability=capability(q_THD.device),
    )
    split, extend = split_tiling(shape), extend_tiling(shape)
    item_tokens = call.packing(split)[1]
    # As many rows as queries: one each, in every step that is made. Were there empty rows, a longer one would do, too.
    short = num_tokens if num_tokens <= page_table_RP.shape[0] else min(SHORT, item_tokens)
    kind = Kind(page_size, window, call.packing(extend)[1], item_tokens, short, SHARE and item_tokens > 1)
    work = (plan or Plan()).work(kind, page_table_RP, cu_q_lens, kv_lens, num_tokens)
    _attend_short(call, split, work, sinks, out)
    if num_tokens > short:
        _attend_long(call, extend, work, (cu_q_lens, kv_lens), sinks, out, short)
    return out


def _case(
    name: str,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    tokens: int = 64,
    rank: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
    sinks: bool = False,
    tree: bool = False,
    options: dict[str, int | float] | None = None,
    **checks: bool | int,
) -> CompileCase:
    """4 rows of 8,192 tokens; one query in all, which leaves the extend kernel out, where tokens is 1."""
    k_cache = meta(1 << 16, kv_heads, dim + (SCALE_BYTES if dtypes[1] is torch.int8 else 0), dtype=dtypes[1])
    call = partial(
        paged_attention,
        meta(tokens, heads, dim, dtype=dtypes[0]),
        k_cache,
        k_cache[..., :rank] if rank else torch.empty_like(k_cache),
        meta(4, 512, dtype=torch.int32),
        meta(5, dtype=torch.int32),
        meta(4, dtype=torch.int32),
        page_size=16,
        scale=dim**-0.5,
        sinks=meta(heads, dtype=torch.float32) if sinks else None,
        tree_mask=meta(64, dtype=torch.uint8) if tree else None,
        **(options or {}),  # type: ignore[arg-type]
    )
    return CompileCase(name, call, **checks)  # type: ignore[arg-type]


_FLOAT32 = (torch.float32, torch.float32)
_FLOAT8, _E5M2 = (torch.bfloat16, torch.float8_e4m3fn), (torch.bfloat16, torch.float8_e5m2)
_INT8 = (torch.bfloat16, torch.int8)

COMPILE_CASES = (
    _case("llama-3-8b", 32, 8, 128),
    _case("qwen3-0.6b", 16, 8, 128, tokens=1),
    _case("qwen3-30b-a3b", 32, 4, 128, tokens=1),
    _case("gemma-3", 16, 8, 256, options={"window": 1024, "softcap": 50.0}),
    _case("gpt-oss", 64, 8, 64, sinks=True, options={"window": 128}),
    _case("phi-3", 32, 32, 96),
    _case("tree", 32, 8, 128, tree=True),
    _case("deepseek-mla", 128, 1, 576, rank=512),
    _case("float8", 32, 8, 128, dtypes=_FLOAT8, oldest=90),
    _case("float8-e5m2", 32, 8, 128, dtypes=_E5M2),
    _case("int8", 32, 8, 128, dtypes=_INT8),
    _case("int8-256", 16, 8, 256, dtypes=_INT8, options={"window": 1024}),
    _case("float32", 32, 8, 128, tokens=1, dtypes=_FLOAT32, tensor_cores=False),
    _case("gemma-3-float32", 16, 8, 256, tokens=1, dtypes=_FLOAT32, tensor_cores=False, options={"window": 1024}),
    _case("mla-float32", 128, 1, 576, rank=512, tokens=1, dtypes=_FLOAT32, tensor_cores=False),
)
