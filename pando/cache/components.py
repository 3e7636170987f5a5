"""Components: one per kind of state. Each says how far its records carry a match, what a lock protects, what may go.

The tree owns structure (keys, parents, children); a component owns `node.records[index]` at every node and nothing
else. A lock is a `Pin`, plain data: releasing it replays exactly what locking did, on whatever nodes cover the span by
then, so it survives splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pando.cache.node import Node, Record, Slots
from pando.cache.value import EvictionOrder


class Pin(NamedTuple):
    """One component's lock: its records over tokens [start, node.depth) on the path to `node`."""

    component: int
    node: Node
    start: int


Receipt = tuple[Pin, ...]
"""All pins of one lock, one per component that has something to protect."""


class Component(Protocol):
    """Rules of one kind of state. `index` is its place in `Node.records`."""

    index: int
    slot_bytes: int
    num_slots: int
    num_locked: int

    def usable(self, node: Node, num_tokens: int) -> int:
        """Longest prefix <= num_tokens that can be resumed from; `num_tokens` tokens match and end at or in `node`."""

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """`lower` lost its first `num_pages` pages to the new node `upper` above it: divide its record."""

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """True if `upper`'s record may dissolve into that of its only child, with nothing to tell them apart."""

    def merge(self, path: Sequence[Node]) -> None:
        """The nodes of `path`, top down, become the last of them: gather their records there."""

    def lock(self, node: Node) -> Pin:
        """Protect what a request resuming at the end of `node` needs."""

    def unlock(self, pin: Pin) -> None:
        """Undo one `lock`; what is then unprotected becomes a candidate for eviction."""

    def touch(self, node: Node) -> None:
        """A hit ended at `node`, which is locked (so no candidate just now): refresh what it used."""

    def offer(self, node: Node) -> None:
        """`node` lost a lock or a child: make its record a candidate if it may be evicted now."""

    def cut(self, record: Record, num_slots: int) -> Slots:
        """Take the last `num_slots` slots off an unlocked record; returns them."""


class FullKV:
    """KV of every token. Needs the whole path; gives up leaf tails only, so no path ever has a hole.

    A record's `locks` are the pins that end at its node plus the number of its children that are locked. So a lock
    protects the path to the root, yet costs only the part of it that was not protected before.
    """

    def __init__(self, index: int, slot_bytes: int, order: EvictionOrder) -> None:
        self.index = index
        self.slot_bytes = slot_bytes
        self.num_slots = 0
        self.num_locked = 0
        self.order = order
        self.clock = 0

    def usable(self, node: Node, num_tokens: int) -> int:
        """All of it: KV can be sliced anywhere."""
        return num_tokens

    def adopt(self, node: Node, slots: Slots) -> None:
        """The new leaf `node` holds `slots`. The caller locks it next."""
        self.clock += 1
        node.records.append(Record(node, slots, locks=0, last_use=self.clock))
        self.num_slots += len(slots)

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """The first pages go to `upper`, which is locked if `lower` is: it has one child."""
        record = lower.records[self.index]
        locks = 1 if record.locks else 0
        upper.records.append(Record(upper, record.slots[:num_pages], locks=locks, last_use=record.last_use))
        record.slots = record.slots[num_pages:]

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """No pin ends at `upper`, and no hit ended there since `lower` was used: they would be evicted in one go."""
        above, below = upper.records[self.index], lower.records[self.index]
        return above.locks == (1 if below.locks else 0) and above.last_use <= below.last_use

    def merge(self, path: Sequence[Node]) -> None:
        """Pages in path order; locks and recency are the last node's."""
        path[-1].records[self.index].slots = np.concatenate([node.records[self.index].slots for node in path])

    def lock(self, node: Node) -> Pin:
        """Protect the path from the root to the end of `node`."""
        pin = Pin(self.index, node, 0)
        current: Node | None = node
        while current is not None:
            record = current.records[self.index]
            record.locks += 1
            if record.locks > 1:
                break  # the path above is protected on behalf of `current` already
            self.num_locked += len(record.slots)
            if record.stamp:
                self.order.discard(record)
            current = current.parent
        return pin

    def unlock(self, pin: Pin) -> None:
        """Undo one `lock`."""
        current: Node | None = pin.node
        while current is not None:
            record = current.records[self.index]
            record.locks -= 1
            if record.locks:
                break
            self.num_locked -= len(record.slots)
            self.offer(current)
            current = current.parent

    def num_to_lock(self, node: Node | None) -> int:
        """Pages that `lock(node)` would turn from evictable into protected."""
        count = 0
        while node is not None and not node.records[self.index].locks:
            count += len(node.records[self.index].slots)
            node = node.parent
        return count

    def touch(self, node: Node) -> None:
        """Refresh `node` alone. Its ancestors need no refresh: they can not go before it, and after it they may."""
        self.clock += 1
        node.records[self.index].last_use = self.clock

    def offer(self, node: Node) -> None:
        """A live, unlocked leaf is a candidate."""
        record = node.records[self.index]
        if node.live and not record.locks and not node.children and node.parent is not None:
            self.order.add(record)

    def cut(self, record: Record, num_slots: int) -> Slots:
        """The record's last pages."""
        keep = len(record.slots) - num_slots
        tail = record.slots[keep:]
        record.slots = record.slots[:keep]
        self.num_slots -= num_slots
        return tail
