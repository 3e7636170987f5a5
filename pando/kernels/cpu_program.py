"""Layers as one native call per step: the instruction list of csrc/program.hpp, with the tensors it points to."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from pando.kernels import _native
from pando.kernels.cpu_linear import CODES, NativeLinear
from pando.kernels.cpu_mixing import STATES_PER_LAYER, NativeMixing
from pando.kernels.ops import HeadsShape, PackedLinear, StateRows, StepTensors


class NativeProgram(NativeMixing):
    """`Program` of one instruction-set level. Keeps every tensor alive whose address it was given."""

    def __init__(self, level: int, dtype: torch.dtype, width: int) -> None:
        super().__init__(_native.Program(level, CODES[dtype], width))
        self._dtype = dtype
        self._width = width
        self._embeds = False
        self._tensors: tuple[Tensor, ...] = ()
        self._page_size = 0
        self._states: tuple[tuple[Tensor, ...], ...] = ()
        self._rows: StateRows | None = None
        self._bound: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = (), ()

    def buffer(self, width: int) -> int:
        """A new buffer of `width` elements per token."""
        return self._native.buffer(width)

    def embed(self, weight_VM: Tensor) -> bool:
        """Residual stream = rows of weight, before all else; False if the rows have another dtype or layout."""
        if weight_VM.dtype is not self._dtype or not weight_VM.is_contiguous() or weight_VM.shape[1] != self._width:
            return False
        self._kept.append(weight_VM)
        self._native.embed(weight_VM.data_ptr(), weight_VM.shape[0])
        self._embeds = True
        return True

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

    def run(self, start: Tensor, step: StepTensors, rotaries: Sequence[Tensor]) -> Tensor:
        """Run all instructions on a step. Raises ValueError on an index out of range."""
        tensors = (start, step.positions, step.cu_q_lens, step.kv_lens, *step.out_loc, *step.page_table, *rotaries)
        # The same memory serves step after step: it is looked at when it changes.
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        if not same or step.page_size != self._page_size:
            self._look_at(start, step, rotaries)
            self._tensors, self._page_size = tensors, step.page_size
        if self._bound[0] is not step.k_caches or self._bound[1] is not step.v_caches:
            self._bind(step)
        if step.state_rows is not None:
            if self._states is not step.states:
                self._bind_states(step.states)
            if self._rows is not step.state_rows or not same:
                self._look_at_states(step.state_rows, step.kv_lens.shape[0])
        result = torch.empty((start.shape[0], self._width), dtype=self._dtype)
        residual, input_ids = (0, start.data_ptr()) if self._embeds else (start.data_ptr(), 0)
        self._native.run(residual, input_ids, result.data_ptr())
        return result

    def _look_at(self, start: Tensor, step: StepTensors, rotaries: Sequence[Tensor]) -> None:
        """Check a step's tensors and hand their addresses over."""
        tokens, rows = start.shape[0], step.kv_lens.shape[0]
        assert start.dtype is (torch.int64 if self._embeds else self._dtype) and start.is_contiguous(), start.dtype
        assert start.shape == ((tokens,) if self._embeds else (tokens, self._width)), start.shape
        assert all(tensor.shape == (tokens,) for tensor in (step.positions, *step.out_loc)), (step.positions, tokens)
        assert step.cu_q_lens.shape == (rows + 1,), (step.cu_q_lens.shape, rows)
        assert all(table.shape[0] == rows and table.stride(1) == 1 for table in step.page_table), step.page_table
        ragged = (step.positions, *step.out_loc, step.cu_q_lens, step.kv_lens)
        assert all(tensor.is_contiguous() for tensor in ragged)
        self._native.look_at(
            tokens,
            rows,
            step.positions.data_ptr(),
            step.cu_q_lens.data_ptr(),
            step.kv_lens.data_ptr(),
            [
                (where.data_ptr(), table.data_ptr(), table.stride(0), table.shape[1])
                for where, table in zip(step.out_loc, step.page_table, strict=True)
            ],
            step.page_size,
            [(table.data_ptr(), table.shape[0]) for table in rotaries],
        )

    def _bind(self, step: StepTensors) -> None:
        kept = self._dtype, torch.int8
        assert all(cache.dtype in kept and cache.stride(2) == 1 for cache in (*step.k_caches, *step.v_caches))
        layers: list[tuple[int, int, int, int, int, int, int, int, bool]] = []
        for k, v, group in zip(step.k_caches, step.v_caches, step.groups, strict=True):
            assert k.dtype is v.dtype and len(k) == len(v), (k.dtype, v.dtype, k.shape, v.shape)
            strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
            layers.append((k.data_ptr(), v.data_ptr(), *strides, len(k), group, k.dtype is torch.int8))
        self._native.bind(layers)
        self._bound = step.k_caches, step.v_caches

    def _bind_states(self, states: tuple[tuple[Tensor, ...], ...]) -> None:
        tensors: list[tuple[int, int, int]] = []
        for layer in states:
            assert len(layer) <= STATES_PER_LAYER and all(tensor[:1].is_contiguous() for tensor in layer), layer
            assert all(
                tensor.dtype is dtype for tensor, dtype in zip(layer, (self._dtype, torch.float32), strict=False)
            )
            tensors += [(tensor.data_ptr(), tensor.stride(0), tensor.shape[0]) for tensor in layer]
            tensors += [(0, 0, 0)] * (STATES_PER_LAYER - len(layer))
        self._native.bind_states(tensors)
        self._states = states

    def _look_at_states(self, rows: StateRows, num_rows: int) -> None:
        assert rows.slots.shape == rows.fresh.shape == (num_rows,), (rows.slots.shape, num_rows)
        assert rows.save_token.shape == rows.save_slot.shape, (rows.save_token.shape, rows.save_slot.shape)
        ids = (rows.slots, rows.save_token, rows.save_slot)
        assert rows.fresh.dtype is torch.bool and all(x.dtype is torch.int64 and x.is_contiguous() for x in ids), rows
        self._native.look_at_states(
            rows.slots.data_ptr(),
            rows.fresh.data_ptr(),
            rows.save_token.data_ptr(),
            rows.save_slot.data_ptr(),
            rows.save_token.shape[0],
        )
        self._rows = rows


def _sizes(shape: HeadsShape) -> tuple[int, int, int, int]:
    return shape.heads, shape.kv_heads, shape.head_dim, shape.v_dim
