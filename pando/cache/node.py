"""The radix tree's node and the record of what one component keeps at it. Plain data."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]
"""Pool indices (pages, or state slots) in position order. Written once, then immutable; splits make views."""

NOTHING: Slots = np.empty(0, dtype=np.int32)
"""No slots: a tombstone, where a component's part was evicted or never written. A later insert may heal it."""


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

    component: whose it is. slots: pool indices held. locks: see the component; 0 = may be evicted. frequency: hits that
    ended here. reach, time: of a window, the tokens of the last prefix that needed it, and when; time is -1 elsewhere.
    floor, kind: the policy's notes. stamp: version of this record's entry in the eviction order, 0 = it is no
    candidate.
    """

    __slots__ = ("component", "floor", "frequency", "kind", "locks", "node", "reach", "slots", "stamp", "time")

    def __init__(self, node: Node, component: int, slots: Slots = NOTHING, locks: int = 0) -> None:
        self.node = node
        self.component = component
        self.slots = slots
        self.locks = locks
        self.frequency = 1
        self.reach = 0
        self.time = -1
        self.floor = 0.0
        self.kind = 0
        self.stamp = 0


class Node:
    """An edge of the tree with the tokens on it.

    key: the edge's tokens as bytes, whole pages, empty only at a root. depth: tokens from the root to this node's end.
    children: by the bytes of their first page. records: one per component, in component order. last_use: logical time
    of the last hit that ended here. live: False once invalidated: never matched again, kept only until its locks are
    gone. hashes: chained page hashes, if computed.
    """

    __slots__ = ("children", "depth", "hashes", "id", "key", "last_use", "live", "namespace", "parent", "records")

    def __init__(self, node_id: int, parent: Node | None, key: bytes, depth: int, namespace: str) -> None:
        self.id = node_id
        self.parent = parent
        self.key = key
        self.depth = depth
        self.namespace = namespace
        self.children: dict[bytes, Node] = {}
        self.records: list[Record] = []
        self.last_use = 0
        self.live = True
        self.hashes: bytes | None = None

    @property
    def start(self) -> int:
        """Tokens from the root to this node's beginning."""
        return 0 if self.parent is None else self.parent.depth
