"""Rotary embedding of queries and keys in place, with their norms before it where a model has them.

One program per token and some of its heads: the token's cosines and sines are read once for these heads.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta

ELEMENTS = 1024
"""Elements a program turns: 8 a thread of four warps."""


@triton.jit
def _norm_rest(first, second, at, exists, weight_ptr, begin, head_dim, eps, REST: tl.constexpr):
    """1 / rms [heads, 1] of heads that consist of pairs and of what is behind `begin`; that part is normed in place."""
    total = tl.sum(first * first + second * second, 1)
    if REST > 0:
        behind = begin + tl.arange(0, REST)[None, :]
        inside = exists & (behind < head_dim)
        rest = tl.load(at + behind, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(rest * rest, 1)
    scale = tl.rsqrt(total / head_dim + eps)[:, None]
    if REST > 0:
        weight = tl.load(weight_ptr + behind, mask=behind < head_dim, other=0.0).to(tl.float32)
        tl.store(at + behind, (rest * scale * weight).to(at.dtype.element_ty), mask=inside)
    return scale


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    position_ptr,
    table_ptr,
    q_heads,
    k_heads,
    head_dim,
    half,
    eps,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Programs (token, block of heads): first the blocks of queries, then those of keys.

    HALF covers the pairs that turn, REST what is behind them (0: nothing to do there, as without norms).
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks = tl.cdiv(q_heads, HEADS)
    if block < query_blocks:
        base = q_ptr + token * q_token_stride
        head, num_heads, head_stride = block * HEADS, q_heads, q_head_stride
    else:
        base = k_ptr + token * k_token_stride
        head, num_heads, head_stride = (block - query_blocks) * HEADS, k_heads, k_head_stride
    heads = head + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    row = table_ptr + tl.load(position_ptr + token) * (2 * half)
    cos = tl.load(row + pair, mask=pair < half, other=0.0)
    sin = tl.load(row + half + pair, mask=pair < half, other=0.0)
    place = 2 * pair if INTERLEAVED else pair
    partner = place + 1 if INTERLEAVED else pair + half
    inside = (heads < num_heads) & (pair < half)
    at = base + heads * head_stride
    first = tl.load(at + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + partner, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if NORM:
        weight_ptr = q_weight_ptr if block < query_blocks else k_weight_ptr
        scale = _norm_rest(first, second, at, heads < num_heads, weight_ptr, 2 * half, head_dim, eps, REST)
        # Rounded to the dtype between norm and rotary, as two ops would.
        first = first * scale * tl.load(weight_ptr + place, mask=pair < half, other=0.0).to(tl.float32)
        second = second * scale * tl.load(weight_ptr + partner, mask=pair < half, other=0.0).to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    tl.store(at + place, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(at + partner, (second * cos + first * sin).to(dtype), mask=inside)


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """`OpTable.rope_`."""
    _launch(q, k, None, None, 0.0, positions, cos_sin, interleaved)


def norm_rope_(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
) -> None:
    """`OpTable.norm_rope_`: rms_norm of each head, then `rope_`, all in place and in one pass."""
    _launch(q, k, q_weight, k_weight, eps, positions, cos_sin, interleaved)


def _launch(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    interleaved: bool,
) -> None:
    assert q.stride(2) == k.stride(2) == 1 and q.dtype == k.dtype, (q.stride(), k.stride(), q.dtype, k.dtype)
    tokens, q_heads, head_dim = q.shape
    if tokens == 0:
        return
    half = cos_sin.shape[1] // 2
    pairs = triton.next_power_of_2(half)
    rest = head_dim - 2 * half if q_weight is not None else 0
    heads = max(1, min(ELEMENTS // (2 * pairs), triton.next_power_of_2(q_heads)))
    _rope_kernel[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k.shape[1], heads))](
        q,
        k,
        q_weight,
        k_weight,
        positions,
        cos_sin,
        q_heads,
        k.shape[1],
        head_dim,
        half,
        eps,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        NORM=q_weight is not None,
        INTERLEAVED=interleaved,
        HEADS=heads,
        HALF=pairs,
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )


def _case(name: str, heads: int, kv_heads: int, dim: int, rotary: int, norm: bool, interleaved: bool) -> CompileCase:
    qkv = meta(3, heads + 2 * kv_heads, dim)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    positions, table = meta(3, dtype=torch.int64), meta(99, rotary, dtype=torch.float32)
    if not norm:
        return CompileCase(name, partial(rope_, q, k, positions, table, interleaved))
    weight = meta(dim, dtype=torch.float32)
    return CompileCase(name, partial(norm_rope_, q, k, weight, weight, 1e-6, positions, table, interleaved))


COMPILE_CASES = (
    _case("llama-3-8b", 32, 8, 128, 128, False, False),
    _case("interleaved", 32, 1, 64, 64, False, True),
    _case("qwen3-0.6b", 16, 8, 128, 128, True, False),
    _case("qwen3-30b-a3b", 32, 4, 128, 128, True, False),
    _case("qwen3-next", 16, 2, 256, 64, True, False),
)
