"""Linear maps, alone and fused."""

from __future__ import annotations

from torch import Tensor

from pando.kernels.ops import OpTable


class Linear:
    """x @ weight.T + bias. weight [out, in]; several projections of one input are stored as one, rows stacked."""

    __slots__ = ("weight", "bias", "_op")

    def __init__(self, weight: Tensor, bias: Tensor | None, ops: OpTable) -> None:
        self.weight = weight
        self.bias = bias
        self._op = ops.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self._op(x, self.weight, self.bias)
