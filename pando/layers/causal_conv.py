"""Depthwise causal convolution over each row's tokens, with the last inputs of a row in its state."""

from __future__ import annotations

from torch import Tensor

from pando.forward import ForwardBatch, StateBatch
from pando.kernels.ops import OpTable


class CausalConv:
    """activation(conv(x) + bias). weight [C, W] and bias [C] float32; the state is the last W - 1 inputs [C, W - 1]."""

    __slots__ = ("weight", "bias", "activation", "_op")

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None, ops: OpTable) -> None:
        self.weight = weight
        self.bias = bias
        self.activation = activation
        self._op = ops.causal_conv

    def __call__(self, x_TC: Tensor, state: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, C] -> [T, C]; state [slots, C, W - 1] is advanced in place."""
        states = states_of(batch)
        return self._op(
            x_TC,
            self.weight,
            self.bias,
            state,
            batch.cu_q_lens,
            states.slots,
            states.fresh,
            states.save_token,
            states.save_slot,
            activation=self.activation,
        )


def states_of(batch: ForwardBatch) -> StateBatch:
    """The step's state slots; a step of a model with recurrent layers always names them."""
    assert batch.states is not None, "a step without states reached a recurrent layer"
    return batch.states
