"""Rotary embedding of queries and keys in place; its inside, with norms before it, is shared with `rope_store`.

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
"""Elements a program turns."""

WARPS = 2
"""16 elements a thread, 8 of them first dims of pairs and 8 their partners: loads of 16 bytes."""


@triton.jit
def pair_places(pair, half, INTERLEAVED: tl.constexpr):
    """Where the dims of pairs are: the first ones, then their partners."""
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    else:
        return pair, pair + half


@triton.jit
def turned(
    at, exists, weight_ptr, angles_ptr, half, head_dim, eps,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads that begin at `at` [heads, 1], normed where NORM and turned: (first dims of pairs, partners, the rest).

    angles_ptr: the token's cosines, then its sines. HALF covers the pairs, REST the dims behind them; with 0 these are
    left alone, and the last of the results stands for nothing. In the dtype of the heads.
    """
    dtype: tl.constexpr = at.dtype.element_ty
    pair = tl.arange(0, HALF)[None, :]
    place, partner = pair_places(pair, half, INTERLEAVED)
    inside = exists & (pair < half)
    cos = tl.load(angles_ptr + pair, mask=pair < half, other=0.0)
    sin = tl.load(angles_ptr + half + pair, mask=pair < half, other=0.0)
    first = tl.load(at + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + partner, mask=inside, other=0.0).to(tl.float32)
    rest = first
    if REST > 0:
        behind = 2 * half + tl.arange(0, REST)[None, :]
        rest = tl.load(at + behind, mask=exists & (behind < head_dim), other=0.0).to(tl.float32)
    if NORM:
        total = tl.sum(first * first + second * second, 1)
        if REST > 0:
            total += tl.sum(rest * rest, 1)
            rest *= tl.load(weight_ptr + behind, mask=behind < head_dim, other=0.0).to(tl.float32)
        scale = tl.rsqrt(total / head_dim + eps)[:, None]
        rest *= scale
        # Rounded to the dtype between norm and rotary, as two ops would.
        first = first * scale * tl.load(weight_ptr + place, mask=pair < half, other=0.0).to(tl.float32)
        second = second * scale * tl.load(weight_ptr + partner, mask=pair < half, other=0.0).to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype), rest.to(dtype)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, position_ptr, table_ptr, q_heads, k_heads, half,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Programs (token, block of heads): first the blocks of queries, then those of keys."""
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
    at = base + heads * head_stride
    angles = table_ptr + tl.load(position_ptr + token) * (2 * half)
    first, second, _ = turned(
        at, heads < num_heads, table_ptr, angles, half, 2 * half, 0.0, False, INTERLEAVED, HALF, 0
    )
    pair = tl.arange(0, HALF)[None, :]
    place, partner = pair_places(pair, half, INTERLEAVED)
    inside = (heads < num_heads) & (pair < half)
    tl.store(at + place, first, mask=inside)
    tl.store(at + partner, second, mask=inside)


def heads_together(width: int, most: int) -> int:
    """Heads of `width` elements (a power of two) that a program takes, of `most` there are."""
    return max(1, min(ELEMENTS // width, triton.next_power_of_2(most)))


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    """`OpTable.rope_`."""
    assert q.stride(2) == k.stride(2) == 1 and q.dtype == k.dtype, (q.stride(), k.stride(), q.dtype, k.dtype)
    tokens, q_heads, _ = q.shape
    if tokens == 0:
        return
    half = cos_sin.shape[1] // 2
    pairs = triton.next_power_of_2(half)
    heads = heads_together(2 * pairs, q_heads)
    _rope_kernel[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k.shape[1], heads))](
        q, k, positions, cos_sin, q_heads, k.shape[1], half,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        INTERLEAVED=interleaved, HEADS=heads, HALF=pairs, num_warps=WARPS,
    )  # fmt: skip


def _case(name: str, heads: int, kv_heads: int, dim: int, rotary: int, interleaved: bool) -> CompileCase:
    qkv = meta(3, heads + 2 * kv_heads, dim)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    positions, table = meta(3, dtype=torch.int64), meta(99, rotary, dtype=torch.float32)
    return CompileCase(name, partial(rope_, q, k, positions, table, interleaved))


COMPILE_CASES = (
    _case("llama-3-8b", 32, 8, 128, 128, False),
    _case("interleaved", 32, 1, 64, 64, True),
)
