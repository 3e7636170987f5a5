"""Quantised weights in the panels of the compiled CPU kernels (csrc/linear_int.hpp), without going through floats.

int8 weights with one scale per output take 8 bits each. Weights with groups keep the scale of a group, and its offset
unless all weights are symmetric (4 bits: offset -8 * scale), as float16 times a power of two per output: exact for
scales that came as float16 or bfloat16 within a range of 2^29, and within 2^-11 of any other.

Activations are integers in every product. With activation_bits 8 they are rounded as `QuantizedWeight` says, to the
same integers. With 16 they are rounded to 16 bits, with one scale per token and group (max |x| / 32639): within
2^-16 of the largest of their group, at twice the arithmetic and the same reading of memory. A row that has an infinity
or a NaN becomes NaN; other rows do not notice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pando.kernels import _native
from pando.kernels.weights import QuantizedWeight, UnroundedWeight

Take = Callable[[int], Tensor]
"""Memory for so many bytes."""

Spec = tuple[int, int, int, int, int, int, bool]
"""The fields of `cpu_linear.PanelSpec`."""


def pack_quantized(weight: QuantizedWeight, activation: int, take: Take) -> tuple[Spec, Tensor, Tensor]:
    """What native code must know of the packed weight, its panels, and a factor per output [padded N] float32.

    activation: code of a gated activation, -1 for none. Raises ValueError for schemes without kernels: groups that are
    no multiple of 4, more than 131,072 inputs of one scale, weights of no inputs or not on the CPU.
    """
    (n, k), group = weight.shape, min(weight.group_size, weight.shape[1])
    if k == 0 or not weight.values.is_cpu:
        raise ValueError(f"a quantised weight {[n, k]} on {weight.values.device} can not be packed")
    values, scale = weight.values.contiguous(), weight.scale.contiguous()
    offset = None if weight.offset is None else weight.offset.float().contiguous()
    source = _native.QuantizedSource(
        n,
        k,
        group,
        weight.bits,
        activation,
        values.data_ptr(),
        scale.data_ptr(),
        0 if offset is None else offset.data_ptr(),
    )
    kind, has_offsets, num_bytes, padded = _native.plan_quantized(source)
    panels, factors = take(num_bytes), torch.empty(padded, dtype=torch.float32)
    _native.pack_quantized(source, panels.data_ptr(), factors.data_ptr())
    return (kind, n, k, group, activation, weight.activation_bits, has_offsets), panels, factors


FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""DType of csrc/kernels.hpp."""


def pack_unrounded(level: int, weight: UnroundedWeight, activation: int, take: Take) -> tuple[Spec, Tensor, Tensor]:
    """Round and pack in one pass: the bytes that rounding first gives. Raises ValueError as `pack_quantized` does."""
    (n, k), group = weight.shape, min(weight.group_size, weight.shape[1])
    dtypes = {part.dtype for part in weight.parts}
    if k == 0 or len(dtypes) != 1 or not dtypes <= FLOATS.keys() or any(not part.is_cpu for part in weight.parts):
        raise ValueError(f"a weight {[n, k]} of {dtypes} can not be rounded")
    parts = [part if part.stride(1) == 1 else part.contiguous() for part in weight.parts]
    kind, has_offsets, num_bytes, padded = _native.plan_rounded(n, k, group, weight.bits, activation)
    panels, factors = take(num_bytes), torch.empty(padded, dtype=torch.float32)
    _native.pack_rounded(
        level,
        FLOATS[parts[0].dtype],
        [(part.data_ptr(), len(part), part.stride(0)) for part in parts],
        k,
        group,
        weight.bits,
        activation,
        panels.data_ptr(),
        factors.data_ptr(),
    )
    return (kind, n, k, group, activation, weight.activation_bits, has_offsets), panels, factors
