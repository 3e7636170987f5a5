"""From logits to tokens: processors, then one sampling op for all rows. A row's token depends on that row alone.

The random number of a row is a hash of its own seed and position, so the same request gives the same tokens whatever it
is batched with, and again after a retraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pando.core.batch import TokenMask
from pando.kernels.ops import OpTable
from pando.runtime.logits_processors import PROCESSORS, Entries, LogitsProcessor
from pando.runtime.table import RequestTable


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the rows of a step ask for. changes: processors, each with the rows that want it, in order. logprobs:
    whether any row asks for them."""

    greedy: bool
    changes: Sequence[tuple[LogitsProcessor, list[int]]]
    logprobs: bool


class Sampler:
    """Chooses one token per emitting row."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        self._ops = ops
        self._table = table
        self._processors: Sequence[LogitsProcessor] = [make(ops, table) for make in PROCESSORS]
        self._entries: Entries = []
        self._wishes = self._read([])

    def __call__(
        self,
        logits_EV: Tensor,
        entries: Entries,
        slots_E: Tensor,
        positions_E: Tensor,
        mask: TokenMask | None = None,
    ) -> Tensor:
        """[2, E] int64: the rows' tokens, and 1 where a row's logits were finite, else 0. The history has them, too.

        positions [E] are where the tokens will stand. `logits_EV` is changed in place by the processors, and by the
        mask where a row asks for log-probabilities, so that what is read afterwards describes the distribution that
        was sampled, before temperature. The result is overwritten by the next call.
        """
        if entries != self._entries:  # the same sequences decode for many steps
            self._entries, self._wishes = entries, self._read(entries)
        wishes = self._wishes
        # On a CPU the choice itself leaves out what is forbidden, without looking at it.
        written = mask is not None and (wishes.logprobs or self._table.device.asynchronous)
        # Looked at first: processors and masks forbid tokens.
        finite_E = self._ops.finite(logits_EV) if wishes.changes or written else None
        for processor, rows in wishes.changes:
            processor.apply(logits_EV, rows, entries, slots_E, positions_E)
        choose = self._table.step.choose
        if mask is None or written:
            if mask is not None:
                self._apply_mask(logits_EV, mask)
            chosen_2E = choose(logits_EV, slots_E, positions_E, greedy=wishes.greedy)
        else:
            bits = self._bits(mask)
            chosen_2E = choose(logits_EV, slots_E, positions_E, greedy=wishes.greedy, masks_MW=bits, masked=mask.rows)
        if finite_E is not None:
            chosen_2E[1] = finite_E
        return chosen_2E

    def _bits(self, mask: TokenMask) -> Tensor:
        return self._table.device.upload_array(mask.bits)

    def _apply_mask(self, logits_EV: Tensor, mask: TokenMask) -> None:
        """Forbid what the grammars forbid. The last change: nothing may make a forbidden token possible again."""
        bits = self._bits(mask)
        if len(mask.rows) == logits_EV.shape[0]:
            self._ops.apply_token_mask_(logits_EV, bits)
            return
        rows = self._table.device.upload(mask.rows)
        part = logits_EV[rows]
        self._ops.apply_token_mask_(part, bits)
        logits_EV[rows] = part

    def _read(self, entries: Entries) -> Wishes:
        changes = []
        for processor in self._processors:
            rows = [row for row, entry in enumerate(entries) if entry is not None and processor.wants(entry)]
            if rows:
                changes.append((processor, rows))
        greedy = all(entry is None or entry.sampling.is_greedy for entry in entries)
        return Wishes(greedy, changes, any(entry is not None and entry.logprobs is not None for entry in entries))
