"""Tests of `pando.cache.tree`: structure alone, with the full-attention component to fill it."""

from __future__ import annotations

from array import array

import pytest

from pando.cache.allocator import SlotAllocator
from pando.cache.components import FullKV
from pando.cache.key import TOKEN_BYTES, tokens_from_bytes, tokens_to_bytes
from pando.cache.node import Node, slots_of
from pando.cache.tree import MERGED_KEY_BYTES, RadixTree
from pando.cache.value import EvictionOrder
from pando.cache.value_policies import Lru


def make_tree(page_size: int) -> tuple[RadixTree, FullKV]:
    """An empty tree."""
    kv = FullKV(0, 1, SlotAllocator(0), EvictionOrder(Lru(), 1))
    return RadixTree(page_size, [kv]), kv


def grow(tree: RadixTree, kv: FullKV, parent: Node, tokens: list[int], first_page: int = 0) -> Node:
    """A new leaf with `tokens`, on pages counted from `first_page`."""
    node = tree.attach(parent, tokens_to_bytes(tokens))
    count = len(node.key) // tree.page_bytes
    kv.adopt(node, slots_of(array("i", range(first_page, first_page + count))))
    kv.offer(node)
    return node


def find(tree: RadixTree, tokens: list[int], namespace: str = "") -> tuple[Node | None, int]:
    """Where a query ends, and the tokens matched."""
    data = tokens_to_bytes(tokens)
    stop = len(data) // tree.page_bytes * tree.page_bytes
    node, num_bytes = tree.find(data, stop, namespace)
    return node, num_bytes // TOKEN_BYTES


def shape(tree: RadixTree) -> list[tuple[int, list[int], list[int]]]:
    """Every node as (depth, tokens, pages)."""
    return sorted((n.depth, tokens_from_bytes(n.key), n.records[0].slots.tolist()) for n in tree.nodes())


def test_an_unknown_namespace_matches_nothing_and_is_not_made() -> None:
    tree, _ = make_tree(1)
    assert find(tree, [1, 2]) == (None, 0)
    assert tree.roots == {}


def test_a_match_ends_inside_an_edge() -> None:
    tree, kv = make_tree(1)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4])
    assert find(tree, [1, 2, 9]) == (node, 2)
    assert find(tree, [1, 2, 3, 4, 5]) == (node, 4)
    assert find(tree, [2]) == (tree.roots[""], 0)


def test_a_page_matches_whole_or_not_at_all() -> None:
    tree, kv = make_tree(4)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4, 5, 6, 7, 8])
    assert find(tree, [1, 2, 3, 4, 5, 6, 7, 9]) == (node, 4)
    assert find(tree, [1, 2, 3, 9, 5, 6, 7, 8]) == (tree.roots[""], 0)


def test_split_keeps_the_lower_node_and_divides_pages() -> None:
    tree, kv = make_tree(2)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4, 5, 6], first_page=10)
    upper = tree.split(node, 2 * TOKEN_BYTES)
    assert (upper.depth, node.depth) == (2, 6)
    assert node.parent is upper and upper.parent is tree.roots[""]
    assert list(upper.children.values()) == [node]
    assert shape(tree)[1:] == [(2, [1, 2], [10]), (6, [3, 4, 5, 6], [11, 12])]
    assert [r.node for r in kv.order] == [node], "the leaf stays the candidate"


def test_split_then_merge_is_the_identity() -> None:
    tree, kv = make_tree(1)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4, 5])
    node.hashes = bytes(range(40))
    before, candidates = shape(tree), [id(r) for r in kv.order]
    upper = tree.split(node, 3 * TOKEN_BYTES)
    tree.split(upper, TOKEN_BYTES)
    assert len(shape(tree)) == 4
    tree.merge_upwards(node)
    assert shape(tree) == before
    assert [id(r) for r in kv.order] == candidates
    assert node.hashes == bytes(range(40))
    assert find(tree, [1, 2, 3, 4, 5]) == (node, 5)


def test_merging_keeps_hashes_only_if_all_parts_have_them() -> None:
    tree, kv = make_tree(1)
    upper = grow(tree, kv, tree.root(""), [1, 2])
    upper.hashes = bytes(16)
    lower = grow(tree, kv, upper, [3])
    tree.merge_upwards(lower)
    assert tokens_from_bytes(lower.key) == [1, 2, 3]
    assert lower.hashes is None


def test_merge_stops_at_a_fork_and_at_a_pin() -> None:
    tree, kv = make_tree(1)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4])
    middle = tree.split(node, 2 * TOKEN_BYTES)
    grow(tree, kv, middle, [9])
    tree.merge_upwards(node)
    assert node.parent is middle
    alone = grow(tree, kv, tree.root("b"), [1, 2, 3, 4])
    pinned = tree.split(alone, 2 * TOKEN_BYTES)
    pin = kv.lock(pinned)
    tree.merge_upwards(alone)
    assert alone.parent is pinned
    kv.unlock(pin)
    tree.merge_upwards(alone)
    assert alone.parent is tree.roots["b"]


def test_merge_stops_where_a_later_hit_ended() -> None:
    tree, kv = make_tree(1)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4])
    upper = tree.split(node, 2 * TOKEN_BYTES)
    kv.order.touch(upper)
    tree.merge_upwards(node)
    assert node.parent is upper, "the tail must stay older than what was hit"
    kv.order.touch(node)
    tree.merge_upwards(node)
    assert node.parent is tree.roots[""]


def test_merged_nodes_stay_short_enough_to_cut() -> None:
    tree, kv = make_tree(1)
    count = MERGED_KEY_BYTES // TOKEN_BYTES
    parent = tree.root("")
    for start in range(0, 2 * count, count // 4):
        parent = grow(tree, kv, parent, list(range(start, start + count // 4)), start)
    tree.merge_upwards(parent)
    assert len(parent.key) == MERGED_KEY_BYTES
    assert parent.depth == 2 * count
    assert parent.records[0].slots.tolist() == list(range(count, 2 * count))


def test_trim_shortens_key_depth_and_hashes() -> None:
    tree, kv = make_tree(2)
    node = grow(tree, kv, tree.root(""), [1, 2, 3, 4, 5, 6])
    node.hashes = bytes(range(24))
    kv.trim(node, 1)
    tree.trim(node, 1)
    assert shape(tree)[1:] == [(4, [1, 2, 3, 4], [0, 1])]
    assert node.hashes == bytes(range(16))


def test_siblings_may_not_begin_alike() -> None:
    tree, kv = make_tree(1)
    grow(tree, kv, tree.root(""), [1, 2])
    with pytest.raises(AssertionError, match="same page"):
        tree.attach(tree.root(""), tokens_to_bytes([1, 3]))


def test_an_idle_root_is_forgotten_a_busy_one_kept() -> None:
    tree, kv = make_tree(1)
    root = tree.root("a")
    pin = kv.lock(root)
    tree.drop_root_if_idle(root)
    assert "a" in tree.roots
    kv.unlock(pin)
    tree.drop_root_if_idle(root)
    assert tree.roots == {}
