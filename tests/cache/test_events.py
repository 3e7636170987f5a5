"""Tests of `pando.cache.events`."""

from __future__ import annotations

from hashlib import blake2b

import msgspec
import pytest

from pando.cache.events import HASH_BYTES, CacheEvent, Cleared, Listener, Removed, Stored
from pando.cache.key import tokens_to_bytes
from tests.cache.random_operations import Driver
from tests.cache.requests import admit, full_cache, serve


def chain(namespace: str, tokens: list[int], page_size: int) -> list[int]:
    """Page hashes by their definition."""
    last = blake2b(namespace.encode(), digest_size=HASH_BYTES).digest()
    hashes = []
    for start in range(0, len(tokens), page_size):
        last = blake2b(last + tokens_to_bytes(tokens[start : start + page_size]), digest_size=HASH_BYTES).digest()
        hashes.append(int.from_bytes(last, "little"))
    return hashes


def replay(events: list[CacheEvent], known: set[int]) -> None:
    """What a router does with events; a page is stored once and removed once."""
    for event in events:
        if isinstance(event, Cleared):
            known.clear()
        elif isinstance(event, Removed):
            assert known >= set(event.page_hashes)
            known.difference_update(event.page_hashes)
        else:
            assert not known & set(event.page_hashes)
            assert event.parent_hash is None or event.parent_hash in known
            assert len(event.token_ids) == len(event.page_hashes) * event.page_size
            known.update(event.page_hashes)


def test_stored_pages_carry_their_tokens_and_chained_hashes() -> None:
    manager = full_cache(16, 2)
    listener = manager.events.listen()
    listener.drain()
    handle = admit(manager, [1, 2, 3, 4, 5, 6], "adapter")
    manager.publish(handle, 4)
    manager.publish(handle, 6)
    hashes = chain("adapter", [1, 2, 3, 4, 5, 6], 2)
    assert listener.drain() == [
        Stored(hashes[:2], None, [1, 2, 3, 4], 2, "adapter"),
        Stored(hashes[2:], hashes[1], [5, 6], 2, "adapter"),
    ]
    assert listener.drain() == []


def test_evicted_pages_are_removed_from_the_tail() -> None:
    manager = full_cache(4, 1)
    listener = manager.events.listen()
    serve(manager, [1, 2, 3])
    listener.drain()
    admit(manager, [9, 9])
    assert listener.drain() == [Removed(chain("", [1, 2, 3], 1)[2:])]


def test_flush_and_invalidate_clear() -> None:
    manager = full_cache(8, 1)
    serve(manager, [1, 2])
    listener = manager.events.listen()
    listener.drain()
    manager.invalidate()
    assert listener.drain() == [Cleared()]
    serve(manager, [1, 2])
    listener.drain()
    manager.flush()
    assert listener.drain()[-1] == Cleared()


def test_pages_of_two_namespaces_have_different_hashes() -> None:
    assert not set(chain("a", [1, 2], 1)) & set(chain("b", [1, 2], 1))


def test_a_late_listener_is_told_what_there_is() -> None:
    manager = full_cache(32, 1)
    early = manager.events.listen()
    serve(manager, [1, 2, 3])
    serve(manager, [1, 2, 4])
    late = manager.events.listen()
    first: set[int] = set()
    second: set[int] = {99}
    replay(early.drain(), first)
    replay(late.drain(), second)
    assert first == second == {*chain("", [1, 2, 3], 1), *chain("", [1, 2, 4], 1)}


def test_nothing_is_hashed_while_nobody_listens() -> None:
    manager = full_cache(8, 1)
    serve(manager, [1, 2])
    assert all(node.hashes is None for node in manager.tree.nodes())
    listener = manager.events.listen()
    manager.events.unlisten(listener)
    listener.drain()
    serve(manager, [3, 4])
    assert not manager.events.active
    assert listener.drain() == []


def test_a_full_queue_drops_the_oldest_and_says_so() -> None:
    listener = Listener(capacity=2)
    for page in range(5):
        listener.push(Removed([page]))
    assert listener.num_dropped == 3
    assert listener.drain() == [Removed([3]), Removed([4])]


def test_events_cross_the_wire() -> None:
    event = Stored(chain("", [1, 2], 1), None, [1, 2], 1, "")
    decoder = msgspec.msgpack.Decoder(Stored | Removed | Cleared)
    assert decoder.decode(msgspec.msgpack.encode(event)) == event


@pytest.mark.parametrize("page_size", [1, 3])
def test_a_router_that_replays_events_knows_exactly_the_tree(page_size: int) -> None:
    driver = Driver(seed=7, page_size=page_size, num_pages=30)
    listener = driver.manager.events.listen()
    known: set[int] = set()
    for _ in range(150):
        driver.run(20)
        replay(listener.drain(), known)
        expected: set[int] = set()
        for namespace, data in driver.contents():
            tokens = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
            expected.add(chain(namespace, tokens, page_size)[-1])
        assert known == expected
    driver.invalidate()
    replay(listener.drain(), known)
    assert known == set()
    assert listener.num_dropped == 0
