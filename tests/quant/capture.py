"""Op tables that remember or change the weights a model packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pando.kernels.ops import OpTable, PackedExperts, PackedLinear
from pando.kernels.reference import REFERENCE, pack_experts, pack_linear
from pando.kernels.weights import QuantizedWeight, Weight


@dataclass
class Capture:
    """The reference table, with every packed weight seen and put through `change` first."""

    change: Callable[[Weight], Weight] = lambda weight: weight
    weights: list[Weight] = field(default_factory=list)

    def table(self) -> OpTable:
        """The op table."""
        return replace(REFERENCE, name="capture", pack_linear=self._linear, pack_experts=self._experts)

    def _take(self, weight: Weight) -> Weight:
        self.weights.append(weight)
        return self.change(weight)

    def _linear(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> PackedLinear:
        return pack_linear(self._take(weight), bias, activation=activation, out_dtype=out_dtype)

    def _experts(
        self,
        gate_up: Sequence[Weight],
        down: Sequence[Weight],
        activation: str,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> PackedExperts:
        up, low = [self._take(w) for w in gate_up], [self._take(w) for w in down]
        return pack_experts(up, low, activation, gate_up_bias, down_bias)


def as_floats(weight: Weight) -> Weight:
    """What the weight stands for, as a plain float32 matrix."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def full_activations(weight: Weight) -> Weight:
    """The weight multiplied with activations as they are."""
    return replace(weight, activation_bits=16) if isinstance(weight, QuantizedWeight) else weight
