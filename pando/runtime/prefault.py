"""KV memory backed before it is written: while no step runs, the system is asked for the pages that come next.

A page that a process touches for the first time has to be found and zeroed, on a virtual machine often fetched from the
host, too. A prefill that fills fresh memory waits for that in every layer. The pool hands out fresh pages in ascending
order, so what comes next is known; it is bounded, so that a pool of many gigabytes is not taken before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from pando.cache.pool import KVPool
from pando.core.batch import Batch, StepResult, TokenMask
from pando.kernels.cpu import populate

IDLE_SECONDS = 0.05
"""No step within this time: the engine has nothing to do."""
START_SECONDS = 1.0
"""The same after the start, when a first request is likely."""
PIECE_BYTES = 2 << 20
"""A step that comes waits for one piece at most, 1 to 6 ms."""
POOL_SHARE = 2
"""At most one part in so many of the pool is taken before it is used."""
AHEAD_SLOTS = 16384
"""A burst of more tokens takes so long that waiting for memory is a small part: a small model need not grow."""


class Inner(Protocol):
    """The executor that runs the steps."""

    depth: int

    def launch(self, batch: Batch) -> Any: ...
    def sample(self, step: Any, mask: TokenMask | None) -> None: ...
    def collect(self, step: Any) -> StepResult: ...
    def reset(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Piece:
    """The rows of some slots of a group, in each of its tensors."""

    group: int
    end: int
    rows: list[Tensor]


class Prefault:
    """How far each page group has been written, and how far its memory is there."""

    def __init__(self, pool: KVPool, num_bytes: int) -> None:
        self._tensors = [
            [
                tensor
                for layer, of in enumerate(pool.groups)
                if of == group
                for tensor in (pool.k[layer], pool.v[layer])
                if tensor.nbytes and tensor.is_contiguous()  # a view of other rows needs no memory of its own
            ]
            for group in range(pool.num_groups)
        ]
        self._page_size = pool.page_size
        per_slot = sum(tensor[:1].nbytes for tensors in self._tensors for tensor in tensors)
        self.ahead = min(AHEAD_SLOTS, min(num_bytes, pool.num_bytes // POOL_SHARE) // max(1, per_slot))
        """Slots of each group that are backed beyond the last one handed out."""
        self.reached = [0] * pool.num_groups
        """Slots below these have been handed out."""
        self.backed = [0] * pool.num_groups
        """Slots below these are backed."""

    def note(self, batch: Batch) -> bool:
        """Take over which pages a batch assigns; whether that reached new ones."""
        pages, groups = batch.page_id, batch.page_group
        before = sum(self.reached)
        for group in set(groups) if groups else ({0} if pages else ()):
            last = max(page for page, of in zip(pages, groups, strict=True) if of == group) if groups else max(pages)
            self.reached[group] = max(self.reached[group], (last + 1) * self._page_size)
        return sum(self.reached) > before

    def next_piece(self) -> Piece | None:
        """What is to be backed next; None if all of the stretch ahead is."""
        for group, tensors in enumerate(self._tensors):
            if not tensors:
                continue
            begin = max(self.backed[group], self.reached[group])
            step = max(1, PIECE_BYTES // max(tensor[:1].nbytes for tensor in tensors))
            end = min(len(tensors[0]), self.reached[group] + self.ahead, begin // step * step + step)
            if begin < end:
                return Piece(group, end, [tensor[begin:end] for tensor in tensors])
        return None


class PrefaultingExecutor:
    """An executor in whose idle times a thread backs the pool's next pages.

    free_bytes: memory of the system that nobody has taken; as much as is backed ahead stays free for others.
    """

    def __init__(self, inner: Inner, pool: KVPool, num_bytes: int, free_bytes: Callable[[], int]) -> None:
        self.inner = inner
        self.depth = inner.depth
        self.prefault = Prefault(pool, num_bytes)
        self._kept_free = num_bytes
        self._free_bytes = free_bytes
        self._launched = self._ended = self._seen = 0
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="pando-prefault", daemon=True)
        self._thread.start()

    def launch(self, batch: Batch) -> Any:
        """Launch the step."""
        self._launched += 1
        if self.prefault.note(batch):
            self._wanted.set()
        return self.inner.launch(batch)

    def sample(self, step: Any, mask: TokenMask | None) -> None:
        """Sample the step."""
        self.inner.sample(step, mask)

    def collect(self, step: Any) -> StepResult:
        """Collect the step."""
        try:
            return self.inner.collect(step)
        finally:
            self._ended += 1

    def reset(self) -> None:
        """Forget all slots after a failed step, which may not have been collected."""
        self.inner.reset()
        self._ended = self._launched

    def close(self) -> None:
        """End the thread, and that of the inner executor."""
        self._stopping.set()
        self._wanted.set()
        self._thread.join()
        self.inner.close()

    def _loop(self) -> None:
        self._stopping.wait(START_SECONDS)
        while not self._stopping.is_set():
            while (piece := self.prefault.next_piece()) is not None and self._free_bytes() > self._kept_free:
                for rows in piece.rows:
                    if not self._idle() or not populate(rows):
                        return
                self.prefault.backed[piece.group] = piece.end
            self._wanted.wait()
            self._wanted.clear()

    def _idle(self) -> bool:
        """Wait until no step has run for a while; False if the engine stops."""
        while self._launched != self._seen or self._launched != self._ended:
            self._seen = self._launched
            if self._stopping.wait(IDLE_SECONDS):
                return False
        return not self._stopping.is_set()
