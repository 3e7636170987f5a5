"""Tests of `pando.cache.components_window`: what a window needs, tombstones, and how they heal."""

from __future__ import annotations

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager
from pando.cache.spec import WINDOW
from tests.cache.requests import admit, cached, serve


def window_cache(window: int = 4, page_size: int = 1, num_bytes: int = 4000) -> CacheManager:
    """Full attention of 2 bytes and windows of 1 byte per token."""
    layout = CacheLayout(page_size, 2, window=window, window_bytes_per_token=1)
    return CacheManager(layout, num_bytes, policy="lru")


def lose_window(manager: CacheManager, tokens: list[int], count: int) -> None:
    """Evict the window pages of the first `count` tokens, of whole pages of one token."""
    node = manager.match(TokenKey([*tokens, -1]), "").node
    assert manager.window is not None
    while node is not None and node.parent is not None:
        record = node.records[1]
        gone = max(0, min(count, node.depth) - (node.depth - len(record.slots)))
        manager.window.allocator.put(manager.window.cut(record, gone))
        node = node.parent
    manager.check()


def test_a_prefix_needs_its_last_window_only() -> None:
    manager = window_cache(window=4)
    serve(manager, list(range(20)))
    lose_window(manager, list(range(20)), 12)
    assert cached(manager, list(range(20))) == 20
    assert cached(manager, list(range(16))) == 16, "12 to 15 are there"
    assert cached(manager, list(range(15))) == 0, "of 11 to 14 the first is gone"
    manager.check()


def test_what_lies_in_front_of_a_hole_can_be_used() -> None:
    manager = window_cache(window=4)
    serve(manager, [*range(10), 99])
    serve(manager, list(range(30)))
    upper = manager.match(TokenKey(range(28)), "").node
    assert upper is not None and upper.depth == 30 and upper.start == 26, "cut where the window begins"
    node = upper.parent
    assert node is not None and manager.window is not None
    for record, count in ((upper.records[1], 2), (node.records[1], 16)):
        manager.window.allocator.put(manager.window.cut(record, count))
    match = manager.match(TokenKey(range(31)), "")
    assert (match.num_tokens, match.num_matched) == (10, 30), "a hole at 27"
    assert cached(manager, [*range(10), 99]) == 11


def test_a_later_request_heals_the_tombstone() -> None:
    manager = window_cache(window=4)
    serve(manager, list(range(20)))
    lose_window(manager, list(range(20)), 20)
    handle = admit(manager, list(range(20)))
    assert (handle.num_cached, handle.num_matched) == (0, 19)
    assert handle.num_tree_pages == 19, "its KV is the tree's, though computed again"
    manager.publish(handle, 20)
    manager.release(handle, 20, publish=True)
    manager.check()
    assert cached(manager, list(range(20))) == 20


def test_healing_keeps_what_the_tree_holds_and_frees_the_twins() -> None:
    manager = window_cache(window=4)
    assert manager.window is not None
    serve(manager, list(range(20)))
    lose_window(manager, list(range(20)), 18)
    kept = manager.match(TokenKey(range(21)), "").node
    assert kept is not None
    slots = kept.records[1].slots.tolist()
    handle = admit(manager, list(range(21)))
    assert handle.num_cached == 0
    writes = manager.publish(handle, 21)
    assert [(index, slot) for group, index, slot in writes if group == WINDOW] == [(18, slots[0]), (19, slots[1])]
    manager.check()
    assert manager.window.num_slots == 21


def test_a_lock_covers_the_window_and_no_more() -> None:
    manager = window_cache(window=4)
    assert manager.window is not None
    serve(manager, list(range(20)))
    handle = admit(manager, list(range(12)), num_tokens=12)
    assert handle.num_cached == 11
    assert manager.window.num_locked == 4
    assert handle.window_pages.tolist()[:7] == [-1] * 7
    assert all(page >= 0 for page in handle.window_pages[7:])
    manager.release(handle, 11, publish=False)
    assert manager.window.num_locked == 0
    manager.check()


@pytest.mark.parametrize("sharing", [True, False])
def test_a_long_answer_holds_one_window(sharing: bool) -> None:
    layout = CacheLayout(1, 1, window=8, window_bytes_per_token=1)
    manager = CacheManager(layout, 5000, policy="lru", sharing=sharing)
    assert manager.window is not None
    handle = admit(manager, [1, 2, 3])
    manager.publish(handle, 3)
    for length in range(3, 300):
        handle.key.append(length % 7)
        assert not manager.grow(handle, length + 1).denied
    manager.check()
    stats = manager.stats().by_component["window"]
    assert stats.num_locked <= 8 + 2 + 1, "the window, the slack, the new page"
    assert (stats.num_evictable > 250) == sharing


def test_the_step_being_planned_sees_its_whole_window() -> None:
    """A chunk of 6 behind 10 tokens reads from 6 on: nothing there may go before the step is launched."""
    manager = window_cache(window=4)
    assert manager.window is not None
    handle = admit(manager, list(range(30)))
    manager.publish(handle, 10)
    manager.publish(handle, 16)
    assert handle.window_pages.tolist()[:6] == [-1] * 6
    assert all(page >= 0 for page in handle.window_pages[6:])
    assert manager.window.num_locked == 10
    manager.check()


def test_windows_are_evicted_inside_a_path_before_its_kv() -> None:
    manager = window_cache(window=2, num_bytes=36)
    serve(manager, list(range(10)))
    serve(manager, [50, 51, 52, 53])
    stats = manager.stats().by_component
    assert stats["window"].num_evicted == 6 and stats["full"].num_evicted == 0, "what fell out of the window"
    assert cached(manager, list(range(10))) == 10


def test_running_requests_need_little_room_to_grow_in_the_window() -> None:
    """Pages to keep are for growth; a window does not grow."""
    layout = CacheLayout(1, 1, window=8, window_bytes_per_token=1)
    manager = CacheManager(layout, 600, num_slots=[500, 100], policy="lru")
    first = admit(manager, list(range(40)), keep=300, step=20)
    assert len(first.window_pages) == 28, "a window and a step"
    second = admit(manager, list(range(100, 140)), keep=300, step=20)
    assert not manager.admit(TokenKey(range(200, 240)), "", 40, keep=300, step=20).denied
    fourth = manager.admit(TokenKey(range(300, 340)), "", 40, keep=300, step=20)
    assert fourth.denied, "of 100 pages 84 are reserved"
    for handle in (first, second):
        manager.publish(handle, 20)
    manager.check()


def test_a_long_prompt_takes_window_pages_step_by_step() -> None:
    layout = CacheLayout(1, 1, window=8, window_bytes_per_token=1)
    manager = CacheManager(layout, 230, num_slots=[200, 30], policy="lru")
    assert manager.admit(TokenKey(range(200)), "", 200).denied
    handle = admit(manager, list(range(200)), step=10)
    for start in range(0, 200, 10):
        manager.publish(handle, start, start)
        grown = manager.grow(handle, start + 10, start)
        assert not grown.denied and all(group == WINDOW for group, _, _ in grown.writes)
        manager.publish(handle, start + 10)
        seen = handle.window_pages[max(0, start - 8) : start + 10].tolist()
        assert len(set(seen)) == len(seen) and -1 not in seen
        manager.check()
    assert manager.window is not None and manager.window.num_locked <= 8 + 10
