"""Tests of `pando.cache.invariants`: each kind of damage is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pando.cache.manager import CacheManager
from tests.cache.requests import admit, full_cache, serve


def busy_manager() -> CacheManager:
    """Something of everything: a running request, an evictable branch, an inner node."""
    manager = full_cache(32, 1)
    serve(manager, [1, 2, 3, 4])
    serve(manager, [1, 2, 5, 6])
    manager.publish(admit(manager, [1, 2, 5, 7, 8]), 4)
    manager.check()
    return manager


def lose_a_page(manager: CacheManager) -> None:
    manager.allocator.take_one()


def free_a_page_twice(manager: CacheManager) -> None:
    manager.allocator.put(manager.allocator.take(1) * 2)


def free_a_page_in_use(manager: CacheManager) -> None:
    manager.allocator.put(next(iter(manager.handles)).pages[:1])


def forget_a_lock(manager: CacheManager) -> None:
    manager.kv.unlock(next(iter(manager.handles)).receipt[0])


def lock_twice(manager: CacheManager) -> None:
    manager.kv.lock(next(iter(manager.handles)).node)


def forget_a_handle(manager: CacheManager) -> None:
    manager.handles.clear()


def miscount_slots(manager: CacheManager) -> None:
    manager.kv.num_slots += 1


def miscount_locked(manager: CacheManager) -> None:
    manager.kv.num_locked -= 1


def lose_a_candidate(manager: CacheManager) -> None:
    manager.order.pop()


def offer_a_locked_node(manager: CacheManager) -> None:
    manager.order.add(next(iter(manager.handles)).node.records[0])


def change_a_token(manager: CacheManager) -> None:
    node = next(iter(manager.handles)).node
    node.key = node.key[:-1] + b"\x01"


def change_a_page(manager: CacheManager) -> None:
    handle = next(iter(manager.handles))
    handle.pages[0], handle.pages[4] = handle.pages[4], handle.pages[0]


def mistake_a_depth(manager: CacheManager) -> None:
    list(manager.tree.nodes())[-1].depth += 1


def misplace_a_child(manager: CacheManager) -> None:
    root = manager.tree.roots[""]
    root.children[b"\xff\0\0\0"] = root.children.pop(next(iter(root.children)))


def keep_an_idle_root(manager: CacheManager) -> None:
    manager.tree.root("nobody")


DAMAGES = [
    lose_a_page,
    free_a_page_twice,
    free_a_page_in_use,
    forget_a_lock,
    lock_twice,
    forget_a_handle,
    miscount_slots,
    miscount_locked,
    lose_a_candidate,
    offer_a_locked_node,
    change_a_token,
    change_a_page,
    mistake_a_depth,
    misplace_a_child,
    keep_an_idle_root,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(damage: Callable[[CacheManager], None]) -> None:
    manager = busy_manager()
    damage(manager)
    with pytest.raises(AssertionError):
        manager.check()
