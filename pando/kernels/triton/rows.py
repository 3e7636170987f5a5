"""What the kernels over ragged rows share: which row a tile of tokens belongs to, which tokens' states are saved, and
how rows are followed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SAVES = 64
"""Saves that are looked at together."""

LONG_ROWS = 4
"""With more tokens per row than this, on average, rows are followed in chunks."""


@triton.jit
def tile_row(cu_q_lens, num_rows, tile, BLOCK: tl.constexpr):
    """The row of tile `tile`, where row r owns tiles cu_q_lens[r] // BLOCK + r onwards.

    These are as many as it needs, or one more: a grid of T // BLOCK + R tiles covers all rows, whatever their lengths.
    """
    low = 0
    high = num_rows
    while low + 1 < high:  # the first tile of `low` is at or before this one, that of `high` behind it
        middle = (low + high) // 2
        before = tl.load(cu_q_lens + middle) // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def num_saves(save_token, count, begin, end, BLOCK: tl.constexpr):
    """How many saves are of tokens begin .. end - 1."""
    found = 0
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(save_token + at, mask=at < count, other=-1)
        found += tl.sum(((token >= begin) & (token < end)).to(tl.int32), 0)
    return found


@triton.jit
def first_save(save_token, count, begin, end, BLOCK: tl.constexpr):
    """The first of tokens begin .. end - 1 whose state is saved; `end` if there is none."""
    found = end
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        token = tl.load(save_token + at, mask=at < count, other=-1).to(tl.int32)
        found = tl.minimum(found, tl.min(tl.where((token >= begin) & (token < end), token, end), 0))
    return found


@triton.jit
def store_saves(s, state, place, inside, save_token, save_slot, count, token, SIZE: tl.constexpr):
    """Write the state `s` after `token` to the slots that ask for it, SIZE elements apart."""
    for i in range(count):
        if tl.load(save_token + i) == token:
            tl.store(state + tl.load(save_slot + i) * SIZE + place, s, mask=inside)


@triton.jit
def left_between(since, keep):
    """exp(since[i] - since[j]) where `keep`, else 0; `since` falls, and only what is at most 1 may be kept."""
    return tl.where(keep, tl.exp(tl.where(keep, since[:, None] - since[None, :], 0.0)), 0.0)


def in_chunks(num_tokens: int, num_rows: int) -> bool:
    """Whether a step's rows are long enough for chunks. All rows of a step go the same way, whatever their lengths."""
    return num_tokens > LONG_ROWS * num_rows


def precision_of(x: Tensor) -> str:
    """How products take the factors of float32 inputs; those of 16-bit inputs have 16 bits."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"
