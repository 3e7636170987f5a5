"""The radix tree: structure only. What nodes hold, and when it may go, is the components' business.

root(namespace)            each namespace has a root of its own: two namespaces share nothing
  |  key: pages 0..2       an edge carries whole pages; siblings differ in their first page
  node (depth 3 pages)
  |            |
  node         node        a leaf without records is removed at once
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pando.cache.components import Component
from pando.cache.key import TOKEN_BYTES, common_prefix
from pando.cache.node import Node, Record

MERGED_KEY_BYTES = 65536
"""By default nodes are merged up to this key length, so that cutting the tail of one copies little."""


class RadixTree:
    """Token prefixes by namespace, at page granularity. Depth is bounded by nothing, so nothing here recurses."""

    def __init__(
        self, page_size: int, components: Sequence[Component], merged_key_bytes: int = MERGED_KEY_BYTES
    ) -> None:
        self.page_size = page_size
        self.page_bytes = page_size * TOKEN_BYTES
        self.components = components
        self.roots: dict[str, Node] = {}
        self._merged_key_bytes = merged_key_bytes
        self._num_ids = 0

    def find(self, data: bytes | bytearray, stop: int, namespace: str) -> tuple[Node | None, int]:
        """The node in which the longest match of data[:stop] ends, and the bytes matched. Changes nothing.

        The match may end inside the node's edge; it never goes on below an edge that matched only in part.
        """
        node = self.roots.get(namespace)
        if node is None:
            return None, 0
        page_bytes, start = self.page_bytes, 0
        while start < stop:
            child = node.children.get(bytes(data[start : start + page_bytes]))
            if child is None:
                break
            node, key = child, child.key
            end = start + len(key)
            if end > stop or not data.startswith(key, start):
                return node, start + common_prefix(key, data, start, stop, page_bytes)
            start = end
        return node, start

    def root(self, namespace: str) -> Node:
        """The namespace's root, made if there is none."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = self._new_node(None, b"", 0, namespace)
        return root

    def attach(self, parent: Node, key: bytes) -> Node:
        """A new leaf below `parent`, with empty records."""
        assert key and len(key) % self.page_bytes == 0, f"edge of {len(key)} bytes, pages of {self.page_bytes}"
        assert key[: self.page_bytes] not in parent.children, "a sibling begins with the same page"
        node = self._new_node(parent, key, parent.depth + len(key) // TOKEN_BYTES, parent.namespace)
        parent.children[key[: self.page_bytes]] = node
        return node

    def split(self, node: Node, num_bytes: int) -> Node:
        """Cut `node`'s edge after `num_bytes`; returns the new upper node. `node` stays the lower one, with its id."""
        parent, key, page_bytes = node.parent, node.key, self.page_bytes
        assert node.live, "what was invalidated is found by nobody, so nobody splits it"
        assert parent is not None and 0 < num_bytes < len(key) and num_bytes % page_bytes == 0, (num_bytes, len(key))
        upper = self._new_node(parent, key[:num_bytes], parent.depth + num_bytes // TOKEN_BYTES, node.namespace)
        upper.children[key[num_bytes : num_bytes + page_bytes]] = node
        parent.children[key[:page_bytes]] = upper
        upper.last_use = node.last_use
        node.parent, node.key = upper, key[num_bytes:]
        num_pages = num_bytes // page_bytes
        for component in self.components:
            component.split(upper, node, num_pages)
        if node.hashes is not None:
            width = len(node.hashes) // (len(key) // page_bytes)
            upper.hashes, node.hashes = node.hashes[: num_pages * width], node.hashes[num_pages * width :]
        return upper

    def cut_at(self, node: Node, num_tokens: int) -> Node:
        """The node on the path to `node` that ends after `num_tokens` tokens; split off if they end inside an edge."""
        if node.depth == num_tokens:
            return node
        parent = node.parent
        while parent is not None and parent.depth >= num_tokens:
            node, parent = parent, parent.parent
        if node.depth == num_tokens:
            return node
        return self.split(node, (num_tokens - node.start) * TOKEN_BYTES)

    def merge_upwards(self, node: Node) -> None:
        """Dissolve the only-child chain above `node` into it, as far as every component allows. Undoes `split`."""
        path, size = [node], len(node.key)
        while (upper := path[-1].parent) is not None and upper.parent is not None and len(upper.children) == 1:
            size += len(upper.key)
            if size > self._merged_key_bytes or not all(c.can_merge(upper, path[-1]) for c in self.components):
                break
            path.append(upper)
        if len(path) == 1:
            return
        path.reverse()
        for component in self.components:
            component.merge(path)
        hashes = [part.hashes for part in path]
        node.hashes = None if None in hashes else b"".join(part for part in hashes if part is not None)
        node.key = b"".join([part.key for part in path])
        node.parent = path[0].parent
        assert node.parent is not None
        node.parent.children[node.key[: self.page_bytes]] = node

    def trim(self, node: Node, num_pages: int) -> None:
        """Shorten the leaf `node` by its last pages."""
        assert not node.children and node.parent is not None
        kept = len(node.key) // self.page_bytes - num_pages
        if node.hashes is not None:
            node.hashes = node.hashes[: len(node.hashes) // (kept + num_pages) * kept]
        node.key = node.key[: kept * self.page_bytes]
        node.depth = node.parent.depth + len(node.key) // TOKEN_BYTES

    def detach(self, node: Node) -> Node:
        """Remove the leaf `node`; returns its parent, which may be a leaf now."""
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.key[: self.page_bytes]]
        return parent

    def drop_root_if_idle(self, root: Node) -> None:
        """Forget a root that nothing holds: namespaces are chosen by users and must not pile up."""
        if not root.children and not any(record.locks for record in root.records):
            if self.roots.get(root.namespace) is root:
                del self.roots[root.namespace]

    def nodes(self) -> Iterator[Node]:
        """Every node that can be matched, roots included, parents before children."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _new_node(self, parent: Node | None, key: bytes, depth: int, namespace: str) -> Node:
        self._num_ids += 1
        node = Node(self._num_ids, parent, key, depth, namespace)
        node.records = [Record(node, component.index) for component in self.components]
        return node
