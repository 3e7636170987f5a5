"""Layers as one native call per step: the instruction list of csrc/program.hpp, with the tensors it points to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.kernels import _native
from pando.kernels.cpu_linear import CODES, NativeLinear
from pando.kernels.ops import HeadsShape, PackedLinear, StepTensors


class NativeProgram:
    """`Program` of one instruction-set level. Keeps every tensor alive whose address it was given."""

    def __init__(self, level: int, dtype: torch.dtype, width: int) -> None:
        self._native = _native.Program(level, CODES[dtype], width)
        self._dtype = dtype
        self._kept: list[object] = []
        self._bound: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = (), ()

    def buffer(self, width: int) -> int:
        """A new buffer of `width` elements per token."""
        return self._native.buffer(width)

    def norm(self, source: int, target: int, weight: Tensor, eps: float) -> None:
        """target = rms_norm(source)."""
        self._native.norm(source, target, self._float_pointer(weight), eps)

    def linear(self, source: int, target: int, packed: PackedLinear, accumulate: bool) -> bool:
        """target = packed(source), or target += it; False if this linear map has no native form."""
        if not isinstance(packed, NativeLinear) or packed.out_dtype not in (None, self._dtype):
            return False
        self._kept.append(packed)
        self._native.linear(source, target, packed.handle, accumulate)
        return True

    def add(self, source: int, target: int) -> None:
        """target += source."""
        self._native.add(source, target)

    def scale(self, buffer: int, factor: float) -> None:
        """buffer *= factor."""
        self._native.scale(buffer, factor)

    def heads(
        self, qkv: int, layer: int, rotary: int, shape: HeadsShape, norms: tuple[Tensor, Tensor] | None, eps: float
    ) -> None:
        """Norm and turn queries and keys, and store keys and values."""
        q_norm, k_norm = (0, 0) if norms is None else map(self._float_pointer, norms)
        self._native.heads(qkv, layer, rotary, *_sizes(shape), shape.rotary_dim, q_norm, k_norm, eps,
                           shape.norm_after_rope, shape.interleaved)  # fmt: skip

    def attend(
        self, qkv: int, target: int, layer: int, shape: HeadsShape, scale: float, window: int, softcap: float,
        sinks: Tensor | None,
    ) -> None:  # fmt: skip
        """target = attention of the queries in qkv."""
        pointer = 0 if sinks is None else self._float_pointer(sinks)
        self._native.attend(qkv, target, layer, *_sizes(shape), window, scale, softcap, pointer)

    def run(self, residual_TM: Tensor, step: StepTensors, rotaries: Sequence[Tensor]) -> Tensor:
        """Run all instructions on a step; residual_TM is used up. Raises ValueError on an index out of range."""
        tokens, rows = residual_TM.shape[0], step.kv_lens.shape[0]
        assert residual_TM.dtype is self._dtype and residual_TM.is_contiguous(), residual_TM.dtype
        assert step.positions.shape == step.out_loc.shape == (tokens,), (step.positions.shape, tokens)
        assert step.cu_q_lens.shape == (rows + 1,) and step.page_table.shape[0] == rows, (step.page_table.shape, rows)
        if self._bound[0] is not step.k_caches or self._bound[1] is not step.v_caches:
            self._bind(step.k_caches, step.v_caches)
        result = torch.empty_like(residual_TM)
        self._native.run(
            residual_TM.data_ptr(),
            result.data_ptr(),
            tokens,
            rows,
            step.positions.data_ptr(),
            step.out_loc.data_ptr(),
            step.cu_q_lens.data_ptr(),
            step.kv_lens.data_ptr(),
            step.page_table.data_ptr(),
            step.page_table.stride(0),
            step.page_table.shape[1],
            step.page_size,
            [(table.data_ptr(), table.shape[0]) for table in rotaries],
        )
        return result

    def _bind(self, k_caches: tuple[Tensor, ...], v_caches: tuple[Tensor, ...]) -> None:
        assert all(cache.dtype is self._dtype and cache.stride(2) == 1 for cache in (*k_caches, *v_caches))
        layers = [
            (k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
            for k, v in zip(k_caches, v_caches, strict=True)
        ]
        self._native.bind(layers, min(cache.shape[0] for cache in (*k_caches, *v_caches)))
        self._bound = k_caches, v_caches

    def _float_pointer(self, tensor: Tensor) -> int:
        kept = tensor.float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _sizes(shape: HeadsShape) -> tuple[int, int, int, int]:
    return shape.heads, shape.kv_heads, shape.head_dim, shape.v_dim
