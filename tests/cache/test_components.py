"""Tests of `pando.cache.components`: what a full-attention lock protects, and what it counts."""

from __future__ import annotations

from array import array

from pando.cache.allocator import SlotAllocator
from pando.cache.components import FullKV
from pando.cache.key import TOKEN_BYTES, tokens_to_bytes
from pando.cache.node import Node, slots_of
from pando.cache.tree import RadixTree
from pando.cache.value import EvictionOrder
from pando.cache.value_policies import Lru


class Chain:
    """Three nodes below a root: [1 2] - [3 4 5] - [6], one token per page."""

    def __init__(self) -> None:
        self.kv = FullKV(0, 1, SlotAllocator(0), EvictionOrder(Lru(), 1))
        self.tree = RadixTree(1, [self.kv])
        self.root = self.tree.root("")
        self.top = self.add(self.root, [1, 2])
        self.middle = self.add(self.top, [3, 4, 5])
        self.leaf = self.add(self.middle, [6])

    def add(self, parent: Node, tokens: list[int]) -> Node:
        """A new leaf, a candidate at once; its parent is none any more."""
        self.kv.order.discard(parent.records[0])
        node = self.tree.attach(parent, tokens_to_bytes(tokens))
        self.kv.adopt(node, slots_of(array("i", tokens)))
        self.kv.offer(node)
        return node

    def locks(self) -> list[int]:
        """Lock counts from the root down."""
        return [node.records[0].locks for node in (self.root, self.top, self.middle, self.leaf)]


def test_a_lock_protects_the_path_to_the_root() -> None:
    chain = Chain()
    pin = chain.kv.lock(chain.middle)
    assert chain.locks() == [1, 1, 1, 0]
    assert (chain.kv.num_slots, chain.kv.num_locked) == (6, 5)
    assert [r.node for r in chain.kv.order] == [chain.leaf]
    chain.kv.unlock(pin)
    assert chain.locks() == [0, 0, 0, 0]
    assert chain.kv.num_locked == 0


def test_a_second_lock_costs_only_what_was_not_protected() -> None:
    chain = Chain()
    first = chain.kv.lock(chain.middle)
    assert chain.kv.num_to_lock(chain.leaf, 6) == 1
    second = chain.kv.lock(chain.leaf)
    assert chain.locks() == [1, 1, 2, 1]
    assert (chain.kv.num_locked, len(chain.kv.order)) == (6, 0)
    chain.kv.unlock(first)
    assert (chain.locks(), chain.kv.num_locked) == ([1, 1, 1, 1], 6)
    chain.kv.unlock(second)
    assert (chain.locks(), chain.kv.num_locked) == ([0, 0, 0, 0], 0)
    assert [r.node for r in chain.kv.order] == [chain.leaf]


def test_receipts_survive_splits_in_any_order() -> None:
    chain = Chain()
    low, high = chain.kv.lock(chain.leaf), chain.kv.lock(chain.middle)
    upper = chain.tree.split(chain.middle, 2 * TOKEN_BYTES)
    assert upper.records[0].locks == 1, "it has one locked child and no pin of its own"
    assert chain.kv.num_locked == 6
    chain.kv.unlock(low)
    assert chain.kv.num_locked == 5
    chain.kv.unlock(high)
    assert chain.kv.num_locked == upper.records[0].locks == 0


def test_splitting_what_nobody_holds_locks_nothing() -> None:
    chain = Chain()
    upper = chain.tree.split(chain.middle, TOKEN_BYTES)
    assert (upper.records[0].locks, chain.kv.num_locked) == (0, 0)


def test_only_unlocked_leaves_are_candidates() -> None:
    chain = Chain()
    for node in (chain.root, chain.top, chain.middle):
        chain.kv.offer(node)
    assert [r.node for r in chain.kv.order] == [chain.leaf]
    pin = chain.kv.lock(chain.leaf)
    chain.kv.offer(chain.leaf)
    assert len(chain.kv.order) == 0
    chain.kv.unlock(pin)
    chain.leaf.live = False
    chain.kv.order.discard(chain.leaf.records[0])
    chain.kv.offer(chain.leaf)
    assert len(chain.kv.order) == 0, "what was invalidated is dropped, not evicted"


def test_cut_takes_the_tail() -> None:
    chain = Chain()
    assert chain.kv.trim(chain.middle, 2).tolist() == [4, 5]
    assert chain.middle.records[0].slots.tolist() == [3]
    assert chain.kv.num_slots == 4
