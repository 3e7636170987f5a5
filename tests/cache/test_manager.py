"""Tests of `pando.cache.manager`: every call, and the figures the cache promises."""

from __future__ import annotations

import pytest

from pando.cache.key import TokenKey, tokens_to_bytes
from pando.cache.spec import FULL
from tests.cache.requests import admit, cached, full_cache, serve


def test_the_same_prompt_twice_computes_one_token() -> None:
    manager = full_cache(12_000, 1)
    prompt = list(range(10_000))
    assert serve(manager, prompt) == 0
    assert serve(manager, prompt) == 9_999
    assert serve(manager, prompt) == 9_999
    assert manager.num_held_tokens == 10_000


def test_a_shared_system_prompt_is_held_once() -> None:
    manager = full_cache(60_000, 1)
    handles = []
    for user in range(100):
        tokens = [*range(500), *range(1000 + 100 * user, 1100 + 100 * user)]
        handle = admit(manager, tokens)
        assert handle.num_cached == (500 if user else 0)
        manager.publish(handle, 600)
        handles.append(handle)
    assert manager.num_held_tokens == 10_500
    assert manager.stats().num_locked == 10_500
    for handle in handles:
        manager.release(handle, 600, publish=True)
    assert manager.num_held_tokens == manager.stats().num_evictable == 10_500


def test_held_tokens_count_a_request_that_published_nothing() -> None:
    manager = full_cache(10, 4)
    admit(manager, [1, 2, 3, 4, 5])
    assert manager.num_held_tokens == 5
    admit(manager, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], num_tokens=4)
    assert manager.num_held_tokens == 9


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_match_leaves_a_token_to_compute(length: int, expected: int) -> None:
    manager = full_cache(16, 4)
    serve(manager, list(range(20)))
    tokens = list(range(length))
    assert manager.match(TokenKey(tokens), "").num_tokens == expected
    assert manager.match(tokens_to_bytes(tokens), "").num_tokens == expected


def test_an_empty_query_matches_nothing() -> None:
    manager = full_cache(4, 1)
    serve(manager, [1, 2])
    assert manager.match(b"", "").num_tokens == 0


def test_a_limit_shortens_the_match() -> None:
    manager = full_cache(32, 4)
    serve(manager, list(range(20)))
    key = TokenKey(range(20))
    assert [manager.match(key, "", limit).num_tokens for limit in (0, 3, 4, 15, 100)] == [0, 0, 4, 12, 16]
    handle = manager.admit(key, "", 20, limit=9)
    assert not handle.denied and handle.num_cached == 8
    assert len(handle.pages) == 5


def test_namespaces_share_nothing() -> None:
    manager = full_cache(32, 1)
    serve(manager, [1, 2, 3], "a")
    assert cached(manager, [1, 2, 3], "a") == 3
    assert cached(manager, [1, 2, 3], "b") == 0
    assert serve(manager, [1, 2, 3], "b") == 0
    assert manager.num_held_tokens == 6


def test_namespaces_do_not_pile_up() -> None:
    manager = full_cache(4, 1)
    for salt in range(1000):
        serve(manager, [1, 2], str(salt))
    assert len(manager.tree.roots) == 2


def test_without_sharing_nothing_is_found_or_kept() -> None:
    manager = full_cache(8, 1, sharing=False)
    assert serve(manager, [1, 2, 3]) == serve(manager, [1, 2, 3]) == 0
    assert manager.stats().num_free == 8


def test_anchor_groups_queries_that_end_in_one_node() -> None:
    manager = full_cache(32, 1)
    serve(manager, [1, 2, 3])
    left, right = manager.match(TokenKey([1, 2, 3, 7]), ""), manager.match(TokenKey([1, 2, 3, 8]), "")
    assert left.anchor == right.anchor
    assert hash(left.anchor) == hash(right.anchor)
    assert manager.match(TokenKey([9]), "").anchor != left.anchor
    assert manager.match(TokenKey([9]), "").anchor != manager.match(TokenKey([9]), "b").anchor


def test_page_after_is_the_first_page_not_matched() -> None:
    manager = full_cache(4, 2)
    key = TokenKey([1, 2, 3, 4, 5])
    assert manager.page_after(key, 2) == tokens_to_bytes([3, 4])
    assert manager.page_after(key, 4) == tokens_to_bytes([5])


# -- admission


def test_admission_takes_matched_pages_first_and_new_ones_behind() -> None:
    manager = full_cache(8, 2)
    first = admit(manager, [1, 2, 3, 4, 5])
    assert first.pages.tolist() == [0, 1, 2]
    manager.publish(first, 5)
    second = admit(manager, [1, 2, 3, 4, 9, 9, 9])
    assert second.num_cached == 4
    assert second.pages.tolist() == [0, 1, 3, 4]
    assert (second.num_tree_pages, first.num_tree_pages) == (2, 2)


def test_a_denial_names_the_shortfall_and_changes_nothing() -> None:
    manager = full_cache(10, 1)
    running = admit(manager, [1, 2, 3, 4, 5, 6])
    manager.publish(running, 6)
    serve(manager, [7, 8])
    before = manager.stats()
    denied = manager.admit(TokenKey([1, 2, 3, 0, 0, 0, 0, 0, 0]), "", 9)
    assert denied.denied and denied.shortfall_bytes == 2
    assert manager.stats() == before
    assert cached(manager, [7, 8]) == 2
    manager.check()
    admit(manager, [1, 2, 3, 0, 0, 0, 0])
    assert cached(manager, [7, 8]) == 0


def test_locking_a_match_takes_it_out_of_what_can_be_evicted() -> None:
    manager = full_cache(4, 1)
    serve(manager, [1, 2, 3])
    assert manager.budget.available_bytes == 4
    denied = manager.admit(TokenKey([1, 2, 3, 4, 5]), "", 5)
    assert denied.denied and denied.shortfall_bytes == 1, "3 matched, 2 new, 4 in all"
    assert admit(manager, [1, 2, 3, 4]).num_cached == 3


def test_the_rest_of_a_matched_edge_may_be_evicted() -> None:
    manager = full_cache(5, 1)
    serve(manager, [1, 2, 3, 4, 5])
    handle = admit(manager, [1, 2, 8, 9, 10])
    assert handle.num_cached == 2
    assert manager.stats().evicted_tokens == 3


def test_keep_holds_pages_back() -> None:
    manager = full_cache(4, 1)
    denied = manager.admit(TokenKey([1, 2, 3]), "", 3, keep=2)
    assert denied.denied and denied.shortfall_bytes == 1
    handle = manager.admit(TokenKey([1, 2, 3]), "", 3, keep=1)
    assert not handle.denied
    assert manager.budget.available_bytes == 1


def test_admission_for_less_than_is_cached_reserves_nothing() -> None:
    manager = full_cache(4, 1)
    serve(manager, [1, 2, 3, 4])
    handle = admit(manager, [1, 2, 3, 4], num_tokens=1)
    assert (handle.num_cached, len(handle.pages)) == (3, 3)
    denied = manager.admit(TokenKey([1, 2, 3, 4]), "", 1, keep=2)
    assert denied.denied and denied.shortfall_bytes == 1, "only page 3 is not held"


# -- growing


def test_grow_adds_pages_only_when_there_is_no_room() -> None:
    manager = full_cache(4, 4)
    handle = admit(manager, [1, 2, 3])
    room = manager.grow(handle, 4)
    assert not room.denied and room.writes == []
    grown = manager.grow(handle, 13)
    assert not grown.denied
    assert grown.writes == [(FULL, 1, 1), (FULL, 2, 2), (FULL, 3, 3)]
    assert handle.pages.tolist() == [0, 1, 2, 3]
    denied = manager.grow(handle, 17)
    assert denied.denied and denied.shortfall_bytes == 4
    assert len(handle.pages) == 4


def test_grow_evicts_what_nobody_holds() -> None:
    manager = full_cache(4, 1)
    serve(manager, [7, 8])
    handle = admit(manager, [1, 2])
    grown = manager.grow(handle, 3)
    assert not grown.denied and grown.writes == [(FULL, 2, 1)], "the tail of the unused prefix"
    assert cached(manager, [7, 8]) == 1


def test_grow_many_writes_columns() -> None:
    manager = full_cache(8, 2)
    handles = [admit(manager, [1, 2]), admit(manager, [3]), admit(manager, [5, 6])]
    writes = manager.grow_many(handles, [3, 2, 5])
    assert not writes.denied
    assert (writes.row, writes.page_index, writes.page_id) == ([0, 2, 2], [1, 1, 2], [3, 4, 5])
    assert [handle.pages.tolist() for handle in handles] == [[0, 3], [1], [2, 4, 5]]
    manager.check()


def test_grow_many_is_all_or_nothing() -> None:
    manager = full_cache(3, 1)
    handles = [admit(manager, [1]), admit(manager, [2])]
    denied = manager.grow_many(handles, [2, 2])
    assert denied.denied and denied.shortfall_bytes == 1
    assert [len(handle.pages) for handle in handles] == [1, 1]
    assert manager.stats().num_free == 1


# -- publishing


def test_published_pages_can_be_matched_before_the_request_ends() -> None:
    manager = full_cache(16, 2)
    first = admit(manager, [1, 2, 3, 4, 5, 6, 7])
    assert manager.publish(first, 4) == []
    assert admit(manager, [1, 2, 3, 4, 5, 6, 7]).num_cached == 4
    assert manager.publish(first, 7) == []
    assert admit(manager, [1, 2, 3, 4, 5, 6, 7]).num_cached == 6


def test_publishing_again_or_less_does_nothing() -> None:
    manager = full_cache(8, 1)
    handle = admit(manager, [1, 2, 3])
    manager.publish(handle, 3)
    node, clock = handle.node, manager.order.clock
    assert manager.publish(handle, 3) == manager.publish(handle, 1) == []
    assert (handle.node, manager.order.clock) == (node, clock)


def test_duplicates_are_swapped_for_the_tree_s_pages() -> None:
    manager = full_cache(16, 2)
    first, second = admit(manager, [1, 2, 3, 4, 5]), admit(manager, [1, 2, 3, 4, 9, 9])
    assert second.pages.tolist() == [3, 4, 5]
    manager.publish(first, 5)
    assert manager.publish(second, 6) == [(FULL, 0, 0), (FULL, 1, 1)]
    manager.check()
    assert second.pages.tolist() == [0, 1, 5]
    assert manager.stats().num_free == 12, "pages 3 and 4 came back"
    assert cached(manager, [1, 2, 3, 4, 9, 9]) == 6


def test_a_swap_may_end_inside_an_edge() -> None:
    manager = full_cache(16, 1)
    first, second = admit(manager, [1, 2, 3, 4]), admit(manager, [1, 2, 9])
    manager.publish(first, 4)
    assert manager.publish(second, 3) == [(FULL, 0, 0), (FULL, 1, 1)]
    assert (first.num_tree_pages, second.num_tree_pages) == (4, 3)
    manager.check()


def test_swapped_pages_rest_while_a_step_may_write_them() -> None:
    manager = full_cache(4, 1)
    first, second = admit(manager, [1, 2]), admit(manager, [1, 2])
    manager.launched(1)
    manager.publish(first, 2)
    manager.publish(second, 2)
    assert (manager.stats().num_free, manager.stats().num_quarantined) == (0, 2)
    denied = manager.admit(TokenKey([5]), "", 1)
    assert denied.denied and denied.shortfall_bytes == 1
    manager.collected(1)
    assert admit(manager, [5]).pages.tolist() == [2]


# -- releasing


def test_an_aborted_request_leaves_its_published_part_only() -> None:
    manager = full_cache(8, 1)
    handle = admit(manager, [1, 2, 3, 4])
    manager.publish(handle, 2)
    manager.release(handle, 4, publish=False)
    manager.check()
    assert cached(manager, [1, 2, 3, 4]) == 2
    assert manager.stats().num_free == 6


def test_a_finished_request_leaves_full_pages_only() -> None:
    manager = full_cache(8, 4)
    handle = admit(manager, [1, 2, 3, 4, 5, 6])
    for token in (7, 8, 9):
        handle.key.append(token)
    manager.grow(handle, 9)
    manager.release(handle, 8, publish=True)
    assert cached(manager, list(range(1, 10))) == 8
    assert manager.stats().num_free == 6
    manager.check()


def test_pages_of_an_aborted_request_rest_until_its_last_step_ends() -> None:
    manager = full_cache(2, 1)
    handle = admit(manager, [1, 2])
    manager.launched(4)
    manager.launched(5)
    manager.release(handle, 2, publish=False)
    manager.collected(4)
    assert manager.stats().num_quarantined == 2
    manager.check()
    manager.collected(5)
    assert manager.stats().num_free == 2


def test_releasing_twice_is_our_mistake() -> None:
    manager = full_cache(2, 1)
    handle = admit(manager, [1])
    manager.release(handle, 1, publish=False)
    with pytest.raises(AssertionError, match="released before"):
        manager.release(handle, 1, publish=False)


def test_nodes_of_a_chunked_prompt_become_one_when_it_ends() -> None:
    manager = full_cache(100, 1)
    handle = admit(manager, list(range(90)))
    for end in range(10, 91, 10):
        manager.publish(handle, end)
    assert len(list(manager.tree.nodes())) == 10
    manager.release(handle, 90, publish=True)
    manager.check()
    assert len(list(manager.tree.nodes())) == 2


# -- eviction


def test_the_least_recently_used_leaf_goes_first() -> None:
    manager = full_cache(6, 1)
    for token in (1, 2, 3):
        serve(manager, [token, 0])
    assert serve(manager, [1, 0]) == 1
    serve(manager, [4, 0])
    assert [cached(manager, [token, 0]) for token in (1, 2, 3, 4)] == [2, 0, 2, 2]


def test_only_as_many_pages_go_as_are_needed() -> None:
    manager = full_cache(8, 1)
    serve(manager, [1, 2, 3, 4, 5, 6])
    serve(manager, [7, 8, 9, 10])
    assert manager.stats().evicted_tokens == 2
    assert cached(manager, [1, 2, 3, 4, 5, 6]) == 4
    manager.check()


def test_a_parent_becomes_a_leaf_in_its_turn() -> None:
    manager = full_cache(6, 1)
    serve(manager, [1, 2, 3])
    serve(manager, [1, 2, 4])
    serve(manager, [5, 6])
    assert manager.stats().num_free == 0
    serve(manager, [7, 8, 9, 10])
    assert cached(manager, [1, 2, 3]) == 0
    assert cached(manager, [5, 6]) == 2
    manager.check()


def test_what_a_request_holds_is_never_evicted() -> None:
    manager = full_cache(6, 1)
    serve(manager, [1, 2, 3])
    holder = admit(manager, [1, 2, 3, 4])
    serve(manager, [7, 8])
    serve(manager, [9, 10])
    assert cached(manager, [1, 2, 3]) == 3
    manager.release(holder, 4, publish=False)
    serve(manager, [11, 12, 13, 14])
    manager.check()


# -- forgetting


def test_flush_drops_what_nobody_holds() -> None:
    manager = full_cache(16, 1)
    serve(manager, [1, 2, 3])
    holder = admit(manager, [1, 2, 9])
    manager.publish(holder, 3)
    assert manager.flush() is False
    manager.check()
    assert cached(manager, [1, 2, 3]) == 2
    manager.release(holder, 3, publish=True)
    assert manager.flush() is True
    assert manager.stats().num_free == 16
    assert manager.tree.roots == {}


def test_after_invalidation_nothing_is_found() -> None:
    manager = full_cache(16, 1)
    serve(manager, [1, 2, 3])
    holder = admit(manager, [1, 2, 9])
    manager.publish(holder, 3)
    manager.invalidate()
    manager.check()
    assert cached(manager, [1, 2, 9]) == 0
    assert manager.stats().num_locked == 3
    assert serve(manager, [1, 2, 3]) == 0
    manager.grow(holder, 4)
    holder.key.append(5)
    assert manager.publish(holder, 4) == [], "a request from before goes on, but shares nothing"
    manager.release(holder, 4, publish=True)
    manager.check()
    assert cached(manager, [1, 2, 9]) == 2, "from the request after"
    assert manager.stats().num_locked == 0
    assert manager.budget.available_bytes == 16


def test_invalidated_pages_go_with_their_last_holder() -> None:
    manager = full_cache(8, 1)
    first = admit(manager, [1, 2, 3])
    manager.publish(first, 3)
    second = admit(manager, [1, 2, 4])
    manager.publish(second, 3)
    manager.invalidate()
    manager.release(first, 3, publish=True)
    manager.check()
    assert manager.stats().num_free == 5
    manager.release(second, 3, publish=True)
    manager.check()
    assert manager.stats().num_free == 8


def test_invalidation_respects_a_step_in_flight() -> None:
    manager = full_cache(4, 1)
    serve(manager, [1, 2])
    manager.launched(1)
    manager.invalidate()
    assert manager.stats().num_quarantined == 2
    manager.collected(1)
    assert manager.stats().num_free == 4


# -- scale


def test_a_tree_as_deep_as_a_long_answer() -> None:
    depth = 100_000
    manager = full_cache(depth + 10, 1)
    tokens = list(range(depth))
    handle = admit(manager, tokens)
    for end in range(1, depth + 1):
        manager.publish(handle, end)
    assert sum(1 for _ in manager.tree.nodes()) == depth + 1
    manager.check()
    assert manager.match(TokenKey(tokens), "").num_tokens == depth - 1
    other = admit(manager, [*tokens, 7])
    assert other.num_cached == depth
    manager.release(other, depth + 1, publish=False)
    manager.release(handle, depth, publish=True)
    manager.check()
    serve(manager, list(range(-1, -2000, -1)))
    assert manager.stats().evicted_tokens == 1989
    manager.invalidate()
    manager.check()
    assert manager.stats().num_free == depth + 10


def test_statistics_add_up() -> None:
    manager = full_cache(20, 2)
    serve(manager, [1, 2, 3, 4])
    admit(manager, [5, 6, 7])
    manager.launched(1)
    gone = admit(manager, [8, 9])
    manager.release(gone, 2, publish=False)
    stats = manager.stats()
    assert (stats.num_free, stats.num_quarantined, stats.num_evictable, stats.num_locked) == (15, 1, 2, 2)
    assert (stats.num_pages, stats.num_handles, stats.num_held_tokens) == (20, 1, 7)
    assert stats.held_bytes == 8
    assert manager.budget.available_bytes == 34
