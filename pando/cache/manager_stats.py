"""What the cache says of itself: counts, each derived from who owns which slot at the moment."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pando.cache.handle import CacheHandle, CacheStats, SlotStats
from pando.cache.manager_store import Store


def held_tokens(store: Store, handles: Collection[CacheHandle]) -> int:
    """Tokens whose KV is resident or being planned, in the tree and in handles, each counted once. O(handles).

    Tokens of windows count where a model has no other KV.
    """
    page = store.tree.page_size
    if store.kv.slot_bytes:
        own = sum(min(len(h.key), len(h.pages) * page) - h.num_tree_pages * page for h in handles)
        return store.kv.num_slots * page + own
    if store.window is None:
        return 0
    firsts = ((h, max(h.first_window_page, h.num_window_tree_pages)) for h in handles)
    own = sum(max(0, min(len(h.key), len(h.window_pages) * page) - first * page) for h, first in firsts)
    return store.window.num_slots * page + own


def cache_stats(store: Store, handles: Collection[CacheHandle], evicted: Sequence[int]) -> CacheStats:
    """Counts of this moment; evicted: slots of each component so far. O(handles)."""
    by_component = {}
    for c, gone in zip(store.components, evicted, strict=True):
        space, evictable = c.allocator, c.num_slots - c.num_locked
        by_component[c.name] = SlotStats(space.num_slots, space.num_free, space.num_quarantined, evictable, gone)
    main = store.kv if store.kv.slot_bytes or store.window is None else store.window
    pages = by_component[main.name]
    resting = sum(c.allocator.num_quarantined * c.slot_bytes for c in store.components)
    return CacheStats(
        num_pages=pages.num_slots,
        num_free=pages.num_free,
        num_quarantined=pages.num_quarantined,
        num_evictable=pages.num_evictable,
        num_locked=pages.num_locked,
        num_held_tokens=held_tokens(store, handles),
        num_handles=len(handles),
        evicted_tokens=pages.num_evicted * store.tree.page_size,
        held_bytes=store.budget.used_bytes - resting,
        budget_bytes=store.budget.num_bytes,
        by_component=by_component,
    )
