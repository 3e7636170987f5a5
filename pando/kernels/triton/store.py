"""Keys and values of a step to their slots of the pool."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.int8_rows import SCALE_BYTES
from pando.kernels.triton.int8_cache import as_words, store_scale, values_at
from pando.kernels.triton.launch import CompileCase, meta


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """x in the pool's dtype; in float8 with the largest number for what is beyond it, NaN stays."""
    if DTYPE == tl.float8e4nv or DTYPE == tl.float8e5:
        LARGEST: tl.constexpr = 448.0 if DTYPE == tl.float8e4nv else 57344.0
        x = tl.clamp(x.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


@triton.jit
def spread(x):
    """Of rows x [heads, dim]: the largest |x| and how many are not finite."""
    x = tl.abs(x.to(tl.float32))
    # The maximum passes over NaN.
    return tl.max(x, 1), tl.sum(tl.where(x < float("inf"), 0, 1), 1)


@triton.jit
def rounding(largest, odd):
    """(factor, scale) of int8 rows by their `spread`, as `round_rows` has them, to the same bits: nothing may be fused.

    A row with numbers that are not finite has the factor 0, and NaN for a scale.
    """
    present = largest >= 2.0**-100
    one = tl.where(present, largest, 1.0)
    full = tl.full(one.shape, 127.0, tl.float32)
    factor = tl.where((odd == 0) & present, tl.div_rn(full, one), 0.0)
    scale = tl.where(present, tl.div_rn(largest, full), 0.0)
    return factor, tl.where(odd == 0, scale, float("nan"))


@triton.jit
def rounded(x, factor, odd):
    """Rows x [heads, dim] as int8, by what `rounding` says of them."""
    product = tl.where((odd == 0)[:, None], x.to(tl.float32), 0.0) * factor[:, None]
    # Adding 1.5 * 2^23 leaves no bits for a fraction: the sum is rounded to an integer, ties to even.
    return ((product + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def copy_heads(
    source, target, head_stride, target_stride, heads, dim: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr
):
    """[heads, dim] from source to target, converted to what the pool keeps; of HEADS of them where heads is less."""
    head, place = tl.arange(0, HEADS), tl.arange(0, DIM)[None, :]
    inside = (head < heads)[:, None] & (place < dim)
    values = tl.load(source + head[:, None] * head_stride + place, mask=inside, other=0.0)
    at = target + head * target_stride
    if target.dtype.element_ty.is_int():
        largest, odd = spread(values)
        factor, scale = rounding(largest, odd)
        tl.store(values_at(at)[:, None] + place, rounded(values, factor, odd), mask=inside)
        store_scale(at, scale, head < heads, dim)
    else:
        tl.store(at[:, None] + place, convert(values, target.dtype.element_ty), mask=inside)


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    heads,
    k_dim: tl.constexpr,
    v_dim: tl.constexpr,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    k_slot_stride,
    k_cache_head_stride,
    v_slot_stride,
    v_cache_head_stride,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
):
    """Programs (token, 0: keys, 1: values). Slots times strides pass 2^31: 64-bit offsets."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if tl.program_id(1) == 0:
        source, target = k_ptr + token * k_token_stride, k_cache_ptr + slot * k_slot_stride
        copy_heads(source, target, k_head_stride, k_cache_head_stride, heads, k_dim, HEADS, K_DIM)
    else:
        source, target = v_ptr + token * v_token_stride, v_cache_ptr + slot * v_slot_stride
        copy_heads(source, target, v_head_stride, v_cache_head_stride, heads, v_dim, HEADS, V_DIM)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out_loc: Tensor) -> None:
    """`OpTable.store_kv`. All may be views with a contiguous last dimension."""
    k_cache, v_cache = as_words(k_cache), as_words(v_cache)
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    tokens, heads, k_dim = k.shape
    if tokens == 0:
        return
    v_dim = v.shape[2]
    _store_kernel[(tokens, 2 if v_dim else 1)](
        k,
        v,
        k_cache,
        v_cache,
        out_loc,
        heads,
        k_dim,
        v_dim,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        v_cache.stride(0),
        v_cache.stride(1),
        HEADS=triton.next_power_of_2(heads),
        K_DIM=triton.next_power_of_2(k_dim),
        V_DIM=triton.next_power_of_2(max(v_dim, 1)),
        num_warps=4,
        enable_fp_fusion=False,
    )


def _case(
    name: str, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype = torch.bfloat16, oldest: int = 80
) -> CompileCase:
    more = SCALE_BYTES if dtype is torch.int8 else 0
    pool = (meta(999, heads, k_dim + more, dtype=dtype), meta(999, heads, v_dim + more, dtype=dtype))
    call = partial(store_kv, meta(3, heads, k_dim), meta(3, heads, v_dim), *pool, meta(3, dtype=torch.int64))
    return CompileCase(name, call, oldest=oldest)


COMPILE_CASES = (
    _case("8x128", 8, 128, 128),
    _case("4x128", 4, 128, 128),
    _case("2x256", 2, 256, 256),
    _case("1x576-512", 1, 576, 512),
    _case("8x128-int8", 8, 128, 128, torch.int8),
    _case("8x128-e4m3", 8, 128, 128, torch.float8_e4m3fn, 90),
    _case("8x128-e5m2", 8, 128, 128, torch.float8_e5m2),
)
