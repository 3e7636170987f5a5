"""What the cache tells others: pages stored, removed, all cleared. Nothing is computed while nobody listens.

Each page has a chained hash: of the hash before it (at first, of the namespace) and its own tokens. So equal hashes
mean equal prefixes in equal namespaces, in any process.
"""

from __future__ import annotations

from collections import deque
from hashlib import blake2b

import msgspec

from pando.cache.key import tokens_from_bytes
from pando.cache.node import Node
from pando.cache.tree import RadixTree

HASH_BYTES = 8
"""Bytes of a page hash: it fits an unsigned 64-bit integer on the wire."""


class Stored(msgspec.Struct, frozen=True, tag="stored"):
    """Pages that can be matched from now on, in order; `parent_hash` is the page before, None at a prefix's start."""

    page_hashes: list[int]
    parent_hash: int | None
    token_ids: list[int]
    page_size: int
    namespace: str


class Removed(msgspec.Struct, frozen=True, tag="removed"):
    """Pages that can not be matched any more."""

    page_hashes: list[int]


class Cleared(msgspec.Struct, frozen=True, tag="cleared"):
    """Nothing can be matched any more."""


CacheEvent = Stored | Removed | Cleared


class Listener:
    """A bounded queue of events. When it overflows the oldest are dropped and counted: the reader then listens anew."""

    def __init__(self, capacity: int) -> None:
        self._queue: deque[CacheEvent] = deque(maxlen=capacity)
        self.num_dropped = 0

    def push(self, event: CacheEvent) -> None:
        """Append one event."""
        self.num_dropped += len(self._queue) == self._queue.maxlen
        self._queue.append(event)

    def drain(self) -> list[CacheEvent]:
        """All events since the last call, oldest first."""
        events = list(self._queue)
        self._queue.clear()
        return events


class EventHub:
    """Hands the tree's changes to its listeners. `active` is False while there are none: callers then skip the call."""

    def __init__(self, tree: RadixTree) -> None:
        self._tree = tree
        self._listeners: list[Listener] = []
        self.active = False

    def listen(self, capacity: int = 65536) -> Listener:
        """A new listener. Its first events describe the tree as it is: cleared, then everything stored."""
        listener = Listener(capacity)
        listener.push(Cleared())
        for node in self._tree.nodes():
            if node.parent is not None:
                listener.push(self._stored_event(node))
        self._listeners.append(listener)
        self.active = True
        return listener

    def unlisten(self, listener: Listener) -> None:
        """Send `listener` nothing more."""
        self._listeners.remove(listener)
        self.active = bool(self._listeners)

    def stored(self, node: Node) -> None:
        """`node` was attached."""
        self._push(self._stored_event(node))

    def removed(self, node: Node, num_pages: int) -> None:
        """The last `num_pages` pages of `node` are about to go."""
        self._push(Removed(_as_ints(self._hashes(node)[-num_pages * HASH_BYTES :])))

    def cleared(self) -> None:
        """The tree forgot everything."""
        self._push(Cleared())

    def _push(self, event: CacheEvent) -> None:
        for listener in self._listeners:
            listener.push(event)

    def _stored_event(self, node: Node) -> Stored:
        parent = node.parent
        assert parent is not None
        parent_hash = None if parent.parent is None else _as_ints(self._hashes(parent)[-HASH_BYTES:])[0]
        page_size = (node.depth - parent.depth) * self._tree.page_bytes // len(node.key)
        hashes = _as_ints(self._hashes(node))
        return Stored(hashes, parent_hash, tokens_from_bytes(node.key), page_size, node.namespace)

    def _hashes(self, node: Node) -> bytes:
        """The node's page hashes; computes those missing on its path, from the top down."""
        missing = []
        current: Node | None = node
        while current is not None and current.hashes is None:
            missing.append(current)
            current = current.parent
        for part in reversed(missing):
            part.hashes = self._chain(part)
        assert node.hashes is not None
        return node.hashes

    def _chain(self, node: Node) -> bytes:
        if node.parent is None:
            return blake2b(node.namespace.encode(), digest_size=HASH_BYTES).digest()
        assert node.parent.hashes is not None
        last, width = node.parent.hashes[-HASH_BYTES:], self._tree.page_bytes
        chain = []
        for start in range(0, len(node.key), width):
            last = blake2b(last + node.key[start : start + width], digest_size=HASH_BYTES).digest()
            chain.append(last)
        return b"".join(chain)


def _as_ints(hashes: bytes) -> list[int]:
    return [int.from_bytes(hashes[i : i + HASH_BYTES], "little") for i in range(0, len(hashes), HASH_BYTES)]
