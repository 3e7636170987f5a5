"""Every fact of the cache, recomputed from scratch and compared. For tests and for `CacheManager.check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

from pando.cache.components import Component, Pin, num_pages_of
from pando.cache.components_state import Recurrent
from pando.cache.components_window import WindowKV, span
from pando.cache.handle import CacheHandle
from pando.cache.key import TOKEN_BYTES
from pando.cache.manager_store import Store
from pando.cache.node import Node

Unborn = Sequence[tuple[int, tuple[Pin, Pin]]]


def check_manager(store: Store, handles: Collection[CacheHandle], unborn: Unborn) -> None:
    """Assert the invariants of structure, locks, candidates, handles, slot ownership and bytes."""
    nodes = list(store.tree.nodes())
    seen = set(nodes)
    pins = [pin for handle in handles for pin in handle.receipt] + [pin for _, locks in unborn for pin in locks]
    nodes.extend(node for node in _dead_nodes(pins) if node not in seen)
    for node in nodes:
        _check_node(node, store)
    _check_path_locks(nodes, store, pins)
    if store.window is not None:
        _check_window(nodes, store.window, pins)
    if store.states is not None:
        _check_states(nodes, store.states, pins, unborn)
    _check_candidates(nodes, store)
    for handle in handles:
        _check_handle(handle, store)
    for component in store.components:
        guests = store.states.guests.slots() if component is store.states and store.states is not None else []
        _check_slots(nodes, component, handles, guests)
    used = sum((c.allocator.num_slots - c.allocator.num_free) * c.slot_bytes for c in store.components)
    assert used == store.budget.used_bytes <= store.budget.num_bytes, (used, store.budget.num_bytes)


def _dead_nodes(pins: list[Pin]) -> list[Node]:
    """Invalidated nodes that locks still hold."""
    found: dict[Node, None] = {}
    for pin in pins:
        current: Node | None = pin.node
        while current is not None and not current.live and current not in found:
            found[current] = None
            current = current.parent
    return list(found)


def _check_node(node: Node, store: Store) -> None:
    tree, kv = store.tree, store.kv
    record = node.records[kv.index]
    assert [r.component for r in node.records] == [c.index for c in tree.components]
    assert all(r.node is node for r in node.records)
    num_pages = num_pages_of(node, tree.page_size)
    if kv.slot_bytes:
        assert len(record.slots) == num_pages, f"{len(record.slots)} pages for {len(node.key)} bytes"
    for first, child in node.children.items():
        assert child.parent is node and child.key[: tree.page_bytes] == first
        assert child.live == node.live and child.namespace == node.namespace
    if node.parent is None:
        assert not node.key and node.depth == 0
        assert not any(len(r.slots) for r in node.records)
        assert (tree.roots.get(node.namespace) is node) == node.live
        assert node.children or record.locks, "an idle root is kept"
        return
    assert node.parent.children[node.key[: tree.page_bytes]] is node
    assert node.key and node.depth == node.parent.depth + len(node.key) // TOKEN_BYTES
    assert node.live or record.locks, "an invalidated node outlives its locks"
    assert node.children or record.locks or any(len(r.slots) for r in node.records), "a leaf holds nothing"
    if not record.locks:
        assert not any(r.locks for r in node.records), "a record is locked whose path is not"


def _check_path_locks(nodes: list[Node], store: Store, pins: list[Pin]) -> None:
    kv = store.kv
    ends = Counter(pin.node for pin in pins if pin.component == kv.index)
    for node in nodes:
        locked_children = sum(child.records[kv.index].locks > 0 for child in node.children.values())
        locks = node.records[kv.index].locks
        assert locks == ends[node] + locked_children, f"{locks} locks, {ends[node]} pins, {locked_children} children"
    _check_num_locked(nodes, kv)


def _check_num_locked(nodes: list[Node], component: Component) -> None:
    records = [node.records[component.index] for node in nodes]
    locked = sum(len(record.slots) for record in records if record.locks)
    assert component.num_locked == locked, (component.name, component.num_locked, locked)


def _check_window(nodes: list[Node], window: WindowKV, pins: list[Pin]) -> None:
    """Locks are the pins over a node; what is held is a suffix of the edge."""
    locks: Counter[Node] = Counter()
    for pin in pins:
        if pin.component == window.index:
            nodes_under = list(span(pin))
            locks.update(nodes_under)
            assert pin.start == pin.node.depth or nodes_under[-1].start == pin.start, "a lock begins inside an edge"
            assert all(len(n.records[window.index].slots) == num_pages_of(n, window.page_size) for n in nodes_under)
    for node in nodes:
        record = node.records[window.index]
        assert record.locks == locks[node], (record.locks, locks[node])
        assert len(record.slots) <= num_pages_of(node, window.page_size)
    _check_num_locked(nodes, window)


def _check_states(nodes: list[Node], states: Recurrent, pins: list[Pin], unborn: Unborn) -> None:
    locks = Counter(pin.node for pin in pins if pin.component == states.index)
    for node in nodes:
        record = node.records[states.index]
        assert record.locks == locks[node] and len(record.slots) <= 1, (record.locks, locks[node])
        assert all(node.start < position <= node.depth for position, _ in states.guests.of(node))
        at_end = any(position == node.depth for position, _ in states.guests.of(node))
        assert not (at_end and len(record.slots)), "a guest where there is a state"
    assert all(pin.node.depth == pin.start for pin in pins if pin.component == states.index)
    assert len(states.guests.slots()) == sum(len(states.guests.of(node)) for node in nodes), "a guest of a lost node"
    assert states.planned == {locks[0].node.records[states.index] for _, locks in unborn}
    _check_num_locked(nodes, states)


def _check_candidates(nodes: list[Node], store: Store) -> None:
    expected = {
        id(record)
        for node in nodes
        if node.live and node.parent is not None
        for record in node.records
        if len(record.slots) and not record.locks and not (record.component == store.kv.index and node.children)
    }
    listed = [id(record) for record in store.order]
    assert len(listed) == len(store.order) == len(set(listed)), "a candidate is listed twice"
    assert set(listed) == expected, "candidates are not what may be evicted"


def _check_handle(handle: CacheHandle, store: Store) -> None:
    """The tree's part of the handle is its node's path: same tokens, same pages."""
    tree, kv = store.tree, store.kv
    page_index = handle.num_tree_pages
    assert handle.node.depth * TOKEN_BYTES == page_index * tree.page_bytes
    assert handle.receipt[0] == Pin(kv.index, handle.node, 0)
    current: Node | None = handle.node
    while current is not None:
        slots = current.records[kv.index].slots
        first = page_index - num_pages_of(current, tree.page_size)
        if kv.slot_bytes:
            assert handle.pages[first:page_index].tobytes() == slots.tobytes(), "handle and tree disagree on pages"
        key = handle.key.data[first * tree.page_bytes : page_index * tree.page_bytes]
        assert key == current.key, "handle and tree disagree on tokens"
        page_index, current = first, current.parent
    assert page_index == 0
    if store.window is not None:
        _check_window_pages(handle, store.window)


def _check_window_pages(handle: CacheHandle, window: WindowKV) -> None:
    """What the handle sees of the tree's window pages is locked and the tree's; what it does not see is -1."""
    pin, first, pages = handle.receipt[1], handle.first_window_page, handle.window_pages
    assert all(page == -1 for page in pages[:first]) and all(page >= 0 for page in pages[first:])
    held = window.pages_under(pin)
    end = pin.node.depth // window.page_size
    assert end <= handle.num_window_tree_pages
    assert pages[max(first, end - len(held)) : end].tobytes() == held[len(held) - max(0, end - first) :].tobytes()
    if handle.node.live:
        assert end == handle.num_window_tree_pages and len(held) == max(0, end - first)


def _own_slots(handle: CacheHandle, name: str) -> list[int]:
    if name == "full":
        return handle.pages[handle.num_tree_pages :].tolist()
    if name == "window":
        return handle.window_pages[max(handle.num_window_tree_pages, handle.first_window_page) :].tolist()
    saved = [slot for _, slot, _ in handle.saves]
    return [slot for slot in (handle.state, handle.spare, handle.scratch, handle.guest[1], *saved) if slot >= 0]


def _check_slots(nodes: list[Node], component: Component, handles: Collection[CacheHandle], guests: list[int]) -> None:
    """Every slot has exactly one owner: the free list, the quarantine, a node, or one handle."""
    in_tree = [int(slot) for node in nodes for slot in node.records[component.index].slots] + guests
    own = list(chain.from_iterable(_own_slots(handle, component.name) for handle in handles))
    allocator = component.allocator
    idle = allocator.idle_slots()
    assert len(idle) == allocator.num_free + allocator.num_quarantined
    lost = f"a {component.name} slot is lost or has two owners"
    assert sorted(idle + in_tree + own) == list(range(allocator.num_slots)), lost
    assert component.num_slots == len(in_tree), (component.name, component.num_slots, len(in_tree))
