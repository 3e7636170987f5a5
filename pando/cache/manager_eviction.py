"""Making room: evicts the least valuable records until a reservation fits, and takes emptied nodes out of the tree."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

from pando.cache.components import Component, num_pages_of
from pando.cache.manager_store import Store
from pando.cache.node import Node, Record


class Eviction:
    """Frees slots by the policy's order. Whatever is not locked can be had; see `Budget.shortfall`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tree, self._kv, self._order = store.tree, store.kv, store.order
        self._window, self._states, self._events = store.window, store.states, store.events
        self._page_size = store.tree.page_size
        self._may_prune = not store.kv.slot_bytes  # else every node but a root holds KV
        self.evicted = [0] * len(store.components)
        """Slots evicted since the start, per component."""

    def make_room(self, need: Sequence[int]) -> None:
        """Evict until `need[i]` slots of each component are free, within the budget. The caller knows that it works."""
        if len(need) == 1 and not self._store.budget.binds:  # pages alone, and only their ids can be short
            while (lacking := need[0] - self._kv.allocator.num_free) > 0:
                self._evict(self._order.pop(), lacking)
            return
        while self._step(need, math.inf):
            pass

    def try_room(self, need: Sequence[int], worth: float) -> bool:
        """`make_room`, but only at the cost of records with scores below `worth`. True if there is room now."""
        while self._step(need, worth):
            pass
        return self._store.budget.has_free(need)

    def _step(self, need: Sequence[int], worth: float) -> bool:
        """Evict one record if something is lacking and it is worth less than `worth`; True if it did."""
        components, budget = self._store.components, self._store.budget
        short = None
        for count, component in zip(need, components, strict=True):
            if count > component.allocator.num_free:
                short = component
                break
        num_bytes = budget.lacking_bytes(need) if budget.binds else 0
        if short is None and num_bytes <= 0:
            return False
        states = self._states
        if states is not None and (num_bytes > 0 or short is states) and states.guests:
            self._free(states, states.take_guest())
            return True
        record = self._order.pop_below(worth, None if short is None else short.index)
        if record is None:
            return False
        component = components[record.component]
        slots = need[short.index] - short.allocator.num_free if short is component else 0
        self._evict(record, max(slots, -(-num_bytes // component.slot_bytes)))
        return True

    def _evict(self, record: Record, at_most: int) -> None:
        """Give up `record`, `at_most` slots of it where it can be divided."""
        node = record.node
        free_leaf = not node.children and not node.records[self._kv.index].locks
        whole = free_leaf and self._order.policy.whole_leaves and self._states is not None
        if whole or record.component == self._kv.index:
            pages = num_pages_of(node, self._page_size)
            self._cut_leaf(node, pages if whole else min(at_most, pages))
        elif self._window is not None and record.component == self._window.index:
            self._free(self._window, self._window.cut(record, at_most))
            self._tidy(node)
        elif self._states is not None:
            self._free(self._states, self._states.take(node))
            self._tidy(node)

    def _cut_leaf(self, node: Node, num_pages: int) -> None:
        """The last pages of an unlocked leaf go, and whatever else ends there."""
        if self._events.active:
            self._events.removed(node, num_pages)
        for component in self._store.components:
            self._order.discard(node.records[component.index])
            self._free(component, component.trim(node, num_pages))
        if num_pages == num_pages_of(node, self._page_size):
            self.remove(node)
            return
        self._tree.trim(node, num_pages)
        for component in self._store.components:
            component.offer(node)

    def _free(self, component: Component, slots: array[int]) -> None:
        self.evicted[component.index] += len(slots)
        component.allocator.put(slots)

    def _tidy(self, node: Node) -> None:
        """`node` lost a state or window pages: it may be superfluous, or its KV worth less."""
        if node.children:
            if len(node.children) == 1:
                self._tree.merge_upwards(next(iter(node.children.values())))
        elif not self.prune(node):
            self._kv.offer(node)

    def remove(self, node: Node) -> None:
        """Take the emptied leaf `node` out of the tree."""
        parent = self._tree.detach(node)
        if parent.parent is None:
            self._tree.drop_root_if_idle(parent)
            return
        if self.prune(parent):
            return
        if len(parent.children) == 1 and self._states is not None and parent.live:
            child = next(iter(parent.children.values()))
            self._tree.merge_upwards(child)
            if child.parent is not parent:
                return
        for component in self._store.components:
            component.offer(parent)

    def prune(self, node: Node) -> bool:
        """Remove `node` and what is above it as long as they are unlocked leaves that hold nothing. True if it went."""
        gone = False
        while self._may_prune and self._holds_nothing(node):
            num_pages = num_pages_of(node, self._page_size)
            if self._events.active:
                self._events.removed(node, num_pages)
            if self._states is not None:
                self._free(self._states, self._states.trim(node, num_pages))
            parent = self._tree.detach(node)
            gone = True
            if parent.parent is None:
                self._tree.drop_root_if_idle(parent)
                return True
            node = parent
        if gone:
            for component in self._store.components:
                component.offer(node)
        return gone

    def _holds_nothing(self, node: Node) -> bool:
        if node.parent is None or node.children or node.records[self._kv.index].locks:
            return False
        return not any(len(record.slots) for record in node.records)

    def drop(self, node: Node) -> None:
        """Free all that the unlocked leaf `node` holds, when the steps in flight have ended, and take it out."""
        for component in self._store.components:
            self._order.discard(node.records[component.index])
            component.allocator.retire(component.trim(node, num_pages_of(node, self._page_size)))
        parent = self._tree.detach(node)
        if parent.parent is None:
            self._tree.drop_root_if_idle(parent)
            return
        for component in self._store.components:
            component.offer(parent)

    def drop_unlocked(self, root: Node) -> None:
        """Drop every node below `root` that protects nothing, children before parents."""
        below = [root]
        for node in below:
            below.extend(node.children.values())
        for node in reversed(below[1:]):
            if node.records[self._kv.index].locks:
                self.purge(node)
                continue
            if self._events.active and node.live:
                self._events.removed(node, num_pages_of(node, self._page_size))
            self.drop(node)

    def purge(self, node: Node) -> None:
        """Free what nobody holds of a node whose path is locked: tombstones stay."""
        for component in self._store.components[1:]:
            if not node.records[component.index].locks:
                component.allocator.retire(component.trim(node, num_pages_of(node, self._page_size)))

    def drop_dead_path(self, node: Node | None) -> None:
        """Drop what an invalidated lock was the last to hold."""
        while node is not None and node.parent is not None and not node.records[self._kv.index].locks:
            parent = node.parent
            self.drop(node)
            node = parent
