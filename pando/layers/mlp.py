"""Feed-forward blocks: gated (SwiGLU and kin) and plain."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from pando.layers.linear import Linear


class GatedMLP:
    """down(act(gate(x)) * up(x)); gate_up stacks the rows of gate, then up, and applies the activation."""

    __slots__ = ("gate_up", "down")

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.down(self.gate_up(x_TM))


class PlainMLP:
    """down(act(up(x)))."""

    __slots__ = ("up", "down", "activation")

    def __init__(self, up: Linear, down: Linear, activation: str) -> None:
        self.up = up
        self.down = down
        self.activation = activation

    def __call__(self, x_TM: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.down(_activate(self.up(x_TM), self.activation))


def _activate(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    if kind == "relu2":
        return F.relu(x).square_()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
