"""Tests of `pando.cache.components_state` and of the states' way through the manager."""

from __future__ import annotations

import pytest

from pando.cache.key import TokenKey
from tests.cache.requests import admit, cached, hybrid_cache, run_hybrid


def test_a_state_serves_its_own_position_and_no_other() -> None:
    manager = hybrid_cache()
    run_hybrid(manager, list(range(10)))
    assert cached(manager, list(range(10))) == 10
    match = manager.match(TokenKey([*range(8), 99]), "")
    assert (match.num_tokens, match.num_matched) == (0, 8)


def test_the_second_request_on_a_branch_leaves_a_state_and_the_third_uses_it() -> None:
    manager = hybrid_cache()
    system = list(range(20))
    assert run_hybrid(manager, [*system, 100, 101]) == 0
    assert run_hybrid(manager, [*system, 200, 201]) == 0
    assert run_hybrid(manager, [*system, 300, 301]) == 20
    assert run_hybrid(manager, [*system, 400]) == 20


def test_a_new_branch_resumes_from_the_nearest_state_above() -> None:
    manager = hybrid_cache()
    run_hybrid(manager, list(range(10)))
    run_hybrid(manager, list(range(30)))
    match = manager.match(TokenKey([*range(25), 99, 99]), "")
    assert (match.num_tokens, match.num_matched) == (10, 25)
    assert run_hybrid(manager, [*range(25), 99, 99]) == 10
    assert run_hybrid(manager, [*range(25), 98, 99]) == 25


def test_a_request_works_on_a_copy() -> None:
    manager = hybrid_cache()
    assert manager.states is not None
    run_hybrid(manager, list(range(10)))
    handle = admit(manager, [*range(10), 50])
    node = manager.match(TokenKey([*range(10), 50]), "").resume
    assert node is not None
    assert handle.restore == manager.states.slot(node)
    assert handle.state not in (-1, handle.restore)
    fresh = admit(manager, [7, 7])
    assert fresh.restore == -1 and fresh.state not in (handle.state, handle.restore)


def test_the_working_state_becomes_the_last_one_without_a_second_slot() -> None:
    manager = hybrid_cache(num_states=1)
    handle = admit(manager, list(range(10)))
    working = handle.state
    assert manager.plan_saves(handle, 0, 10) == []
    manager.publish(handle, 10)
    manager.launched(0)
    manager.release(handle, 10, publish=True, state_at=10)
    manager.check()
    node = manager.match(TokenKey(range(11)), "").resume
    assert node is not None and manager.states is not None
    assert manager.states.slot(node) == working


def test_a_state_that_read_more_than_is_published_is_not_kept() -> None:
    """The step after the last one was launched already: the state has read a token that the request does not have."""
    manager = hybrid_cache()
    handle = admit(manager, list(range(10)))
    manager.publish(handle, 10)
    manager.launched(0)
    manager.launched(1)
    manager.release(handle, 10, publish=True, state_at=11)
    manager.check()
    assert cached(manager, list(range(10))) == 0
    assert manager.stats().by_component["state"].num_quarantined == 1


def test_with_larger_pages_the_last_whole_page_has_a_state() -> None:
    manager = hybrid_cache(page_size=4)
    handle = admit(manager, list(range(10)))
    assert manager.plan_saves(handle, 0, 10) == [(8, handle.spare)]
    manager.publish(handle, 10)
    manager.launched(0)
    for length in (10, 11):
        handle.key.append(length)
        manager.grow(handle, length + 1)
        manager.launched(length)
    assert manager.plan_saves(handle, 10, 11) == []
    assert manager.plan_saves(handle, 11, 12) == [(12, handle.spare)]
    manager.launched(20)
    manager.release(handle, 12, publish=True, state_at=12)
    manager.check()
    assert cached(manager, list(range(13))) == 12


def test_a_spare_that_is_ahead_is_not_kept() -> None:
    manager = hybrid_cache(page_size=4)
    handle = admit(manager, list(range(7)))
    manager.plan_saves(handle, 0, 7)
    manager.publish(handle, 7)
    manager.launched(0)
    assert manager.plan_saves(handle, 7, 8) == [(8, handle.spare)]
    manager.launched(1)
    manager.release(handle, 7, publish=True, state_at=8)
    manager.check()
    assert cached(manager, list(range(8))) == 0


def test_a_planned_state_is_found_once_its_step_was_launched() -> None:
    """Copies run before a step, so a state that this very step saves would be read too early."""
    manager = hybrid_cache(admission="every:5")
    handle = admit(manager, list(range(12)))
    (first, _), (second, _) = manager.plan_saves(handle, 0, 12)
    assert (first, second) == (5, 10)
    manager.publish(handle, 12)
    manager.check()
    match = manager.match(TokenKey(range(12)), "")
    assert (match.num_tokens, match.num_matched) == (0, 11)
    assert manager.stats().by_component["state"].num_evictable == 0, "nor may it be handed out"
    manager.launched(0)
    assert manager.match(TokenKey(range(12)), "").num_tokens == 10
    assert manager.stats().by_component["state"].num_evictable == 2
    manager.check()


def test_positions_are_carried_to_the_chunk_that_holds_them() -> None:
    manager = hybrid_cache(admission="every:4")
    handle = admit(manager, list(range(20)))
    found = []
    for start in range(0, 20, 7):
        saves = manager.plan_saves(handle, start, min(20, start + 7))
        assert all(start < position <= start + 7 for position, _ in saves)
        found += [position for position, _ in saves]
        manager.publish(handle, min(20, start + 7))
        manager.launched(start)
    assert found == [4, 8, 12, 16, 20]
    manager.check()


@pytest.mark.parametrize(("page_size", "grid", "expected"), [(1, 1, 23), (4, 1, 20), (1, 8, 16), (4, 6, 12)])
def test_positions_lie_on_pages_and_on_the_grid(page_size: int, grid: int, expected: int) -> None:
    manager = hybrid_cache(page_size=page_size, grid=grid, admission="branch")
    run_hybrid(manager, list(range(40)))
    handle = admit(manager, [*range(23), 99, 99, 99])
    assert [position for position, _ in manager.plan_saves(handle, 0, 26)] == [expected]


def test_hints_name_positions_that_nobody_reached_yet() -> None:
    manager = hybrid_cache()
    handle = manager.admit(TokenKey(range(12)), "", 12, hints=(5, 40, 0))
    assert not handle.denied
    assert [position for position, _ in manager.plan_saves(handle, 0, 12)] == [5, 12]
    manager.publish(handle, 12)
    manager.launched(0)
    assert cached(manager, [*range(5), 99]) == 5
    manager.check()


def test_a_checkpoint_is_dropped_when_nothing_less_worthy_is_there() -> None:
    manager = hybrid_cache(num_states=2, admission="branch+last")
    holders = [admit(manager, [1, 2, 3]), admit(manager, [4, 5])]
    manager.publish(holders[0], 3)
    assert manager.admit(TokenKey([1, 2, 9, 9]), "", 4).denied, "no working state"
    manager.release(holders[1], 2, publish=False)
    handle = admit(manager, [1, 2, 9, 9])
    assert handle.checkpoints == [2]
    assert manager.plan_saves(handle, 0, 4) == []
    assert manager.publish(handle, 4) == []
    manager.check()


def test_two_requests_that_save_the_same_state_leave_one() -> None:
    manager = hybrid_cache(admission="every:4")
    handles = [admit(manager, list(range(6))) for _ in range(2)]
    saves = [manager.plan_saves(handle, 0, 6) for handle in handles]
    assert [len(s) for s in saves] == [1, 1] and saves[0] != saves[1]
    for handle in handles:
        manager.publish(handle, 6)
        manager.check()
    stats = manager.stats().by_component["state"]
    assert stats.num_quarantined == 1, "the second is written by the step being planned, so it rests"
    manager.launched(0)
    manager.collected(0)
    assert manager.stats().by_component["state"].num_quarantined == 0
    manager.check()


def test_invalidation_forgets_states_too() -> None:
    manager = hybrid_cache(admission="every:4")
    run_hybrid(manager, list(range(10)))
    handle = admit(manager, [*range(10), 1, 2])
    manager.plan_saves(handle, 8, 12)
    manager.publish(handle, 12)
    manager.invalidate()
    manager.check()
    assert cached(manager, list(range(10))) == 0
    manager.launched(7)
    manager.release(handle, 0, publish=False)
    manager.collected(7)
    manager.check()
    assert manager.budget.used_bytes == 0


def test_a_cache_with_one_state_serves_a_request_that_could_resume() -> None:
    """What it would resume from takes the only other slot: it starts from zero instead of waiting for ever."""
    manager = hybrid_cache(num_states=1)
    run_hybrid(manager, list(range(10)))
    assert run_hybrid(manager, [*range(10), 5, 6]) == 0
    manager.check()


def test_a_model_of_states_alone_keeps_paths_only_above_states() -> None:
    manager = hybrid_cache(kv_bytes=0)
    run_hybrid(manager, list(range(10)))
    run_hybrid(manager, [*range(6), 70, 71])
    assert manager.match(TokenKey([*range(6), 99]), "").num_tokens == 6
    assert manager.stats().num_pages == 0
    manager.flush()
    assert manager.tree.roots == {}
