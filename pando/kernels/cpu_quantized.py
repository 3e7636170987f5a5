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
from pando.kernels.weights import QuantizedWeight


def pack_quantized(
    weight: QuantizedWeight, bias: Tensor | None, activation: int, take: Callable[[int], Tensor]
) -> tuple[_native.Weight, list[Tensor]]:
    """The weight as native code takes it, and the tensors it points to.

    bias: in panel order, float32 (`cpu_linear.per_output`). activation: code of a gated activation, -1 for none. take:
    memory for so many bytes. Raises ValueError for schemes without kernels: groups that are no multiple of 4, more than
    131,072 inputs of one scale, weights of no inputs or not on the CPU.
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
    handle = _native.Weight(
        kind,
        n,
        k,
        group,
        activation,
        weight.activation_bits,
        panels.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        factors.data_ptr(),
        has_offsets,
    )
    return handle, [panels, factors, *([] if bias is None else [bias])]
