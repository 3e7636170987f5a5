"""Token embedding and the head that scores the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels.ops import Fuse, as_it_is
from pando.layers.linear import Linear


class Embedding:
    """Rows of weight [V, M] times a multiplier."""

    __slots__ = ("weight", "multiplier")

    def __init__(self, weight: Tensor, multiplier: float = 1.0) -> None:
        self.weight = weight
        # Rounded to the model's dtype, as models trained with such a factor see it.
        self.multiplier = torch.tensor(multiplier, dtype=weight.dtype).item()

    def __call__(self, ids_T: Tensor) -> Tensor:
        """[T] int64 -> [T, M], a fresh tensor."""
        rows = self.weight.index_select(0, ids_T)
        return rows if self.multiplier == 1.0 else rows.mul_(self.multiplier)


def scale_and_cap(logits_EV: Tensor, multiplier: float, softcap: float) -> Tensor:
    """softcap * tanh(multiplier * logits / softcap) in float32; softcap 0: without it."""
    logits_EV = logits_EV.float()
    if multiplier != 1.0:
        logits_EV = logits_EV * multiplier
    return torch.tanh(logits_EV / softcap) * softcap if softcap > 0.0 else logits_EV


class Head:
    """Float32 logits: linear, then a multiplier, then softcap * tanh(logits / softcap)."""

    __slots__ = ("linear", "multiplier", "softcap", "_scale_and_cap")

    def __init__(self, linear: Linear, multiplier: float = 1.0, softcap: float = 0.0, fuse: Fuse = as_it_is) -> None:
        self.linear = linear
        self.multiplier = multiplier
        self.softcap = softcap
        self._scale_and_cap = fuse(scale_and_cap)

    def __call__(self, hidden_EM: Tensor) -> Tensor:
        """[E, M] -> [E, V] float32."""
        logits = self.linear(hidden_EM)
        if self.multiplier == 1.0 and self.softcap == 0.0:
            return logits.float()  # no copy where the linear was packed for float32
        return self._scale_and_cap(logits, self.multiplier, self.softcap)
