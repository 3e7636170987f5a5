"""Rows of a KV cache in int8: D values, then the float32 they are to be multiplied with, as 4 bytes of the same row.

A cache [S, K, D] of floats becomes one [S, K, D + 4] of int8, so that a slot keeps one address and one stride, and
whoever copies slots copies scales with them. A row stands for values * scale, rounded to the dtype of the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
_SMALLEST = 2.0**-100


def round_rows(x: Tensor) -> Tensor:
    """[..., D] of any float dtype as rows of int8 [..., D + 4], one scale a row: max |x| / 127, ties to even.

    Rows whose largest element is below 2^-100 become zeros; a row with an element that is not finite stands for NaN.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    sane, present = largest.isfinite(), largest >= _SMALLEST
    # Not 127.0 / largest: torch makes that 127 times the reciprocal, which rounds twice.
    factor = torch.where(sane & present, torch.full_like(largest, 127.0) / largest, 0.0)
    scale = torch.where(present, largest / 127.0, 0.0).masked_fill_(~sane, float("nan"))
    values = (wide * factor).nan_to_num_(0.0).round_().to(torch.int8)
    return torch.cat((values, scale.view(torch.int8)), dim=-1)


def expand_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows [..., D + 4] stand for, [..., D] in `dtype`."""
    values, scale = rows.split_with_sizes((rows.shape[-1] - SCALE_BYTES, SCALE_BYTES), dim=-1)
    return (values.float() * scale.contiguous().view(torch.float32)).to(dtype)


def row_size(cache: Tensor) -> int:
    """Dims D of a cache [S, K, D], or of one of int8 rows."""
    return cache.shape[2] - SCALE_BYTES if cache.dtype is torch.int8 else cache.shape[2]
