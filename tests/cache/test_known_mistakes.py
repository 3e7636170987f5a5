"""Mistakes that prefix caches are known to make; each has its test."""

from __future__ import annotations

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager
from tests.cache.requests import admit, cached, full_cache, hybrid_cache, run_hybrid, serve


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


# -- the same with recurrent states


def test_matching_on_below_a_partially_matched_edge_with_states() -> None:
    """A state below an edge that matched in part only belongs to another prefix."""
    manager = hybrid_cache()
    run_hybrid(manager, [1, 2, 3, 4])
    run_hybrid(manager, [1, 2, 3, 4, 5, 6])
    match = manager.match(TokenKey([1, 2, 9, 9, 5, 6, 0]), "")
    assert (match.num_tokens, match.num_matched) == (0, 2)


def test_crediting_another_node_than_the_victim_in_bytes() -> None:
    """Whatever is evicted, the bytes in use are those of what is there, and within the budget."""
    manager = CacheManager(CacheLayout(1, 1, state_bytes=10), 100, policy="lru")
    for first in range(0, 900, 30):
        run_hybrid(manager, list(range(first, first + 7 + first % 11)))
        stats = manager.stats()
        full, state = stats.by_component["full"], stats.by_component["state"]
        assert stats.held_bytes == full.num_evictable + 10 * state.num_evictable <= 100
    assert full.num_evicted and state.num_evicted


def test_evicting_the_states_of_a_path_shallow_first() -> None:
    """A branch finds the state at the fork: ends of paths go before it, though it was used longer ago."""
    manager = hybrid_cache(num_states=5, policy="lru")
    system = list(range(10))
    for tail in (100, 200, 300):
        run_hybrid(manager, [*system, tail, tail])
    for tail in (400, 500, 600, 700):
        assert run_hybrid(manager, [*system, tail, tail]) == 10


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("policy", ["branch+last", "every:16"])
def test_losing_all_reuse_of_states_on_an_exact_multiple(page_size: int, policy: str) -> None:
    """A state after the whole prompt would be of no use to the same prompt: its last token is computed again."""
    manager = hybrid_cache(page_size=page_size, admission=policy)
    prompt = list(range(64))
    found = [run_hybrid(manager, prompt) for _ in range(3)]
    assert found[0] == 0
    assert found[2] == (64 - page_size if policy == "branch+last" else 48)


@pytest.mark.parametrize("state_at", [9, 11, None])
def test_donating_a_state_slot_that_is_still_written(state_at: int | None) -> None:
    """Only a state that has read exactly what is published goes to the tree; any other is freed after its steps."""
    manager = hybrid_cache()
    handle = admit(manager, list(range(10)))
    manager.publish(handle, 10)
    manager.launched(0)
    manager.release(handle, 10, publish=True, state_at=state_at)
    stats = manager.stats().by_component["state"]
    assert (stats.num_evictable, stats.num_quarantined) == (0, 1)
    manager.check()


def test_leaking_the_states_of_a_request_that_is_not_scheduled() -> None:
    """Denied, aborted before its first step, or aborted between planning and launch: no slot is lost."""
    manager = hybrid_cache(num_states=3, admission="every:2")
    run_hybrid(manager, [1, 2, 3])
    handle = admit(manager, [1, 2, 3, 4, 5, 6])
    assert manager.plan_saves(handle, 2, 4)
    manager.release(handle, 0, publish=False)
    manager.check()
    manager.launched(1)
    manager.collected(1)
    stats = manager.stats().by_component["state"]
    assert stats.num_free + stats.num_evictable == 3
