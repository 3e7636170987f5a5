"""Depthwise causal convolution on a GPU. What a row remembers are its last inputs as they are, so cuts leave no trace.

Outputs are independent of each other, so long rows are cut into tiles of tokens that run at once; the states follow in
a second kernel, because the tiles read what it overwrites. Short rows go through one kernel that does both. Contracts
and legend are those of `pando.kernels.recurrent`.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.reference_recurrent import check_conv_activation
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.rows import LONG_ROWS, SAVES, in_chunks, num_saves, tile_row

TOKENS, CHANNELS = 32, 64
"""A tile of outputs: 128 bytes of each token's 16-bit inputs."""


@triton.jit
def _outputs(
    x, weight, bias, past, y, at_c, first, begin, end, remembered, x_token, y_token,
    C: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens first .. first + TOKENS - 1 of the row begin .. end - 1; `past` points at its state, of which
    the last `remembered` inputs count."""
    t = (first + tl.arange(0, TOKENS)).to(tl.int64)
    in_c, in_t = at_c < C, t < end
    sums = tl.zeros((TOKENS, at_c.shape[0]), tl.float32)
    for tap in tl.static_range(TAPS):
        source = t - (TAPS - 1) + tap
        own = (in_t & (source >= begin))[:, None] & in_c[None, :]
        values = tl.load(x + source[:, None] * x_token + at_c[None, :], mask=own, other=0.0).to(tl.float32)
        if tap < TAPS - 1:
            older = (in_t & (source < begin) & (source >= begin - remembered))[:, None] & in_c[None, :]
            back = past + at_c[None, :] * (TAPS - 1) + (source - begin + TAPS - 1)[:, None]
            values += tl.load(back, mask=older, other=0.0).to(tl.float32)
        factor = tl.load(weight + at_c * TAPS + tap, mask=in_c, other=0.0).to(tl.float32)
        sums += values * factor[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + at_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if SILU:
        sums = sums * tl.sigmoid(sums)
    tl.store(y + t[:, None] * y_token + at_c[None, :], sums.to(y.dtype.element_ty), mask=in_t[:, None] & in_c[None, :])


@triton.jit
def _window(x, past, at_c, at_y, done, begin, remembered, x_token, C: tl.constexpr, KEPT: tl.constexpr):
    """The last KEPT inputs of a row after `done` of its tokens in this step, [C, Y]."""
    inside = (at_c < C)[:, None] & (at_y < KEPT)[None, :]
    source = (done - KEPT + at_y).to(tl.int64)  # below 0: of earlier steps
    new = tl.load(
        x + (begin + source)[None, :] * x_token + at_c[:, None], mask=inside & (source >= 0)[None, :], other=0.0
    )
    older = inside & ((source < 0) & (source >= -remembered))[None, :]
    old = tl.load(past + at_c[:, None] * KEPT + (KEPT + source)[None, :], mask=older, other=0.0)
    return tl.where((source >= 0)[None, :], new, old.to(new.dtype))


@triton.jit
def _states(
    x, state, slot, at_c, begin, end, remembered, save_token, save_slot, count, x_token,
    C: tl.constexpr, KEPT: tl.constexpr, BLOCK_Y: tl.constexpr, SAVES: tl.constexpr,
):  # fmt: skip
    """Write the states that a row saves, then its own."""
    at_y = tl.arange(0, BLOCK_Y)
    place = at_c[:, None] * KEPT + at_y[None, :]
    inside = (at_c < C)[:, None] & (at_y < KEPT)[None, :]
    past = state + slot * (C * KEPT)
    if num_saves(save_token, count, begin, end, SAVES) > 0:
        for i in range(count):
            token = tl.load(save_token + i).to(tl.int32)
            if (token >= begin) & (token < end):
                kept = _window(x, past, at_c, at_y, token + 1 - begin, begin, remembered, x_token, C, KEPT)
                tl.store(state + tl.load(save_slot + i) * (C * KEPT) + place, kept, mask=inside)
    last = _window(x, past, at_c, at_y, end - begin, begin, remembered, x_token, C, KEPT)
    tl.debug_barrier()  # a thread's element may be one that another has yet to read
    tl.store(past + place, last, mask=inside)


@triton.jit
def _conv_rows(
    x, weight, bias, state, y, cu_q_lens, slots, fresh, save_token, save_slot, count, x_token, y_token,
    C: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_Y: tl.constexpr, SAVES: tl.constexpr,
):  # fmt: skip
    """A row's states, and its outputs before them where OUTPUTS."""
    row = tl.program_id(0)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    if begin < end:
        at_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        slot = tl.load(slots + row)
        remembered = (TAPS - 1) * (1 - tl.load(fresh + row).to(tl.int32))
        if OUTPUTS:
            past = state + slot * (C * (TAPS - 1))
            for first in range(begin, end, TOKENS):
                _outputs(
                    x, weight, bias, past, y, at_c, first, begin, end, remembered, x_token, y_token,
                    C, TAPS, HAS_BIAS, SILU, TOKENS,
                )  # fmt: skip
        if TAPS > 1:
            _states(
                x, state, slot, at_c, begin, end, remembered, save_token, save_slot, count, x_token,
                C, TAPS - 1, BLOCK_Y, SAVES,
            )  # fmt: skip


@triton.jit
def _conv_tiles(
    x, weight, bias, state, y, cu_q_lens, slots, fresh, num_rows, x_token, y_token,
    C: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of a row."""
    tile = tl.program_id(0)
    row = tile_row(cu_q_lens, num_rows, tile, TOKENS)
    begin, end = tl.load(cu_q_lens + row), tl.load(cu_q_lens + row + 1)
    first = begin + (tile - begin // TOKENS - row) * TOKENS
    if first < end:
        at_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        past = state + tl.load(slots + row) * (C * (TAPS - 1))
        remembered = (TAPS - 1) * (1 - tl.load(fresh + row).to(tl.int32))
        _outputs(
            x, weight, bias, past, y, at_c, first, begin, end, remembered, x_token, y_token,
            C, TAPS, HAS_BIAS, SILU, TOKENS,
        )  # fmt: skip


def causal_conv(
    x_TC: Tensor,
    weight_CX: Tensor,
    bias_C: Tensor | None,
    state_SCY: Tensor,
    cu_q_lens: Tensor,
    slots: Tensor,
    fresh: Tensor,
    save_token: Tensor,
    save_slot: Tensor,
    *,
    activation: str | None = None,
) -> Tensor:
    """`OpTable.causal_conv`."""
    check_conv_activation(activation)
    (num_tokens, channels), taps = x_TC.shape, weight_CX.shape[1]
    y_TC = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device)
    if not num_tokens:
        return y_TC
    num_rows = slots.shape[0]
    long = in_chunks(num_tokens, num_rows)
    blocks = triton.cdiv(channels, CHANNELS)
    strides = (x_TC.stride(0), y_TC.stride(0))
    kind = (channels, taps, bias_C is not None, activation == "silu")
    tensors = (x_TC, weight_CX, bias_C, state_SCY, y_TC, cu_q_lens, slots, fresh)
    if long:
        _conv_tiles[num_tokens // TOKENS + num_rows, blocks](
            *tensors, num_rows, *strides, *kind, TOKENS, CHANNELS, num_warps=4
        )
    _conv_rows[num_rows, blocks](
        *tensors, save_token, save_slot, save_token.shape[0], *strides, *kind, not long,
        1 if num_tokens <= num_rows else LONG_ROWS, CHANNELS, triton.next_power_of_2(max(1, taps - 1)), SAVES,
        num_warps=2,
    )  # fmt: skip
    return y_TC


def _case(name: str, tokens: int, channels: int) -> CompileCase:
    """A step of two rows, its inputs cut out of a wider projection."""
    ids = partial(meta, dtype=torch.int64)
    x = meta(tokens, channels + 64)[:, :channels]
    weights = (meta(channels, 4, dtype=torch.float32), meta(channels, dtype=torch.float32))
    ragged = (meta(3, dtype=torch.int32), ids(2), meta(2, dtype=torch.bool), ids(3), ids(3))
    return CompileCase(name, partial(causal_conv, x, *weights, meta(9, channels, 3), *ragged, activation="silu"))


COMPILE_CASES = (
    _case("qwen3-next-decode", 2, 8192),
    _case("qwen3-next-prefill", 300, 8192),
    _case("odd", 300, 1001),
)
