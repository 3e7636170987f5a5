"""One kernel for products with few or middling many rows: x @ weight.T for plain, int8, float8 and int4 weights.

The product is turned round: a tile of the weight [BN outputs, BK inputs] is the left operand and the rows are the right
one, [BK, BM]. So the long side of a decode step's product fills the tensor cores' 64 rows and the few tokens their
columns (as few as 16), and weights that are unpacked in registers go into the product without a way through shared
memory.

Weights of 4 bits hold inputs k and k + H of a chunk of 2 H inputs in one byte, low bits first: unpacked halves are
tiles of H inputs each, in order. Products of unpacked integers are exact; a group's scale multiplies its partial sums,
which are fewer than its weights.

With routing (a mixture of experts) a tile of rows belongs to one expert and rows are named by a sorted list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pando.kernels.triton.activation import gated

DENSE, INT8, INT4 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Kinds of weights."""


@triton.jit
def load_rows(x_ptr, rows, first, k, EVEN: tl.constexpr, SIZE: tl.constexpr):
    """x [SIZE, BM]: inputs first .. first + SIZE - 1 of the rows whose offsets are `rows` [BM]."""
    inputs = first + tl.arange(0, SIZE)[:, None]
    at = x_ptr + rows[None, :] + inputs
    return tl.load(at) if EVEN else tl.load(at, mask=inputs < k, other=0.0)


@triton.jit
def scaled(acc, part, x, scale_ptr, offset_ptr, line):
    """acc + scale * part + offset * sum of x, with scales [BN] at `line`."""
    acc += part.to(tl.float32) * tl.load(scale_ptr + line).to(tl.float32)[:, None]
    if offset_ptr is not None:
        total = tl.sum(x.to(tl.float32), 0)
        acc += tl.load(offset_ptr + line).to(tl.float32)[:, None] * total[None, :]
    return acc


@triton.jit
def add_tile(
    acc,
    w_at,
    x,
    x_high,
    scale_ptr,
    offset_ptr,
    line,
    line_high,
    left,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc [BN, BM] += weight tile @ x. `left`: inputs from this tile's first on that exist, where MASKED."""
    if MASKED:
        inside = tl.arange(0, w_at.shape[1])[None, :] < left
        w = tl.load(w_at, mask=inside, other=0.0)
    else:
        w = tl.load(w_at)
    if KIND == INT4:
        low, high = (w & 15).to(x.dtype), (w >> 4).to(x.dtype)
        acc = scaled(acc, tl.dot(low, x, input_precision="ieee"), x, scale_ptr, offset_ptr, line)
        part = tl.dot(high, x_high, input_precision="ieee")
        return scaled(acc, part, x_high, scale_ptr, offset_ptr, line_high)
    if scale_ptr is not None:
        part = tl.dot(w.to(x.dtype), x, input_precision="ieee")
        return scaled(acc, part, x, scale_ptr, offset_ptr, line)
    if x.dtype == tl.float8e4nv:
        # Hopper adds products of float8 with 14 bits: a tile's sum goes to float32 before the next one.
        return tl.dot(w, x, acc, max_num_imprecise_acc=w.shape[1])
    return tl.dot(w.to(x.dtype), x, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def finish(acc, line, factor_ptr, bias_ptr, row_scale):
    """Sums in float32 with the scales of outputs and rows and the bias."""
    acc = acc.to(tl.float32)
    if row_scale is not None:
        acc *= row_scale[None, :]
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + line)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + line).to(tl.float32)[:, None]
    return acc


@triton.jit
def row_places(tile_ptr, pair_ptr, num_rows, choices, GATHER: tl.constexpr, BM: tl.constexpr):
    """A tile's expert (-1: nothing to do), and of its rows: where they are read, where written, which exist.

    Rows behind the last are read as the last and not written. GATHER: row p reads the token of pair p of the sorted
    list and writes row p. Else row p is read and written to the place of pair p.
    """
    tile = tl.program_id(1)
    row = tile * BM + tl.arange(0, BM)
    if tile_ptr is None:
        place = tl.minimum(row, num_rows - 1).to(tl.int64)
        return 0, place, place, row < num_rows
    else:
        expert, first = tl.load(tile_ptr + 3 * tile), tl.load(tile_ptr + 3 * tile + 1)
        end = tl.load(tile_ptr + 3 * tile + 2)
        row = first + tl.arange(0, BM)
        place = tl.minimum(row, tl.maximum(end - 1, 0))
        pair = tl.load(pair_ptr + place)
        source = pair // choices if GATHER else place
        target = place if GATHER else pair
        return expert, source.to(tl.int64), target.to(tl.int64), row < end


@triton.jit
def product_kernel(
    x_ptr,
    row_scale_ptr,
    w_ptr,
    scale_ptr,
    offset_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    tile_ptr,
    pair_ptr,
    num_rows,
    n,
    k,
    x_stride,
    w_stride,
    groups,
    group_size,
    steps,
    choices,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    GATHER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Programs (outputs, rows, pieces of K); see `product` for what the arguments are."""
    half = n // 2 if GATED >= 0 else n
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    expert, source, target, valid = row_places(tile_ptr, pair_ptr, num_rows, choices, GATHER, BM)
    if expert < 0:
        return
    output = tl.minimum(column, half - 1)
    acc = tl.zeros((BN, BM), tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32)
    up = acc
    SIZE: tl.constexpr = BK // 2 if KIND == INT4 else BK
    w_at = w_ptr + (expert * n + output).to(tl.int64)[:, None] * w_stride + tl.arange(0, SIZE)[None, :]
    lines, first = expert * groups * n + output, tl.program_id(2) * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(k, BK))):
        x = load_rows(x_ptr, source * x_stride, step * BK, k, EVEN, SIZE)
        x_high = load_rows(x_ptr, source * x_stride, step * BK + SIZE, k, EVEN, SIZE) if KIND == INT4 else x
        line = lines + tl.minimum(step * BK // group_size, groups - 1) * n
        high = lines + tl.minimum((step * BK + SIZE) // group_size, groups - 1) * n
        at, left = w_at + step * SIZE, k - step * BK
        acc = add_tile(acc, at, x, x_high, scale_ptr, offset_ptr, line, high, left, KIND, KIND == DENSE and not EVEN)
        if GATED >= 0:
            at, line, high = at + half.to(tl.int64) * w_stride, line + half, high + half
            up = add_tile(up, at, x, x_high, scale_ptr, offset_ptr, line, high, left, KIND, KIND == DENSE and not EVEN)
    if not SPLIT:
        row_scale = None if row_scale_ptr is None else tl.load(row_scale_ptr + source)
        line = expert * n + output
        acc = finish(acc, line, factor_ptr, bias_ptr, row_scale)
        if GATED >= 0:
            up = finish(up, line + half, factor_ptr, bias_ptr, row_scale)
            acc = gated(acc, up, GATED)
    out_at = out_ptr + (tl.program_id(2) * num_rows + target[None, :]) * half + column[:, None]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[None, :] & (column < half)[:, None])


@triton.jit
def join_kernel(
    part_ptr,
    row_scale_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    n,
    pieces,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's sums over the pieces of K, in order, and what `product_kernel` does at its end."""
    row, half = tl.program_id(0).to(tl.int64), n // 2 if GATED >= 0 else n
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < half
    at = part_ptr + row * n + column
    size = tl.num_programs(0).to(tl.int64) * n
    acc, up = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for piece in range(pieces):
        acc += tl.load(at + piece * size, mask=inside, other=0.0)
        if GATED >= 0:
            up += tl.load(at + piece * size + half, mask=inside, other=0.0)
    row_scale = 1.0 if row_scale_ptr is None else tl.load(row_scale_ptr + row)
    line = tl.minimum(column, half - 1)
    acc = finish_row(acc, line, factor_ptr, bias_ptr, row_scale)
    if GATED >= 0:
        acc = gated(acc, finish_row(up, line + half, factor_ptr, bias_ptr, row_scale), GATED)
    tl.store(out_ptr + row * half + column, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_row(acc, line, factor_ptr, bias_ptr, row_scale):
    """`finish` for the outputs of one row."""
    acc *= row_scale
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + line)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + line).to(tl.float32)
    return acc
