"""Prefix caching of a hybrid model, as plainly as it can be said: the oracle of the simulator's tests.

Nothing of pando.cache is used. Requests run one after the other. A node holds an edge's tokens, and perhaps the
recurrent state at its end. A prompt resumes at the deepest state on its path; where its path leaves the tree a state is
kept, and one after its last token. Then whole nodes go, least recently used first, until the bytes fit.

Two rules show only where a few requests fill the budget. Of the states on a request's path the one it resumes from and
those it leaves are spared, older ones are not. And where the pages alone are too many no state goes in vain: leaves do.
"""

from __future__ import annotations

from collections.abc import Iterable

KV_BYTES, STATE_BYTES = 65_536, 26_787_840


class Node:
    """An edge and what is at its end."""

    def __init__(self, parent: Node | None, tokens: list[int], depth: int, time: int) -> None:
        self.parent, self.tokens, self.depth, self.time = parent, tokens, depth, time
        self.children: dict[int, Node] = {}
        self.state = False

    def path(self) -> list[Node]:
        """This node and those above it."""
        return [self, *(self.parent.path() if self.parent else [])]


class ReferenceCache:
    """leaves_only: evict leaves only; otherwise nodes with one child give up their states, too.

    spares_path: spare every state on the path of the request, too.
    """

    def __init__(self, budget: float, *, leaves_only: bool, spares_path: bool = False) -> None:
        self.budget, self.leaves_only, self.spares_path = budget, leaves_only, spares_path
        self.root = Node(None, [], 0, 0)
        self.nodes: list[Node] = []
        self.used = self.time = 0

    def serve(self, prompt: list[int], output: list[int]) -> int:
        """Run one request; returns the tokens of its prompt that were cached."""
        end, matched = self._walk(prompt, split=False)
        resume = next((node for node in end.path() if node.state), self.root)
        self._touch(resume)
        whole = prompt + output
        end, known = self._walk(whole, split=True)
        used = [resume]
        if matched > resume.depth:
            used.append(next(node for node in end.path() if node.depth == matched))
            self._keep_state(used[-1])
        if known < len(whole):
            leaf = Node(end, whole[known:], len(whole), 0)
            end.children[whole[known]] = leaf
            self.nodes.append(leaf)
            self.used += KV_BYTES * len(leaf.tokens)
            end = leaf
        self._keep_state(end)
        self._evict(protected=end.path() if self.spares_path else [*used, end])
        self._evict(protected=[])
        return resume.depth

    def _walk(self, tokens: list[int], *, split: bool) -> tuple[Node, int]:
        """The last node wholly on the path, cut there if asked, and the number of tokens known."""
        node, at = self.root, 0
        while at < len(tokens) and tokens[at] in node.children:
            child = node.children[tokens[at]]
            pairs = zip(child.tokens, tokens[at:], strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(child.tokens), len(tokens) - at))
            at += common
            if common < len(child.tokens):
                return (self._split(child, common), at) if split else (node, at)
            node = child
        return node, at

    def _split(self, lower: Node, count: int) -> Node:
        parent = lower.parent
        assert parent is not None
        upper = Node(parent, lower.tokens[:count], lower.depth - len(lower.tokens) + count, lower.time)
        parent.children[upper.tokens[0]] = upper
        lower.tokens, lower.parent = lower.tokens[count:], upper
        upper.children[lower.tokens[0]] = lower
        self.nodes.append(upper)
        return upper

    def _touch(self, node: Node) -> None:
        self.time += 1
        node.time = self.time

    def _keep_state(self, node: Node) -> None:
        self.used += 0 if node.state else STATE_BYTES
        node.state = True
        self._touch(node)

    def _evict(self, protected: Iterable[Node]) -> None:
        kept = set(protected)
        while self.used > self.budget:
            too_many_pages = sum(len(node.tokens) for node in self.nodes) > self.budget // KV_BYTES
            goes = (lambda node: not node.children) if too_many_pages else self._may_go
            candidates = [node for node in self.nodes if node not in kept and goes(node)]
            if not candidates:
                return
            self._remove(min(candidates, key=lambda node: node.time))

    def _may_go(self, node: Node) -> bool:
        return not node.children or (not self.leaves_only and len(node.children) == 1 and node.state)

    def _remove(self, node: Node) -> None:
        self.used -= STATE_BYTES if node.state else 0
        node.state = False
        if node.children:
            self._merge(node)
            return
        self.used -= KV_BYTES * len(node.tokens)
        self.nodes.remove(node)
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[0]]
        if parent.parent is not None and not parent.state and len(parent.children) == 1:
            self._merge(parent)

    def _merge(self, node: Node) -> None:
        (child,) = node.children.values()
        child.tokens, child.parent = node.tokens + child.tokens, node.parent
        assert node.parent is not None
        node.parent.children[child.tokens[0]] = child
        self.nodes.remove(node)


def hit_rate(requests: Iterable[tuple[list[int], list[int]]], budget: float, *, leaves_only: bool) -> float:
    """Share of prompt tokens that were cached."""
    cache, hits, total = ReferenceCache(budget, leaves_only=leaves_only), 0, 0
    for prompt, output in requests:
        hits += cache.serve(prompt, output)
        total += len(prompt)
    return hits / total
