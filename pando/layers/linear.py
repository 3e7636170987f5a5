"""Linear maps, alone and fused."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels.ops import OpTable, PackedLinear
from pando.kernels.weights import Weight


class Linear:
    """x @ weight.T + bias. weight [out, in]; several projections of one input are stored as one, rows stacked.

    activation: the rows are a gate, then an up part, and the result is act(gate) * up (see `PackLinear`).
    """

    __slots__ = ("in_features", "packed")

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        ops: OpTable,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.in_features = weight.shape[1]
        self.packed: PackedLinear = ops.pack_linear(weight, bias, activation=activation, out_dtype=out_dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.packed(x)
