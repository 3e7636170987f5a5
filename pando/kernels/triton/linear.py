"""Linear maps: few rows by our own kernel, many rows of plain weights by the vendor's library.

Up to 16 rows a step reads the weight and does little else: one kernel for all kinds of weights, with the gated
activation at its end, and activations as they are. Rounding them to 8 bits, as `activation_bits` 8 asks for, would cost
a kernel and save no reading. Weights of 4 bits never have their activations rounded. Above that

- plain weights go to torch (cuBLAS), with the activation as a kernel of its own;
- int8 weights with 8-bit activations: rows are rounded once, then int8 tensor cores; float8 weights
  likewise, with rows rounded to float8;
- other quantised weights are unpacked in registers up to 256 rows; beyond, writing them out as 16-bit floats costs less
  than unpacking them once for every 128 rows, and cuBLAS multiplies them.

A row's result does not depend on the other rows, but on how many there are: the kernel chosen adds in its own order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pando.kernels.triton.activation import activate, activation_code, gated_activation
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.matrix import DENSE, INT4, Matrix, pack, product, tiles_for
from pando.kernels.triton.rounding import expand, round_rows
from pando.kernels.weights import QuantizedWeight, Weight

FEW_ROWS = 16
"""Rows that one tile of the product kernel holds at least."""

UNPACKED_ROWS = 256
"""Rows up to which quantised weights are unpacked in registers."""

EXPANDED = 1 << 27
"""Weights written out as floats at once: 256 MiB."""


class TritonLinear:
    """`PackedLinear` on a GPU."""

    __slots__ = ("matrix", "_bias", "_activation", "_code", "_out_dtype")

    def __init__(
        self, matrix: Matrix, bias: Tensor | None, activation: str | None, out_dtype: torch.dtype | None
    ) -> None:
        self.matrix, self._bias, self._activation, self._out_dtype = matrix, bias, activation, out_dtype
        self._code = -1 if activation is None else activation_code(activation)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.matrix.num_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; [..., N / 2] with an activation."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        dtype = self._out_dtype or x.dtype
        width = self.matrix.num_outputs // (1 if self._activation is None else 2)
        if rows.shape[0] == 0:
            return torch.empty((*x.shape[:-1], width), dtype=dtype, device=x.device)
        own = rows.shape[0] <= FEW_ROWS if self.matrix.kind == DENSE else rows.shape[0] <= UNPACKED_ROWS
        if self.matrix.kind == DENSE and x.dtype is torch.float32:
            own = False  # tensor cores have no float32
        out = self._own(rows, width, dtype) if own or self._eight_bits(rows) else self._library(rows, dtype)
        return out.view(*x.shape[:-1], width)

    def _eight_bits(self, rows: Tensor) -> bool:
        return self.matrix.eight_bit_rows and rows.shape[0] > FEW_ROWS

    def _own(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(rows.shape[0], width, dtype=dtype, device=rows.device)
        row_scale = None
        if self._eight_bits(rows):
            rows, row_scale = round_rows(rows, self.matrix.values.dtype)
        if self._code >= 0 and self.matrix.kind == INT4 and rows.shape[0] > 2 * FEW_ROWS:
            # Two sums and their partial sums would not fit the registers.
            both = torch.empty(rows.shape[0], 2 * width, dtype=torch.float32, device=rows.device)
            product(rows, self.matrix, tiles_for(self.matrix, rows, rows.shape[0], False), both)
            activate(both, self._code, out)
            return out
        tiles = tiles_for(self.matrix, rows, rows.shape[0], self._code >= 0)
        return product(rows, self.matrix, tiles, out, activation=self._code, row_scale=row_scale)

    def _library(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        bias = None if self._bias is None else self._bias.to(rows.dtype)
        if self.matrix.kind == DENSE:
            out = F.linear(rows, self.matrix.values[0].to(rows.dtype), bias)
        else:
            n, step = self.matrix.num_outputs, max(1, EXPANDED // self.matrix.num_inputs)
            parts = [
                F.linear(
                    rows,
                    expand(self.matrix, rows.dtype, first, min(first + step, n)),
                    None if bias is None else bias[first : first + step],
                )
                for first in range(0, n, step)
            ]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        out = out if self._activation is None else gated_activation(out, self._activation)
        return out.to(dtype)


def pack_linear(
    weight: Weight, bias: Tensor | None = None, *, activation: str | None = None, out_dtype: torch.dtype | None = None
) -> TritonLinear:
    """`OpTable.pack_linear`."""
    matrix = pack([weight], None if bias is None else bias.unsqueeze(0))
    return TritonLinear(matrix, bias, activation, out_dtype)


def quantized_meta(n: int, k: int, bits: int, group_size: int, offset: bool, activation_bits: int) -> QuantizedWeight:
    """A quantised weight without memory, for compile cases."""
    lines = meta(n, -(-k // group_size), dtype=torch.float32)
    values = meta(n, k, dtype=torch.int8 if bits == 8 else torch.uint8)
    return QuantizedWeight(values, lines, lines if offset else None, bits, group_size, activation_bits)


def float8_meta(n: int, k: int) -> QuantizedWeight:
    """A weight of float8 without memory, for compile cases."""
    values, scale = meta(n, k, dtype=torch.float8_e4m3fn), meta(n, 1, dtype=torch.float32)
    return QuantizedWeight(values, scale, None, 8, k, 8)


def _case(name: str, weight: Weight, rows: int, activation: str | None = None, oldest: int = 80) -> CompileCase:
    def call() -> Tensor:
        return pack_linear(weight, activation=activation)(meta(rows, weight.shape[1]))

    return CompileCase(name, call, oldest=oldest)


_LLAMA_UP, _LLAMA_QKV, _LLAMA_DOWN = (28672, 4096), (6144, 4096), (4096, 14336)
COMPILE_CASES = (
    _case("bf16-up", meta(*_LLAMA_UP), 3, "silu"),
    _case("bf16-down", meta(*_LLAMA_DOWN), 3),
    _case("bf16-in-pieces", meta(1024, 2048), 1),
    _case("int8-up-1", quantized_meta(*_LLAMA_UP, 8, 4096, False, 16), 1, "silu"),
    _case("int8-up-256", quantized_meta(*_LLAMA_UP, 8, 4096, False, 16), 256, "silu"),
    _case("w8a8-up-32", quantized_meta(*_LLAMA_UP, 8, 4096, False, 8), 32, "silu"),
    _case("w8a8-up-256", quantized_meta(*_LLAMA_UP, 8, 4096, False, 8), 256, "silu"),
    _case("fp8-up-1", float8_meta(*_LLAMA_UP), 1, "silu", 90),
    _case("fp8-down-16", float8_meta(*_LLAMA_DOWN), 16, None, 90),
    _case("fp8-up-32", float8_meta(*_LLAMA_UP), 32, "silu", 90),
    _case("fp8-up-256", float8_meta(*_LLAMA_UP), 256, "silu", 90),
    _case("fp8-down-256", float8_meta(*_LLAMA_DOWN), 256, None, 90),
    _case("int4-up-1", quantized_meta(*_LLAMA_UP, 4, 64, True, 8), 1, "silu"),
    _case("int4-up-32", quantized_meta(*_LLAMA_UP, 4, 64, True, 8), 32, "silu"),
    _case("int4-up-64", quantized_meta(*_LLAMA_UP, 4, 64, True, 8), 64, "silu"),
    _case("int4-128-qkv-1", quantized_meta(*_LLAMA_QKV, 4, 128, False, 8), 1),
    _case("int8-32-qkv-1", quantized_meta(*_LLAMA_QKV, 8, 32, False, 16), 1),
    _case("int4-qkv-300", quantized_meta(*_LLAMA_QKV, 4, 64, True, 8), 300),
)
