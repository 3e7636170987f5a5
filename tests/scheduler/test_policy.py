"""Orders of the waiting queue against plain sorting, and what they cost."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.handle import PrefixMatch
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager
from pando.core.messages import Abort, Generate
from pando.core.sampling import SamplingParams
from pando.scheduler.policy import FAIR_EVERY, LongestPrefix, Ordered, WaitingQueue, waiting_queue
from pando.scheduler.request import Request, State
from tests.scheduler.harness import VOCAB, bench


class CountingCache(CacheManager):
    """Counts `match` calls."""

    matches = 0

    def match(self, tokens: bytes | TokenKey, namespace: str, limit: int | None = None) -> PrefixMatch:
        self.matches += 1
        return super().match(tokens, namespace, limit)


class Arrivals:
    """Makes waiting requests with consecutive arrival numbers."""

    def __init__(self) -> None:
        self.order = 0

    def __call__(self, tokens: list[int], priority: int = 0, namespace: str = "") -> Request:
        self.order += 1
        message = Generate(
            rid=f"r{self.order}", input_ids=tokens, sampling=SamplingParams(), priority=priority, namespace=namespace
        )
        request = Request(message, self.order, 0.0, frozenset())
        request.move(State.WAITING)
        return request


def cached(cache: CacheManager, tokens: list[int], namespace: str = "") -> None:
    """Put a prefix into the cache."""
    handle = cache.admit(TokenKey(tokens), namespace, len(tokens))
    assert not handle.denied
    cache.release(handle, len(tokens), publish=True)


def take(queue: WaitingQueue, cache: CacheManager, *, publish: bool = True) -> Request:
    """Admit the next request as the scheduler does: match and lock, take out, publish its prompt."""
    request = queue.peek()
    assert request is not None and queue.peek() is request
    handle = cache.admit(request.key, request.namespace, request.known, limit=request.reusable)
    assert not handle.denied
    request.begin(0, handle)
    queue.pop(request)
    if publish:
        cache.publish(handle, request.known)
    cache.release(handle, request.known if publish else 0, publish=publish)
    return request


def prompt(rng: random.Random, num: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(num)]


# -- by arrival and by priority


@pytest.mark.parametrize("by_priority", [False, True])
def test_ordered_equals_sorting(by_priority: bool) -> None:
    rng, new, queue = random.Random(1), Arrivals(), Ordered(by_priority)
    waiting: dict[str, Request] = {}
    running: list[Request] = []

    def best() -> Request:
        return min(waiting.values(), key=lambda r: (-r.priority if by_priority else 0, r.order))

    for _ in range(3000):
        action = rng.random()
        if action < 0.45:
            request = new([1], priority=rng.randrange(4))
            waiting[request.rid] = request
            queue.push(request)
        elif action < 0.75 and waiting:
            request = best()
            assert queue.peek() is request
            queue.pop(request)
            running.append(waiting.pop(request.rid))
        elif action < 0.85 and waiting:
            request = waiting.pop(rng.choice(list(waiting)))
            queue.remove(request)
        elif running:
            request = running.pop(rng.randrange(len(running)))
            waiting[request.rid] = request
            queue.push_front(request)
        assert len(queue) == len(waiting) and {r.rid for r in queue} == set(waiting)
        assert queue.peek() is (best() if waiting else None)


def test_a_new_request_may_use_the_id_of_one_that_was_removed() -> None:
    for queue in (Ordered(False), LongestPrefix(CacheManager(CacheLayout(1, 1), 64))):
        new = Arrivals()
        first = new([1, 2])
        queue.push(first)
        queue.remove(first)
        first.move(State.DONE)
        message = Generate(rid=first.rid, input_ids=[3], sampling=SamplingParams())
        second = Request(message, 99, 0.0, frozenset())
        second.move(State.WAITING)
        queue.push(second)
        assert queue.peek() is second and len(queue) == 1


def test_names_of_policies() -> None:
    cache = CacheManager(CacheLayout(1, 1), 8)
    assert isinstance(waiting_queue("lpm", cache), LongestPrefix)
    new = Arrivals()
    low, high = new([1]), new([1], priority=3)
    for name, first in (("fcfs", low), ("priority", high)):
        queue = waiting_queue(name, cache)
        queue.push(low)
        queue.push(high)
        assert queue.peek() is first


# -- longest cached prefix


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("seed", range(6))
def test_admits_the_longest_prefix_except_at_fairness_turns(seed: int, page_size: int) -> None:
    """With a cache that does not change, every admission but the eighth has the longest match of all that wait."""
    rng, new = random.Random(seed), Arrivals()
    cache = CacheManager(CacheLayout(page_size, 1), 4000 // page_size * page_size)
    roots = [prompt(rng, 64) for _ in range(5)]
    for root in roots:
        cached(cache, root[: rng.randrange(8, 65)])
    queue = LongestPrefix(cache)
    waiting: dict[str, Request] = {}
    admitted = 0
    for _ in range(600):
        for _ in range(rng.choice([0, 1, 1, 3])):
            tokens = rng.choice(roots)[: rng.randrange(65)] + prompt(rng, rng.randrange(1, 9))
            request = new(tokens, namespace=rng.choice(["", "", "other"]))
            waiting[request.rid] = request
            queue.push(request)
        if waiting and rng.random() < 0.1:
            gone = waiting.pop(rng.choice(list(waiting)))
            queue.remove(gone)
            gone.move(State.DONE)
        if not waiting:
            assert queue.peek() is None
            continue
        request = take(queue, cache, publish=False)
        del waiting[request.rid]
        lengths = [cache.match(r.key, r.namespace).num_tokens for r in waiting.values()]
        own = cache.match(request.key, request.namespace).num_tokens
        if admitted % FAIR_EVERY == FAIR_EVERY - 1:
            assert request.order < min((r.order for r in waiting.values()), default=request.order + 1)
        else:
            assert own >= max(lengths, default=0), (own, max(lengths))
        admitted += 1
        assert len(queue) == len(waiting)


def test_ties_go_by_arrival() -> None:
    rng, new = random.Random(2), Arrivals()
    cache = CacheManager(CacheLayout(1, 1), 1000)
    shared = prompt(rng, 20)
    cached(cache, shared)
    queue = LongestPrefix(cache)
    for i in range(FAIR_EVERY - 1):
        queue.push(new([*shared, i, 0]))
    assert [take(queue, cache, publish=False).order for _ in range(FAIR_EVERY - 1)] == list(range(1, FAIR_EVERY))


def test_requests_with_a_prefix_that_is_being_computed_follow_each_other() -> None:
    """Two cold groups arrive in turns: once one of a group is admitted, the rest of its group has the longer prefix."""
    rng, new = random.Random(3), Arrivals()
    cache = CacheManager(CacheLayout(1, 1), 4000)
    roots = prompt(rng, 30), prompt(rng, 30)
    queue = LongestPrefix(cache)
    for i in range(12):
        queue.push(new([*roots[i % 2], i]))
    groups = []
    for admitted in range(12):
        request = take(queue, cache)
        if admitted % FAIR_EVERY != FAIR_EVERY - 1:
            groups.append(int(request.key.tokens()[0] == roots[1][0]))
    assert groups == sorted(groups), "one group after the other, or they evict each other when there are many"


def test_bounded_unfairness() -> None:
    """A request behind k others is admitted after at most FAIR_EVERY * (k + 1) admissions, whatever arrives later."""
    rng, new = random.Random(4), Arrivals()
    cache = CacheManager(CacheLayout(1, 1), 4000)
    hot = prompt(rng, 50)
    cached(cache, hot)
    queue = LongestPrefix(cache)
    cold = [new(prompt(rng, 5)) for _ in range(6)]
    for request in cold:
        queue.push(request)
    admitted: list[Request] = []
    while not all(request in admitted for request in cold):
        for _ in range(2):
            queue.push(new([*hot, rng.randrange(VOCAB), 1]))
        admitted.append(take(queue, cache, publish=False))
        assert len(admitted) <= FAIR_EVERY * (len(cold) + 1)
    for behind, request in enumerate(cold):
        assert admitted.index(request) < FAIR_EVERY * (behind + 1)


def test_retracted_requests_go_first() -> None:
    rng, new = random.Random(5), Arrivals()
    cache = CacheManager(CacheLayout(1, 1), 4000)
    hot = prompt(rng, 50)
    cached(cache, hot)
    queue = LongestPrefix(cache)
    for i in range(20):
        queue.push(new([*hot, i]))
    ran = [take(queue, cache, publish=False) for _ in range(3)]
    for request in ran:
        request.leave(State.WAITING)
        queue.push_front(request)
    assert len(queue) == 20
    assert {take(queue, cache, publish=False) for _ in range(3)} == set(ran)
    assert queue.peek() not in ran and len(queue) == 17


def test_a_retracted_request_that_is_removed_is_not_admitted() -> None:
    new, cache = Arrivals(), CacheManager(CacheLayout(1, 1), 100)
    queue = LongestPrefix(cache)
    first, second = new([1, 2, 3]), new([4, 5])
    queue.push(first)
    queue.push(second)
    assert take(queue, cache, publish=False) is first
    first.leave(State.WAITING)
    queue.push_front(first)
    queue.remove(first)
    first.move(State.DONE)
    assert take(queue, cache, publish=False) is second
    assert queue.peek() is None and len(queue) == 0


def test_an_emptied_queue_keeps_nothing() -> None:
    """Places in deques and heaps that were skipped must not pile up while a server runs for weeks."""
    rng, new = random.Random(6), Arrivals()
    cache = CacheManager(CacheLayout(1, 1), 4000)
    root = prompt(rng, 40)
    queue = LongestPrefix(cache)
    for _ in range(400):
        for _ in range(3):
            queue.push(new(root[: rng.randrange(41)] + prompt(rng, 3)))
        for _ in range(2):
            take(queue, cache)
        gone = rng.choice(list(queue))
        queue.remove(gone)
        gone.move(State.DONE)
        assert len(queue) == 0 or len(queue._by_age) <= 8 * FAIR_EVERY * (len(queue) + 1)
    while queue.peek() is not None:
        take(queue, cache)
    sizes: dict[str, Any] = {name: len(getattr(queue, name)) for name in ("_members", "_buckets", "_home", "_by_age")}
    assert sizes == dict.fromkeys(sizes, 0)


def test_matches_per_admission_do_not_grow_with_the_queue() -> None:
    """10,000 waiting requests share a prefix; calls are counted, not timed."""
    rng, new = random.Random(7), Arrivals()
    cache = CountingCache(CacheLayout(1, 1), 120_000)
    shared = prompt(rng, 60)
    queue = LongestPrefix(cache)
    num = 10_000
    for i in range(num):
        queue.push(new([*shared, i % VOCAB, i // VOCAB]))
    assert cache.matches == num, "one at arrival"
    worst = 0
    for _ in range(num):
        before = cache.matches
        take(queue, cache)
        worst = max(worst, cache.matches - before)
    # One for the admission itself, one for the bucket's next head, and now and then one of a stale entry.
    assert worst <= 4, worst
    assert cache.matches <= num * 4


@pytest.mark.parametrize("depth", [0, 1])
def test_in_the_scheduler_each_step_costs_few_matches(depth: int) -> None:
    b = bench(num_pages=4000, token_budget=64, max_running=4, depth=depth, context_length=200, max_queued=20_000)
    calls = 0
    original = b.cache.match

    def match(*args: Any, **options: Any) -> PrefixMatch:
        nonlocal calls
        calls += 1
        return original(*args, **options)

    b.cache.match = match  # type: ignore[method-assign]
    shared = prompt(random.Random(8), 30)
    for i in range(500):
        b.add(f"r{i}", [*shared, i, 1], 2, ignore_eos=True)
    b.step()
    assert calls <= 500 + 4 * 4
    while len(b.scheduler.admission.waiting) > 400:
        before = calls
        b.step()
        assert calls - before <= 4 * 4
    b.inbox.commands.append(Abort())
    b.run()
