"""What waiting one step would save: prefixes that requests which read their prompts right now are about to leave."""

from __future__ import annotations

from collections.abc import Iterable

from pando.cache.handle import CacheHandle
from pando.cache.key import TOKEN_BYTES, TokenKey, common_prefix
from pando.cache.manager import CacheManager


def awaited(cache: CacheManager, reading: Iterable[CacheHandle], key: TokenKey, namespace: str, limit: int) -> int:
    """Tokens of `key`, `limit` at most, after which a request could resume once the handles `reading` went on.

    It may be less than what the cache knows already. With recurrent states a request can resume where one is saved,
    from the step after on; without, at any page that a handle will publish.
    """
    page, data = cache.page_size, key.data
    most, width = min(limit, len(key) - 1) // page * page, page * TOKEN_BYTES
    best = 0
    for handle in reading:
        others = handle.key.data
        if handle.namespace != namespace or others[:width] != data[:width] or not handle.node.live:
            continue  # nothing in common, or nothing that it will share: a step failed
        if cache.states is None:
            planned = handle.num_planned // page * width
            if data.startswith(others[: planned + width]):
                stop = min(most, handle.prompt_len) * TOKEN_BYTES
                best = max(best, common_prefix(bytes(others[:stop]), data, 0, stop, width) // TOKEN_BYTES)
            continue
        for position in handle.coming(cache.states.allocator.newest_launched):
            if best < position <= most and data.startswith(others[: position * TOKEN_BYTES]):
                best = position
    return best
