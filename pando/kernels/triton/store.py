"""Keys and values of a step to their slots of the pool."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta


@triton.jit
def _copy(source, target, head_stride, target_stride, heads, dim, HEADS: tl.constexpr, DIM: tl.constexpr):
    """[heads, dim] from source to target, converted to the pool's dtype."""
    head, place = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (place < dim)
    values = tl.load(source + head * head_stride + place, mask=inside, other=0.0)
    tl.store(target + head * target_stride + place, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _store_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    heads,
    k_dim,
    v_dim,
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
        _copy(source, target, k_head_stride, k_cache_head_stride, heads, k_dim, HEADS, K_DIM)
    else:
        source, target = v_ptr + token * v_token_stride, v_cache_ptr + slot * v_slot_stride
        _copy(source, target, v_head_stride, v_cache_head_stride, heads, v_dim, HEADS, V_DIM)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out_loc: Tensor) -> None:
    """`OpTable.store_kv`. All may be views with a contiguous last dimension."""
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
    )


def _case(name: str, heads: int, k_dim: int, v_dim: int, dtype: torch.dtype = torch.bfloat16) -> CompileCase:
    pool = (meta(999, heads, k_dim, dtype=dtype), meta(999, heads, v_dim, dtype=dtype))
    slots = meta(3, dtype=torch.int64)
    return CompileCase(name, partial(store_kv, meta(3, heads, k_dim), meta(3, heads, v_dim), *pool, slots))


COMPILE_CASES = (
    _case("8x128", 8, 128, 128),
    _case("4x128", 4, 128, 128),
    _case("2x256", 2, 256, 256),
    _case("1x576-512", 1, 576, 512),
)
