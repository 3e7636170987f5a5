"""Changes to logits before sampling, each for the rows that ask for it. Rows that ask for nothing cost nothing.

A processor knows its rows' lengths on the device only, and waits for nothing: the host may be a step ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pando.core.batch import NewSlot
from pando.kernels.ops import OpTable
from pando.runtime.table import RequestTable

Entries = Sequence[NewSlot | None]


class LogitsProcessor(Protocol):
    """One kind of change."""

    def wants(self, entry: NewSlot) -> bool:
        """True if this sequence's parameters ask for it."""

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """Change the given rows in place. ends [E]: number of tokens so far, the position of the one to come."""


class Penalties:
    """Repetition, frequency and presence penalties over the sequence's own history."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        self._ops = ops
        self._table = table

    def wants(self, entry: NewSlot) -> bool:
        """True if any penalty is on."""
        sampling = entry.sampling
        return bool(sampling.frequency_penalty or sampling.presence_penalty or sampling.repetition_penalty != 1.0)

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """One op call for all rows that ask."""
        chosen = [entry for row in rows if (entry := entries[row]) is not None]
        device = self._table.device
        at = device.upload(rows)
        slots, lens = slots_E[at], ends_E[at]
        longest = max(max(len(entry.tokens), entry.prompt_len + entry.sampling.max_new_tokens) for entry in chosen)
        width = device.largest(lens, min(longest, self._table.context_length) + 1)
        history = self._table.tokens_NC[slots, :width].contiguous()
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        values = device.upload([getattr(e.sampling, name) for name in names for e in chosen], torch.float32)
        part = logits_EV[at].contiguous()
        self._ops.apply_penalties_(part, history, self._table.prompt_len[slots], lens, *values.view(3, -1).unbind(0))
        logits_EV[at] = part


class LogitBias:
    """A constant added to chosen tokens."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        del ops
        self._device = table.device

    def wants(self, entry: NewSlot) -> bool:
        """True if there is a bias."""
        return bool(entry.sampling.logit_bias)

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """All biased places at once; no place comes twice."""
        biased = [(row, entry.sampling.logit_bias) for row in rows if (entry := entries[row]) is not None]
        places = [row for row, bias in biased for _ in bias], [token for _, bias in biased for token in bias]
        row_K, token_K = self._device.upload([*places[0], *places[1]]).view(2, -1).unbind(0)
        values = self._device.upload([value for _, bias in biased for value in bias.values()], torch.float32)
        logits_EV[row_K, token_K] += values


class MinNewTokens:
    """No end before `min_new_tokens` tokens."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        del ops
        self._device = table.device

    def wants(self, entry: NewSlot) -> bool:
        """True if a minimum is set and something could end the sequence."""
        return entry.sampling.min_new_tokens > 0 and bool(entry.eos_token_ids)

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """Forbid the end tokens in rows that are still too short."""
        found = [(row, entry) for row in rows if (entry := entries[row]) is not None]
        ends = [(row, token, entry) for row, entry in found for token in entry.eos_token_ids]
        columns = self._device.upload(
            [row for row, _, _ in ends]
            + [token for _, token, _ in ends]
            + [entry.prompt_len + entry.sampling.min_new_tokens for _, _, entry in ends]
        )
        row_K, token_K, shortest_K = columns.view(3, -1).unbind(0)
        too_short = ends_E[row_K] < shortest_K
        logits_EV[row_K, token_K] = logits_EV[row_K, token_K].masked_fill(too_short, -torch.inf)


PROCESSORS: tuple[Callable[[OpTable, RequestTable], LogitsProcessor], ...] = (Penalties, LogitBias, MinNewTokens)
"""In the order they are applied."""
