"""Weights of linear maps as a checkpoint or a quantiser gives them, before an op table packs them for its kernels.

Legend: N outputs, K inputs, G groups of inputs (the last one may be shorter). Values are independent of any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """w[n, k] = scale[n, g] * values[n, k] + offset[n, g] with g = k // group_size.

    values [N, K]: int8 in -127..127 or float8 e4m3 (bits 8) or uint8 in 0..15 (bits 4). scale and offset [N, G]
    float32; offset None is 0. group_size == K is one scale per output, which is all that float8 can have.
    activation_bits: 16 multiplies activations as they are; 8 rounds them to int8 first, with one scale per token and
    group of inputs: max |x| / 127, ties to even. A table may leave them as they are where rounding would save nothing.
    Of float8 weights 8 allows a table to round them to float8 e4m3, with one scale per token: max |x| / 448.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    bits: int
    group_size: int
    activation_bits: int

    def __post_init__(self) -> None:
        (n, k), groups = self.values.shape, -(-self.values.shape[1] // self.group_size)
        assert self.bits in (4, 8) and self.activation_bits in (8, 16), (self.bits, self.activation_bits)
        integers = self.values.dtype is (torch.int8 if self.bits == 8 else torch.uint8)
        plain_float = self.is_float and self.bits == 8 and groups == 1 and self.offset is None
        assert integers or plain_float, (self.values.dtype, self.bits, groups)
        assert self.scale.shape == (n, groups) and self.scale.dtype is torch.float32, (self.scale.shape, n, k, groups)
        assert self.offset is None or self.offset.shape == (n, groups), self.offset.shape

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values.shape

    @property
    def is_float(self) -> bool:
        """Whether the values are float8."""
        return self.values.dtype is torch.float8_e4m3fn

    @property
    def scheme(self) -> tuple[int, int, int, bool]:
        """Weights of equal schemes can be one weight."""
        return self.bits, self.group_size, self.activation_bits, self.is_float

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        scale = self.scale.repeat_interleave(self.group_size, 1)[:, : self.values.shape[1]]
        wide = self.values.float() * scale
        if self.offset is not None:
            wide += self.offset.repeat_interleave(self.group_size, 1)[:, : self.values.shape[1]]
        return wide

    def rows(self, index: slice | Tensor) -> QuantizedWeight:
        """Some of the outputs."""
        offset = None if self.offset is None else self.offset[index]
        return replace(self, values=self.values[index], scale=self.scale[index], offset=offset)


@dataclass(frozen=True, slots=True)
class UnroundedWeight:
    """A float weight [N, K] for an op table to round while it packs it, so that no rounded copy is ever held whole.

    parts [n_i, K]: its rows, of one float dtype, one part after another. The rest as for the `QuantizedWeight` that it
    stands for: bits 8 has one scale per output (group_size K), bits 4 a scale and an offset per group of inputs, and
    both have the values that `pando.quant.rounding` gives.
    """

    parts: tuple[Tensor, ...]
    bits: int
    group_size: int
    activation_bits: int

    @property
    def scheme(self) -> tuple[int, int, int, bool]:
        """As of a `QuantizedWeight`."""
        return self.bits, self.group_size, self.activation_bits, False

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return torch.Size((sum(len(part) for part in self.parts), self.parts[0].shape[1]))

    def rows(self, index: slice | Tensor) -> UnroundedWeight:
        """Some of the outputs."""
        return replace(self, parts=(self._whole()[index],))

    def dequantize(self) -> Tensor:
        """[N, K] float32, not rounded."""
        return self._whole().float()

    def _whole(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


Weight = Tensor | QuantizedWeight | UnroundedWeight
"""[N, K]: a float tensor, a quantised one, or one to be rounded."""


def concatenate(parts: Sequence[Weight]) -> Weight:
    """Several weights of the same inputs one after another along N. Raises ValueError if their schemes differ."""
    if len(parts) == 1:
        return parts[0]
    dense = [part for part in parts if isinstance(part, Tensor)]
    if len(dense) == len(parts):
        return torch.cat(dense)
    unrounded = [part for part in parts if isinstance(part, UnroundedWeight)]
    if len(unrounded) == len(parts) and len({replace(part, parts=()) for part in unrounded}) == 1:
        return replace(unrounded[0], parts=tuple(each for part in unrounded for each in part.parts))
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    schemes = {part.scheme for part in quantized}
    if len(quantized) != len(parts) or len(schemes) != 1:
        raise ValueError("parts of a fused projection are quantised differently")
    offsets = [part.offset for part in quantized if part.offset is not None]
    if offsets and len(offsets) != len(parts):
        offsets = [torch.zeros_like(part.scale) if part.offset is None else part.offset for part in quantized]
    return replace(
        quantized[0],
        values=torch.cat([part.values for part in quantized]),
        scale=torch.cat([part.scale for part in quantized]),
        offset=torch.cat(offsets) if offsets else None,
    )
