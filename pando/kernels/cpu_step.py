"""What happens around the model in a step, natively: csrc/step.hpp. What a call does not cover runs the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels import _native, reference, reference_step
from pando.kernels.ops import SamplingColumns, StepInputs


def write_pages_(pages_NP: Tensor, writes: Tensor) -> None:
    """Page assignments. Raises ValueError on a slot or an index outside the table, before it writes anything."""
    if not (_is_table(pages_NP) and _is_column(writes)):
        return reference_step.write_pages_(pages_NP, writes)
    _native.write_pages(_view(pages_NP), writes.data_ptr(), writes.shape[0] // 3)
    return None


def fill_step_(out: StepInputs, columns: Tensor, tokens_NC: Tensor, pages_NP: Tensor, page_size: int) -> None:
    """The flattened step. Raises ValueError if a row leaves the table or the sizes do not fit."""
    tables = (tokens_NC, pages_NP, out.page_table)
    longs = (columns, out.input_ids, out.positions, out.out_loc, out.last, out.emit_slots, out.emit_ends)
    ints = (out.cu_q_lens, out.kv_lens)
    if not (
        all(map(_is_table, tables))
        and all(map(_is_column, longs))
        and all(tensor.dtype is torch.int32 and tensor.is_contiguous() for tensor in ints)
    ):
        return reference_step.fill_step_(out, columns, tokens_NC, pages_NP, page_size)
    rows, num_tokens, num_emitting = columns.shape[0] // 4, out.positions.shape[0], out.last.shape[0]
    assert out.input_ids.shape == out.out_loc.shape == (num_tokens,), (out.input_ids.shape, out.out_loc.shape)
    assert out.emit_slots.shape == out.emit_ends.shape == (num_emitting,), (out.emit_slots.shape, out.emit_ends.shape)
    assert out.cu_q_lens.shape == (rows + 1,) and out.kv_lens.shape == (rows,), (out.cu_q_lens.shape, rows)
    assert out.page_table.shape[0] == rows and out.page_table.shape[1] <= pages_NP.shape[1], out.page_table.shape
    _native.fill_step(
        columns.data_ptr(),
        rows,
        _view(tokens_NC),
        _view(pages_NP),
        page_size,
        num_tokens,
        num_emitting,
        out.input_ids.data_ptr(),
        out.positions.data_ptr(),
        out.out_loc.data_ptr(),
        out.cu_q_lens.data_ptr(),
        out.kv_lens.data_ptr(),
        _view(out.page_table),
        out.last.data_ptr(),
        out.emit_slots.data_ptr(),
        out.emit_ends.data_ptr(),
    )
    return None


def choose(
    level: int,
    logits_EV: Tensor,
    slots_E: Tensor,
    positions_E: Tensor,
    history_NC: Tensor,
    sampling: SamplingColumns | None,
) -> Tensor:
    """Tokens, and which rows are finite. Raises ValueError on a slot or a position outside the history."""
    if not (
        logits_EV.dtype is torch.float32
        and logits_EV.is_cpu
        and logits_EV.is_contiguous()
        and _is_column(slots_E)
        and _is_column(positions_E)
        and _is_table(history_NC)
        and (sampling is None or _are_columns(sampling))
    ):
        return reference.choose(logits_EV, slots_E, positions_E, history_NC, sampling)
    rows, vocab = logits_EV.shape
    assert slots_E.shape == positions_E.shape == (rows,), (slots_E.shape, positions_E.shape, rows)
    out = torch.empty((2, rows), dtype=torch.int64)
    _native.choose(
        level,
        logits_EV.data_ptr(),
        rows,
        vocab,
        slots_E.data_ptr(),
        positions_E.data_ptr(),
        *((0, 0, 0, 0, 0) if sampling is None else _addresses(sampling, history_NC.shape[0])),
        _view(history_NC),
        out.data_ptr(),
    )
    return out


def _is_table(tensor: Tensor) -> bool:
    """An int32 CPU tensor [rows, width] whose rows are contiguous."""
    return tensor.dtype is torch.int32 and tensor.is_cpu and tensor.stride(1) == 1


def _is_column(tensor: Tensor) -> bool:
    return tensor.dtype is torch.int64 and tensor.is_cpu and tensor.is_contiguous()


def _view(table: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, width, row stride."""
    rows, width = table.shape
    return table.data_ptr(), rows, width, table.stride(0)


def _are_columns(sampling: SamplingColumns) -> bool:
    floats = (sampling.temperature, sampling.top_p, sampling.min_p)
    return (
        all(tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() for tensor in floats)
        and sampling.top_k.dtype is torch.int32
        and sampling.top_k.is_contiguous()
        and _is_column(sampling.seed)
    )


def _addresses(sampling: SamplingColumns, num_slots: int) -> tuple[int, ...]:
    columns = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
    assert all(column.shape[0] >= num_slots for column in columns), [column.shape for column in columns]
    return tuple(column.data_ptr() for column in columns)
