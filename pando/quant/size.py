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
    """Bits of an element in groups with a 16-bit scale, and a 16-bit offset if there are any."""
    return bits + (32 if offset else 16) / group_size


BITS_ON_LOAD: Mapping[str, MatrixBits] = {
    "int8": MatrixBits(8, 8),
    "w8a8": MatrixBits(8, 8),
    "int4": MatrixBits(grouped_bits(4, INT4_GROUP), 8),
    "fp8": MatrixBits(8, 8),
}
"""Of the modes that round on load."""


def matrix_bits(quantization: str, config: Mapping[str, object]) -> MatrixBits | None:
    """Bits under a value of `--quantization`, or of a checkpoint whose `config` says that it is quantised.

    None where matrices have the model's dtype. A head that a checkpoint leaves plain counts as 16 bits.
    """
    text = _section(config, "text_config")
    settings = _section(config, "quantization_config") or _section(text, "quantization_config")
    if not settings:
        return BITS_ON_LOAD.get(quantization)
    if settings.get("quant_method") == "compressed-tensors":
        groups = _section(settings, "config_groups")
        weights = _section(_section(groups, next(iter(groups), "")), "weights")
        return MatrixBits(_stored(weights.get("num_bits"), weights.get("group_size")), 16)
    bits = _stored(settings.get("bits"), settings.get("group_size"))
    return MatrixBits(bits, _stored(settings.get("head_bits", 16), None))


def _stored(bits: object, group_size: object) -> float:
    """Bits of an element by what a checkpoint's config says; 4 in rows where it says nothing."""
    width = float(bits) if isinstance(bits, int | float) else 4
    return width if not isinstance(group_size, int) or group_size <= 0 else width + 32 / group_size


def _section(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A nested object; empty if there is none."""
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}
