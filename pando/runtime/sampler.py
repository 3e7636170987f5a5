"""From logits to tokens: processors, then one sampling op for all rows. A row's token depends on that row alone.

The random number of a row is a hash of its own seed and position, so the same request gives the same tokens whatever it
is batched with, and again after a retraction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pando.core.batch import NewSlot
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
        self, logits_EV: Tensor, entries: Sequence[NewSlot | None], slots_E: Tensor, positions_E: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [E] int64 and whether each row's logits were finite [E] bool.

        positions [E] are where the tokens will stand. `logits_EV` is changed in place by the processors, so that
        log-probabilities read afterwards describe the distribution that was sampled, before temperature.
        """
        finite_E = self._ops.finite(logits_EV)
        for processor in self._processors:
            rows = [row for row, entry in enumerate(entries) if entry is not None and processor.wants(entry)]
            if rows:
                processor.apply(logits_EV, rows, entries, slots_E, positions_E)
        if all(entry is None or entry.sampling.is_greedy for entry in entries):
            return self._ops.argmax(logits_EV), finite_E
        columns = self._table.gather(("temperature", "top_k", "top_p", "min_p", "seed"), slots_E)
        temperature, top_k, top_p, min_p, seed = columns
        tokens = self._ops.sample(logits_EV, temperature, top_k.to(torch.int32), top_p, min_p, seed, positions_E)
        return tokens, finite_E
