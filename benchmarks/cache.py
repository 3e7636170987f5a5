"""Times of the prefix cache's calls: `python -m benchmarks.cache [--quick]`. No torch, one core.

Prints microseconds per call, the best of several rounds, for the calls the scheduler makes per request and per step.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator

from pando.cache.budget import CacheLayout
from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager


def best_us(call: Callable[[], object], rounds: int, calls: int = 1) -> float:
    """Microseconds per call, the fastest of `rounds` rounds of `calls` calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def admitted(manager: CacheManager, key: TokenKey, num_tokens: int) -> CacheHandle:
    """Admit a request that must fit."""
    handle = manager.admit(key, "", num_tokens)
    assert not handle.denied
    return handle


def with_prompt(page_size: int, num_tokens: int, chunk: int) -> tuple[CacheManager, TokenKey]:
    """A cache that holds one prompt, published in chunks and still running, so that its nodes stay apart."""
    manager = CacheManager(CacheLayout(page_size, 1), (2 * num_tokens // page_size + 64) * page_size)
    key = TokenKey(i * 7919 % 50021 for i in range(num_tokens))
    handle = admitted(manager, key, num_tokens)
    for end in range(chunk, num_tokens + 1, chunk):
        manager.publish(handle, end)
    return manager, key


def matches(rounds: int) -> Iterator[tuple[str, float]]:
    """Matching long prompts, whole and diverging in the middle."""
    for label, page_size, num_tokens in (("8K tokens, page 16", 16, 8192), ("128K tokens, page 1", 1, 131072)):
        for chunk in (num_tokens, 2048):
            manager, key = with_prompt(page_size, num_tokens, chunk)
            half = TokenKey([*key.tokens(0, num_tokens // 2 + 3), *[1] * (num_tokens // 2)])
            name = f"match {label}, nodes of {chunk}"
            yield name, best_us(lambda m=manager, k=key: m.match(k, ""), rounds, 5)  # type: ignore[misc]
            yield f"{name}, diverging half-way", best_us(lambda m=manager, k=half: m.match(k, ""), rounds, 5)  # type: ignore[misc]


def request_calls(page_size: int, rounds: int) -> Iterator[tuple[str, float]]:
    """A request of 1,000 tokens, 500 of them cached: each call of its life."""
    num_requests = 200
    shared = list(range(500))
    best = dict.fromkeys(("admit", "publish", "grow, room", "grow, all", "release"), float("inf"))
    for round_index in range(rounds):
        manager = CacheManager(CacheLayout(page_size, 1), (600 * num_requests // page_size + 2000) * page_size)
        warm = admitted(manager, TokenKey(shared), 500)
        manager.release(warm, 500, publish=True)
        draw = random.Random(round_index)
        keys = [TokenKey(shared + [draw.randrange(50000) for _ in range(500)]) for _ in range(num_requests)]
        handles: list[CacheHandle] = []
        times = {
            "admit": _timed(lambda m=manager, k=keys, h=handles: h.extend(admitted(m, key, 1000) for key in k)),  # type: ignore[misc]
            "publish": _timed(lambda m=manager, h=handles: [m.publish(handle, 1000) for handle in h]),  # type: ignore[misc]
            "grow, room": _timed(lambda m=manager, h=handles: [m.grow(handle, 1000) for handle in h]),  # type: ignore[misc]
            "grow, all": _timed(
                lambda m=manager, h=handles: [m.grow(handle, n) for n in range(1001, 1017) for handle in h]  # type: ignore[misc]
            )
            / 16,
            "release": _timed(lambda m=manager, h=handles: [m.release(x, 1000, publish=True) for x in h]),  # type: ignore[misc]
        }
        for name, seconds in times.items():
            best[name] = min(best[name], seconds / num_requests * 1e6)
    for name, microseconds in best.items():
        yield f"{name}, 1,000-token request, page {page_size}", microseconds


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decode_steps(page_size: int, rounds: int) -> Iterator[tuple[str, float]]:
    """One decode step of 256 requests through `grow_many`, averaged over 64 steps."""
    best = float("inf")
    for _ in range(rounds):
        manager = CacheManager(CacheLayout(page_size, 1), (256 * 1100 // page_size + 256) * page_size)
        handles = [admitted(manager, TokenKey([i, *range(999)]), 1000) for i in range(256)]
        steps = [[n] * 256 for n in range(1001, 1065)]
        best = min(best, _timed(lambda m=manager, h=handles, s=steps: [m.grow_many(h, n) for n in s]) / 64)  # type: ignore[misc]
    yield f"grow_many, step of 256 requests, page {page_size}", best * 1e6


def evictions(num_nodes: int) -> Iterator[tuple[str, float]]:
    """Evicting leaves one after the other out of a tree of `num_nodes` nodes, by whole nodes and page by page."""
    for label, pages_per_leaf in (("whole leaf of 1 page", 1), ("page of a leaf of 4", 4)):
        manager = CacheManager(CacheLayout(1, 1), num_nodes * pages_per_leaf)
        for i in range(num_nodes):
            handle = admitted(manager, TokenKey([i, *range(pages_per_leaf - 1)]), pages_per_leaf)
            manager.release(handle, pages_per_leaf, publish=True)
        handle = admitted(manager, TokenKey([num_nodes]), 1)
        count = num_nodes // 2
        seconds = _timed(lambda m=manager, h=handle, n=count: [m.grow(h, i) for i in range(2, n)])  # type: ignore[misc]
        yield f"grow with eviction of a {label}, {num_nodes:,} nodes", seconds / count * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, a small tree")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 7
    sections = [matches(rounds), evictions(2_000 if quick else 100_000)]
    for page_size in (1, 16):
        sections += [request_calls(page_size, rounds), decode_steps(page_size, rounds)]
    for section in sections:
        for name, microseconds in section:
            print(f"{microseconds:10.2f} us  {name}", flush=True)


if __name__ == "__main__":
    main()
