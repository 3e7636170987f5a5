"""Components: one per kind of state. Each says how far its records carry a match, what a lock protects, what may go.

The tree owns structure (keys, parents, children); a component owns `node.records[index]` at every node and nothing
else. A lock is a `Pin`, plain data: releasing it replays exactly what locking did, on whatever nodes cover the span by
then, so it survives splits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pando.cache.allocator import SlotAllocator
from pando.cache.key import TOKEN_BYTES
from pando.cache.node import NOTHING, Node, Slots, pages_of
from pando.cache.value import EvictionOrder


class Pin(NamedTuple):
    """One component's lock: its records over tokens [start, node.depth) on the path to `node`."""

    component: int
    node: Node
    start: int


Receipt = tuple[Pin, ...]
"""All pins of one lock, at most one per component."""


class Component(Protocol):
    """Rules of one kind of state. `index` is its place in `Node.records`; `num_slots` are those in the tree."""

    name: str
    index: int
    slot_bytes: int
    num_slots: int
    num_locked: int
    allocator: SlotAllocator

    def usable(self, node: Node, num_tokens: int) -> tuple[Node, int]:
        """Longest prefix <= num_tokens that can be resumed from, and the node in or at the end of which it ends.

        `num_tokens` tokens match, and they end in `node`.
        """

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """`lower` lost its first `num_pages` pages to the new node `upper` above it: divide its record."""

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """True if `upper`'s record may dissolve into that of its only child, with nothing to tell them apart."""

    def merge(self, path: Sequence[Node]) -> None:
        """The nodes of `path`, top down, become the last of them: gather their records there."""

    def unlock(self, pin: Pin) -> None:
        """Undo one lock; what is then unprotected becomes a candidate for eviction."""

    def touch(self, node: Node, num_hits: int) -> None:
        """`node`, whose time was refreshed, was used, and found by `num_hits` requests."""

    def offer(self, node: Node) -> None:
        """`node` lost a lock or a child, or its value changed: a candidate if it may be evicted now."""

    def trim(self, node: Node, num_pages: int) -> array[int]:
        """`node`, an unlocked leaf, loses its last `num_pages` pages: returns the slots that go with them."""


class FullKV:
    """KV of every token, full attention's or latent. Needs the whole path; gives up leaf tails only: no holes.

    It is also the tree's lock: a record's `locks` are the pins that end at its node plus the number of its children
    that are locked. So a lock protects the path to the root, yet costs only the part of it that was not protected
    before; and what is not locked here is not locked in any component. Without full-attention layers (`slot_bytes` 0)
    it holds no pages and is the lock alone.

    exact_order: nodes are merged only if LRU can not tell them apart from one.
    """

    name = "full"

    def __init__(
        self, index: int, slot_bytes: int, allocator: SlotAllocator, order: EvictionOrder, *, exact_order: bool = True
    ) -> None:
        self.index = index
        self.slot_bytes = slot_bytes
        self.allocator = allocator
        self.num_slots = 0
        self.num_locked = 0
        self.order = order
        self.exact_order = exact_order

    def usable(self, node: Node, num_tokens: int) -> tuple[Node, int]:
        """All of it: KV can be sliced anywhere."""
        return node, num_tokens

    def adopt(self, node: Node, slots: Slots) -> None:
        """The new leaf `node` holds `slots`. The caller locks it next."""
        record = node.records[self.index]
        record.slots = slots
        self.order.touch(node)
        self.order.policy.made(record)
        self.num_slots += len(slots)

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """The first pages go to `upper`, which is locked if `lower` is: it has one child."""
        record = lower.records[self.index]
        above = upper.records[self.index]
        above.slots, above.locks = record.slots[:num_pages], 1 if record.locks else 0
        above.frequency, above.floor, above.kind = record.frequency, record.floor, record.kind
        record.slots = record.slots[num_pages:]
        if record.stamp:
            self.order.add(record)

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """No pin ends at `upper`, and no hit ended there since `lower` was used: they would be evicted in one go."""
        above, below = upper.records[self.index], lower.records[self.index]
        if self.exact_order and upper.last_use > lower.last_use:
            return False
        return above.locks == (1 if below.locks else 0)

    def merge(self, path: Sequence[Node]) -> None:
        """Pages in path order; locks and recency are the last node's."""
        record = path[-1].records[self.index]
        record.slots = np.concatenate([node.records[self.index].slots for node in path])
        if record.stamp:
            self.order.add(record)

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

    def num_to_lock(self, node: Node | None, num_tokens: int) -> int:
        """Pages that locking the first `num_tokens` tokens, which end in `node`, would take from the evictable ones."""
        count = 0
        if node is not None and node.depth > num_tokens and not node.records[self.index].locks:
            slots = len(node.records[self.index].slots)
            if slots:
                count -= (node.depth - num_tokens) * slots // (node.depth - node.start)
        while node is not None and not node.records[self.index].locks:
            count += len(node.records[self.index].slots)
            node = node.parent
        return count

    def touch(self, node: Node, num_hits: int) -> None:
        """Its ancestors need no refresh: they can not go before it, and after it they may."""
        record = node.records[self.index]
        record.frequency += num_hits
        self.order.policy.touched(record, num_hits)
        if record.stamp:
            self.order.add(record)

    def offer(self, node: Node) -> None:
        """A live, unlocked leaf is a candidate."""
        record = node.records[self.index]
        if len(record.slots) and not record.locks and not node.children and node.live:
            self.order.add(record)

    def trim(self, node: Node, num_pages: int) -> array[int]:
        """The record's last pages."""
        record = node.records[self.index]
        if not len(record.slots):
            return array("i")
        keep = len(record.slots) - num_pages
        tail = pages_of(record.slots[keep:])
        record.slots = record.slots[:keep] if keep else NOTHING
        self.num_slots -= num_pages
        return tail


def num_pages_of(node: Node, page_size: int) -> int:
    """Pages on the node's edge."""
    return len(node.key) // (page_size * TOKEN_BYTES)
