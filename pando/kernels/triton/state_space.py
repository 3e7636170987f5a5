"""Mamba-2's recurrence on a GPU: token by token, or in chunks of tokens as matrix products (Dao, Gu 2024, section 6).

Both follow a row's tokens in one program per head and part of the head, with the state in registers. Contracts and
legend are those of `pando.kernels.recurrent`, but for one promise: in chunks, the last bits of a result depend on where
a step begins. `state_space_by_token` keeps it.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.rows import SAVES, first_save, in_chunks, left_between, num_saves, precision_of, store_saves

STATE_TILE = 4096
"""Elements of a state that a program holds: 32 registers a thread of four warps."""

CHUNK = 32
"""Tokens that are taken as one matrix. 64 spill on Hopper, or halve the part of a head: then its programs, each of
which fills a multiprocessor, are twice as many, and each multiplies the same keys and queries."""


@triton.jit
def _by_token(
    x, dt, a, b, c, d, y, state, cu_q_lens, slots, fresh, save_token, save_slot, count,
    x_token, x_head, dt_token, b_token, b_group, c_token, c_group, y_token, y_head,
    REPEATS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SAVES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        at_n = tl.arange(0, BLOCK_N)
        in_p, in_n = at_p < P, at_n < N
        inside = in_p[:, None] & in_n[None, :]
        place = (head * P + at_p[:, None]) * N + at_n[None, :]
        own = state + tl.load(slots + row) * (HEADS * P * N) + place
        s = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        if tl.load(fresh + row).to(tl.int32) == 0:
            s = tl.load(own, mask=inside, other=0.0)
        decay = tl.load(a + head)
        skip = tl.load(d + head) if HAS_D else 0.0
        group = head // REPEATS
        saves = num_saves(save_token, count, begin, end, SAVES)
        for i in range(end - begin):
            t = begin.to(tl.int64) + i
            step = tl.load(dt + t * dt_token + head)
            x_p = tl.load(x + t * x_token + head * x_head + at_p, mask=in_p, other=0.0).to(tl.float32)
            b_n = tl.load(b + t * b_token + group * b_group + at_n, mask=in_n, other=0.0).to(tl.float32)
            c_n = tl.load(c + t * c_token + group * c_group + at_n, mask=in_n, other=0.0).to(tl.float32)
            s = s * tl.exp(step * decay) + (x_p * step)[:, None] * b_n[None, :]
            y_p = tl.sum(s * c_n[None, :], 1) + x_p * skip
            tl.store(y + t * y_token + head * y_head + at_p, y_p.to(y.dtype.element_ty), mask=in_p)
            if saves > 0:
                store_saves(s, state, place, inside, save_token, save_slot, count, t, HEADS * P * N)
        tl.store(own, s, mask=inside)


@triton.jit
def _by_chunk(
    x, dt, a, b, c, d, y, state, cu_q_lens, slots, fresh, save_token, save_slot, count,
    x_token, x_head, dt_token, b_token, b_group, c_token, c_group, y_token, y_head,
    REPEATS: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SAVES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
        at_n, at_t = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
        in_p, in_n = at_p < P, at_n < N
        inside = in_p[:, None] & in_n[None, :]
        place = at_p[:, None] * N + at_n[None, :]
        state += head * (P * N)
        own = state + tl.load(slots + row) * (HEADS * P * N) + place
        s = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
        if tl.load(fresh + row).to(tl.int32) == 0:
            s = tl.load(own, mask=inside, other=0.0)
        decay = tl.load(a + head)
        skip = tl.load(d + head) if HAS_D else 0.0
        group = head // REPEATS
        causal = at_t[:, None] >= at_t[None, :]
        saves = num_saves(save_token, count, begin, end, SAVES)
        first = begin
        while first < end:
            # A chunk ends behind a token whose state is saved, too.
            stop = tl.minimum(first + CHUNK, end)
            if saves > 0:
                stop = tl.minimum(stop, first_save(save_token, count, first, stop, SAVES) + 1)
            in_t = first + at_t < stop
            base = first.to(tl.int64)
            step = tl.load(dt + base * dt_token + head + at_t * dt_token, mask=in_t, other=0.0)
            since = tl.cumsum(step * decay, 0)  # log of what is left, after each token, of the state before the chunk
            x_at = x + base * x_token + head * x_head + (at_t[:, None] * x_token + at_p[None, :])
            here = in_t[:, None] & in_p[None, :]
            x_tp = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
            seen = in_t[:, None] & in_n[None, :]
            b_tn = tl.load(
                b + base * b_token + group * b_group + (at_t[:, None] * b_token + at_n[None, :]), mask=seen, other=0.0
            )
            c_tn = tl.load(
                c + base * c_token + group * c_group + (at_t[:, None] * c_token + at_n[None, :]), mask=seen, other=0.0
            )
            weight = left_between(since, causal) * tl.dot(c_tn, tl.trans(b_tn), input_precision=PRECISION)
            wide = x_tp * step[:, None]
            kind = x.dtype.element_ty  # of the factors of products; sums and the state are float32
            y_tp = tl.dot(c_tn, tl.trans(s.to(kind)), input_precision=PRECISION) * tl.exp(since)[:, None]
            y_tp += tl.dot(weight.to(kind), wide.to(kind), input_precision=PRECISION) + x_tp * skip
            out = y + base * y_token + head * y_head + (at_t[:, None] * y_token + at_p[None, :])
            tl.store(out, y_tp.to(y.dtype.element_ty), mask=here)
            last = tl.sum(tl.where(at_t == CHUNK - 1, since, 0.0), 0)
            left = tl.exp(tl.minimum(last - since, 0.0))
            s = s * tl.exp(last) + tl.dot(tl.trans((wide * left[:, None]).to(kind)), b_tn, input_precision=PRECISION)
            if saves > 0:
                store_saves(s, state, place, inside, save_token, save_slot, count, stop - 1, HEADS * P * N)
            first = stop
        tl.store(own, s, mask=inside)


def state_space_by_token(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor | None,
    state_SHPN: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    chunked: bool = False,
) -> Tensor:
    """`OpTable.state_space`, to the last bit the same however rows are cut into steps (unless chunked)."""
    num_tokens, heads, head_dim = x_THP.shape
    groups, size = b_TGN.shape[1:]
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    if not num_tokens:
        return y_THP
    block_n = max(16, triton.next_power_of_2(size))
    tile = 2 * STATE_TILE if chunked and block_n <= 128 else STATE_TILE
    block_p = min(max(16, triton.next_power_of_2(head_dim)), max(16, tile // block_n))
    grid = (slots.shape[0], heads, triton.cdiv(head_dim, block_p))
    arguments = (
        x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, y_THP, state_SHPN,
        cu_q_lens, slots, fresh, save_token, save_slot, save_token.shape[0],
        x_THP.stride(0), x_THP.stride(1), dt_TH.stride(0), b_TGN.stride(0), b_TGN.stride(1),
        c_TGN.stride(0), c_TGN.stride(1), y_THP.stride(0), y_THP.stride(1),
        heads // groups, head_dim, size, heads, d_H is not None, block_p, block_n, SAVES,
    )  # fmt: skip
    if chunked:
        _by_chunk[grid](*arguments, CHUNK, precision_of(x_THP), num_warps=8)
    else:
        _by_token[grid](*arguments, num_warps=4)
    return y_THP


def state_space(
    x_THP: Tensor,
    dt_TH: Tensor,
    a_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    d_H: Tensor | None,
    state_SHPN: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
) -> Tensor:
    """`OpTable.state_space`, long rows in chunks."""
    return state_space_by_token(
        x_THP, dt_TH, a_H, b_TGN, c_TGN, d_H, state_SHPN, cu_q_lens, slots, fresh, save_token, save_slot,
        chunked=in_chunks(x_THP.shape[0], slots.shape[0]),
    )  # fmt: skip


def _case(name: str, tokens: int, heads: int, groups: int, head_dim: int, size: int) -> CompileCase:
    """A step of two rows, its activations cut out of a wider projection."""
    wide = meta(tokens, heads * head_dim + 2 * groups * size)
    x, b, c = wide.split([heads * head_dim, groups * size, groups * size], dim=1)
    f32, ids = partial(meta, dtype=torch.float32), partial(meta, dtype=torch.int64)
    return CompileCase(
        name,
        call=partial(
            state_space, x.unflatten(1, (heads, head_dim)), f32(tokens, heads), f32(heads),
            b.unflatten(1, (groups, size)), c.unflatten(1, (groups, size)), f32(heads), f32(9, heads, head_dim, size),
            meta(3, dtype=torch.int32), ids(2), meta(2, dtype=torch.bool), ids(3), ids(3),
        ),
    )  # fmt: skip


COMPILE_CASES = tuple(
    _case(f"{name}-{kind}", tokens, *shape)
    for name, shape in {"nemotron-h": (128, 8, 64, 128), "falcon-h1": (24, 1, 64, 256)}.items()
    for kind, tokens in {"decode": 2, "prefill": 300}.items()
)
