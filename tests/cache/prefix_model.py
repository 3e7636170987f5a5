"""The cache as brute force: a dict of every cached prefix, page by page, with a time each. The oracle of the tests.

It knows no tree. A page is named by its namespace and all tokens up to its end. A hit gives every page it covers a new
time. The victim is the page with the oldest time among those that nobody holds and that no longer prefix needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pando.cache.key import TOKEN_BYTES

Prefix = tuple[str, bytes]


@dataclass(eq=False)
class ModelHandle:
    """A running request: its own copy of what the manager's handle should say."""

    namespace: str
    tokens: list[int]
    pages: list[int]
    num_shared: int
    live: bool = True
    names: list[Prefix] = field(default_factory=list)


@dataclass
class PrefixModel:
    """What the cache must contain after each call. `now` is the model's own clock."""

    num_pages: int
    page_size: int
    cached: dict[Prefix, int] = field(default_factory=dict)
    used: dict[Prefix, int] = field(default_factory=dict)
    handles: list[ModelHandle] = field(default_factory=list)
    quarantine: list[tuple[int, list[int]]] = field(default_factory=list)
    launched: int = -1
    collected: int = -1
    now: int = 0
    num_evicted: int = 0

    def shared(self, handle: ModelHandle) -> list[Prefix]:
        """Names of the pages that a handle shares with the cache."""
        return self.named(handle, handle.num_shared)

    def named(self, handle: ModelHandle, count: int) -> list[Prefix]:
        """Names of the first `count` pages of a handle, made once: tokens only grow."""
        if len(handle.names) < count:
            handle.names = self.prefixes(handle.namespace, handle.tokens, count)
        return handle.names[:count]

    def prefixes(self, namespace: str, tokens: list[int], num_pages: int) -> list[Prefix]:
        """Names of the first `num_pages` pages of `tokens`."""
        data = b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in tokens[: num_pages * self.page_size])
        width = self.page_size * TOKEN_BYTES
        return [(namespace, data[: (i + 1) * width]) for i in range(num_pages)]

    def match(self, namespace: str, tokens: list[int]) -> list[Prefix]:
        """The longest cached prefix that leaves a token to compute."""
        found = []
        for prefix in self.prefixes(namespace, tokens, max(0, len(tokens) - 1) // self.page_size):
            if prefix not in self.cached:
                break
            found.append(prefix)
        return found

    def locked(self) -> set[Prefix]:
        """Cached pages that live handles hold."""
        names: set[Prefix] = set()
        for handle in self.handles:
            if handle.live:
                names.update(self.shared(handle))
        return names

    def busy(self) -> set[int]:
        """Page ids that are not free."""
        pages = set(self.cached.values())
        for handle in self.handles:
            pages.update(handle.pages)
        for _, resting in self.quarantine:
            pages.update(resting)
        return pages

    def num_free(self) -> int:
        """Pages that can be taken now."""
        return self.num_pages - len(self.busy())

    def shortfall(self, num_new: int, to_lock: list[Prefix]) -> int:
        """Pages lacking for `num_new` new ones if `to_lock` may not be evicted; <= 0 if it fits."""
        return max(0, num_new) - self.num_free() - len(self.cached.keys() - self.locked() - set(to_lock))

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def touch(self, names: list[Prefix]) -> None:
        """All these pages were used now."""
        self.now += 1
        self.used.update(dict.fromkeys(names, self.now))

    def make_room(self, num_new: int) -> None:
        """Evict, one page at a time, until `num_new` pages are free."""
        missing = num_new - self.num_free()
        if missing <= 0:
            return
        locked, width = self.locked(), self.page_size * TOKEN_BYTES
        for _ in range(missing):
            inner = {(namespace, data[:-width]) for namespace, data in self.cached}
            victim = min(self.cached.keys() - locked - inner, key=self.used.__getitem__)
            del self.cached[victim], self.used[victim]
            self.num_evicted += 1

    def retire(self, pages: list[int]) -> None:
        """Free pages, now or when the newest launched step is collected."""
        if pages and self.launched > self.collected:
            self.quarantine.append((self.launched, pages))

    def collect(self, step: int) -> None:
        """Step `step` ended."""
        self.collected = step
        self.quarantine = [(tag, pages) for tag, pages in self.quarantine if tag > step]

    def publish(self, handle: ModelHandle, num_tokens: int) -> list[tuple[int, int]]:
        """Share the first full pages of a handle; returns the page swaps it should see."""
        count = num_tokens // self.page_size
        if count <= handle.num_shared or not handle.live:
            return []
        names = self.named(handle, count)
        swaps, duplicates = [], []
        for index in range(handle.num_shared, count):
            page = self.cached.setdefault(names[index], handle.pages[index])
            if page != handle.pages[index]:
                swaps.append((index, page))
                duplicates.append(handle.pages[index])
                handle.pages[index] = page
        handle.num_shared = count
        self.retire(duplicates)
        self.touch(names)
        return swaps

    def release(self, handle: ModelHandle, num_tokens: int, publish: bool) -> None:
        """End a handle."""
        if publish:
            self.publish(handle, num_tokens)
        self.handles.remove(handle)
        if handle.live:
            self.retire(handle.pages[handle.num_shared :])
            self.touch(self.shared(handle))
        else:
            held = {page for other in self.handles for page in other.pages}
            self.retire([page for page in handle.pages if page not in held])

    def forget(self, *, also_locked: bool) -> None:
        """Drop what nobody holds; with `also_locked` the rest can not be matched any more either."""
        locked = self.locked()
        self.retire([page for name, page in self.cached.items() if name not in locked])
        kept = {} if also_locked else {name: page for name, page in self.cached.items() if name in locked}
        self.cached, self.used = kept, {name: self.used[name] for name in kept}
        if also_locked:
            for handle in self.handles:
                handle.live = False
