"""int8 rows of a cache (`pando.kernels.int8_rows`) inside kernels: D values of a byte, then their float32 scale.

A row of 128 values is 132 bytes long, so rows begin at multiples of 4 bytes and not of 16. Kernels are given such a
cache as words of 4 bytes, with strides in words: so the compiler knows that 4 values can be read at once, and the scale
is one word. A cache whose rows begin elsewhere (D no multiple of 4, views with odd gaps) is read byte by byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 4


def as_words(cache: Tensor) -> Tensor:
    """An int8 cache [S, K, D + 4] as int32 [S, K, D / 4 + 1] where its rows are of whole words; others as they are."""
    if cache.dtype is not torch.int8:
        return cache
    whole = (*cache.stride()[:2], cache.shape[2], cache.storage_offset())
    return cache if any(number % WORD for number in whole) else cache.view(torch.int32)


@triton.jit
def values_at(row):
    """The addresses of the bytes of rows, given as words or bytes."""
    return row.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def load_scale(row, inside, D: tl.constexpr, MASKED: tl.constexpr):
    """The scales behind the D values of rows, float32; 0 where not `inside`, where MASKED."""
    if row.dtype.element_ty == tl.int32:
        at = row + D // 4
        word = tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)
    else:
        word = tl.zeros(row.shape, tl.int32)
        for byte in tl.static_range(4):
            at = row + D + byte
            part = tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)
            word |= (part.to(tl.int32) & 255) << (8 * byte)
    return word.to(tl.float32, bitcast=True)


@triton.jit
def store_scale(row, scale, inside, D: tl.constexpr):
    """Write scales behind the D values of rows."""
    word = scale.to(tl.int32, bitcast=True)
    if row.dtype.element_ty == tl.int32:
        tl.store(row + D // 4, word, mask=inside)
    else:
        for byte in tl.static_range(4):
            tl.store(row + D + byte, (word >> (8 * byte)).to(tl.int8), mask=inside)
