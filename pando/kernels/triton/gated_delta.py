"""The gated delta rule on a GPU: token by token, or in chunks of tokens as matrix products.

In a chunk that begins with the state S, with g_i the logarithm of what is left of S after token i, the corrections
u_i = beta_i (v_i - k_i^T S_before_i) solve a triangular system (Yang, Kautz, Hatamizadeh 2024, section 3.3):

    (I + L) U = beta (V - e^g K S),   L_ij = beta_i e^(g_i - g_j) k_i.k_j  for j < i
    O = scale (e^g Q S + M U),        M_ij = e^(g_i - g_j) q_i.k_j         for j <= i
    S = e^(g_C) S + sum_j e^(g_C - g_j) k_j u_j^T

(I + L)^-1 does not depend on S: one kernel makes it for all chunks at once, and a second follows each row. All
exponents are at most 0. Contracts and legend are those of `pando.kernels.recurrent`, but for one promise: in chunks,
the last bits of a result depend on where a step begins. `gated_delta_by_token` keeps it; decays per key channel always
go token by token.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.rows import (
    SAVES,
    first_save,
    in_chunks,
    left_between,
    num_saves,
    precision_of,
    store_saves,
    tile_row,
)

CHUNK = 32
"""Tokens that are taken as one matrix. 64 spill on Hopper: there the left operands of its wide products, keys and
queries that were normed in registers, are held by both groups of four warps."""

STATE_TILE = 4096
"""Elements of a state that a program holds: a head of 128 x 128 is four programs, 32 heads are one for each of 128
multiprocessors."""


@triton.jit
def _unit(x, NORMALIZE: tl.constexpr):
    """Rows of x [C, K], divided by their lengths if asked."""
    x = x.to(tl.float32)
    if NORMALIZE:
        x = x * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None]
    return x


@triton.jit
def _keys(
    x, at_t, in_t, x_token,
    K: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Queries or keys [C, K] of a chunk that begins at `x`, as factors of products."""
    at_k = tl.arange(0, BLOCK_K)
    seen = in_t[:, None] & (at_k < K)[None, :]
    rows = tl.load(x + (at_t[:, None] * x_token + at_k[None, :]), mask=seen, other=0.0)
    return _unit(rows, NORMALIZE).to(x.dtype.element_ty)


@triton.jit
def _by_token(
    q, k, v, log_decay, beta, o, state, cu_q_lens, slots, fresh, save_token, save_slot, count, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, decay_token, decay_head, beta_token, o_token, o_head,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, NORMALIZE: tl.constexpr,
    PER_CHANNEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SAVES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_k = tl.arange(0, BLOCK_K)
        at_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_k, in_v = at_k < K, at_v < V
        inside = in_k[:, None] & in_v[None, :]
        place = (head * K + at_k[:, None]) * V + at_v[None, :]
        own = state + tl.load(slots + row) * (HEADS * K * V) + place
        s = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        if tl.load(fresh + row).to(tl.int32) == 0:
            s = tl.load(own, mask=inside, other=0.0)
        shared = head // REPEATS
        saves = num_saves(save_token, count, begin, end, SAVES)
        for i in range(end - begin):
            t = begin.to(tl.int64) + i
            q_k = tl.load(q + t * q_token + shared * q_head + at_k, mask=in_k, other=0.0).to(tl.float32)
            k_k = tl.load(k + t * k_token + shared * k_head + at_k, mask=in_k, other=0.0).to(tl.float32)
            if NORMALIZE:
                q_k = q_k * tl.rsqrt(tl.sum(q_k * q_k, 0) + 1e-6)
                k_k = k_k * tl.rsqrt(tl.sum(k_k * k_k, 0) + 1e-6)
            v_v = tl.load(v + t * v_token + head * v_head + at_v, mask=in_v, other=0.0).to(tl.float32)
            decays = log_decay + t * decay_token + head * decay_head
            if PER_CHANNEL:
                s = s * tl.exp(tl.load(decays + at_k, mask=in_k, other=0.0))[:, None]
            else:
                s = s * tl.exp(tl.load(decays))
            u_v = (v_v - tl.sum(s * k_k[:, None], 0)) * tl.load(beta + t * beta_token + head)
            s = s + k_k[:, None] * u_v[None, :]
            o_v = tl.sum(s * (q_k * scale)[:, None], 0)
            tl.store(o + t * o_token + head * o_head + at_v, o_v.to(o.dtype.element_ty), mask=in_v)
            if saves > 0:
                store_saves(s, state, place, inside, save_token, save_slot, count, t, HEADS * K * V)
        tl.store(own, s, mask=inside)


@triton.jit
def _inverses(
    k, log_decay, beta, inverse, cu_q_lens, num_rows, k_token, k_head, decay_token, decay_head, beta_token,
    REPEATS: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inverse [T, G, CHUNK]: the rows of (I + L)^-1 of each chunk, by forward substitution."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tile_row(cu_q_lens, num_rows, tile, CHUNK)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    first = begin + (tile - begin // CHUNK - row) * CHUNK
    if first < end:
        at_t, at_k = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
        t = (first + at_t).to(tl.int64)
        in_t = t < end
        seen = in_t[:, None] & (at_k < K)[None, :]
        k_tk = _unit(
            tl.load(k + t[:, None] * k_token + (head // REPEATS) * k_head + at_k[None, :], mask=seen, other=0.0),
            NORMALIZE,
        ).to(k.dtype.element_ty)
        since = tl.cumsum(tl.load(log_decay + t * decay_token + head * decay_head, mask=in_t, other=0.0), 0)
        strength = tl.load(beta + t * beta_token + head, mask=in_t, other=0.0)
        left = left_between(since, at_t[:, None] > at_t[None, :])
        lower = tl.dot(k_tk, tl.trans(k_tk), input_precision=PRECISION) * left * strength[:, None]
        solved = tl.where(at_t[:, None] == at_t[None, :], 1.0, 0.0)
        for i in range(1, tl.minimum(CHUNK, end - first)):
            at_i = (at_t == i)[:, None]
            factors = tl.sum(tl.where(at_i, lower, 0.0), 0)  # row i of L; rows before it are solved
            solved = solved - tl.where(at_i, tl.sum(factors[:, None] * solved, 0)[None, :], 0.0)
        out = inverse + (t[:, None] * HEADS + head) * CHUNK + at_t[None, :]
        tl.store(out, solved.to(k.dtype.element_ty), mask=in_t[:, None])


@triton.jit
def _by_chunk(
    q, k, v, log_decay, beta, o, state, inverse, cu_q_lens, slots, fresh, save_token, save_slot, count, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, decay_token, decay_head, beta_token, o_token, o_head,
    REPEATS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SAVES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_t, at_k = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
        at_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
        in_k, in_v = at_k < K, at_v < V
        inside = in_k[:, None] & in_v[None, :]
        place = at_k[:, None] * V + at_v[None, :]
        state += head * (K * V)
        own = state + tl.load(slots + row) * (HEADS * K * V) + place
        s = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
        if tl.load(fresh + row).to(tl.int32) == 0:
            s = tl.load(own, mask=inside, other=0.0)
        shared = head // REPEATS
        kind = k.dtype.element_ty  # of the factors of products; sums and the state are float32
        causal = at_t[:, None] >= at_t[None, :]
        saves = num_saves(save_token, count, begin, end, SAVES)
        first = begin
        while first < end:
            # A chunk ends behind a token whose state is saved, too; the rest of it keeps its place in the tile.
            behind = (first - begin) % CHUNK
            start = first - behind
            stop = tl.minimum(start + CHUNK, end)
            if saves > 0:
                stop = tl.minimum(stop, first_save(save_token, count, first, stop, SAVES) + 1)
            in_t = (at_t >= behind) & (start + at_t < stop)
            base = start.to(tl.int64)
            here = in_t[:, None] & in_v[None, :]
            decays = log_decay + base * decay_token + head * decay_head
            since = tl.cumsum(tl.load(decays + at_t * decay_token, mask=in_t, other=0.0), 0)
            before = tl.exp(since)
            k_tk = _keys(k + base * k_token + shared * k_head, at_t, in_t, k_token, K, NORMALIZE, BLOCK_K)
            values = v + base * v_token + head * v_head + (at_t[:, None] * v_token + at_v[None, :])
            v_tv = tl.load(values, mask=here, other=0.0)
            rest = v_tv.to(tl.float32) - tl.dot(k_tk, s.to(kind), input_precision=PRECISION) * before[:, None]
            rest *= tl.load(beta + base * beta_token + head + at_t * beta_token, mask=in_t, other=0.0)[:, None]
            # The inverse's blocks on the diagonal are the inverses of the matrix's; outside of them `rest` is 0.
            rows = inverse + (base * HEADS + head) * CHUNK + (at_t[:, None] * (HEADS * CHUNK) + at_t[None, :])
            solve = tl.load(rows, mask=in_t[:, None], other=0.0)
            u_tv = tl.dot(solve, rest.to(kind), input_precision=PRECISION)
            q_tk = _keys(q + base * q_token + shared * q_head, at_t, in_t, q_token, K, NORMALIZE, BLOCK_K)
            weight = left_between(since, causal) * tl.dot(q_tk, tl.trans(k_tk), input_precision=PRECISION)
            o_tv = tl.dot(q_tk, s.to(kind), input_precision=PRECISION) * before[:, None]
            o_tv += tl.dot(weight.to(kind), u_tv.to(kind), input_precision=PRECISION)
            out = o + base * o_token + head * o_head + (at_t[:, None] * o_token + at_v[None, :])
            tl.store(out, (o_tv * scale).to(o.dtype.element_ty), mask=here)
            last = tl.sum(tl.where(at_t == CHUNK - 1, since, 0.0), 0)
            left = tl.exp(tl.minimum(last - since, 0.0))
            faded = (u_tv * left[:, None]).to(kind)  # not the keys: they stay in shared memory as they are
            s = s * tl.exp(last) + tl.dot(tl.trans(k_tk), faded, input_precision=PRECISION)
            if saves > 0:
                store_saves(s, state, place, inside, save_token, save_slot, count, stop - 1, HEADS * K * V)
            first = stop
        tl.store(own, s, mask=inside)


def gated_delta_by_token(
    q_THK: Tensor,
    k_THK: Tensor,
    v_TGV: Tensor,
    log_decay: Tensor,
    beta_TG: Tensor,
    state_SGKV: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    scale: float,
    normalize: bool,
    chunked: bool = False,
) -> Tensor:
    """`OpTable.gated_delta`, to the last bit the same however rows are cut into steps (unless chunked)."""
    num_tokens, heads, value_dim = v_TGV.shape
    key_dim = q_THK.shape[2]
    o_TGV = torch.empty(v_TGV.shape, dtype=q_THK.dtype, device=q_THK.device)
    if not num_tokens:
        return o_TGV
    per_channel = log_decay.dim() == 3
    num_rows = slots.shape[0]
    block_k = max(16, triton.next_power_of_2(key_dim))
    block_v = min(max(16, triton.next_power_of_2(value_dim)), max(16, STATE_TILE // block_k))
    grid = (num_rows, heads, triton.cdiv(value_dim, block_v))
    keys = (k_THK.stride(0), k_THK.stride(1))
    decays = (log_decay.stride(0), log_decay.stride(1), beta_TG.stride(0))
    strides = (
        q_THK.stride(0), q_THK.stride(1), *keys, v_TGV.stride(0), v_TGV.stride(1), *decays,
        o_TGV.stride(0), o_TGV.stride(1),
    )  # fmt: skip
    ragged = (cu_q_lens, slots, fresh, save_token, save_slot, save_token.shape[0], scale)
    repeats = heads // q_THK.shape[1]
    if not chunked or per_channel:
        _by_token[grid](
            q_THK, k_THK, v_TGV, log_decay, beta_TG, o_TGV, state_SGKV, *ragged, *strides, repeats, key_dim, value_dim,
            heads, normalize, per_channel, block_k, block_v, SAVES, num_warps=4,
        )  # fmt: skip
        return o_TGV
    precision = precision_of(q_THK)
    inverse = torch.empty((num_tokens, heads, CHUNK), dtype=q_THK.dtype, device=q_THK.device)
    _inverses[num_tokens // CHUNK + num_rows, heads](
        k_THK, log_decay, beta_TG, inverse, cu_q_lens, num_rows, *keys, *decays, repeats, key_dim, heads, normalize,
        block_k, CHUNK, precision, num_warps=4,
    )  # fmt: skip
    _by_chunk[grid](
        q_THK, k_THK, v_TGV, log_decay, beta_TG, o_TGV, state_SGKV, inverse, *ragged, *strides, repeats, key_dim,
        value_dim, heads, normalize, block_k, block_v, SAVES, CHUNK, precision, num_warps=8,
    )  # fmt: skip
    return o_TGV


def gated_delta(
    q_THK: Tensor,
    k_THK: Tensor,
    v_TGV: Tensor,
    log_decay: Tensor,
    beta_TG: Tensor,
    state_SGKV: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    scale: float,
    normalize: bool,
) -> Tensor:
    """`OpTable.gated_delta`, long rows in chunks."""
    return gated_delta_by_token(
        q_THK, k_THK, v_TGV, log_decay, beta_TG, state_SGKV, cu_q_lens, slots, fresh, save_token, save_slot,
        scale=scale, normalize=normalize, chunked=in_chunks(q_THK.shape[0], slots.shape[0]),
    )  # fmt: skip


def _case(name: str, tokens: int, heads: int, groups: int, key: int, value: int, per_channel: bool) -> CompileCase:
    """A step of two rows, its activations cut out of a wider projection."""
    wide = meta(tokens, 2 * heads * key + groups * value)
    q, k, v = wide.split([heads * key, heads * key, groups * value], dim=1)
    f32, ids = partial(meta, dtype=torch.float32), partial(meta, dtype=torch.int64)
    return CompileCase(
        name,
        partial(
            gated_delta, q.unflatten(1, (heads, key)), k.unflatten(1, (heads, key)), v.unflatten(1, (groups, value)),
            f32(tokens, groups, *((key,) if per_channel else ())), f32(tokens, groups), f32(9, groups, key, value),
            meta(3, dtype=torch.int32), ids(2), meta(2, dtype=torch.bool), ids(3), ids(3),
            scale=key**-0.5, normalize=True,
        ),
    )  # fmt: skip


COMPILE_CASES = (
    _case("qwen3-next-decode", 2, 16, 32, 128, 128, False),
    _case("qwen3-next-prefill", 300, 16, 32, 128, 128, False),
    _case("kimi-linear", 300, 32, 32, 128, 128, True),
    _case("wide-keys", 300, 4, 4, 256, 512, False),
)
