"""RMS norm with a gate, as recurrent mixers have it before their output projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pando.kernels.ops import OpTable
from pando.layers.shapes import GatedNormPlace


def gated(y_TC: Tensor, z_TC: Tensor) -> Tensor:
    """y * silu(z) in float32."""
    return y_TC * F.silu(z_TC.float())


def gated_as(y_TC: Tensor, z_TC: Tensor, dtype: torch.dtype) -> Tensor:
    """y * silu(z), computed in float32."""
    return gated(y_TC, z_TC).to(dtype)


def group_norm(y_TC: Tensor, weight_GD: Tensor, eps: float) -> Tensor:
    """RMS norm of each group of D elements, which has a weight of its own."""
    groups_TGD = y_TC.view(y_TC.shape[0], -1, weight_GD.shape[-1])
    scaled = groups_TGD * (groups_TGD.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (scaled * weight_GD).view_as(y_TC)


class GatedNorm:
    """norm(y) * silu(z), or norm(y * silu(z)) with place "after_gate"; without a weight, y * silu(z).

    weight float32 [G, D]: each group of D elements is normalised by itself. [1, D] serves any number of groups.
    """

    __slots__ = ("weight", "eps", "place", "_norm", "_group_norm", "_gated", "_gated_as")

    def __init__(self, weight: Tensor | None, eps: float, place: GatedNormPlace, ops: OpTable) -> None:
        self.weight = weight
        self.eps = eps
        self.place = place
        self._norm = ops.rms_norm
        self._group_norm = ops.fuse(group_norm)
        self._gated, self._gated_as = ops.fuse(gated), ops.fuse(gated_as)

    def __call__(self, y_TC: Tensor, z_TC: Tensor) -> Tensor:
        """[T, C], [T, C] -> [T, C], dtype of y; the gate and the norm in float32."""
        if self.weight is None:
            return self._gated_as(y_TC, z_TC, y_TC.dtype)
        if self.place == "after_gate":
            return self._normed(self._gated(y_TC, z_TC)).to(y_TC.dtype)
        return self._gated_as(self._normed(y_TC.float()), z_TC, y_TC.dtype)

    def _normed(self, wide_TC: Tensor) -> Tensor:
        assert self.weight is not None
        if self.weight.shape[0] > 1:
            return self._group_norm(wide_TC, self.weight, self.eps)
        groups_TGD = wide_TC.view(wide_TC.shape[0], -1, self.weight.shape[-1])
        return self._norm(groups_TGD, self.weight[0], self.eps).view_as(wide_TC)
