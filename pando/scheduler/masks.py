"""Token masks of a step's guided rows, computed beside the forward pass where that has a device of its own.

`begin` is called before a step is launched: rows whose tokens the host knows already are filled in another thread while
the model runs. `end` is called when the step before has been committed, so every token is known: it waits for that
thread and fills the rest. On a CPU, where both want the same cores and the hand-over costs more than a mask, all rows
are filled at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pando.core.batch import TokenMask
from pando.scheduler.admission import Plan
from pando.scheduler.guide import Guide
from pando.scheduler.request import Request, State


class Masks:
    """Fills masks of `vocab_size` tokens. overlap: in another thread while the step runs, as far as possible."""

    def __init__(self, vocab_size: int, *, overlap: bool) -> None:
        self._words = -(-vocab_size // 32)
        self._overlap = overlap
        self._pool: ThreadPoolExecutor | None = None
        self._job: _Job | None = None

    def begin(self, plan: Plan | None) -> None:
        """Start on the rows of a step that is about to be launched."""
        if self._job is not None and self._job.started is not None:
            self._job.started.result()  # its step failed; the states are not free before
        job = _Job.of(plan, self._words)
        self._job = job
        if job is None:
            return
        ready = [entry for entry in job.entries if not entry.waits]
        if ready and self._overlap:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="pando-masks")
            job.started = self._pool.submit(job.fill, ready)

    def end(self) -> TokenMask | None:
        """The masks of the step given to `begin`, or None if none of its rows needs one."""
        job, self._job = self._job, None
        if job is None:
            return None
        job.fill([entry for entry in job.entries if entry.waits or job.started is None])
        if job.started is not None:
            job.started.result()
        return TokenMask(job.rows, job.bits)


class _Entry:
    """A guided row: `row` of the mask and those after it, one per draft."""

    __slots__ = ("drafts", "guide", "request", "row", "waits")

    def __init__(self, request: Request, guide: Guide, row: int) -> None:
        self.request = request
        self.guide = guide
        self.row = row
        self.drafts: Sequence[int] = request.drafts
        self.waits = request.pending > 1 or request.void > 0


class _Job:
    """The masks of one step."""

    def __init__(self, entries: list[_Entry], rows: list[int], words: int) -> None:
        self.entries = entries
        self.rows = rows
        self.bits: NDArray[np.int32] = np.full((len(rows), words), -1, dtype=np.int32)
        self.started: Future[None] | None = None

    @classmethod
    def of(cls, plan: Plan | None, words: int) -> _Job | None:
        """The job of a step, or None if no row needs a mask."""
        if plan is None or not any(request.guide is not None for request in plan.rows):
            return None
        entries: list[_Entry] = []
        rows: list[int] = []
        emitted = 0
        for request, emit, drafts in zip(plan.rows, plan.batch.emit, plan.batch.num_draft, strict=True):
            if not emit:
                continue
            if request.guide is not None:
                entries.append(_Entry(request, request.guide, len(rows)))
                rows += range(emitted, emitted + drafts + 1)
            emitted += drafts + 1
        return cls(entries, rows, words) if entries else None

    def fill(self, entries: Sequence[_Entry]) -> None:
        """Fill the rows of these entries. A row whose token no longer matters keeps a mask that allows everything."""
        for entry in entries:
            request = entry.request
            if request.state is State.RUNNING and request.pending == 1 and not request.void:
                entry.guide.fill(self.bits, entry.row, entry.drafts)
