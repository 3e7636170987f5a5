"""AWQ checkpoints (Lin et al. 2023) in the "gemm" layout: 4 bits, groups of inputs, a scale and a zero point each.

qweight [K, N / 8] int32    w[n, k] = scale[k / g, n] * (q[n, k] - zero[k / g, n])
qzeros [G, N / 8] int32     a word holds 8 outputs; its fields, lowest first, are outputs 0, 2, 4, 6, 1, 3, 5, 7
scales [G, N] float16
"""

from __future__ import annotations

from collections.abc import Mapping

from pando.kernels.weights import QuantizedWeight
from pando.quant.packed_words import unpack
from pando.quant.settings import check_whole_words, group_of, integer, read_shaped, require
from pando.quant.source import TensorSource

FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of a word's i-th lowest field."""


class AWQ:
    """Reads modules of an AWQ checkpoint."""

    suffixes = (".qweight", ".qzeros", ".scales")

    def __init__(self, settings: Mapping[str, object]) -> None:
        require(settings, "version", ("gemm", "GEMM"), "AWQ")
        require(settings, "bits", (4,), "AWQ")
        require(settings, "w_bit", (4,), "AWQ")
        self.group_size = integer(settings, "group_size", integer(settings, "q_group_size", 128))

    def weight(self, source: TensorSource, module: str, rows: int, columns: int) -> QuantizedWeight:
        """The matrix [rows, columns]."""
        check_whole_words(rows, 8, f"{module}.qweight")
        words = read_shaped(source, f"{module}.qweight", columns, rows // 8)
        scales = source.read(f"{module}.scales")
        groups = scales.shape[0]
        scales = read_shaped(source, f"{module}.scales", groups, rows).float()
        zeros = unpack(read_shaped(source, f"{module}.qzeros", groups, rows // 8), 4, FIELDS).float()
        return QuantizedWeight(
            values=unpack(words, 4, FIELDS).T.contiguous(),
            scale=scales.T.contiguous(),
            offset=(-zeros * scales).T.contiguous(),
            bits=4,
            group_size=group_of(columns, groups, self.group_size, f"{module}.scales"),
            activation_bits=8,
        )
