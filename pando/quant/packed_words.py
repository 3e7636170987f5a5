"""Small integers packed into 32-bit words, lowest bits first, along the last dim."""

from __future__ import annotations

import torch
from torch import Tensor

IN_ORDER = tuple(range(8))


def unpack(words: Tensor, bits: int, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """words [..., W] int32 -> uint8 [..., W * 32 / bits] with values 0 .. 2^bits - 1, for 4 or 8 bits.

    order: the place within a word's run that its i-th lowest field belongs to.
    """
    raw = words.contiguous().view(torch.uint8)  # four bytes a word, lowest first
    if bits == 8:
        return raw
    fields = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2)
    if order == IN_ORDER:
        return fields
    places = torch.tensor(order).argsort()
    return fields.unflatten(-1, (-1, 8)).index_select(-1, places).flatten(-2)
