"""Which record is worth least. One interface, so that policies differ in nothing but their order."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

from pando.cache.node import Record


class EvictionOrder(Protocol):
    """The candidates for eviction (unlocked records that their component can give up), least valuable first.

    A candidate carries a non-zero `stamp`, set here and nowhere else.
    """

    def add(self, record: Record) -> None:
        """`record` became a candidate, or its value changed."""

    def discard(self, record: Record) -> None:
        """`record` is no candidate any more; harmless if it was none."""

    def pop(self) -> Record:
        """Remove and return the least valuable candidate. Raises LookupError if there is none."""

    def __iter__(self) -> Iterator[Record]:
        """All candidates, in no particular order."""

    def __len__(self) -> int:
        """Number of candidates."""


class LruLeaf:
    """Least recently used leaf first. O(log n): a heap whose outdated entries are dropped when they surface."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Record]] = []
        self._num_stamps = 0
        self._num_candidates = 0

    def add(self, record: Record) -> None:
        """`record` became a candidate, or was used; its former entry is outdated from now on."""
        if not record.stamp:
            self._num_candidates += 1
        self._num_stamps += 1
        record.stamp = self._num_stamps
        heapq.heappush(self._heap, (record.last_use, record.stamp, record))
        if len(self._heap) > 2 * self._num_candidates + 64:
            self._compact()

    def discard(self, record: Record) -> None:
        """`record` is no candidate any more; harmless if it was none."""
        if record.stamp:
            record.stamp = 0
            self._num_candidates -= 1

    def pop(self) -> Record:
        """Remove and return the candidate used longest ago. Raises LookupError if there is none."""
        while self._heap:
            _, stamp, record = heapq.heappop(self._heap)
            if record.stamp == stamp:
                self.discard(record)
                return record
        raise LookupError("no candidate for eviction")

    def __iter__(self) -> Iterator[Record]:
        """All candidates, in no particular order."""
        return (record for _, stamp, record in self._heap if record.stamp == stamp)

    def __len__(self) -> int:
        """Number of candidates."""
        return self._num_candidates

    def _compact(self) -> None:
        """Drop outdated entries, so that the heap stays within a constant factor of the candidates."""
        self._heap = [entry for entry in self._heap if entry[2].stamp == entry[1]]
        heapq.heapify(self._heap)
