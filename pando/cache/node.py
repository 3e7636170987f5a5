"""The radix tree's node and the record of what one component keeps at it. Plain data."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]
"""Pool indices (pages, or state slots) in position order. Written once, then immutable; splits make views."""


def slots_of(pages: array[int]) -> Slots:
    """A read-only copy of `pages`."""
    return np.frombuffer(pages.tobytes(), dtype=np.int32)


def pages_of(slots: Slots) -> array[int]:
    """A growable copy of `slots`."""
    pages = array("i")
    pages.frombytes(slots.tobytes())
    return pages


class Record:
    """What one component keeps at one node: the unit of locking and of eviction.

    slots: pool indices held. locks: see the component; 0 = may be evicted. last_use: logical time of the last hit.
    stamp: version of this record's entry in the eviction order, 0 = it is no candidate.
    """

    __slots__ = ("last_use", "locks", "node", "slots", "stamp")

    def __init__(self, node: Node, slots: Slots, *, locks: int, last_use: int) -> None:
        self.node = node
        self.slots = slots
        self.locks = locks
        self.last_use = last_use
        self.stamp = 0


class Node:
    """An edge of the tree with the tokens on it.

    key: the edge's tokens as bytes, whole pages, empty only at a root. depth: tokens from the root to this node's end.
    children: by the bytes of their first page. records: one per component, in component order. live: False once
    invalidated: never matched again, kept only until its locks are gone. hashes: chained page hashes, if computed.
    """

    __slots__ = ("children", "depth", "hashes", "id", "key", "live", "namespace", "parent", "records")

    def __init__(self, node_id: int, parent: Node | None, key: bytes, depth: int, namespace: str) -> None:
        self.id = node_id
        self.parent = parent
        self.key = key
        self.depth = depth
        self.namespace = namespace
        self.children: dict[bytes, Node] = {}
        self.records: list[Record] = []
        self.live = True
        self.hashes: bytes | None = None
