"""Every fact of the cache, recomputed from scratch and compared. For tests and for `CacheManager.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from pando.cache.allocator import PageAllocator
from pando.cache.components import FullKV
from pando.cache.handle import CacheHandle
from pando.cache.key import TOKEN_BYTES
from pando.cache.node import Node
from pando.cache.tree import RadixTree
from pando.cache.value import EvictionOrder


def check_manager(
    tree: RadixTree, kv: FullKV, order: EvictionOrder, allocator: PageAllocator, handles: Collection[CacheHandle]
) -> None:
    """Assert the invariants of structure, locks, candidates, handles and page ownership."""
    nodes = list(tree.nodes())
    seen = set(nodes)
    nodes.extend(node for node in _dead_nodes(handles) if node not in seen)
    for node in nodes:
        _check_node(node, tree, kv)
    _check_locks(nodes, kv, handles)
    _check_candidates(nodes, kv, order)
    for handle in handles:
        _check_handle(handle, tree, kv)
    _check_pages(nodes, kv, allocator, handles)


def _dead_nodes(handles: Collection[CacheHandle]) -> list[Node]:
    """Invalidated nodes that handles still hold."""
    found: dict[Node, None] = {}
    for handle in handles:
        current: Node | None = handle.node
        while current is not None and not current.live and current not in found:
            found[current] = None
            current = current.parent
    return list(found)


def _check_node(node: Node, tree: RadixTree, kv: FullKV) -> None:
    record = node.records[kv.index]
    assert record.node is node and len(node.records) == len(tree.components)
    assert len(record.slots) * tree.page_bytes == len(node.key), f"{len(record.slots)} pages for {len(node.key)} bytes"
    for first, child in node.children.items():
        assert child.parent is node and child.key[: tree.page_bytes] == first
        assert child.live == node.live and child.namespace == node.namespace
    if node.parent is None:
        assert not node.key and node.depth == 0
        assert (tree.roots.get(node.namespace) is node) == node.live
        assert node.children or record.locks, "an idle root is kept"
        return
    assert node.parent.children[node.key[: tree.page_bytes]] is node
    assert node.key and node.depth == node.parent.depth + len(node.key) // TOKEN_BYTES
    assert node.live or record.locks, "an invalidated node outlives its locks"


def _check_locks(nodes: list[Node], kv: FullKV, handles: Collection[CacheHandle]) -> None:
    pins = Counter(pin.node for handle in handles for pin in handle.receipt if pin.component == kv.index)
    for node in nodes:
        locked_children = sum(child.records[kv.index].locks > 0 for child in node.children.values())
        locks = node.records[kv.index].locks
        assert locks == pins[node] + locked_children, f"{locks} locks, {pins[node]} pins, {locked_children} children"
    locked = sum(len(node.records[kv.index].slots) for node in nodes if node.records[kv.index].locks)
    assert kv.num_locked == locked, (kv.num_locked, locked)


def _check_candidates(nodes: list[Node], kv: FullKV, order: EvictionOrder) -> None:
    expected = {
        id(node.records[kv.index])
        for node in nodes
        if node.live and node.parent is not None and not node.children and not node.records[kv.index].locks
    }
    listed = [id(record) for record in order]
    assert len(listed) == len(order) == len(set(listed)), "a candidate is listed twice"
    assert set(listed) == expected, "candidates are not the unlocked leaves"


def _check_handle(handle: CacheHandle, tree: RadixTree, kv: FullKV) -> None:
    """The tree's part of the handle is its node's path: same tokens, same pages."""
    page_index = handle.num_tree_pages
    assert handle.node.depth * TOKEN_BYTES == page_index * tree.page_bytes
    assert [pin.node for pin in handle.receipt] == [handle.node] * len(tree.components)
    current: Node | None = handle.node
    while current is not None:
        slots = current.records[kv.index].slots
        first = page_index - len(slots)
        assert handle.pages[first:page_index].tobytes() == slots.tobytes(), "handle and tree disagree on pages"
        key = handle.key.data[first * tree.page_bytes : page_index * tree.page_bytes]
        assert key == current.key, "handle and tree disagree on tokens"
        page_index, current = first, current.parent
    assert page_index == 0


def _check_pages(nodes: list[Node], kv: FullKV, allocator: PageAllocator, handles: Collection[CacheHandle]) -> None:
    """Every page has exactly one owner: the free list, the quarantine, a node, or one handle."""
    in_tree = [int(page) for node in nodes for page in node.records[kv.index].slots]
    own = [page for handle in handles for page in handle.pages[handle.num_tree_pages :]]
    idle = allocator.idle_pages()
    assert len(idle) == allocator.num_free + allocator.num_quarantined
    assert sorted(idle + in_tree + own) == list(range(allocator.num_pages)), "a page is lost or has two owners"
    assert kv.num_slots == len(in_tree), (kv.num_slots, len(in_tree))
