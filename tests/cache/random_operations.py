"""Random requests against a CacheManager and the brute-force model, compared after every call."""

from __future__ import annotations

import random
from collections.abc import Callable

from pando.cache.handle import CacheHandle
from pando.cache.key import TokenKey, tokens_to_bytes
from pando.cache.node import Node
from tests.cache.prefix_model import ModelHandle, Prefix, PrefixModel
from tests.cache.requests import full_cache

NAMESPACES = ("", "", "", "adapter")


class Driver:
    """One manager and one model under the same random calls. Raises AssertionError at the first difference."""

    def __init__(self, seed: int, page_size: int, num_pages: int, max_running: int = 5) -> None:
        self.random = random.Random(seed)
        self.page_size = page_size
        self.max_running = max_running
        self.manager = full_cache(num_pages, page_size)
        self.model = PrefixModel(num_pages, page_size)
        self.running: list[tuple[CacheHandle, ModelHandle]] = []
        self.history: list[list[int]] = [[]]
        self.step = 0
        self.num_denied = self.num_swapped = self.num_matched = 0
        actions: list[tuple[Callable[[], None], int]] = [
            (self.admit, 30),
            (self.decode, 24),
            (self.decode_all, 6),
            (self.publish, 16),
            (self.release, 16),
            (self.launch, 8),
            (self.collect, 8),
            (self.look, 6),
        ]
        self._actions = [action for action, weight in actions for _ in range(weight)]

    def run(self, num_operations: int) -> None:
        """That many random calls, each followed by all checks."""
        for index in range(num_operations):
            if index % 331 == 330:
                self.random.choice((self.flush, self.invalidate))()
            else:
                self.random.choice(self._actions)()
            self.compare()

    def drain(self) -> None:
        """End all requests and steps: nothing may be left but the tree."""
        while self.running:
            self.release()
            self.compare()
        self.manager.collected(self.step)
        self.model.collect(self.step)
        self.compare()
        assert self.manager.budget.available_bytes == self.model.num_pages * self.page_size, "pages leaked"

    # -- calls

    def prompt(self) -> list[int]:
        """Tokens that often share a prefix with an earlier prompt or with a finished request."""
        base = self.random.choice(self.history)
        kept = base[: self.random.randint(0, len(base))] if self.random.random() < 0.5 else base
        tokens = kept + [self.random.randrange(3) for _ in range(self.random.randint(0, 4 * self.page_size))]
        tokens = tokens[: 9 * self.page_size] or [1]
        self.history = [*self.history[-15:], tokens]
        return tokens

    def admit(self) -> None:
        """Admit a new request, or be denied for a reason the model shares."""
        if len(self.running) == self.max_running:
            return
        namespace, tokens = self.random.choice(NAMESPACES), self.prompt()
        names = self.model.match(namespace, tokens)
        limit, keep = None, 0
        if self.random.random() < 0.2:
            limit, keep = self.random.randint(0, len(tokens)), self.random.randint(0, 4)
            names = names[: limit // self.page_size]
        cached = len(names) * self.page_size
        needed = self.random.randint(0, len(tokens)) if self.random.random() < 0.5 else len(tokens)
        num_new = self.model.pages_for(needed) - len(names)
        shortfall = self.model.shortfall(num_new, names) + keep
        assert self.manager.match(tokens_to_bytes(tokens), namespace, limit).num_tokens == cached
        handle = self.manager.admit(TokenKey(tokens), namespace, needed, limit=limit, keep=keep)
        if handle.denied:
            assert handle.shortfall_bytes == shortfall * self.page_size > 0
            self.num_denied += 1
            return
        assert shortfall <= 0 and handle.num_cached == cached
        found = [self.model.cached[name] for name in names]
        assert handle.pages[: len(found)].tolist() == found, "matched pages are not those of the prefix"
        ours = ModelHandle(namespace, tokens, found, len(found))
        self.model.handles.append(ours)
        self.model.touch(names)
        self.take(ours, handle.pages[len(found) :].tolist(), num_new)
        self.running.append((handle, ours))
        self.num_matched += cached

    def decode(self) -> None:
        """One request gets a token and room for it."""
        if not self.running:
            return
        handle, ours = self.random.choice(self.running)
        target = len(ours.tokens) if self.random.random() < 0.3 else len(ours.pages) * self.page_size + 1
        target = min(target, len(ours.tokens) + 1)
        num_new = max(0, self.model.pages_for(target) - len(ours.pages))
        shortfall = self.model.shortfall(num_new, [])
        first = len(ours.pages)
        result = self.manager.grow(handle, target)
        if result.denied:
            assert result.shortfall_bytes == shortfall * self.page_size > 0
            self.num_denied += 1
            return
        assert shortfall <= 0 or num_new == 0
        assert [index for _, index, _ in result.writes] == list(range(first, first + max(0, num_new)))
        self.take(ours, [page for _, _, page in result.writes], num_new)
        if target > len(ours.tokens):
            token = self.random.randrange(3)
            ours.tokens = [*ours.tokens, token]
            handle.key.append(token)

    def decode_all(self) -> None:
        """All requests get a token at once, or none does."""
        targets = [len(ours.tokens) + 1 for _, ours in self.running]
        counts = [
            max(0, self.model.pages_for(n) - len(o.pages)) for n, (_, o) in zip(targets, self.running, strict=True)
        ]
        shortfall = self.model.shortfall(sum(counts), [])
        writes = self.manager.grow_many([handle for handle, _ in self.running], targets)
        if writes.denied:
            assert writes.shortfall_bytes == shortfall * self.page_size > 0
            self.num_denied += 1
            return
        assert shortfall <= 0 or not sum(counts)
        self.model.make_room(sum(counts))
        columns = list(zip(writes.row, writes.page_index, writes.page_id, strict=True))
        for row, (handle, ours) in enumerate(self.running):
            mine = [(index, page) for r, index, page in columns if r == row]
            assert [index for index, _ in mine] == list(range(len(ours.pages), len(ours.pages) + counts[row]))
            self.take(ours, [page for _, page in mine], counts[row], room_made=True)
            token = self.random.randrange(3)
            ours.tokens = [*ours.tokens, token]
            handle.key.append(token)

    def take(self, ours: ModelHandle, new: list[int], num_new: int, *, room_made: bool = False) -> None:
        """The model's request gets the pages the manager chose, which must be free in the model."""
        assert len(new) == max(0, num_new)
        if not room_made:
            self.model.make_room(len(new))
        assert not self.model.busy() & set(new), "a page in use was handed out"
        ours.pages.extend(new)

    def num_computable(self, ours: ModelHandle) -> int:
        """Tokens of a request that have pages."""
        return min(len(ours.tokens), len(ours.pages) * self.page_size)

    def publish(self) -> None:
        """Share some more of a request."""
        if self.running:
            handle, ours = self.random.choice(self.running)
            count = self.random.randint(0, self.num_computable(ours))
            swaps = self.model.publish(ours, count)
            got = [(index, page) for _, index, page in self.manager.publish(handle, count)]
            assert sorted(set(got) - set(swaps)) == [] and set(swaps) <= set(got), (got, swaps)
            self.num_swapped += len(swaps)

    def release(self) -> None:
        """Finish, abort or retract a request."""
        if self.running:
            handle, ours = self.running.pop(self.random.randrange(len(self.running)))
            count = self.random.randint(ours.num_shared * self.page_size, max(1, self.num_computable(ours)))
            count = min(count, self.num_computable(ours))
            publish = self.random.random() < 0.7
            if publish:
                self.history = [*self.history[-15:], ours.tokens]
            self.model.release(ours, count, publish)
            self.manager.release(handle, count, publish=publish)

    def launch(self) -> None:
        """A step is launched; at most two are in flight."""
        if self.step - self.model.collected < 2:
            self.step += 1
            self.manager.launched(self.step)
            self.model.launched = self.step

    def collect(self) -> None:
        """The oldest step in flight ends."""
        if self.model.collected < self.model.launched:
            step = max(self.model.collected, 0) + 1
            self.manager.collected(step)
            self.model.collect(step)

    def look(self) -> None:
        """A match changes nothing and twice gives the same."""
        namespace, tokens = self.random.choice(NAMESPACES), self.prompt()
        key = TokenKey(tokens)
        match = self.manager.match(key, namespace)
        assert match.num_tokens == len(self.model.match(namespace, tokens)) * self.page_size
        assert self.manager.match(key, namespace) == match

    def flush(self) -> None:
        """Drop what is not held."""
        self.model.forget(also_locked=False)
        assert self.manager.flush() == (not self.running)

    def invalidate(self) -> None:
        """A step failed."""
        self.model.forget(also_locked=True)
        self.manager.invalidate()

    # -- comparison

    def contents(self) -> dict[Prefix, int]:
        """Every page the tree can match, by its prefix."""
        found: dict[Prefix, int] = {}
        paths: dict[Node | None, bytes] = {None: b""}
        width = self.manager.tree.page_bytes
        for node in self.manager.tree.nodes():
            above = paths[node.parent]
            paths[node] = above + node.key
            for index, page in enumerate(node.records[0].slots.tolist(), 1):
                found[node.namespace, above + node.key[: index * width]] = page
        return found

    def compare(self) -> None:
        """The manager is consistent in itself and equal to the model."""
        self.manager.check()
        assert self.contents() == self.model.cached
        for handle, ours in self.running:
            assert handle.pages.tolist() == ours.pages
            assert handle.num_tree_pages == ours.num_shared
        stats = self.manager.stats()
        assert stats.num_free == self.model.num_free()
        assert stats.num_evictable == len(self.model.cached.keys() - self.model.locked())
        assert stats.evicted_tokens == self.model.num_evicted * self.page_size
        assert stats.num_free + stats.num_quarantined + stats.num_evictable + stats.num_locked == stats.num_pages
