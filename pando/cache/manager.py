"""CacheManager: what the scheduler calls. Matches prefixes, reserves pages, publishes what was computed, evicts.

    match -> admit -> [ grow -> publish ]* -> release         launched(step) / collected(step) around every step

`publish` is called when the step that computes the tokens is planned. That is sound because steps run in order on the
device and store their KV before they attend: whoever matches those pages runs later. For the same reason an evicted
page can be handed out at once: the steps that still read it run before the one that writes it anew. Pages that a
request frees itself may still be written by a launched step, so they go through the allocator's quarantine.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pando.cache.allocator import PageAllocator
from pando.cache.components import Component, FullKV, Receipt
from pando.cache.events import EventHub
from pando.cache.handle import CacheHandle, CacheStats, Denied, GrowResult, PageWrites, PrefixMatch
from pando.cache.invariants import check_manager
from pando.cache.key import TOKEN_BYTES, TokenKey, common_prefix
from pando.cache.node import Node, pages_of, slots_of
from pando.cache.tree import RadixTree
from pando.cache.value import EvictionOrder, LruLeaf

_NO_GROWTH = GrowResult(0, array("i"))


class CacheManager:
    """The prefix cache of one replica, on host integers. Not thread-safe: one scheduler owns it.

    num_pages, page_size (tokens): the pool. bytes_per_page: over all layers, for statistics. sharing=False matches and
    publishes nothing. order: eviction order, least recently used leaf by default.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        bytes_per_page: int = 0,
        *,
        sharing: bool = True,
        order: EvictionOrder | None = None,
    ) -> None:
        self.page_size = page_size
        self.sharing = sharing
        self.order: EvictionOrder = LruLeaf() if order is None else order
        self.kv = FullKV(0, bytes_per_page, self.order)
        self.components: tuple[Component, ...] = (self.kv,)
        self.allocator = PageAllocator(num_pages)
        self.tree = RadixTree(page_size, self.components)
        self.events = EventHub(self.tree)
        self.handles: set[CacheHandle] = set()
        self.evicted_tokens = 0

    # -- finding

    def page_after(self, key: TokenKey, num_tokens: int) -> bytes:
        """The page of `key` that follows its first `num_tokens` tokens (whole pages); shorter at its end."""
        start = num_tokens * TOKEN_BYTES
        return bytes(key.data[start : start + self.tree.page_bytes])

    def match(self, tokens: bytes | TokenKey, namespace: str, limit: int | None = None) -> PrefixMatch:
        """The longest cached prefix of `tokens` that leaves at least one token to compute. Changes nothing.

        limit: tokens to match at most; None = all but the last.
        """
        data = tokens.data if isinstance(tokens, TokenKey) else tokens
        most = len(data) // TOKEN_BYTES - 1
        stop = max(0, (most if limit is None else min(limit, most)) // self.page_size) * self.tree.page_bytes
        node, num_bytes = self.tree.find(data, stop, namespace) if self.sharing else (None, 0)
        if node is None:
            return PrefixMatch(0, (namespace, 0), None)
        num_tokens = num_bytes // TOKEN_BYTES
        for component in self.components:
            num_tokens = component.usable(node, num_tokens)
        return PrefixMatch(num_tokens, (namespace, node.id), node)

    def available_pages(self) -> int:
        """Pages that a reservation can get: free ones and evictable ones."""
        return self.allocator.num_free + self.kv.num_slots - self.kv.num_locked

    # -- a request's way

    def admit(
        self, key: TokenKey, namespace: str, num_tokens_needed: int, *, limit: int | None = None, keep: int = 0
    ) -> CacheHandle | Denied:
        """Lock the longest cached prefix of `key` and reserve pages for positions [0, num_tokens_needed), or deny.

        `handle.num_cached` tokens need not be computed. The key stays the caller's, who appends tokens to it.
        limit: tokens to take from the cache at most. keep: pages that must stay available afterwards.
        """
        match = self.match(key, namespace, limit)
        shortfall = self._shortfall(match, num_tokens_needed) + keep
        if shortfall > 0:
            return Denied(shortfall)
        node = match.node if match.node is not None else self.tree.root(namespace)
        tail = node.depth - match.num_tokens
        if tail:
            node = self.tree.split(node, len(node.key) - tail * TOKEN_BYTES)
        receipt = self._lock(node)
        if match.num_tokens:
            self._touch(node)
        pages = self._path_pages(node)
        num_new = self._num_pages(num_tokens_needed) - len(pages)
        handle = CacheHandle(key, namespace, node, receipt, pages, match.num_tokens)
        if num_new > 0:
            self._reserve(num_new)
            pages.extend(self.allocator.take(num_new))
        self.handles.add(handle)
        return handle

    def grow(self, handle: CacheHandle, num_tokens: int) -> GrowResult | Denied:
        """Make pages exist for positions [0, num_tokens) of the handle. Returns the new ones."""
        pages = handle.pages
        first = len(pages)
        need = -(-num_tokens // self.page_size) - first
        if need <= 0:
            return _NO_GROWTH
        allocator = self.allocator
        if need > allocator.num_free:
            shortfall = need - self.available_pages()
            if shortfall > 0:
                return Denied(shortfall)
            self._reserve(need)
        new = allocator.take(need)
        pages.extend(new)
        return GrowResult(first, new)

    def grow_many(self, handles: Sequence[CacheHandle], num_tokens: Sequence[int]) -> PageWrites | Denied:
        """`grow` of every handle to its own number of tokens, all or none, with the new pages as columns."""
        page_size = self.page_size
        writes = PageWrites()
        rows, indices = writes.row, writes.page_index
        for row, (handle, count) in enumerate(zip(handles, num_tokens, strict=True)):
            first = len(handle.pages)
            need = -(-count // page_size) - first
            if need == 1:
                rows.append(row)
                indices.append(first)
            elif need > 1:
                rows.extend([row] * need)
                indices.extend(range(first, first + need))
        shortfall = len(rows) - self.available_pages()
        if shortfall > 0:
            return Denied(shortfall)
        if not rows:
            return writes
        self._reserve(len(rows))
        writes.page_id = self.allocator.take(len(rows)).tolist()
        for row, page in zip(rows, writes.page_id, strict=True):
            handles[row].pages.append(page)
        return writes

    def publish(self, handle: CacheHandle, num_tokens: int) -> list[tuple[int, int]]:
        """Let others match the full pages of the handle's first `num_tokens` tokens, all computed or being planned.

        Returns (page index, page id) writes: pages that another request published first replace the handle's own.
        """
        num_pages = num_tokens // self.page_size
        if num_pages <= handle.num_tree_pages or not handle.node.live or not self.sharing:
            return []
        assert num_tokens <= len(handle.key) and num_pages <= len(handle.pages), (num_tokens, len(handle.pages))
        swaps: list[tuple[int, int]] = []
        node = self._insert(handle, num_pages, swaps)
        receipt = self._lock(node)
        self._unlock(handle.receipt)
        handle.node, handle.receipt, handle.num_tree_pages = node, receipt, num_pages
        return swaps

    def release(self, handle: CacheHandle, num_tokens: int, *, publish: bool) -> None:
        """End the handle: publish its first `num_tokens` tokens if asked, free its own pages, drop its lock."""
        assert handle in self.handles, "the handle was released before"
        if publish:
            self.publish(handle, num_tokens)
        self.handles.remove(handle)
        self.allocator.retire(handle.pages[handle.num_tree_pages :])
        node = handle.node
        self._touch(node)
        self._unlock(handle.receipt)
        if not node.live:
            self._drop_dead_path(node)
        elif node.parent is not None:
            self.tree.merge_upwards(node)
        else:
            self.tree.drop_root_if_idle(node)

    # -- steps

    def launched(self, step: int) -> None:
        """Step `step` was launched. Pages freed from now on rest until it is collected."""
        self.allocator.launched(step)

    def collected(self, step: int) -> None:
        """Step `step` has ended, well or not. Pages freed before the next launch can be used again."""
        self.allocator.collected(step)

    # -- forgetting

    def invalidate(self) -> None:
        """A step failed: nothing published so far may be matched again. Locked pages go when they are released."""
        roots = list(self.tree.roots.values())
        for node in self.tree.nodes():
            node.live = False
        self.tree.roots.clear()
        for root in roots:
            self._drop_unlocked(root)
        if self.events.active:
            self.events.cleared()

    def flush(self) -> bool:
        """Drop everything that no request holds. False if requests hold anything."""
        for root in list(self.tree.roots.values()):
            self._drop_unlocked(root)
        if self.events.active and not self.tree.roots:
            self.events.cleared()
        return not self.handles

    # -- looking

    @property
    def num_held_tokens(self) -> int:
        """Tokens whose KV is resident or being planned, in the tree and in handles, each counted once. O(handles)."""
        own = sum(self._num_own_tokens(handle) for handle in self.handles)
        return self.kv.num_slots * self.page_size + own

    def stats(self) -> CacheStats:
        """Counts of this moment. O(handles)."""
        free, quarantined = self.allocator.num_free, self.allocator.num_quarantined
        evictable = self.kv.num_slots - self.kv.num_locked
        used = self.allocator.num_pages - free
        return CacheStats(
            num_pages=self.allocator.num_pages,
            num_free=free,
            num_quarantined=quarantined,
            num_evictable=evictable,
            num_locked=used - quarantined - evictable,
            num_held_tokens=self.num_held_tokens,
            num_handles=len(self.handles),
            evicted_tokens=self.evicted_tokens,
            held_bytes=(used - quarantined) * self.kv.slot_bytes,
        )

    def check(self) -> None:
        """Recompute every fact from scratch and assert that it agrees. For tests; O(everything)."""
        check_manager(self.tree, self.kv, self.order, self.allocator, self.handles)

    # -- inner

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _num_own_tokens(self, handle: CacheHandle) -> int:
        return min(len(handle.key), len(handle.pages) * self.page_size) - handle.num_tree_pages * self.page_size

    def _shortfall(self, match: PrefixMatch, num_tokens: int) -> int:
        """Pages lacking to lock the match and reserve the rest of `num_tokens`; <= 0 if it fits.

        Locking takes pages out of the evictable ones, so the matched pages count as well, once, if nobody holds them.
        """
        need = self._num_pages(num_tokens) - match.num_tokens // self.page_size
        node = match.node
        to_lock = self.kv.num_to_lock(node)
        if node is not None and to_lock:
            to_lock -= (node.depth - match.num_tokens) // self.page_size  # the unmatched end of the last edge
        return max(0, need) + to_lock - self.available_pages()

    def _path_pages(self, node: Node) -> array[int]:
        """Pages of all tokens from the root to the end of `node`."""
        path = []
        current: Node | None = node
        while current is not None:
            path.append(current)
            current = current.parent
        pages = array("i")
        for part in reversed(path):
            pages.extend(pages_of(part.records[self.kv.index].slots))
        return pages

    def _lock(self, node: Node) -> Receipt:
        return tuple([component.lock(node) for component in self.components])

    def _unlock(self, receipt: Receipt) -> None:
        for pin in receipt:
            self.components[pin.component].unlock(pin)

    def _touch(self, node: Node) -> None:
        for component in self.components:
            component.touch(node)

    def _insert(self, handle: CacheHandle, num_pages: int, swaps: list[tuple[int, int]]) -> Node:
        """Walk and extend the tree below the handle's node to `num_pages` pages; returns the node that ends there."""
        data, width = handle.key.data, self.tree.page_bytes
        node, index = handle.node, handle.num_tree_pages
        while index < num_pages:
            start = index * width
            child = node.children.get(bytes(data[start : start + width]))
            if child is None:
                node = self.tree.attach(node, bytes(data[start : num_pages * width]))
                self.kv.adopt(node, slots_of(handle.pages[index:num_pages]))
                if self.events.active:
                    self.events.stored(node)
                return node
            common = common_prefix(child.key, data, start, num_pages * width, width)
            node = child if common == len(child.key) else self.tree.split(child, common)
            index = self._swap(handle, node, index, swaps)
        return node

    def _swap(self, handle: CacheHandle, node: Node, index: int, swaps: list[tuple[int, int]]) -> int:
        """Replace the handle's own pages from `index` on by those of `node`; returns the index after them."""
        pages = pages_of(node.records[self.kv.index].slots)
        end = index + len(pages)
        duplicates = handle.pages[index:end]
        handle.pages[index:end] = pages
        swaps.extend(zip(range(index, end), pages, strict=True))
        self.allocator.retire(duplicates)
        return end

    def _reserve(self, num_pages: int) -> None:
        """Evict until `num_pages` pages are free. The caller has checked that it can be done."""
        missing = num_pages - self.allocator.num_free
        while missing > 0:
            missing -= self._evict_one(missing)

    def _evict_one(self, at_most: int) -> int:
        """Evict the tail of the least valuable record, `at_most` pages of it; returns how many."""
        record = self.order.pop()
        node = record.node
        count = min(at_most, len(record.slots))
        if self.events.active:
            self.events.removed(node, count)
        self.allocator.put(pages_of(self.kv.cut(record, count)))
        self.evicted_tokens += count * self.page_size
        if len(record.slots):
            self.tree.trim(node, count)
            self.kv.offer(node)
            return count
        self._remove(node)
        return count

    def _remove(self, node: Node) -> None:
        """Take the emptied leaf `node` out of the tree."""
        parent = self.tree.detach(node)
        for component in self.components:
            component.offer(parent)
        if parent.parent is None:
            self.tree.drop_root_if_idle(parent)

    def _drop(self, node: Node) -> None:
        """Free all pages of the unlocked leaf `node` and take it out."""
        record = node.records[self.kv.index]
        self.order.discard(record)
        self.allocator.retire(pages_of(self.kv.cut(record, len(record.slots))))
        self._remove(node)

    def _drop_unlocked(self, root: Node) -> None:
        """Drop every node below `root` that protects nothing, children before parents."""
        below = [root]
        for node in below:
            below.extend(node.children.values())
        for node in reversed(below[1:]):
            if not any(record.locks for record in node.records):
                if self.events.active and node.live:
                    self.events.removed(node, len(node.key) // self.tree.page_bytes)
                self._drop(node)

    def _drop_dead_path(self, node: Node | None) -> None:
        """Drop what an invalidated handle's lock was the last to hold."""
        while node is not None and node.parent is not None and not node.records[self.kv.index].locks:
            parent = node.parent
            self._drop(node)
            node = parent
