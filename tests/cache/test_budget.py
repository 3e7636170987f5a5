"""Tests of `pando.cache.budget`: one budget over several id spaces."""

from __future__ import annotations

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager
from tests.cache.requests import admit, run_hybrid


def test_slot_bytes_follow_the_layout() -> None:
    assert CacheLayout(16, 3).slot_bytes == (48,)
    assert CacheLayout(4, 3, window=8, window_bytes_per_token=2, state_bytes=100).slot_bytes == (12, 8, 100)
    assert CacheLayout(1, state_bytes=7).slot_bytes == (0, 7)


def test_id_spaces_hold_what_the_budget_holds_unless_told_otherwise() -> None:
    layout = CacheLayout(1, 2, state_bytes=30)
    cache = CacheManager(layout, 100)
    assert [c.allocator.num_slots for c in cache.components] == [50, 3]
    assert cache.budget.binds
    cache = CacheManager(layout, 100, num_slots=[20, 2])
    assert [c.allocator.num_slots for c in cache.components] == [20, 2]
    assert not cache.budget.binds


def test_states_and_kv_share_one_budget() -> None:
    cache = CacheManager(CacheLayout(1, 1, state_bytes=30), 100, policy="lru")
    handle = admit(cache, list(range(40)))
    assert cache.budget.used_bytes == 70 and cache.budget.available_bytes == 30
    denied = cache.admit(TokenKey([9] * 10), "", 10)
    assert denied.denied and denied.shortfall_bytes == 10, "10 tokens and a state, 30 bytes left"
    cache.publish(handle, 40)
    cache.release(handle, 40, publish=True)
    assert cache.budget.available_bytes == 100
    other = admit(cache, [9] * 60)
    assert cache.stats().by_component["full"].num_evicted == 40, "30 bytes were lacking; a leaf goes whole"
    assert not other.denied and cache.budget.used_bytes == 90


def test_a_denial_for_ids_names_their_bytes() -> None:
    cache = CacheManager(CacheLayout(1, 1, state_bytes=30), 10_000, num_slots=[100, 1])
    admit(cache, [1, 2, 3])
    denied = cache.admit(TokenKey([4]), "", 1)
    assert denied.denied and denied.shortfall_bytes == 30


@pytest.mark.parametrize("policy", ["lru", "gdsf:0.25"])
def test_a_state_makes_room_by_kv_and_kv_by_states(policy: str) -> None:
    cache = CacheManager(CacheLayout(1, 1, state_bytes=30), 100, policy=policy)
    for first in range(0, 100, 10):
        run_hybrid(cache, list(range(first, first + 10)))
    kept = cache.stats().by_component
    assert kept["state"].num_evicted >= 7 and kept["full"].num_evicted >= 70
    handle = admit(cache, list(range(500, 570)))
    assert cache.budget.used_bytes == 100
    cache.release(handle, 0, publish=False)
