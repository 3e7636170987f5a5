"""Tests of `pando.cache.value`."""

from __future__ import annotations

import random

import pytest

from pando.cache.node import Node, Record
from pando.cache.value import EvictionOrder
from pando.cache.value_policies import Lru


def record(last_use: int) -> Record:
    """A record used at `last_use`."""
    node = Node(1, None, b"", 0, "")
    node.last_use = last_use
    return Record(node, 0)


def test_the_record_used_longest_ago_goes_first() -> None:
    order = EvictionOrder(Lru(), 1)
    for time in (3, 1, 2):
        order.add(record(time))
    assert [order.pop().node.last_use for _ in range(3)] == [1, 2, 3]


def test_a_record_used_again_moves_back() -> None:
    order = EvictionOrder(Lru(), 1)
    old, new = record(1), record(2)
    order.add(old)
    order.add(new)
    old.node.last_use = 3
    order.add(old)
    assert len(order) == 2
    assert [order.pop(), order.pop()] == [new, old]


def test_a_discarded_record_never_comes_out() -> None:
    order = EvictionOrder(Lru(), 1)
    gone, kept = record(1), record(2)
    order.add(gone)
    order.add(kept)
    order.discard(gone)
    order.discard(gone)
    assert list(order) == [kept]
    assert order.pop() is kept
    with pytest.raises(LookupError):
        order.pop()


def test_popping_takes_the_record_out() -> None:
    order = EvictionOrder(Lru(), 1)
    only = record(1)
    order.add(only)
    order.pop()
    assert (len(order), list(order), only.stamp) == (0, [], 0)


def test_outdated_entries_do_not_pile_up() -> None:
    order = EvictionOrder(Lru(), 1)
    busy = record(0)
    for time in range(10_000):
        busy.node.last_use = time
        order.add(busy)
    assert len(order._heaps[0][0][0]) <= 2 * len(order) + 64


def test_random_use_equals_sorting() -> None:
    draw = random.Random(5)
    order, clock = EvictionOrder(Lru(), 1), 0
    present: list[Record] = []
    for _ in range(5000):
        clock += 1
        kind = draw.random()
        if kind < 0.4 or not present:
            present.append(record(clock))
            order.add(present[-1])
        elif kind < 0.6:
            used = draw.choice(present)
            used.node.last_use = clock
            order.add(used)
        elif kind < 0.8:
            order.discard(present.pop(draw.randrange(len(present))))
        else:
            oldest = min(present, key=lambda item: item.node.last_use)
            assert order.pop() is oldest
            present.remove(oldest)
        assert len(order) == len(present)
    assert {id(item) for item in order} == {id(item) for item in present}
