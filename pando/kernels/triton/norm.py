"""Norms over the last dimension: one program per row, the row in registers, sums in float32."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, width, x_stride, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: residual += x where ADD, then x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual_ptr + row * width + place
        # Rounded to the stream's dtype before it is normed: the stream is what later layers read.
        summed = (x + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(at, summed, mask=inside)
        x = summed.to(tl.float32)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(out_ptr + row * width + place, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, width, x_stride, heads, eps, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: (x - mean) / std * weight + bias; PER_HEAD: row r has those of head r % heads."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < width
    x = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    # Twice over registers: sums of squares would lose a small spread around a large mean.
    centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    out = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    line = (row % heads) * width + place if PER_HEAD else place
    if weight_ptr is not None:
        out *= tl.load(weight_ptr + line, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + line, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + place, out.to(out_ptr.dtype.element_ty), mask=inside)


def num_warps(block: int) -> int:
    """Warps for a row of `block` elements: 16 a thread, so that two 16-byte loads are in flight in each."""
    return max(1, min(16, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`OpTable.rms_norm`. The rows of x may be strided if they can be viewed as one dimension."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`OpTable.add_rms_norm`: the residual stream is read once and written once."""
    assert residual.is_contiguous(), "the residual stream is updated in place"
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    _launch(rows if rows.stride(-1) == 1 else rows.contiguous(), residual, weight, out, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`OpTable.layer_norm`. The rows of x may be strided if they can be viewed as one dimension."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel() == 0:
        return out
    given = [each for each in (weight, bias) if each is not None]
    heads = given[0].shape[0] if given and given[0].dim() == 2 else 1
    assert all(each.is_contiguous() and each.numel() == heads * x.shape[-1] for each in given), (x.shape, heads)
    block = triton.next_power_of_2(rows.shape[1])
    _layer_norm_kernel[(rows.shape[0],)](
        rows,
        weight,
        bias,
        out,
        rows.shape[1],
        rows.stride(0),
        heads,
        eps,
        PER_HEAD=heads > 1,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


def _launch(rows: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    if rows.numel() == 0:
        return
    block = triton.next_power_of_2(rows.shape[1])
    _rms_norm_kernel[(rows.shape[0],)](
        rows,
        residual,
        weight,
        out,
        rows.shape[1],
        rows.stride(0),
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )


def _layer_norm_case(name: str, n: int, heads: int, has_bias: bool) -> CompileCase:
    shape = (n,) if heads == 1 else (heads, n)
    weight, bias = meta(*shape, dtype=torch.float32), meta(*shape, dtype=torch.float32) if has_bias else None
    return CompileCase(f"layer-{name}", partial(layer_norm, meta(3, *shape), weight, bias, 1e-5))


COMPILE_CASES = (
    _layer_norm_case("2560", 2560, 1, True),
    _layer_norm_case("8192", 8192, 1, False),
    _layer_norm_case("heads", 128, 64, False),
    *(
        CompileCase(f"rms-{n}", partial(rms_norm, meta(3, n), meta(n, dtype=torch.float32), 1e-6))
        for n in (128, 1024, 4096)
    ),
    *(
        CompileCase(f"add-rms-{n}", partial(add_rms_norm, meta(3, n), meta(3, n), meta(n, dtype=torch.float32), 1e-6))
        for n in (1024, 4096)
    ),
)
