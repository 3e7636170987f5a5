"""Gated short convolution (LFM2): the whole past of a row is the last few inputs of the convolution."""

from __future__ import annotations

from torch import Tensor

from pando.forward import AttentionBackend, ForwardBatch
from pando.layers.causal_conv import CausalConv
from pando.layers.linear import Linear


class ShortConv:
    """(C * conv(B * x)) Wo. inputs gives B, C and x, stacked."""

    __slots__ = ("index", "inputs", "conv", "o")

    def __init__(self, index: int, inputs: Linear, conv: CausalConv, o: Linear) -> None:
        self.index = index
        self.inputs = inputs
        self.conv = conv
        self.o = o

    def __call__(self, x_TM: Tensor, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        """[T, M] -> [T, M]; advances the rows' states."""
        (state,) = attention.pool.states[self.index]
        b_TC, c_TC, x_TC = self.inputs(x_TM).chunk(3, dim=-1)
        return self.o(c_TC * self.conv(b_TC * x_TC, state, batch))
