"""Sliding windows in the tree: KV that only the tokens right behind it ever read."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from pando.cache.allocator import SlotAllocator
from pando.cache.components import Pin, num_pages_of
from pando.cache.node import Node, Record, Slots, pages_of, slots_of
from pando.cache.value import EvictionOrder


class WindowKV:
    """KV of sliding-window layers. A prefix can be resumed if its last `window` tokens are there.

        edge       | p0 | p1 | p2 | p3 | p4 |
        record               | w2 | w3 | w4 |      a suffix of the edge: what is nearest to its end is needed longest

    The pages in front of the suffix are a tombstone: they fell out of everybody's window, or were evicted. A request
    that computes them again heals it. A lock covers whole records; nodes are split so that it covers no more than the
    window.
    """

    name = "window"

    def __init__(
        self, index: int, slot_bytes: int, allocator: SlotAllocator, order: EvictionOrder, window: int, page_size: int
    ) -> None:
        self.index = index
        self.slot_bytes = slot_bytes
        self.allocator = allocator
        self.order = order
        self.window = window
        self.page_size = page_size
        self.num_slots = 0
        self.num_locked = 0

    def first_page(self, num_tokens: int) -> int:
        """Index of the first page that is needed to go on behind `num_tokens` tokens."""
        return max(0, num_tokens - self.window) // self.page_size

    def usable(self, node: Node, num_tokens: int) -> tuple[Node, int]:
        """The longest prefix whose last `window` tokens have pages."""
        end_node, end = node, num_tokens
        need = self.first_page(end) * self.page_size
        current = node
        while current.parent is not None:
            held = current.depth - len(current.records[self.index].slots) * self.page_size
            if held <= need:
                break
            current, start = current.parent, current.start
            if held > start:  # a hole in the window: nothing that ends on this edge is whole
                end_node, end = current, start
                need = self.first_page(end) * self.page_size
        return end_node, end

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """Each gets the part of the suffix on its edge; every lock covers both, for locks begin where nodes do."""
        record = lower.records[self.index]
        below = num_pages_of(lower, self.page_size)
        cut = max(0, len(record.slots) - below)
        above = upper.records[self.index]
        above.slots, above.locks = record.slots[:cut], record.locks
        above.frequency, above.floor, above.kind = record.frequency, record.floor, record.kind
        above.reach, above.time = record.reach, record.time
        record.slots = record.slots[cut:]
        self.offer(upper)
        if record.stamp:
            self._renew(lower)

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """Nobody holds either, and the pages of both are one suffix, used by the same request."""
        above, below = upper.records[self.index], lower.records[self.index]
        if above.locks or below.locks:
            return False
        whole = len(below.slots) == num_pages_of(lower, self.page_size)
        return not len(above.slots) or (whole and above.time == below.time)

    def merge(self, path: Sequence[Node]) -> None:
        """Pages in path order."""
        records = [node.records[self.index] for node in path]
        for record in records[:-1]:
            self.order.discard(record)
        last = records[-1]
        last.slots = np.concatenate([record.slots for record in records])
        self._renew(path[-1])

    def lock(self, node: Node, start: int) -> Pin:
        """Protect what is held of tokens [start, node.depth); a node begins at `start`."""
        pin = Pin(self.index, node, start)
        for current in span(pin):
            record = current.records[self.index]
            record.locks += 1
            if record.locks == 1:
                self.num_locked += len(record.slots)
                self.order.discard(record)
        return pin

    def unlock(self, pin: Pin) -> None:
        """Undo one `lock`."""
        for current in span(pin):
            record = current.records[self.index]
            record.locks -= 1
            if not record.locks:
                self.num_locked -= len(record.slots)
                self.offer(current)

    def num_to_lock(self, node: Node | None, num_tokens: int) -> int:
        """Pages that locking the window behind `num_tokens` tokens would take from the evictable ones."""
        count, start = 0, self.first_page(num_tokens) * self.page_size
        while node is not None and node.depth > start:
            record = node.records[self.index]
            held = node.depth - len(record.slots) * self.page_size
            if not record.locks:
                count += max(0, min(node.depth, num_tokens) - max(start, held)) // self.page_size
            node = node.parent
        return count

    def use(self, owner: Record, num_hits: int) -> None:
        """A request resumed, or may resume, at the end of `owner`'s node: the window there is worth what that saves."""
        node: Node | None = owner.node
        start, depth = self.first_page(owner.node.depth) * self.page_size, owner.node.depth
        while node is not None and node.depth > start:
            record = node.records[self.index]
            record.reach, record.time = depth, self.order.clock
            record.frequency += num_hits
            self.order.policy.needed(record, owner)
            if record.stamp:
                self.order.add(record)
            node = node.parent

    def touch(self, node: Node, num_hits: int) -> None:
        """Windows are refreshed by their span, see `use`."""

    def offer(self, node: Node) -> None:
        """Pages that nobody holds are candidates, wherever they are."""
        record = node.records[self.index]
        if len(record.slots) and not record.locks and node.live:
            self.order.add(record)

    def put(self, node: Node, first: int, pages: array[int]) -> int:
        """Pages of a request for `node`'s edge from page `first` of it on, up to its end: heal what is missing.

        Returns how many of them, from the first, were taken; the tree holds the rest already.
        """
        record = node.records[self.index]
        total = num_pages_of(node, self.page_size)
        missing = total - len(record.slots)
        if first >= missing:
            return 0
        taken = missing - first
        new: Slots = slots_of(pages[:taken])
        record.slots = np.concatenate([new, record.slots]) if len(record.slots) else new
        self.num_slots += taken
        if record.time < 0:
            record.time = 0
            self.order.policy.made(record)
        if record.locks:
            self.num_locked += taken
        else:
            self.offer(node)
        return taken

    def cut(self, record: Record, num_pages: int) -> array[int]:
        """Take the first `num_pages` pages off an unlocked record: the tombstone grows. Returns them."""
        pages = pages_of(record.slots[:num_pages])
        record.slots = record.slots[num_pages:]
        self.num_slots -= len(pages)
        self._renew(record.node)
        return pages

    def trim(self, node: Node, num_pages: int) -> array[int]:
        """The end of the suffix goes."""
        record = node.records[self.index]
        keep = max(0, len(record.slots) - num_pages)
        tail = pages_of(record.slots[keep:])
        record.slots = record.slots[:keep]
        self.num_slots -= len(tail)
        self._renew(node)
        return tail

    def pages_under(self, pin: Pin) -> array[int]:
        """Page ids of tokens [pin.start, pin.node.depth), all of which are there, in position order."""
        parts = [pages_of(node.records[self.index].slots) for node in span(pin)]
        pages = array("i")
        for part in reversed(parts):
            pages.extend(part)
        return pages

    def _renew(self, node: Node) -> None:
        self.order.discard(node.records[self.index])
        self.offer(node)


def span(pin: Pin) -> Iterator[Node]:
    """The nodes under a window's pin, from its end upwards."""
    current: Node | None = pin.node
    while current is not None and current.depth > pin.start:
        yield current
        current = current.parent
