"""Weights whose groups were formed over reordered inputs, and mixtures of schemes inside one fused projection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pando.kernels.weights import QuantizedWeight, UnroundedWeight, Weight


@dataclass(frozen=True, slots=True)
class OrderedWeight:
    """weight [N, K] for inputs taken in another order: the product is x[..., order] @ weight.T. order [K] int64.

    Quantisers that treat the most active inputs first ("act order") give a group of a scale to inputs that are not
    neighbours; sorted by group they are.
    """

    weight: QuantizedWeight | UnroundedWeight
    order: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return tuple(self.weight.shape)

    def dequantize(self) -> Tensor:
        """[N, K] float32, inputs in their own order."""
        wide = self.weight.dequantize()
        out = wide.new_empty(wide.shape)
        out[:, self.order] = wide
        return out

    def rows(self, index: slice | Tensor) -> OrderedWeight:
        """Some of the outputs."""
        return OrderedWeight(self.weight.rows(index), self.order)


EXPAND_AT_ONCE = 1 << 20
"""Elements."""

InputWeight = Weight | OrderedWeight
"""What a checkpoint may hold for a matrix [N, K]."""


def on_device(weight: QuantizedWeight | UnroundedWeight, device: torch.device) -> QuantizedWeight | UnroundedWeight:
    """The weight with its tensors on a device."""
    if isinstance(weight, UnroundedWeight):
        return replace(weight, parts=tuple(part.to(device) for part in weight.parts))
    offset = None if weight.offset is None else weight.offset.to(device)
    return replace(weight, values=weight.values.to(device), scale=weight.scale.to(device), offset=offset)


def expand(weight: InputWeight, dtype: torch.dtype) -> Tensor:
    """The floats a weight stands for, piece by piece: only the result is ever held whole."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    (rows, columns), step = weight.shape, max(1, EXPAND_AT_ONCE // weight.shape[1])
    out = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, step):
        out[start : start + step] = weight.rows(slice(start, start + step)).dequantize()
    return out
