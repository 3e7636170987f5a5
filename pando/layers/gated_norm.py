"""RMS norm with a gate, as recurrent mixers have it before their output projection."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pando.kernels.ops import OpTable
from pando.layers.shapes import GatedNormPlace


class GatedNorm:
    """norm(y) * silu(z), or norm(y * silu(z)) with place "after_gate"; without a weight, y * silu(z).

    weight float32 [G, D]: each group of D elements is normalised by itself. [1, D] serves any number of groups.
    """

    __slots__ = ("weight", "eps", "place", "_norm")

    def __init__(self, weight: Tensor | None, eps: float, place: GatedNormPlace, ops: OpTable) -> None:
        self.weight = weight
        self.eps = eps
        self.place = place
        self._norm = ops.rms_norm

    def __call__(self, y_TC: Tensor, z_TC: Tensor) -> Tensor:
        """[T, C], [T, C] -> [T, C], dtype of y; the gate and the norm in float32."""
        gate_TC = F.silu(z_TC.float())
        if self.weight is None:
            return (y_TC * gate_TC).to(y_TC.dtype)
        if self.place == "after_gate":
            return self._normed(y_TC * gate_TC).to(y_TC.dtype)
        return self._normed(y_TC.float()).mul_(gate_TC).to(y_TC.dtype)

    def _normed(self, wide_TC: Tensor) -> Tensor:
        assert self.weight is not None
        groups_TGD = wide_TC.view(wide_TC.shape[0], -1, self.weight.shape[-1])
        if self.weight.shape[0] == 1:
            return self._norm(groups_TGD, self.weight[0], self.eps).view_as(wide_TC)
        scaled = groups_TGD * (groups_TGD.square().mean(-1, keepdim=True) + self.eps).rsqrt_()
        return (scaled * self.weight).view_as(wide_TC)
