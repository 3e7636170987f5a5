"""Norms of heads, rotary embedding and the store to the pool in one pass over queries, keys and values.

Queries are turned in place. Keys go from the projection's memory to their slots without being written back, and values
are copied beside them: a layer reads each once, and the next launch is attention.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.int8_rows import SCALE_BYTES
from pando.kernels.ops import Rope
from pando.kernels.triton.int8_cache import as_words, store_scale, values_at
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.rotary import WARPS, heads_together, pair_places, turned
from pando.kernels.triton.store import convert, copy_heads, rounded, rounding, spread


@triton.jit
def _write_parts(
    base, exists, first, second, rest, half, head_dim: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads as `turned` gives them to rows that begin at `base` [heads], converted to what is kept there."""
    pair = tl.arange(0, HALF)[None, :]
    place, partner = pair_places(pair, half, INTERLEAVED)
    inside = exists[:, None] & (pair < half)
    behind = 2 * half + tl.arange(0, REST if REST > 0 else 1)[None, :]
    if base.dtype.element_ty.is_int():
        largest, odd = spread(first)
        its_largest, its_odd = spread(second)
        largest, odd = tl.maximum(largest, its_largest), odd + its_odd
        if REST > 0:
            its_largest, its_odd = spread(rest)
            largest, odd = tl.maximum(largest, its_largest), odd + its_odd
        factor, scale = rounding(largest, odd)
        at = values_at(base)[:, None]
        tl.store(at + place, rounded(first, factor, odd), mask=inside)
        tl.store(at + partner, rounded(second, factor, odd), mask=inside)
        if REST > 0:
            tl.store(at + behind, rounded(rest, factor, odd), mask=exists[:, None] & (behind < head_dim))
        store_scale(base, scale, exists, head_dim)
    else:
        dtype: tl.constexpr = base.dtype.element_ty
        tl.store(base[:, None] + place, convert(first, dtype), mask=inside)
        tl.store(base[:, None] + partner, convert(second, dtype), mask=inside)
        if REST > 0:
            tl.store(base[:, None] + behind, convert(rest, dtype), mask=exists[:, None] & (behind < head_dim))


@triton.jit
def _rope_store_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, position_ptr, table_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    q_heads, k_heads, half, eps,
    q_token, q_head, k_token, k_head, v_token, v_head, k_slot, k_cache_head, v_slot, v_cache_head,
    D: tl.constexpr, DV: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Programs (token, block of heads): of queries, then of keys, then of values. Slots times strides pass 2^31."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks, key_blocks = tl.cdiv(q_heads, HEADS), tl.cdiv(k_heads, HEADS)
    slot = tl.load(slot_ptr + token)
    angles = table_ptr + tl.load(position_ptr + token) * (2 * half)
    if block < query_blocks:
        heads = block * HEADS + tl.arange(0, HEADS)
        exists, at = heads < q_heads, q_ptr + token * q_token + heads * q_head
        first, second, q_rest = turned(
            at[:, None], exists[:, None], q_weight_ptr, angles, half, D, eps,
            NORM, INTERLEAVED, HALF, REST if NORM else 0,
        )  # fmt: skip
        _write_parts(at, exists, first, second, q_rest, half, D, INTERLEAVED, HALF, REST if NORM else 0)
    elif block < query_blocks + key_blocks:
        heads = (block - query_blocks) * HEADS + tl.arange(0, HEADS)
        exists, at = heads < k_heads, k_ptr + token * k_token + heads * k_head
        first, second, rest = turned(
            at[:, None], exists[:, None], k_weight_ptr, angles, half, D, eps, NORM, INTERLEAVED, HALF, REST
        )
        kept = k_cache_ptr + slot * k_slot + heads * k_cache_head
        _write_parts(kept, exists, first, second, rest, half, D, INTERLEAVED, HALF, REST)
    else:
        head = (block - query_blocks - key_blocks) * HEADS
        source = v_ptr + token * v_token + head * v_head
        target = v_cache_ptr + slot * v_slot + head * v_cache_head
        copy_heads(source, target, v_head, v_cache_head, k_heads - head, DV, HEADS, V_DIM)


def rope_store(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, rope: Rope, k_cache_SKD: Tensor, v_cache_SKD: Tensor, out_loc: Tensor
) -> Tensor:
    """`OpTable.rope_store`: q in place, k as it was."""
    if not q_THD.shape[0]:
        return q_THD
    assert q_THD.stride(2) == k_TKD.stride(2) == v_TKD.stride(2) == 1 and q_THD.dtype is k_TKD.dtype, q_THD.stride()
    (tokens, q_heads, dim), (_, kv_heads, v_dim) = q_THD.shape, v_TKD.shape
    half = rope.cos_sin.shape[1] // 2
    rest = dim - 2 * half
    heads = heads_together(triton.next_power_of_2(max(dim, v_dim)), q_heads)
    key_blocks = triton.cdiv(kv_heads, heads)
    rounds = k_cache_SKD.dtype is torch.int8
    k_cache, v_cache = as_words(k_cache_SKD), as_words(v_cache_SKD)
    q_weight, k_weight = rope.norms or (None, None)
    _rope_store_kernel[(tokens, triton.cdiv(q_heads, heads) + key_blocks * (2 if v_dim else 1))](
        q_THD, k_TKD, v_TKD, q_weight, k_weight, rope.positions, rope.cos_sin, k_cache, v_cache, out_loc,
        q_heads, kv_heads, half, rope.eps,
        *q_THD.stride()[:2], *k_TKD.stride()[:2], *v_TKD.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        D=dim, DV=v_dim, NORM=rope.norms is not None, INTERLEAVED=rope.interleaved,
        HEADS=heads, HALF=triton.next_power_of_2(half), REST=triton.next_power_of_2(rest) if rest else 0,
        V_DIM=triton.next_power_of_2(max(v_dim, 1)),
        num_warps=WARPS, enable_fp_fusion=not rounds,
    )  # fmt: skip
    return q_THD


def _case(
    name: str,
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    rotary: int = 0,
    norm: bool = False,
    interleaved: bool = False,
    kept: torch.dtype = torch.bfloat16,
    oldest: int = 80,
) -> CompileCase:
    q, k, v = meta(3, (heads + 2 * kv_heads) * dim).split((heads * dim, kv_heads * dim, kv_heads * dim), 1)
    pool = meta(999, kv_heads, dim + (SCALE_BYTES if kept is torch.int8 else 0), dtype=kept)
    weight, ids = meta(dim, dtype=torch.float32), meta(3, dtype=torch.int64)
    table = meta(99, rotary or dim, dtype=torch.float32)
    rope = Rope(ids, table, interleaved, (weight, weight) if norm else None, 1e-6)
    k, v = k.unflatten(1, (kv_heads, dim)), v.unflatten(1, (kv_heads, dim))
    call = partial(rope_store, q.unflatten(1, (heads, dim)), k, v, rope, pool, torch.empty_like(pool), ids)
    return CompileCase(name, call, oldest=oldest)


COMPILE_CASES = (
    _case("llama-3-8b", 32, 8, 128),
    _case("qwen3-0.6b", 16, 8, 128, norm=True),
    _case("qwen3-30b-a3b", 32, 4, 128, norm=True),
    _case("qwen3-next", 16, 2, 256, rotary=64, norm=True),
    _case("glm-4", 32, 2, 128, rotary=64, interleaved=True),
    _case("phi-2", 32, 32, 80, rotary=32),
    _case("int8", 32, 8, 128, kept=torch.int8),
    _case("int8-norm-256", 16, 2, 256, rotary=64, norm=True, kept=torch.int8),
    _case("e4m3", 32, 8, 128, kept=torch.float8_e4m3fn, oldest=90),
    _case("e5m2", 32, 8, 128, kept=torch.float8_e5m2),
)
