"""Memory for the inputs of a step, kept from step to step: nothing is made anew while their sizes do not change."""

from __future__ import annotations

import torch
from torch import Tensor

from pando.kernels.ops import StepInputs


class StepMemory:
    """Hands out the tensors of a step."""

    def __init__(self, device: torch.device, num_groups: int) -> None:
        self._groups = num_groups
        self._longs = torch.zeros(1024, dtype=torch.int64, device=device)
        self._ints = torch.zeros(1024, dtype=torch.int32, device=device)
        self._shape = (-1,) * 5

    def fits(self, rows: int, tokens: int, emitting: int, extra: int, pages: int) -> bool:
        """Whether the tensors handed out last are of these sizes."""
        return self._shape == (rows, tokens, emitting, extra, pages)

    def carve(self, rows: int, tokens: int, emitting: int, extra: int, pages: int) -> StepInputs:
        """Tensors of these sizes: R, T, E, X and P of `StepInputs`. Those of an earlier call are no longer valid."""
        self._shape = (rows, tokens, emitting, extra, pages)
        longs = (tokens, tokens, emitting + extra, emitting, emitting, *(tokens,) * self._groups)
        ints = (rows + 1, rows, *(rows * pages,) * self._groups)
        self._longs = _at_least(self._longs, sum(longs))
        self._ints = _at_least(self._ints, sum(ints))
        input_ids, positions, logits_index, slots, ends, *out_loc = self._longs[: sum(longs)].split(longs)
        cu_q_lens, kv_lens, *tables = self._ints[: sum(ints)].split(ints)
        page_table = tuple(table.view(rows, pages) for table in tables)
        return StepInputs(
            input_ids, positions, tuple(out_loc), cu_q_lens, kv_lens, page_table, logits_index, slots, ends
        )


def _at_least(memory: Tensor, size: int) -> Tensor:
    return memory if size <= memory.shape[0] else memory.new_zeros(size + size // 4)
