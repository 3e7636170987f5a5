"""What happens around the model in a step, natively: csrc/step.hpp, bound once to the tensors of a request table.

Tensors are checked when they are bound, not in every step: with all of a model's weights in between, the caches have
forgotten the interpreter, and each question to a tensor costs half a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pando.kernels import _native
from pando.kernels.ops import SamplingColumns, StepInputs
from pando.kernels.step_memory import StepMemory


class NativeStepTable:
    """`StepTable` of one level. An index outside its table raises ValueError before anything is written."""

    def __init__(
        self,
        level: int,
        tokens_NC: Tensor,
        pages_GNP: Tensor,
        sampling: SamplingColumns,
        page_size: int,
        upload: Callable[[list[int]], Tensor],
    ) -> None:
        del upload  # host integers are read where they are
        columns = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
        assert all(table.dtype is torch.int32 and table.stride(1) == 1 for table in (tokens_NC, *pages_GNP))
        assert all(column.shape == tokens_NC.shape[:1] and column.is_contiguous() for column in columns)
        assert all(tensor.is_cpu for tensor in (tokens_NC, pages_GNP, *columns))
        self._kept = (tokens_NC, pages_GNP, sampling)
        self._native = _native.StepTable(
            level,
            _view(tokens_NC),
            [_view(pages_NP) for pages_NP in pages_GNP],
            page_size,
            *(column.data_ptr() for column in columns),
        )
        self._memory = StepMemory(tokens_NC.device, pages_GNP.shape[0])
        self._inputs: StepInputs | None = None
        self._chosen = torch.empty((2, 0), dtype=torch.int64)

    def reserve(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Keep memory for steps of these shapes."""
        self._memory.reserve(shapes)

    def write_pages(
        self, slots: Sequence[int], indices: Sequence[int], ids: Sequence[int], groups: Sequence[int] = ()
    ) -> None:
        """Page assignments, in order."""
        self._native.write_pages(slots, indices, ids, groups)

    def write_tokens(self, slots: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> None:
        """Tokens that the host has chosen, in order."""
        self._native.write_tokens(slots, positions, ids)

    def flatten(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        lens: Sequence[int],
        emits: Sequence[int],
        *,
        num_extra: int,
        num_pages: int,
    ) -> StepInputs:
        """The inputs of a step."""
        shape = (len(slots), sum(lens), sum(emits), num_extra, num_pages)
        inputs = self._inputs
        if inputs is None or not self._memory.fits(*shape):
            inputs = self._inputs = self._memory.carve(*shape)
            self._bind(inputs, shape[1], shape[2])
        self._native.flatten(slots, starts, lens, emits)
        return inputs

    def _bind(self, inputs: StepInputs, num_tokens: int, num_emitting: int) -> None:
        self._native.bind(
            num_tokens,
            num_emitting,
            inputs.input_ids.data_ptr(),
            inputs.positions.data_ptr(),
            [(where.data_ptr(), _view(table)) for where, table in zip(inputs.out_loc, inputs.page_table, strict=True)],
            inputs.cu_q_lens.data_ptr(),
            inputs.kv_lens.data_ptr(),
            inputs.logits_index.data_ptr(),
            inputs.emit_slots.data_ptr(),
            inputs.emit_ends.data_ptr(),
        )

    def choose(
        self,
        logits_EV: Tensor,
        slots_E: Tensor,
        ends_E: Tensor,
        *,
        greedy: bool,
        masks_MW: Tensor | None = None,
        masked: Sequence[int] = (),
    ) -> Tensor:
        """Tokens, and which rows are finite. Of a row with a mask only the logits of what it allows are looked at."""
        rows, vocab = logits_EV.shape
        assert logits_EV.dtype is torch.float32 and logits_EV.is_contiguous(), (logits_EV.dtype, logits_EV.stride())
        assert slots_E.dtype is ends_E.dtype is torch.int64 and slots_E.shape == ends_E.shape == (rows,), slots_E.shape
        if self._chosen.shape[1] != rows:
            self._chosen = torch.empty((2, rows), dtype=torch.int64)
        mask, stride = (0, 0) if masks_MW is None else _words(masks_MW, len(masked), vocab)
        self._native.choose(
            logits_EV.data_ptr(),
            rows,
            vocab,
            slots_E.data_ptr(),
            ends_E.data_ptr(),
            greedy,
            self._chosen.data_ptr(),
            mask,
            stride,
            masked,
        )
        return self._chosen


def _view(table: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, width, row stride."""
    rows, width = table.shape
    return table.data_ptr(), rows, width, table.stride(0)


def _words(masks_MW: Tensor, num_masked: int, vocab: int) -> tuple[int, int]:
    """Address and row stride of token masks."""
    assert masks_MW.dtype is torch.int32 and masks_MW.is_contiguous(), (masks_MW.dtype, masks_MW.stride())
    rows, words = masks_MW.shape
    assert rows == num_masked and words * 32 >= vocab, (masks_MW.shape, num_masked, vocab)
    return masks_MW.data_ptr(), words
