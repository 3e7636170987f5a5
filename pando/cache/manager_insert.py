"""Insertion: a request's pages and states become the tree's, where others find them."""

from __future__ import annotations

from array import array

from pando.cache.components import Pin
from pando.cache.components_state import Recurrent
from pando.cache.components_window import WindowKV
from pando.cache.handle import NO_GUEST, CacheHandle, PageWrite
from pando.cache.key import common_prefix
from pando.cache.manager_store import Store
from pando.cache.node import Node, pages_of, slots_of
from pando.cache.spec import FULL, WINDOW


class Insertion:
    """Puts what handles computed, or are about to compute, into the tree."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tree, self._kv, self._events = store.tree, store.kv, store.events
        self._page_size = store.tree.page_size
        self.unborn: list[tuple[int, tuple[Pin, Pin]]] = []
        """(step, locks) of states in the tree that a step not launched yet will write."""
        self.arriving: list[CacheHandle] = []
        """Handles with a guest that a step not launched yet will write."""

    def extend(self, handle: CacheHandle, num_pages: int, writes: list[PageWrite]) -> None:
        """The handle's first `num_pages` pages of full attention are the tree's from now on, and locked."""
        node = self._walk(handle, num_pages, writes)
        pin = self._kv.lock(node)
        self._kv.unlock(handle.receipt[0])
        handle.receipt = (pin, *handle.receipt[1:])
        handle.node, handle.num_tree_pages = node, num_pages

    def _walk(self, handle: CacheHandle, num_pages: int, writes: list[PageWrite]) -> Node:
        """Walk and extend the tree below the handle's node to `num_pages` pages; returns the node that ends there."""
        data, width = handle.key.data, self._tree.page_bytes
        node, index = handle.node, handle.num_tree_pages
        while index < num_pages:
            start = index * width
            child = node.children.get(bytes(data[start : start + width]))
            if child is None:
                return self._attach(node, handle, index, num_pages)
            common = common_prefix(child.key, data, start, num_pages * width, width)
            node = child if common == len(child.key) else self._tree.split(child, common)
            end = index + common // width
            self._swap(handle, node, index, end, writes)
            index = end
        return node

    def _attach(self, parent: Node, handle: CacheHandle, index: int, num_pages: int) -> Node:
        """A new leaf with the handle's pages [index, num_pages)."""
        width = self._tree.page_bytes
        node = self._tree.attach(parent, bytes(handle.key.data[index * width : num_pages * width]))
        self._kv.adopt(node, slots_of(handle.pages[index:num_pages]))
        store = self._store
        if store.window is not None:
            store.window.offer(parent)
        if store.states is not None:
            store.states.offer(parent)
        if self._events.active:
            self._events.stored(node)
        return node

    def _swap(self, handle: CacheHandle, node: Node, index: int, end: int, writes: list[PageWrite]) -> None:
        """Replace the handle's own pages [index, end) by those of `node`."""
        pages = pages_of(node.records[self._kv.index].slots)
        if pages:
            duplicates = handle.pages[index:end]
            handle.pages[index:end] = pages
            writes.extend([(FULL, i, page) for i, page in enumerate(pages, index)])
            self._kv.allocator.retire(duplicates)

    # -- windows

    def slide(self, window: WindowKV, handle: CacheHandle, num_tokens: int, start: int) -> list[PageWrite]:
        """The handle's window pages of its first `num_tokens` tokens are the tree's; hold what is read from `start` on.

        The tree knows the tokens. Pages in front of the window of a step that starts after `start` tokens are let go.
        """
        writes: list[PageWrite] = []
        end = num_tokens // self._page_size
        node = self._tree.cut_at(handle.node, end * self._page_size)
        healed = self._heal(window, handle, node, writes)
        first = min(window.first_page(start), end)
        pin = self.lock_window(window, node, first * self._page_size)
        for other in healed:
            window.offer(other)
        window.unlock(handle.receipt[1])
        handle.receipt = (handle.receipt[0], pin, *handle.receipt[2:])
        handle.num_window_tree_pages = max(end, handle.num_window_tree_pages)
        forget(handle, first)
        return writes

    def lock_window(self, window: WindowKV, node: Node, start: int) -> Pin:
        """Lock the window pages of tokens [start, node.depth), and no others."""
        if 0 < start < node.depth:
            self._tree.cut_at(node, start)
        return window.lock(node, start)

    def _heal(self, window: WindowKV, handle: CacheHandle, node: Node, writes: list[PageWrite]) -> list[Node]:
        """Give the tree the handle's own window pages up to the end of `node`; returns the nodes that got some."""
        page, shared = self._page_size, handle.num_window_tree_pages
        healed = []
        current: Node | None = node
        while current is not None and current.depth > shared * page:
            first = current.start // page
            begin, end = max(first, shared), current.depth // page
            own = handle.window_pages[begin:end]
            taken = window.put(current, begin - first, own)
            if taken:
                healed.append(current)
            if taken < len(own):
                held = pages_of(current.records[window.index].slots[taken - len(own) :])
                handle.window_pages[begin + taken : end] = held
                writes.extend([(WINDOW, i, slot) for i, slot in enumerate(held, begin + taken)])
                window.allocator.retire(own[taken:])
            current = current.parent
        return healed

    def use_window(self, window: WindowKV, node: Node, num_hits: int) -> None:
        """A request may resume at the end of `node`, or `num_hits` did: the window there, and no more, is of use."""
        states = self._store.states
        owner = node.records[0 if states is None else states.index]
        start = window.first_page(node.depth) * self._page_size
        if node.live and (states is None or len(owner.slots)):
            if start > 0:
                self._tree.cut_at(node, start)
            window.use(owner, num_hits)

    # -- states

    def attach_saves(self, states: Recurrent, handle: CacheHandle, num_tokens: int) -> None:
        """The handle's saved states of its first `num_tokens` tokens, which the tree knows, are the tree's."""
        waiting = []
        for position, slot, step in handle.saves:
            if position > num_tokens:
                waiting.append((position, slot, step))
            else:
                self.attach_state(states, handle, position, slot, step)
        handle.saves = waiting

    def attach_state(self, states: Recurrent, handle: CacheHandle, position: int, slot: int, step: int) -> None:
        """`slot`, written by `step`, is the state after `position` tokens of the handle, unless there is one."""
        node = self._tree.cut_at(handle.node, position)
        planned = step > states.allocator.newest_launched
        self.settle_guest(states, node)
        if states.slot(node) >= 0:
            states.allocator.retire(array("i", [slot]), planned=planned)
            return
        self._store.order.touch(node)
        if planned:
            locks = (self._kv.lock(node), states.lock(node))
            self.unborn.append((step, locks))
            states.planned.add(node.records[states.index])
        states.put(node, slot)
        if self._store.window is not None:
            self.use_window(self._store.window, node, 0)
        self._rescore(states, node)

    def attach_guests(self, states: Recurrent, step: int) -> None:
        """Guests that steps up to `step` write can be found from now on."""
        for handle in [handle for handle in self.arriving if handle.guest[2] <= step]:
            position, slot, _ = handle.guest
            self.drop_guest(handle)
            node = handle.node
            while node.parent is not None and node.start >= position:
                node = node.parent
            known = position == node.depth and states.slot(node) >= 0
            if not known and node.live and position <= node.depth and states.guests.put(node, position, slot):
                states.num_slots += 1
            else:
                states.allocator.retire(array("i", [slot]))

    def drop_guest(self, handle: CacheHandle) -> None:
        """The handle's guest is its own no more."""
        self.arriving.remove(handle)
        handle.guest = NO_GUEST

    def settle_guest(self, states: Recurrent, node: Node) -> None:
        """A guest at the end of `node`, if there is one, becomes its state."""
        if states.settle(node):
            self._rescore(states, node)

    def _rescore(self, states: Recurrent, node: Node) -> None:
        """A new state at `node`: what is at it is worth more, and what is below, up to the next states, less."""
        order, below = self._store.order, [node]
        for current in below:
            for record in current.records:
                if record.stamp:
                    order.add(record)
            if current is node or not len(current.records[states.index].slots):
                below.extend(current.children.values())


def forget(handle: CacheHandle, first: int) -> None:
    """The handle sees no window page in front of page `first` any more."""
    gone = first - handle.first_window_page
    if gone > 0:
        handle.window_pages[handle.first_window_page : first] = array("i", [-1]) * gone
        handle.first_window_page = first
