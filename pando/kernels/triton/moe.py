"""Routed experts: pairs sorted by expert, two products over tiles of one expert's rows, a weighted sum per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.activation import activation_code
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.linear import float8_meta, quantized_meta
from pando.kernels.triton.matrix import Matrix, pack, product, tiles_for
from pando.kernels.triton.rounding import round_rows
from pando.kernels.triton.routing import route
from pando.kernels.weights import Weight

FEW_ROWS = 16
"""Rows of an expert up to which activations stay as they are, as in `linear`."""


@triton.jit
def _combine_kernel(y_ptr, weight_ptr, out_ptr, choices, width, weight_stride, BLOCK: tl.constexpr):
    """out[token] = sum over the choices, in order, of weight * y[pair] in float32."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(choices):
        weight = tl.load(weight_ptr + token * weight_stride + choice).to(tl.float32)
        y = tl.load(y_ptr + (token * choices + choice) * width + place, mask=inside, other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * width + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(y: Tensor, weights: Tensor, out: Tensor) -> None:
    """out [T, M] = the weighted sum of each token's k rows of y [T k, M]."""
    (tokens, width), weights = out.shape, weights if weights.stride(1) == 1 else weights.contiguous()
    block = min(1024, triton.next_power_of_2(width))
    _combine_kernel[(tokens, triton.cdiv(width, block))](
        y, weights, out, weights.shape[1], width, weights.stride(0), BLOCK=block, num_warps=4
    )


class TritonExperts:
    """`PackedExperts` on a GPU. A token's result depends on how many tokens there are, not on what they are."""

    __slots__ = ("gate_up", "down", "_code")

    def __init__(self, gate_up: Matrix, down: Matrix, activation: str) -> None:
        self.gate_up, self.down, self._code = gate_up, down, activation_code(activation)

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.gate_up.num_bytes + self.down.num_bytes

    def __call__(self, x_TM: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sum over the k chosen experts of weight * expert(x): [T, M]."""
        out = torch.empty(x_TM.shape, dtype=x_TM.dtype, device=x_TM.device)
        pairs, experts = topk_ids.numel(), self.gate_up.values.shape[0]
        if pairs == 0:
            return out.zero_()
        x = x_TM if x_TM.stride(1) == 1 else x_TM.contiguous()
        expected = triton.cdiv(pairs, experts)  # rows of an expert if all are chosen alike
        first = tiles_for(self.gate_up, x, expected, True, routed=True)
        second = replace(tiles_for(self.down, x, expected, False, routed=True), rows=first.rows)
        routing = route(topk_ids, experts, first.rows)
        inner = torch.empty(pairs, self.down.num_inputs, dtype=x.dtype, device=x.device)
        x, scale = self._rounded(x, self.gate_up, expected)
        product(x, self.gate_up, first, inner, activation=self._code, row_scale=scale, routing=routing)
        y = torch.empty(pairs, out.shape[1], dtype=out.dtype, device=out.device)
        inner, scale = self._rounded(inner, self.down, expected)
        product(inner, self.down, second, y, row_scale=scale, routing=replace(routing, gather=False))
        combine(y, topk_weights, out)
        return out

    def _rounded(self, x: Tensor, matrix: Matrix, expected: int) -> tuple[Tensor, Tensor | None]:
        """x in 8 bits with its scales where that pays."""
        return round_rows(x, matrix.values.dtype) if matrix.eight_bit_rows and expected > FEW_ROWS else (x, None)


def pack_experts(
    gate_up: Sequence[Weight],
    down: Sequence[Weight],
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> TritonExperts:
    """`OpTable.pack_experts`."""
    return TritonExperts(pack(gate_up, gate_up_bias), pack(down, down_bias), activation)


def _case(
    name: str, tokens: int, experts: int, choices: int, width: int, inner: int, *, bits: int = 16, oldest: int = 80
) -> CompileCase:
    def weights(n: int, k: int) -> list[Weight]:
        if oldest > 80:
            return [float8_meta(n, k)] * experts
        if bits == 16:
            return [meta(n, k)] * experts
        return [quantized_meta(n, k, bits, 64 if bits == 4 else k, bits == 4, 8)] * experts

    def call() -> Tensor:
        packed = pack_experts(weights(2 * inner, width), weights(width, inner), "silu")
        ids = meta(tokens, choices, dtype=torch.int64)
        return packed(meta(tokens, width), ids, meta(tokens, choices, dtype=torch.float32))

    return CompileCase(name, call, oldest=oldest)


COMPILE_CASES = (
    _case("qwen3-30b-a3b-1", 1, 128, 8, 2048, 768),
    _case("qwen3-30b-a3b-512", 512, 128, 8, 2048, 768),
    _case("qwen3-30b-a3b-8192", 8192, 128, 8, 2048, 768),
    _case("qwen3-30b-a3b-int4-1", 1, 128, 8, 2048, 768, bits=4),
    _case("qwen3-30b-a3b-int4-8192", 8192, 128, 8, 2048, 768, bits=4),
    _case("qwen3-30b-a3b-w8a8-8192", 8192, 128, 8, 2048, 768, bits=8),
    _case("qwen3-30b-a3b-fp8-1", 1, 128, 8, 2048, 768, bits=8, oldest=90),
    _case("qwen3-30b-a3b-fp8-8192", 8192, 128, 8, 2048, 768, bits=8, oldest=90),
)
