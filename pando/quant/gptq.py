"""GPTQ checkpoints (Frantar et al. 2022), 4 and 8 bits: groups of inputs, a scale and a zero point each.

qweight [K * bits / 32, N] int32    w[n, k] = scale[g_idx[k], n] * (q[n, k] - zero[g_idx[k], n])
qzeros [G, N * bits / 32] int32     words hold neighbouring inputs (qweight) or outputs (qzeros), lowest bits first;
scales [G, N] float16               the first format stores zero - 1, `checkpoint_format: gptq_v2` stores zero
g_idx [K] int32                     group of an input; k / g unless made with act order
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pando.kernels.weights import QuantizedWeight
from pando.quant.order import OrderedWeight
from pando.quant.packed_words import unpack
from pando.quant.settings import check_whole_words, group_of, integer, read_shaped, require
from pando.quant.source import TensorSource, WeightProblem


class GPTQ:
    """Reads modules of a GPTQ checkpoint."""

    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")

    def __init__(self, settings: Mapping[str, object]) -> None:
        require(settings, "bits", (4, 8), "GPTQ")
        require(settings, "checkpoint_format", ("gptq", "gptq_v2"), "GPTQ")
        require(settings, "is_marlin_format", (False,), "GPTQ")
        self.group_size = integer(settings, "group_size", 128)
        self.zero_shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def weight(self, source: TensorSource, module: str, rows: int, columns: int) -> QuantizedWeight | OrderedWeight:
        """The matrix [rows, columns]; its bits follow from the tensors, because a checkpoint may mix them."""
        words = source.read(f"{module}.qweight")
        bits = 32 * words.shape[0] // columns
        if bits not in (4, 8):
            raise WeightProblem(
                f"{module}.qweight has shape {list(words.shape)}, [{columns // 8}, {rows}] (4 bits) or "
                f"[{columns // 4}, {rows}] (8 bits) expected"
            )
        check_whole_words(columns, 32 // bits, f"{module}.qweight")
        words = read_shaped(source, f"{module}.qweight", columns * bits // 32, rows)
        groups = source.read(f"{module}.scales").shape[0]
        scales = read_shaped(source, f"{module}.scales", groups, rows).float()
        check_whole_words(rows, 32 // bits, f"{module}.qzeros")
        zeros = unpack(read_shaped(source, f"{module}.qzeros", groups, rows * bits // 32), bits).float()
        weight = from_codes(unpack(words.T, bits), scales.T, zeros.T + self.zero_shift, bits)
        group_size = group_of(columns, groups, self.group_size, f"{module}.scales")
        return self._ordered(source, module, weight, group_size)

    def _ordered(
        self, source: TensorSource, module: str, parts: tuple[Tensor, Tensor, Tensor], group_size: int
    ) -> QuantizedWeight | OrderedWeight:
        """The weight with neighbours in a group, and the order of its inputs where that is not their own."""
        codes, scale, offset = parts
        columns, bits = codes.shape[1], 8 if codes.dtype is torch.int8 else 4
        activation_bits = 8 if bits == 4 else 16
        groups = torch.arange(columns) // group_size
        name = f"{module}.g_idx"
        stored = read_shaped(source, name, columns).long() if name in source.names() else groups
        order = None
        if not torch.equal(stored, groups):
            order = stored.argsort(stable=True)
            if not torch.equal(stored[order], groups):
                raise WeightProblem(f"{name} does not divide {columns} inputs into groups of {group_size}")
            codes = codes[:, order].contiguous()
        some = None if bits == 8 and not bool(offset.any()) else offset
        weight = QuantizedWeight(codes, scale, some, bits, group_size, activation_bits)
        return weight if order is None else OrderedWeight(weight, order)


def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale, offset) of w = scale * (code - zero), for codes [N, K] uint8, scales and zeros [N, G] float32.

    Codes of 8 bits become int8: 128 is taken off them and put into the offset.
    """
    if bits == 4:
        return codes, scales.contiguous(), (-zeros * scales).contiguous()
    # The bytes of code - 128: flipping the highest bit.
    return (codes ^ 128).view(torch.int8), scales.contiguous(), ((128 - zeros) * scales).contiguous()
