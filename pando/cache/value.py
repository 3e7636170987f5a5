"""Which record is worth least: the candidates for eviction in the order of a policy, which can be exchanged."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Protocol

from pando.cache.node import Node, Record

NUM_TIERS = 2
"""Proper candidates, and those that go only when there is no other: every unlocked record is in one of them."""


class Policy(Protocol):
    """An order among records. Scores of all components are comparable; the lowest goes first."""

    whole_leaves: bool
    """True if a leaf with a state goes at once with all it holds, False if only as much goes as is needed."""
    looks_at_all: bool
    """True if scores depend on all candidates, so that `choose` has to look at each."""

    def place(self, record: Record) -> tuple[int, int, float]:
        """(tier, group, base) of a candidate. Its score is base + bias(group); base may rise, see `EvictionOrder`."""

    def bias(self, group: int) -> float:
        """What all candidates of a group have in common; may change at any time."""

    def newcomer(self, tokens: int, above: int) -> float:
        """Score of a state that is not there yet, after `tokens` tokens, when the nearest one above is at `above`."""

    def made(self, record: Record) -> None:
        """`record` got its first slots."""

    def touched(self, record: Record, num_hits: int) -> None:
        """`record` is complete and used, and was found by `num_hits` requests."""

    def needed(self, record: Record, owner: Record) -> None:
        """`record`, pages of a window, is needed to resume at the end of `owner`'s node. `owner` was touched before."""

    def evicted(self, record: Record, score: float) -> None:
        """`record`, with this score, was the victim; it still has its slots."""

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The victim, if `looks_at_all`; None: the lowest score."""


Entry = tuple[float, int, int, Record]
"""Base, last use, stamp, record: the order within a group."""


class EvictionOrder:
    """Candidates for eviction, least valuable first. O(log n): outdated entries of the heaps go when they surface.

    There is a heap per component, tier and group; what a group has in common counts when their tops are compared. A
    candidate carries a non-zero `stamp`, set here and nowhere else. A base that rose since it was entered is noticed
    when it surfaces; one that may have sunk must be entered again by `add`.
    """

    def __init__(self, policy: Policy, num_components: int) -> None:
        self.policy = policy
        self.clock = 0
        self._heaps: list[list[dict[int, list[Entry]]]] = [
            [{} for _ in range(NUM_TIERS)] for _ in range(num_components)
        ]
        self._num_stamps = 0
        self._num_candidates = 0
        self._num_entries = 0

    def use(self, policy: Policy) -> None:
        """Go on with another policy, which has seen all records: every candidate is ranked anew."""
        candidates = list(self)
        self.policy = policy
        for tiers in self._heaps:
            for groups in tiers:
                groups.clear()
        self._num_entries = 0
        for record in candidates:
            self.add(record)

    def score(self, record: Record) -> tuple[int, float]:
        """(tier, score) of a candidate at this moment: the lowest goes first."""
        tier, group, base = self.policy.place(record)
        return tier, base + self.policy.bias(group)

    def touch(self, node: Node) -> None:
        """`node` was made, or a hit ended in it."""
        self.clock += 1
        node.last_use = self.clock

    def add(self, record: Record) -> None:
        """`record` became a candidate, or its value changed; its former entry is outdated from now on."""
        if not record.stamp:
            self._num_candidates += 1
        self._num_stamps += 1
        record.stamp = self._num_stamps
        tier, group, base = self.policy.place(record)
        heap = self._heaps[record.component][tier].setdefault(group, [])
        heapq.heappush(heap, (base, record.node.last_use, record.stamp, record))
        self._num_entries += 1
        if self._num_entries > 2 * self._num_candidates + 64:
            self._compact()

    def discard(self, record: Record) -> None:
        """`record` is no candidate any more; harmless if it was none."""
        if record.stamp:
            record.stamp = 0
            self._num_candidates -= 1

    def pop(self, component: int | None = None) -> Record:
        """Remove and return the least valuable candidate, of one component if asked. Raises LookupError if none."""
        record = self.pop_below(math.inf, component)
        if record is None:
            raise LookupError("no candidate for eviction")
        return record

    def pop_below(self, worth: float, component: int | None = None) -> Record | None:
        """The same if its score is below `worth`; None if there is no such candidate."""
        components = self._heaps if component is None else self._heaps[component : component + 1]
        for tier in range(NUM_TIERS):
            record, score = self._least(components, tier)
            if record is None:
                continue
            if self.policy.looks_at_all:
                live = (record for tiers in components for record in self._live(tiers[tier]))
                record = self.policy.choose(live) or record
            if score >= worth:
                return None
            self.discard(record)
            self.policy.evicted(record, score)
            return record
        return None

    def __iter__(self) -> Iterator[Record]:
        """All candidates, in no particular order."""
        return (record for tiers in self._heaps for groups in tiers for record in self._live(groups))

    def __len__(self) -> int:
        """Number of candidates."""
        return self._num_candidates

    @staticmethod
    def _live(groups: dict[int, list[Entry]]) -> Iterator[Record]:
        return (record for heap in groups.values() for _, _, stamp, record in heap if record.stamp == stamp)

    def _least(self, components: list[list[dict[int, list[Entry]]]], tier: int) -> tuple[Record | None, float]:
        """The lowest of the groups' tops and its score; among equals the one used longest ago."""
        bias, best, least = self.policy.bias, None, math.inf
        for tiers in components:
            for group, heap in tiers[tier].items():
                top = self._top(heap) if heap else None
                if top is None:
                    continue
                score = top[0] + bias(group)
                if best is None or score < least or score == least and top[1:3] < best[1:3]:
                    best, least = top, score
        return (None if best is None else best[3]), least

    def _top(self, heap: list[Entry]) -> Entry | None:
        while heap:
            base, last_use, stamp, record = heap[0]
            if record.stamp != stamp:
                heapq.heappop(heap)
                self._num_entries -= 1
                continue
            now = self.policy.place(record)[2]
            if now <= base:
                return heap[0]
            heapq.heapreplace(heap, (now, last_use, stamp, record))
        return None

    def _compact(self) -> None:
        """Drop outdated entries, so that the heaps stay within a constant factor of the candidates."""
        self._num_entries = 0
        for tiers in self._heaps:
            for tier, groups in enumerate(tiers):
                live = {group: [e for e in heap if e[3].stamp == e[2]] for group, heap in groups.items()}
                tiers[tier] = {group: heap for group, heap in live.items() if heap}
                for heap in tiers[tier].values():
                    heapq.heapify(heap)
                    self._num_entries += len(heap)
