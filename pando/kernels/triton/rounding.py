"""Activations to 8 bits, one scale per row, and packed weights back to 16-bit floats. `linear` launches both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.matrix import INT4, Matrix


@triton.jit
def _round_rows_kernel(x_ptr, out_ptr, scale_ptr, width, x_stride, BLOCK: tl.constexpr):
    """A row to int8 or float8: max |x| / 127 (448) is its scale, ties go to even."""
    INTEGERS: tl.constexpr = out_ptr.dtype.element_ty == tl.int8
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0 if INTEGERS else 448.0)
    ratio = tl.div_rn(x, tl.maximum(scale, 1.2e-38) + tl.zeros((BLOCK,), tl.float32))
    if INTEGERS:
        # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to an integer, ties to even.
        ratio = (ratio + 12582912.0) - 12582912.0
    tl.store(out_ptr + row * width + place, ratio.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


def round_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, K] -> int8 or float8 e4m3 [rows, K] and scales [rows] float32."""
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _round_rows_kernel[(rows,)](
        x, out, scale, width, x.stride(0), BLOCK=block, num_warps=max(1, min(16, block // 1024))
    )
    return out, scale


@triton.jit
def _expand_kernel(
    w_ptr,
    scale_ptr,
    offset_ptr,
    factor_ptr,
    out_ptr,
    first,
    n,
    k,
    w_stride,
    group_size,
    GROUPED: tl.constexpr,
    OFFSETS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One output's weights of some inputs; HALF > 0: of 4 bits, halves of 2 HALF inputs share bytes."""
    output = first + tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < k
    at = w_ptr + output.to(tl.int64) * w_stride
    if HALF > 0:
        byte = tl.load(at + place // (2 * HALF) * HALF + place % HALF, mask=inside, other=0)
        wide = tl.where(place // HALF % 2 == 0, byte & 15, byte >> 4).to(tl.float32)
    else:
        wide = tl.load(at + place, mask=inside, other=0.0).to(tl.float32)
    if GROUPED:
        line = place // group_size * n + output
        wide *= tl.load(scale_ptr + line, mask=inside, other=0.0).to(tl.float32)
        if OFFSETS:
            wide += tl.load(offset_ptr + line, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.load(factor_ptr + output)
    out = out_ptr + tl.program_id(0).to(tl.int64) * k + place
    tl.store(out, wide.to(out_ptr.dtype.element_ty), mask=inside)


def expand(matrix: Matrix, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Outputs first .. last - 1 of a quantised linear map as floats [last - first, K]."""
    assert matrix.factor is not None and matrix.values.shape[0] == 1
    out = torch.empty(last - first, matrix.num_inputs, dtype=dtype, device=matrix.values.device)
    block = min(1024, triton.next_power_of_2(matrix.num_inputs))
    _expand_kernel[(last - first, triton.cdiv(matrix.num_inputs, block))](
        matrix.values,
        matrix.scale,
        matrix.offset,
        matrix.factor,
        out,
        first,
        matrix.num_outputs,
        matrix.num_inputs,
        matrix.values.stride(1),
        max(matrix.group_size, 1),
        GROUPED=matrix.scale is not None,
        OFFSETS=matrix.offset is not None,
        HALF=matrix.half if matrix.kind == INT4 else 0,
        BLOCK=block,
        num_warps=4,
    )
    return out
