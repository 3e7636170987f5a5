"""`--quantization`: what becomes of the matrices of a plain checkpoint as they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pando.kernels.weights import QuantizedWeight, UnroundedWeight
from pando.quant.order import InputWeight
from pando.quant.rounding import four_bits, per_output, per_output_float8
from pando.quant.size import INT4_GROUP, MIN_SIDE


@dataclass(frozen=True, slots=True)
class Rounding:
    """Matrices [n_i, K] of one input -> one weight, rows one after another.

    floats: to float8 instead of integers of 8 bits. lazily: leave the work to the op table, which must be one that
    `rounds` (`OpTable.rounds`).
    """

    bits: int
    activation_bits: int
    floats: bool = False
    lazily: bool = False

    def __call__(self, parts: Sequence[Tensor]) -> QuantizedWeight | UnroundedWeight:
        """The weight."""
        if self.floats:
            return per_output_float8(parts, self.activation_bits)
        if self.lazily:
            group = parts[0].shape[1] if self.bits == 8 else INT4_GROUP
            return UnroundedWeight(tuple(parts), self.bits, group, self.activation_bits)
        if self.bits == 8:
            return per_output(parts, self.activation_bits)
        return four_bits(parts, INT4_GROUP, self.activation_bits)


@dataclass(frozen=True, slots=True)
class OnLoad:
    """How matrices are rounded; None leaves them as they are.

    linear: projections and experts. head: the output head. Embeddings, norms, biases, routers and matrices with a side
    below `MIN_SIDE` are never rounded: they are small, or looked up row by row, or decide where everything else goes.
    """

    linear: Rounding | None = None
    head: Rounding | None = None

    def lazily(self) -> OnLoad:
        """The same, for an op table that rounds."""
        return OnLoad(*(None if each is None else replace(each, lazily=True) for each in (self.linear, self.head)))

    def round_linear(self, parts: Sequence[InputWeight]) -> list[InputWeight]:
        """The parts of a fused projection or an expert; what the checkpoint itself has quantised stays as it is."""
        return _rounded(parts, self.linear)

    def round_head(self, weight: InputWeight) -> InputWeight:
        """The output head."""
        return _rounded([weight], self.head)[0]


def _rounded(parts: Sequence[InputWeight], rounding: Rounding | None) -> list[InputWeight]:
    plain = [part for part in parts if isinstance(part, Tensor)]
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
    if rounding is None or len(plain) != len(parts) or min(rows, columns) < MIN_SIDE:
        return list(parts)
    return [rounding(plain)]


AS_STORED = OnLoad()
"""Nothing is rounded."""

_INT8, _W8A8, _INT4 = Rounding(8, 16), Rounding(8, 8), Rounding(4, 8)
_FP8 = Rounding(8, 8, floats=True)

ON_LOAD: Mapping[str, OnLoad] = {
    "auto": AS_STORED,
    "int8": OnLoad(_INT8, _INT8),
    "w8a8": OnLoad(_W8A8, _W8A8),
    "int4": OnLoad(_INT4, _W8A8),
    "fp8": OnLoad(_FP8, _FP8),
}
"""By the name `--quantization` has for it."""
