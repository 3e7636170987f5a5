"""Changes to logits before sampling, each for the rows that ask for it. Rows that ask for nothing cost nothing."""

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
        at = torch.tensor(rows, device=logits_EV.device)
        slots, lens = slots_E[at], ends_E[at]
        history = self._table.tokens_NC[slots, : int(lens.max())].contiguous()
        chosen = [entry.sampling for row in rows if (entry := entries[row]) is not None]
        values = [
            torch.tensor([getattr(sampling, name) for sampling in chosen], device=logits_EV.device)
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        ]
        part = logits_EV[at].contiguous()
        self._ops.apply_penalties_(part, history, self._table.prompt_len[slots], lens, *values)
        logits_EV[at] = part


class LogitBias:
    """A constant added to chosen tokens."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        del ops, table

    def wants(self, entry: NewSlot) -> bool:
        """True if there is a bias."""
        return bool(entry.sampling.logit_bias)

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """Row by row: biases are short and rare."""
        for row in rows:
            entry = entries[row]
            assert entry is not None
            bias = entry.sampling.logit_bias
            tokens = torch.tensor(list(bias), device=logits_EV.device)
            logits_EV[row, tokens] += torch.tensor(list(bias.values()), device=logits_EV.device)


class MinNewTokens:
    """No end before `min_new_tokens` tokens."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        del ops, table

    def wants(self, entry: NewSlot) -> bool:
        """True if a minimum is set and something could end the sequence."""
        return entry.sampling.min_new_tokens > 0 and bool(entry.eos_token_ids)

    def apply(self, logits_EV: Tensor, rows: list[int], entries: Entries, slots_E: Tensor, ends_E: Tensor) -> None:
        """Forbid the end tokens in rows that are still too short."""
        lens = ends_E.tolist()
        for row in rows:
            entry = entries[row]
            assert entry is not None
            if lens[row] - entry.prompt_len < entry.sampling.min_new_tokens:
                logits_EV[row, torch.tensor(entry.eos_token_ids, device=logits_EV.device)] = -torch.inf


PROCESSORS: tuple[Callable[[OpTable, RequestTable], LogitsProcessor], ...] = (Penalties, LogitBias, MinNewTokens)
"""In the order they are applied."""
