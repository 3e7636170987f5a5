"""States in room that nobody needs: found, resumed from, and the first to go."""

from __future__ import annotations

from typing import Any

from pando.cache.awaited import awaited
from pando.cache.budget import CacheLayout
from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager

STATE = 10
"""Bytes of a state; a token's KV takes one."""


def cache_of(
    num_bytes: int, *, page_size: int = 1, admission: str = "branch+last+room", **options: Any
) -> CacheManager:
    layout = CacheLayout(page_size, 1, state_bytes=STATE, **options)
    return CacheManager(layout, num_bytes, policy="lru", admission=admission)


class Steps:
    """Requests one after the other, each in one step."""

    def __init__(self, cache: CacheManager) -> None:
        self.cache, self.step = cache, -1

    def admit(self, tokens: list[int]) -> CacheHandle:
        handle = self.cache.admit(TokenKey(tokens), "", len(tokens))
        assert not handle.denied
        return handle

    def plan(self, handle: CacheHandle, end: int) -> list[int]:
        """Plan a step to position `end`; the positions it saves."""
        saves = self.cache.plan_saves(handle, handle.num_planned, end)
        self.cache.publish(handle, end)
        self.cache.check()
        return [position for position, _ in saves]

    def launch(self) -> None:
        self.step += 1
        self.cache.launched(self.step)
        self.cache.collected(self.step)
        self.cache.check()

    def serve(self, tokens: list[int]) -> int:
        """A whole request; returns the tokens it found."""
        handle = self.admit(tokens)
        self.plan(handle, len(tokens))
        self.launch()
        self.cache.release(handle, len(tokens), publish=True, state_at=len(tokens))
        self.cache.check()
        return handle.num_cached


def guests(cache: CacheManager) -> list[int]:
    """Positions of all guests."""
    assert cache.states is not None
    return sorted(at for node in cache.tree.nodes() for at, _ in cache.states.guests.of(node))


def test_an_equal_prompt_resumes_the_second_time() -> None:
    for page_size, expected in ((1, [0, 19, 19]), (4, [0, 16, 16])):
        steps = Steps(cache_of(400, page_size=page_size))
        assert [steps.serve(list(range(20))) for _ in range(3)] == expected
        assert guests(steps.cache) == []  # it became a state like others


def test_without_room_there_is_none_and_nothing_else_differs() -> None:
    for admission in ("branch+last", "branch+last+room"):
        steps = Steps(cache_of(20 + 2 * STATE - 1, admission=admission))
        assert [steps.serve(list(range(20))) for _ in range(2)] == [0, 0]
        assert guests(steps.cache) == []


def test_a_guest_splits_no_edge_and_is_the_first_to_go() -> None:
    steps = Steps(cache_of(20 + 12 + 3 * STATE - 1))
    steps.serve(list(range(20)))
    assert guests(steps.cache) == [19] and len(list(steps.cache.tree.nodes())) == 2
    steps.serve(list(range(100, 112)))
    assert guests(steps.cache) == [], "the first one's guest made room, and there was none for another"
    assert steps.cache.eviction.evicted == [0, 1]
    assert steps.cache.match(TokenKey(range(21)), "").num_tokens == 20


def test_splits_and_tails_that_go_take_their_guests_along() -> None:
    steps = Steps(cache_of(400, admission="last+room"))
    steps.serve(list(range(20)))
    steps.serve([*range(10), *range(50, 60)])
    assert guests(steps.cache) == [19, 19]
    fork = steps.cache.match(TokenKey([*range(10), 7, 7]), "")
    assert (fork.num_tokens, fork.num_matched) == (0, 10)
    assert steps.cache.flush() and guests(steps.cache) == []
    assert steps.cache.budget.used_bytes == 0


def test_a_guest_is_found_once_its_step_was_launched() -> None:
    steps = Steps(cache_of(400))
    first = steps.admit(list(range(20)))
    assert steps.plan(first, 20) == [19]
    assert steps.cache.match(TokenKey(range(20)), "").num_tokens == 0
    assert awaited(steps.cache, [first], TokenKey(range(30)), "", 29) == 19
    steps.launch()
    assert steps.cache.match(TokenKey(range(20)), "").num_tokens == 19
    assert awaited(steps.cache, [first], TokenKey(range(30)), "", 29) == 0


def test_a_request_released_before_its_step_was_launched_leaves_no_guest() -> None:
    steps = Steps(cache_of(400))
    first = steps.admit(list(range(20)))
    steps.plan(first, 20)
    steps.cache.release(first, 0, publish=False)
    steps.cache.check()
    steps.launch()
    steps.launch()
    assert guests(steps.cache) == [] and steps.cache.budget.used_bytes == steps.cache.budget.evictable_bytes


def test_what_is_awaited_of_a_prompt_read_in_chunks() -> None:
    plain = CacheManager(CacheLayout(4, 1), 400)
    handle = plain.admit(TokenKey(range(40)), "", 40)
    assert not handle.denied
    plain.publish(handle, 16)
    assert awaited(plain, [handle], TokenKey(range(40)), "", 39) == 36
    assert awaited(plain, [handle], TokenKey([*range(21), *range(90, 110)]), "", 40) == 20
    assert awaited(plain, [handle], TokenKey([*range(17), *range(90, 110)]), "", 36) == 0, "that is there already"
    assert awaited(plain, [handle], TokenKey(range(40)), "other", 39) == 0
    plain.invalidate()
    assert awaited(plain, [handle], TokenKey(range(40)), "", 39) == 0, "a step failed: it will share nothing"
    steps = Steps(cache_of(400, admission="branch+last+room"))
    long = steps.admit(list(range(40)))
    steps.plan(long, 10)
    assert awaited(steps.cache, [long], TokenKey(range(40)), "", 39) == 39
    assert awaited(steps.cache, [long], TokenKey([*range(30), 1, 1]), "", 31) == 0, "no state will be there"
