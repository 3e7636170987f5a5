"""Bits a weight takes, without torch: `pando plan` counts with them before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_SIDE = 32
"""Matrices with fewer rows or columns stay as they are: nothing is gained by rounding them."""

INT4_GROUP = 64
"""Inputs that share a scale and an offset under `--quantization int4`; docs/quantization.md has the measurements."""


@dataclass(frozen=True, slots=True)
class MatrixBits:
    """Bits of an element of a projection and of the output head, scales and offsets included."""

    linear: float
    head: float


def grouped_bits(bits: int, group_size: int, *, offset: bool = True) -> float:
    """Bits of an element in groups with a float32 scale, and a float32 offset if there are any."""
    return bits + (64 if offset else 32) / group_size


BITS_ON_LOAD: Mapping[str, MatrixBits] = {
    "int8": MatrixBits(8, 8),
    "w8a8": MatrixBits(8, 8),
    "int4": MatrixBits(grouped_bits(4, INT4_GROUP), 8),
}
"""Of the modes that round on load."""


def matrix_bits(quantization: str) -> MatrixBits | None:
    """Bits under a value of `--quantization`; None where matrices have the model's dtype."""
    return BITS_ON_LOAD.get(quantization)
