"""From logits to tokens: processors, then one sampling op for all rows. A row's token depends on that row alone.

The random number of a row is a hash of its own seed and position, so the same request gives the same tokens whatever it
is batched with, and again after a retraction.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pando.core.batch import NewSlot, TokenMask
from pando.kernels.ops import OpTable
from pando.runtime.logits_processors import PROCESSORS, LogitsProcessor
from pando.runtime.table import RequestTable


class Sampler:
    """Chooses one token per emitting row."""

    def __init__(self, ops: OpTable, table: RequestTable) -> None:
        self._ops = ops
        self._table = table
        self._processors: Sequence[LogitsProcessor] = [make(ops, table) for make in PROCESSORS]

    def __call__(
        self,
        logits_EV: Tensor,
        entries: Sequence[NewSlot | None],
        slots_E: Tensor,
        positions_E: Tensor,
        mask: TokenMask | None = None,
    ) -> Tensor:
        """[2, E] int64: the rows' tokens, and 1 where a row's logits were finite, else 0. The history has them, too.

        positions [E] are where the tokens will stand. `logits_EV` is changed in place by the processors, so that
        log-probabilities read afterwards describe the distribution that was sampled, before temperature.
        """
        finite_E = self._process(logits_EV, entries, slots_E, positions_E)
        if mask is not None:
            finite_E = self._ops.finite(logits_EV) if finite_E is None else finite_E
            self._apply_mask(logits_EV, mask)
        greedy = all(entry is None or entry.sampling.is_greedy for entry in entries)
        chosen = self._table.step.choose(logits_EV, slots_E, positions_E, greedy=greedy)
        if finite_E is not None:
            chosen[1] = finite_E
        return chosen

    def _apply_mask(self, logits_EV: Tensor, mask: TokenMask) -> None:
        """Forbid what the grammars forbid. The last processor: nothing may make a forbidden token possible again."""
        bits = self._table.device.upload_array(mask.bits)
        if len(mask.rows) == logits_EV.shape[0]:
            self._ops.apply_token_mask_(logits_EV, bits)
            return
        rows = self._table.device.upload(mask.rows)
        part = logits_EV[rows]
        self._ops.apply_token_mask_(part, bits)
        logits_EV[rows] = part

    def _process(
        self, logits_EV: Tensor, entries: Sequence[NewSlot | None], slots_E: Tensor, positions_E: Tensor
    ) -> Tensor | None:
        """Apply what rows ask for. Which rows were finite before it, if anything was done: tokens may be forbidden."""
        finite_E = None
        for processor in self._processors:
            rows = [row for row, entry in enumerate(entries) if entry is not None and processor.wants(entry)]
            if rows:
                finite_E = self._ops.finite(logits_EV) if finite_E is None else finite_E
                processor.apply(logits_EV, rows, entries, slots_E, positions_E)
        return finite_E
