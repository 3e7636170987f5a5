"""Mistakes that prefix caches are known to make; each has its test. (Those of recurrent states come with them.)"""

from __future__ import annotations

import pytest

from pando.cache.key import TokenKey
from tests.cache.requests import admit, cached, full_cache, serve


@pytest.mark.parametrize("page_size", [1, 2])
def test_matching_on_below_a_partially_matched_edge(page_size: int) -> None:
    """[1 2 | 3 4] with a child [5 6]: the query [1 2 | 9 9 | 5 6] must not reach the child."""
    manager = full_cache(32, page_size)
    serve(manager, [1, 2, 3, 4])
    serve(manager, [1, 2, 3, 4, 5, 6])
    serve(manager, [1, 2, 3, 4, 7, 8])
    assert cached(manager, [1, 2, 9, 9, 5, 6]) == 2
    assert cached(manager, [1, 2, 5, 6]) == 2
    handle = admit(manager, [1, 2, 9, 9, 5, 6, 0, 0])
    assert handle.num_cached == 2


def test_crediting_another_node_than_the_victim() -> None:
    """Pages gained by an eviction are the victim's: exactly what was asked for is free, whoever was looked at."""
    manager = full_cache(20, 1)
    serve(manager, list(range(100, 110)))
    serve(manager, [1])
    serve(manager, list(range(200, 209)))
    handle = admit(manager, [5])
    assert manager.stats().num_free == 0 and manager.stats().evicted_tokens == 1
    for tokens in range(2, 13):
        grown = manager.grow(handle, tokens)
        assert not grown.denied and len(grown.writes) == 1
        assert manager.stats().evicted_tokens == tokens and manager.stats().num_free == 0
        manager.check()
    assert cached(manager, [1]) == 0
    assert cached(manager, list(range(200, 209))) == 8


def test_refreshing_all_ancestors_on_a_hit() -> None:
    """A hit refreshes the node it ends in; an ancestor's own turn comes from hits that end there."""
    manager = full_cache(32, 1)
    serve(manager, [1, 2, 3])
    serve(manager, [1, 2, 4])
    serve(manager, [1, 2, 3, 5])
    leaf = manager.match(TokenKey([1, 2, 3, 5, 0]), "").node
    assert leaf is not None and leaf.parent is not None
    parent = leaf.parent
    before = parent.last_use, leaf.last_use
    admit(manager, [1, 2, 3, 5, 9])
    after = parent.last_use, leaf.last_use
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_an_old_fork_goes_when_its_branches_are_gone() -> None:
    """Its branches' later hits do not keep the fork above a prefix that was used after them."""
    manager = full_cache(6, 1)
    serve(manager, [1, 2, 3])
    serve(manager, [1, 2, 4])
    serve(manager, [8, 9])
    serve(manager, [5, 6, 7])
    assert cached(manager, [1, 2]) == 1
    serve(manager, [5, 6, 7, 0])
    assert cached(manager, [1, 2]) == 0
    assert cached(manager, [8, 9]) == 2


def test_evicting_a_path_shallow_first() -> None:
    """The end of a path goes before its beginning, so a later branch still finds the beginning."""
    manager = full_cache(10, 1)
    handle = admit(manager, list(range(8)))
    for end in (2, 4, 6, 8):
        manager.publish(handle, end)
    manager.release(handle, 8, publish=True)
    serve(manager, [50, 51, 52, 53, 54])
    assert manager.stats().evicted_tokens == 3
    assert cached(manager, [0, 1, 2, 3, 4, 99]) == 5


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_losing_all_reuse_on_an_exact_multiple(page_size: int) -> None:
    """A prompt of whole pages, published in whole chunks, is reused up to its last page."""
    manager = full_cache(1024 // page_size, page_size)
    prompt = list(range(64))
    handle = admit(manager, prompt)
    manager.publish(handle, 32)
    manager.publish(handle, 64)
    manager.release(handle, 64, publish=True)
    assert serve(manager, prompt) == 64 - page_size


def test_donating_a_page_that_is_still_aliased() -> None:
    """After publishing, a page belongs to the tree alone: no other request owns it, none writes it."""
    manager = full_cache(32, 2)
    twins = [admit(manager, [1, 2, 3, 4, 5]) for _ in range(3)]
    for handle in twins:
        manager.publish(handle, 5)
        manager.check()
    own = [page for handle in twins for page in handle.pages[handle.num_tree_pages :]]
    shared = {page for handle in twins for page in handle.pages[: handle.num_tree_pages]}
    assert len(own) == len(set(own)) == 3
    assert len(shared) == 2 and not shared & set(own)


def test_leaking_a_matched_request_that_is_not_scheduled() -> None:
    """A match holds nothing, and a denial neither."""
    manager = full_cache(8, 1)
    serve(manager, [1, 2, 3, 4])
    manager.match(TokenKey([1, 2, 3, 4, 5]), "")
    assert manager.admit(TokenKey([1, 2, *range(10, 20)]), "", 12).denied
    assert manager.admit(TokenKey([5] * 20), "new namespace", 20).denied
    assert manager.stats().num_locked == 0
    assert list(manager.tree.roots) == [""]
    assert manager.flush() is True
    assert manager.stats().num_free == 8


def test_raising_because_two_counters_of_one_fact_differ() -> None:
    """Locked pages are derived, so a page lost by a mistake shows in them and stops nothing."""
    manager = full_cache(8, 1)
    serve(manager, [1, 2])
    manager.allocator.take_one()
    stats = manager.stats()
    assert stats.num_free + stats.num_evictable + stats.num_locked == 8
    handle = manager.admit(TokenKey([3, 4, 5]), "", 3)
    assert not handle.denied
    manager.release(handle, 3, publish=True)
    with pytest.raises(AssertionError, match="lost or has two owners"):
        manager.check()
