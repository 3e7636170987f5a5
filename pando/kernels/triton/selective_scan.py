"""Mamba's recurrence on a GPU, token by token: a program follows some channels of a row, their states in registers.

Contracts and legend are those of `pando.kernels.recurrent`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.rows import SAVES, num_saves, store_saves

STATE_TILE = 1024
"""Elements of a state that a program holds: few, so that a single long row still fills the device."""


@triton.jit
def _scan(
    x, dt, a, b, c, d, y, state, cu_q_lens, slots, fresh, save_token, save_slot, count,
    x_token, dt_token, b_token, c_token, y_token,
    C: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, SAVES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_c, at_n = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
        in_c, in_n = at_c < C, at_n < N
        inside = in_c[:, None] & in_n[None, :]
        place = at_c[:, None] * N + at_n[None, :]
        own = state + tl.load(slots + row) * (C * N) + place
        s = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        if tl.load(fresh + row).to(tl.int32) == 0:
            s = tl.load(own, mask=inside, other=0.0)
        decay = tl.load(a + place, mask=inside, other=0.0)
        if HAS_D:
            skip = tl.load(d + at_c, mask=in_c, other=0.0)
        saves = num_saves(save_token, count, begin, end, SAVES)
        for i in range(end - begin):
            t = begin.to(tl.int64) + i
            x_c = tl.load(x + t * x_token + at_c, mask=in_c, other=0.0).to(tl.float32)
            dt_c = tl.load(dt + t * dt_token + at_c, mask=in_c, other=0.0)
            b_n = tl.load(b + t * b_token + at_n, mask=in_n, other=0.0).to(tl.float32)
            c_n = tl.load(c + t * c_token + at_n, mask=in_n, other=0.0).to(tl.float32)
            s = s * tl.exp(dt_c[:, None] * decay) + (x_c * dt_c)[:, None] * b_n[None, :]
            y_c = tl.sum(s * c_n[None, :], 1)
            if HAS_D:
                y_c += x_c * skip
            tl.store(y + t * y_token + at_c, y_c.to(y.dtype.element_ty), mask=in_c)
            if saves > 0:
                store_saves(s, state, place, inside, save_token, save_slot, count, t, C * N)
        tl.store(own, s, mask=inside)


def selective_scan(
    x_TC: Tensor,
    dt_TC: Tensor,
    a_CN: Tensor,
    b_TN: Tensor,
    c_TN: Tensor,
    d_C: Tensor | None,
    state_SCN: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
) -> Tensor:
    """`OpTable.selective_scan`."""
    (num_tokens, channels), size = x_TC.shape, b_TN.shape[1]
    y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    if not num_tokens:
        return y_TC
    block_n = triton.next_power_of_2(size)
    block_c = min(triton.next_power_of_2(channels), max(16, STATE_TILE // block_n))
    _scan[slots.shape[0], triton.cdiv(channels, block_c)](
        x_TC, dt_TC, a_CN, b_TN, c_TN, d_C, y_TC, state_SCN,
        cu_q_lens, slots, fresh, save_token, save_slot, save_token.shape[0],
        x_TC.stride(0), dt_TC.stride(0), b_TN.stride(0), c_TN.stride(0), y_TC.stride(0),
        channels, size, d_C is not None, block_c, block_n, SAVES, num_warps=2,
    )  # fmt: skip
    return y_TC


def _case(name: str, channels: int, size: int) -> CompileCase:
    """A step of two rows."""
    f32, ids = partial(meta, dtype=torch.float32), partial(meta, dtype=torch.int64)
    tokens = (meta(9, channels), f32(9, channels), f32(channels, size), meta(9, size), meta(9, size), f32(channels))
    ragged = (meta(3, dtype=torch.int32), ids(2), meta(2, dtype=torch.bool), ids(3), ids(3))
    return CompileCase(name, partial(selective_scan, *tokens, f32(9, channels, size), *ragged))


COMPILE_CASES = (_case("jamba", 8192, 16), _case("wide", 1024, 64))
