"""Norms over the last dimension. `add` also folds a branch into the residual stream, in one op where there is one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pando.kernels.ops import OpTable


class Norm(Protocol):
    """What the decoder calls between its branches."""

    def __call__(self, x_TM: Tensor) -> Tensor:
        """The normalised x, dtype of x."""

    def add(self, x_TM: Tensor, residual_TM: Tensor) -> Tensor:
        """residual += x in place; returns the normalised residual."""


class RMSNorm:
    """x / rms(x) * weight. weight float32 [M]; a family that stores weight - 1 is folded at load."""

    __slots__ = ("weight", "eps", "_norm", "_add_norm")

    def __init__(self, weight: Tensor, eps: float, ops: OpTable) -> None:
        self.weight = weight
        self.eps = eps
        self._norm = ops.rms_norm
        self._add_norm = ops.add_rms_norm

    def __call__(self, x_TM: Tensor) -> Tensor:
        """The normalised x, dtype of x."""
        return self._norm(x_TM, self.weight, self.eps)

    def add(self, x_TM: Tensor, residual_TM: Tensor) -> Tensor:
        """residual += x in place; returns the normalised residual."""
        return self._add_norm(x_TM, residual_TM, self.weight, self.eps)


class LayerNorm:
    """(x - mean) / std * weight + bias, computed in float32. weight float32 [M] or [heads, D] per head, or None."""

    __slots__ = ("weight", "bias", "eps", "_norm")

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float, ops: OpTable) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self._norm = ops.layer_norm

    def __call__(self, x_TM: Tensor) -> Tensor:
        """The normalised x, dtype of x."""
        return self._norm(x_TM, self.weight, self.bias, self.eps)

    def add(self, x_TM: Tensor, residual_TM: Tensor) -> Tensor:
        """residual += x in place; returns the normalised residual."""
        residual_TM.add_(x_TM)
        return self(residual_TM)


class NoNorm:
    """Identity, for placements where a branch reads the residual stream itself (post-norm)."""

    __slots__ = ()

    def __call__(self, x_TM: Tensor) -> Tensor:
        """x itself."""
        return x_TM

    def add(self, x_TM: Tensor, residual_TM: Tensor) -> Tensor:
        """residual += x in place; returns the residual itself."""
        return residual_TM.add_(x_TM)


class Scale:
    """x * factor in place: the multiplier some families put on a branch before it joins the residual stream."""

    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x_TM: Tensor) -> Tensor:
        """The scaled x."""
        return x_TM.mul_(self.factor)
