"""Pieces of a layer from the tensors of a checkpoint: what attention, mixers and MLPs are built of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pando.kernels.ops import OpTable
from pando.kernels.weights import QuantizedWeight, UnroundedWeight
from pando.layers.linear import Linear
from pando.layers.norm import LayerNorm, RMSNorm
from pando.layers.rotary import Rotary
from pando.layers.shapes import RopeShape
from pando.models.spec import Spec
from pando.models.weights import Loader
from pando.quant.on_load import OnLoad
from pando.quant.order import InputWeight, OrderedWeight


def scaled(weight: InputWeight, factor: float) -> InputWeight:
    """The weight times a factor, rounded once to its own dtype."""
    if factor == 1.0:
        return weight
    if isinstance(weight, Tensor):
        return (weight.float() * factor).to(weight.dtype)
    if isinstance(weight, OrderedWeight):
        return OrderedWeight(_scaled(weight.weight, factor), weight.order)
    return _scaled(weight, factor)


def _scaled(weight: QuantizedWeight | UnroundedWeight, factor: float) -> QuantizedWeight | UnroundedWeight:
    """A quantised weight times a factor."""
    if isinstance(weight, UnroundedWeight):
        return replace(weight, parts=tuple((part.float() * factor).to(part.dtype) for part in weight.parts))
    offset = None if weight.offset is None else weight.offset * factor
    return replace(weight, scale=weight.scale * factor, offset=offset)


class Parts:
    """Norms, linear maps and rotary embeddings of one model; layers with equal rotary embeddings share a table."""

    def __init__(self, spec: Spec, loader: Loader, ops: OpTable, context_length: int, rounding: OnLoad) -> None:
        self.spec = spec
        self.loader = loader
        self.ops = ops
        self.rounding = rounding
        self._context_length = context_length
        self._rotaries: dict[RopeShape, Rotary] = {}

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The distinct rotary embeddings of the layers built so far."""
        return tuple(self._rotaries.values())

    def norm(self, name: str, *shape: int) -> RMSNorm | LayerNorm:
        """A norm of the family's kind, of elements [*shape], from its checkpoint name."""
        if not self.spec.norm_weight:
            return LayerNorm(None, None, self.spec.eps, self.ops)
        weight = self.loader.float32(name + ".weight", *shape).add_(self.spec.norm_offset)
        if self.spec.norm == "rms":
            return RMSNorm(weight, self.spec.eps, self.ops)
        bias = self.loader.float32(name + ".bias", *shape) if self.spec.norm_bias else None
        return LayerNorm(weight, bias, self.spec.eps, self.ops)

    def rms_norm(self, name: str, *shape: int, eps: float) -> RMSNorm:
        """An RMS norm whose weight is stored as it is, whatever the family's other norms are."""
        return RMSNorm(self.loader.float32(name + ".weight", *shape), eps, self.ops)

    def linear(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        """A linear map from its checkpoint name."""
        return self.fused([(name, rows)], columns, bias)

    def plain(self, parts: Sequence[tuple[str, int]], bias: bool, columns: int | None = None) -> Linear:
        """Linear maps of one input (the hidden states), as one, never rounded: a router, gates, step sizes."""
        columns = columns or self.spec.hidden_size
        weights = [self.loader.weight(name + ".weight", rows, columns) for name, rows in parts]
        vector = self.loader.vectors([(name + ".bias", rows) for name, rows in parts]) if bias else None
        return Linear.fused(weights, vector, self.ops)

    def fused(
        self,
        parts: Sequence[tuple[str, int]],
        columns: int,
        bias: bool,
        activation: str | None = None,
        factors: Sequence[float] | None = None,
    ) -> Linear:
        """Several linear maps of one input, given as (checkpoint name, rows), as one; factors: of their matrices."""
        weights = self.weights([(name + ".weight", rows) for name, rows in parts], columns, factors)
        vector = self.loader.vectors([(name + ".bias", rows) for name, rows in parts]) if bias else None
        return Linear.fused(weights, vector, self.ops, activation=activation)

    def weights(
        self, parts: Sequence[tuple[str, int]], columns: int, factors: Sequence[float] | None = None
    ) -> list[InputWeight]:
        """Matrices of one fused projection, rounded to one if that was asked for."""
        stored = [self.loader.weight(name, rows, columns) for name, rows in parts]
        if factors is not None:
            stored = [scaled(weight, factor) for weight, factor in zip(stored, factors, strict=True)]
        return self.rounding.round_linear(stored)

    def tensors(self, index: int, whole: str, parts: dict[str, int]) -> list[tuple[str, int]]:
        """Tensors of a fused linear: one when the checkpoint stores it fused, else one per part."""
        fused = self.spec.layer_name(index, whole)
        if fused + ".weight" in self.loader.names:
            return [(fused, sum(parts.values()))]
        return [(self.spec.layer_name(index, role), rows) for role, rows in parts.items()]

    def rotary(self, rope: RopeShape) -> Rotary:
        """The rotary embedding of a shape."""
        if rope not in self._rotaries:
            self._rotaries[rope] = Rotary(rope, self._context_length, self.loader.device, self.ops)
        return self._rotaries[rope]
