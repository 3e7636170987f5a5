"""Guests: recurrent states in room that nobody needs. They are the first to go, and the tree does not change for them.

A state that few will ask for, such as the one before a prompt's last token, is worth keeping only while it costs
nothing. So a guest belongs to a position inside an edge, not to a node's end: no edge is split, no policy sees it, and
what is cached besides is the same as without guests. Where a request resumes from one it becomes a state like others.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pando.cache.node import Node


class Guests:
    """Positions and slots of guests by the node whose edge they lie in or end; those of the oldest node go first."""

    def __init__(self) -> None:
        self._of: dict[Node, list[tuple[int, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def slots(self) -> list[int]:
        """Every guest's slot."""
        return [slot for guests in self._of.values() for _, slot in guests]

    def of(self, node: Node) -> Sequence[tuple[int, int]]:
        """(position, slot) of the guests of `node`, ascending: node.start < position <= node.depth."""
        return self._of.get(node, ())

    def deepest(self, node: Node, num_tokens: int) -> int:
        """The last position up to `num_tokens` where `node` has a guest, 0 = none."""
        return max((position for position, _ in self._of.get(node, ()) if position <= num_tokens), default=0)

    def put(self, node: Node, position: int, slot: int) -> bool:
        """`node` gets a guest; False if there is one at that position."""
        assert node.start < position <= node.depth, (node.start, position, node.depth)
        guests = self._of.setdefault(node, [])
        if any(at == position for at, _ in guests):
            return False
        guests.append((position, slot))
        guests.sort()
        return True

    def take_end(self, node: Node) -> int:
        """The guest at the end of `node`, which is none from now on: its slot, or -1."""
        guests = self._of.get(node)
        if not guests or guests[-1][0] != node.depth:
            return -1
        slot = guests.pop()[1]
        self._forget_if_empty(node)
        return slot

    def take_oldest(self) -> int:
        """The guest to go first: its slot. There is one."""
        node = next(iter(self._of))
        slot = self._of[node].pop()[1]
        self._forget_if_empty(node)
        return slot

    def split(self, upper: Node, lower: Node) -> None:
        """The end of `upper` cut the edge of `lower`."""
        guests = self._of.pop(lower, ())
        for node, part in (
            (upper, [guest for guest in guests if guest[0] <= upper.depth]),
            (lower, [guest for guest in guests if guest[0] > upper.depth]),
        ):
            if part:
                self._of[node] = part

    def merge(self, path: Sequence[Node]) -> None:
        """The nodes of `path`, top down, become the last of them."""
        found = [guest for node in path for guest in self._of.pop(node, ())]
        if found:
            self._of[path[-1]] = found

    def trim(self, node: Node, depth: int) -> array[int]:
        """`node` is to end after `depth` tokens: slots of the guests behind."""
        gone = array("i", [slot for position, slot in self._of.get(node, ()) if position > depth])
        if gone:
            self._of[node] = [guest for guest in self._of[node] if guest[0] <= depth]
            self._forget_if_empty(node)
        return gone

    def _forget_if_empty(self, node: Node) -> None:
        if not self._of[node]:
            del self._of[node]
