"""Gated activations: of a whole tensor, and as the last step of a product."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels.reference import ACTIVATIONS
from pando.kernels.triton.launch import CompileCase, meta

BLOCK = 1024
"""Outputs per program: 8 a thread of four warps, one 16-byte load from each half."""


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """act(gate) * up in float32. KIND: index into `ACTIVATIONS`. Comparisons pass a NaN on, minima would not."""
    if KIND == 0:  # silu
        return gate * tl.sigmoid(gate) * up
    elif KIND == 1:  # gelu_tanh; 1 + tanh(z) = 2 sigmoid(2 z)
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif KIND == 2:  # gelu
        return gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif KIND == 3:  # relu2
        positive = tl.where(gate < 0.0, 0.0, gate)
        return positive * positive * up
    else:  # swiglu_oai
        capped = tl.where(gate > 7.0, 7.0, gate)
        clamped = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return capped * tl.sigmoid(1.702 * capped) * (clamped + 1.0)


@triton.jit
def _gated_kernel(x_ptr, out_ptr, width, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + place, gated(gate, up, KIND).to(out_ptr.dtype.element_ty), mask=inside)


def activation_code(kind: str) -> int:
    """Index into `ACTIVATIONS`. Raises ConfigError on an unknown kind."""
    if kind not in ACTIVATIONS:
        raise ConfigError(f"activation {kind!r} is not known; known: {', '.join(ACTIVATIONS)}", param="activation")
    return ACTIVATIONS.index(kind)


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """`OpTable.gated_activation`."""
    out = torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    activate(gate_up, activation_code(kind), out)
    return out


def activate(gate_up: Tensor, code: int, out: Tensor) -> None:
    """`gated_activation` by the kind's code into out [T, I] of any float dtype."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    width = rows.shape[1] // 2
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        grid = (rows.shape[0], triton.cdiv(width, block))
        _gated_kernel[grid](rows, out, width, rows.stride(0), KIND=code, BLOCK=block, num_warps=4)


COMPILE_CASES = tuple(
    CompileCase(f"{kind}-{width}", partial(gated_activation, meta(3, 2 * width), kind))
    for kind, width in (("silu", 14336), ("silu", 768), *((kind, 3072) for kind in ACTIVATIONS))
)
