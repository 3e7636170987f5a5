"""Token embedding and the head that scores the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

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


class Head:
    """Float32 logits: linear, then a multiplier, then softcap * tanh(logits / softcap)."""

    __slots__ = ("linear", "multiplier", "softcap")

    def __init__(self, linear: Linear, multiplier: float = 1.0, softcap: float = 0.0) -> None:
        self.linear = linear
        self.multiplier = multiplier
        self.softcap = softcap

    def __call__(self, hidden_EM: Tensor) -> Tensor:
        """[E, M] -> [E, V] float32."""
        logits = self.linear(hidden_EM).float()  # no copy where the linear was packed for float32
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap > 0.0:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
