"""Recurrent states in the tree: a slot holds the states of all layers after as many tokens as a node ends at."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from pando.cache.allocator import SlotAllocator
from pando.cache.components import Pin
from pando.cache.guests import Guests
from pando.cache.node import NOTHING, Node, Record, pages_of
from pando.cache.value import EvictionOrder


class Recurrent:
    """States of recurrent layers: valid at a node's end and nowhere else. Immutable; a request copies what it resumes.

    A slot in the tree was written by a step that ran, or runs before anybody can read it. `num_slots` includes guests.
    """

    name = "state"

    def __init__(
        self, index: int, slot_bytes: int, allocator: SlotAllocator, order: EvictionOrder, page_size: int = 1
    ) -> None:
        self.index = index
        self.page_size = page_size
        self.slot_bytes = slot_bytes
        self.allocator = allocator
        self.order = order
        self.num_slots = 0
        self.num_locked = 0
        self.planned: set[Record] = set()
        """States that the step being planned will save: nobody resumes there before it was launched."""
        self.guests = Guests()

    def usable(self, node: Node, num_tokens: int) -> tuple[Node, int]:
        """The deepest state on the path; the root is the state of nothing read."""
        while node.parent is not None:
            record = node.records[self.index]
            if node.depth <= num_tokens and len(record.slots) and record not in self.planned:
                return node, node.depth
            if self.guests and (position := self.guests.deepest(node, num_tokens)):
                return node, position
            node = node.parent
        return node, 0

    def slot(self, node: Node) -> int:
        """The slot of the state at the end of `node`, -1 if there is none."""
        slots = node.records[self.index].slots
        return int(slots[0]) if len(slots) else -1

    def put(self, node: Node, slot: int) -> None:
        """`node`, which has none, gets a state."""
        record = node.records[self.index]
        assert not len(record.slots) and node.parent is not None, f"a second state after {node.depth} tokens"
        record.slots = np.array([slot], dtype=np.int32)
        record.frequency = 1
        self.num_slots += 1
        self.order.policy.touched(record, 0)
        if record.locks:
            self.num_locked += 1
        else:
            self.offer(node)

    def settle(self, node: Node) -> bool:
        """A guest at the end of `node`, if there is one, becomes its state. True if one did."""
        slot = self.guests.take_end(node)
        if slot >= 0:
            self.num_slots -= 1
            self.order.touch(node)
            self.put(node, slot)
        return slot >= 0

    def take_guest(self) -> array[int]:
        """Take the guest that goes first off the tree."""
        self.num_slots -= 1
        return array("i", [self.guests.take_oldest()])

    def split(self, upper: Node, lower: Node, num_pages: int) -> None:
        """The state stays at the lower node: at the cut there was none."""
        self.guests.split(upper, lower)

    def can_merge(self, upper: Node, lower: Node) -> bool:
        """A state can not move."""
        record = upper.records[self.index]
        return not len(record.slots) and not record.locks

    def merge(self, path: Sequence[Node]) -> None:
        """The last node's state is that of the whole."""
        self.guests.merge(path)

    def lock(self, node: Node) -> Pin:
        """Protect the state at the end of `node`."""
        record = node.records[self.index]
        record.locks += 1
        if record.locks == 1:
            self.num_locked += len(record.slots)
            self.order.discard(record)
        return Pin(self.index, node, node.depth)

    def unlock(self, pin: Pin) -> None:
        """Undo one `lock`."""
        record = pin.node.records[self.index]
        record.locks -= 1
        if not record.locks:
            self.num_locked -= len(record.slots)
            self.offer(pin.node)

    def num_to_lock(self, node: Node | None, num_tokens: int) -> int:
        """1 if the state after `num_tokens` tokens, at the end of `node`, could be evicted."""
        if node is None or not num_tokens:
            return 0
        record = node.records[self.index]
        if node.depth > num_tokens or not len(record.slots):
            return 1  # a guest, which becomes a state
        return len(record.slots) if not record.locks else 0

    def touch(self, node: Node, num_hits: int) -> None:
        """A request resumed here."""
        record = node.records[self.index]
        if len(record.slots):
            record.frequency += num_hits
            self.order.policy.touched(record, num_hits)
            if record.stamp:
                self.order.add(record)

    def offer(self, node: Node) -> None:
        """A state that nobody holds is a candidate, wherever it is."""
        record = node.records[self.index]
        if len(record.slots) and not record.locks and node.live:
            self.order.add(record)

    def take(self, node: Node) -> array[int]:
        """Take the state off `node`, which is not locked: a tombstone stays."""
        record = node.records[self.index]
        self.order.discard(record)
        slots = pages_of(record.slots)
        record.slots = NOTHING
        self.num_slots -= len(slots)
        return slots

    def trim(self, node: Node, num_pages: int) -> array[int]:
        """Its position goes, and the state with it, and guests."""
        gone = self.guests.trim(node, node.depth - num_pages * self.page_size)
        self.num_slots -= len(gone)
        return self.take(node) + gone
