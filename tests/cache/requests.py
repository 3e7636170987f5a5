"""Small steps of requests' lives, for the tests of the manager."""

from __future__ import annotations

from typing import Any

from pando.cache.budget import CacheLayout
from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager


def full_cache(num_pages: int, page_size: int, **options: Any) -> CacheManager:
    """A cache of full attention alone, one byte per token, so that bytes count tokens; LRU unless told otherwise."""
    return CacheManager(CacheLayout(page_size, 1), num_pages * page_size, **{"policy": "lru", **options})


def admit(
    manager: CacheManager, tokens: list[int], namespace: str = "", num_tokens: int | None = None, **options: Any
) -> CacheHandle:
    """Admit a request that must fit, with pages for all its tokens unless told otherwise."""
    handle = manager.admit(TokenKey(tokens), namespace, len(tokens) if num_tokens is None else num_tokens, **options)
    assert not handle.denied
    manager.check()
    return handle


def serve(manager: CacheManager, tokens: list[int], namespace: str = "") -> int:
    """A whole request of one step; returns the tokens it found cached."""
    handle = admit(manager, tokens, namespace)
    manager.publish(handle, len(tokens))
    manager.release(handle, len(tokens), publish=True)
    manager.check()
    return handle.num_cached


def cached(manager: CacheManager, tokens: list[int], namespace: str = "") -> int:
    """Tokens of `tokens` that the cache holds, the last one included."""
    return manager.match(TokenKey([*tokens, -1]), namespace).num_tokens


def hybrid_cache(
    *, page_size: int = 1, num_states: int = 20, kv_bytes: int = 1, grid: int = 1, **options: Any
) -> CacheManager:
    """Full attention of one byte per token and states of 10 bytes; pages are never short."""
    layout = CacheLayout(page_size, kv_bytes, state_bytes=10, grid=grid)
    slots = [1000 * (kv_bytes > 0), num_states]
    size = sum(n * b for n, b in zip(slots, layout.slot_bytes, strict=True))
    return CacheManager(layout, size, num_slots=slots, **{"policy": "lru", "admission": "branch+last", **options})


def run_hybrid(manager: CacheManager, tokens: list[int], namespace: str = "") -> int:
    """A whole request of one step, with all its saves, launched and ended; returns the tokens it found cached."""
    handle = admit(manager, tokens, namespace)
    start, step = handle.num_cached, manager.allocator.newest_launched + 1
    manager.plan_saves(handle, start, len(tokens))
    manager.publish(handle, len(tokens))
    manager.check()
    manager.launched(step)
    manager.collected(step)
    manager.release(handle, len(tokens), publish=True, state_at=len(tokens))
    manager.check()
    return handle.num_cached
