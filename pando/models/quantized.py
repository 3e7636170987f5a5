"""A checkpoint that is quantised, under the names a plain one has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pando.models.weights import Change, SafetensorsSource
from pando.quant.formats import QuantFormat
from pando.quant.order import InputWeight
from pando.quant.source import WeightProblem

WEIGHT = ".weight"


class QuantizedSource:
    """The tensors of a quantised module appear as one: `MODULE.weight`. All others are as they are stored."""

    def __init__(self, files: SafetensorsSource, form: QuantFormat) -> None:
        self.files = files
        self.form = form
        stored, marker = files.names(), form.suffixes[0]
        self._modules = frozenset(name.removesuffix(marker) for name in stored if name.endswith(marker))
        self._names = frozenset(self._plain_name(name) for name in stored)

    def _plain_name(self, name: str) -> str:
        for suffix in self.form.suffixes:
            if name.endswith(suffix) and name.removesuffix(suffix) in self._modules:
                return name.removesuffix(suffix) + WEIGHT
        return name

    def names(self) -> frozenset[str]:
        """Names as a plain checkpoint would have them."""
        return self._names

    def tensor(self, name: str, shape: Sequence[int], change: Change | None = None) -> Tensor:
        """A float tensor. Raises WeightProblem."""
        if self.is_quantized(name):
            raise WeightProblem(f"{name} is quantised, which is not supported where {list(shape)} is expected")
        return self.files.tensor(name, shape, change)

    def weight(self, name: str, rows: int, columns: int) -> InputWeight:
        """A matrix, quantised where the checkpoint has it so. Raises WeightProblem."""
        if self.is_quantized(name):
            return self.form.weight(self.files, name.removesuffix(WEIGHT), rows, columns)
        return self.files.weight(name, rows, columns)

    def is_quantized(self, name: str) -> bool:
        """Whether a name stands for a quantised module."""
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) in self._modules

    def release(self) -> None:
        """Give back the pages of all files."""
        self.files.release()
