"""Random operations against the brute-force model, every invariant checked after each call.

60,000 operations by default, on full attention alone, evicted by LRU; `test_random_engine.py` has the other mixes.
PANDO_TEST_CACHE_OPERATIONS=1000000 runs more.
"""

from __future__ import annotations

import os

import pytest

from tests.cache.random_operations import Driver
from tests.cache.requests import serve

NUM_OPERATIONS = int(os.environ.get("PANDO_TEST_CACHE_OPERATIONS", "60000"))

POOLS = [(1, 10), (1, 24), (1, 48), (3, 12), (3, 30), (16, 16), (16, 36)]
"""(page size, pages): from pools that a single request nearly fills to pools that seldom evict."""

ROUND = 2_500
"""Operations of one driver; then it is drained and a new one starts with another seed."""


@pytest.mark.parametrize(("page_size", "num_pages"), POOLS)
@pytest.mark.timeout(0)
def test_random_operations(page_size: int, num_pages: int) -> None:
    left, seed = NUM_OPERATIONS // len(POOLS) + 1, 0
    matched = denied = evicted = 0
    while left > 0:
        driver = Driver(seed, page_size, num_pages)
        driver.run(min(left, ROUND))
        driver.drain()
        matched += driver.num_matched
        denied += driver.num_denied
        evicted += driver.model.num_evicted
        left, seed = left - ROUND, seed + 1
    assert matched and denied and evicted, "the operations never met pressure"


def test_the_same_calls_give_the_same_actions() -> None:
    def actions() -> list[object]:
        driver = Driver(seed=3, page_size=2, num_pages=24)
        listener = driver.manager.events.listen()
        driver.run(3000)
        return [listener.drain(), [(h.pages.tolist(), h.num_cached) for h, _ in driver.running], driver.contents()]

    assert actions() == actions()


def test_larger_pages_never_match_more() -> None:
    small, large = (Driver(seed=5, page_size=size, num_pages=2000) for size in (2, 6))
    for driver in (small, large):
        driver.history = [[t % 3 for t in range(40)]]
    prompts = [small.prompt() * 2 for _ in range(300)]
    for prompt in prompts:
        assert serve(large.manager, prompt) <= serve(small.manager, prompt)


def test_an_endless_pool_finds_the_longest_previous_prefix() -> None:
    driver = Driver(seed=6, page_size=1, num_pages=20_000)
    seen: list[list[int]] = []
    for _ in range(300):
        prompt = driver.prompt()
        longest = 0
        for old in seen:
            common = next((i for i, (a, b) in enumerate(zip(old, prompt, strict=False)) if a != b), None)
            longest = max(longest, min(len(old), len(prompt)) if common is None else common)
        assert serve(driver.manager, prompt) == min(longest, len(prompt) - 1)
        seen.append(prompt)
