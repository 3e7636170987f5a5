"""Memory for the inputs of a step, kept from step to step: nothing is made anew while their sizes do not change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.kernels.ops import StepInputs

ALIGNMENT = 16
"""Elements to which a tensor's place is rounded up: kernels for a GPU are compiled anew for each alignment."""


class StepMemory:
    """Hands out the tensors of a step."""

    def __init__(self, device: torch.device, num_groups: int) -> None:
        self._groups = num_groups
        self._longs = torch.zeros(1024, dtype=torch.int64, device=device)
        self._ints = torch.zeros(1024, dtype=torch.int32, device=device)
        self._yielding = torch.zeros(1024, dtype=torch.int64, device=device)
        self._shape = (-1,) * 5
        self._reserved: frozenset[tuple[int, int, int]] = frozenset()
        self._reserved_longs, self._reserved_ints = self._longs[:0], self._ints[:0]

    def reserve(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Give the inputs of steps of these R, T, P places that never change, for all but what yields tokens.

        The steps of all these shapes share the memory.
        """
        longs = max(_length(self._long_sizes(tokens)) for _, tokens, _ in shapes)
        ints = max(_length(self._int_sizes(rows, pages)) for rows, _, pages in shapes)
        self._reserved = frozenset(shapes)
        self._reserved_longs, self._reserved_ints = self._longs.new_zeros(longs), self._ints.new_zeros(ints)

    def fits(self, rows: int, tokens: int, emitting: int, extra: int, pages: int) -> bool:
        """Whether the tensors handed out last are of these sizes."""
        return self._shape == (rows, tokens, emitting, extra, pages)

    def carve(self, rows: int, tokens: int, emitting: int, extra: int, pages: int) -> StepInputs:
        """Tensors of these sizes: R, T, E, X and P of `StepInputs`. Those of an earlier call are no longer valid."""
        self._shape = (rows, tokens, emitting, extra, pages)
        long_sizes, int_sizes = self._long_sizes(tokens), self._int_sizes(rows, pages)
        yielding = (emitting + extra, emitting, emitting)
        self._yielding = _at_least(self._yielding, _length(yielding))
        longs, ints = self._reserved_longs, self._reserved_ints
        if (rows, tokens, pages) not in self._reserved:
            longs = self._longs = _at_least(self._longs, _length(long_sizes))
            ints = self._ints = _at_least(self._ints, _length(int_sizes))
        input_ids, positions, *out_loc = _split(longs, long_sizes)
        cu_q_lens, kv_lens, *tables = _split(ints, int_sizes)
        page_table = tuple(table.view(rows, pages) for table in tables)
        return StepInputs(
            input_ids, positions, tuple(out_loc), cu_q_lens, kv_lens, page_table, *_split(self._yielding, yielding)
        )

    def _long_sizes(self, tokens: int) -> tuple[int, ...]:
        return (tokens,) * (2 + self._groups)

    def _int_sizes(self, rows: int, pages: int) -> tuple[int, ...]:
        return (rows + 1, rows, *(rows * pages,) * self._groups)


def _places(sizes: Sequence[int]) -> list[int]:
    """Where each of several tensors begins, and where the next one would."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return places


def _length(sizes: Sequence[int]) -> int:
    return _places(sizes)[-1]


def _split(memory: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [memory[place : place + size] for place, size in zip(_places(sizes), sizes, strict=False)]


def _at_least(memory: Tensor, size: int) -> Tensor:
    return memory if size <= memory.shape[0] else memory.new_zeros(size + size // 4)
