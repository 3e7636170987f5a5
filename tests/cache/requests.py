"""Small steps of requests' lives, for the tests of the manager."""

from __future__ import annotations

from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager


def admit(manager: CacheManager, tokens: list[int], namespace: str = "", num_tokens: int | None = None) -> CacheHandle:
    """Admit a request that must fit, with pages for all its tokens unless told otherwise."""
    handle = manager.admit(TokenKey(tokens), namespace, len(tokens) if num_tokens is None else num_tokens)
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
