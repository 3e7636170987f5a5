"""Random traffic through a CacheManager with any mix of components, on a device that checks what it reads.

Beside the device's checks, after every call: all invariants; the match of a query equals what brute force finds in the
list of all that is cached, without a tree; nothing vanishes that was not counted as evicted; nothing cached ever moves;
every victim is the least valuable candidate; a denial changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pando.cache.budget import CacheLayout
from pando.cache.key import TOKEN_BYTES, TokenKey, tokens_to_bytes
from pando.cache.manager import CacheManager
from pando.cache.node import Node, Record
from tests.cache.fake_device import FakeDevice, Row, Sequence

NAMESPACES = ("", "", "", "adapter")
STATE_BYTES = 24
Item = tuple[str, str, bytes]
"""(component, namespace, tokens up to and with it): one page, or one state."""


MIXES = ("full", "full+window", "full+state", "full+window+state", "state")
PAGE_SIZES = (1, 4, 16)
POLICIES = ("reuse", "lru", "gdsf:0.25", "lru_leaf", "marconi:0.5")
ADMISSIONS = ("branch+last+room", "branch+last", "last+room", "every:5", "last", "branch", "every:7+branch+last")


class Quadratic:
    """Arithmetic of a model with attention."""

    def flops(self, num_tokens: int) -> float:
        """Linear and quadratic parts of comparable size."""
        return 1e6 * num_tokens + 1e5 * num_tokens**2


@dataclass(frozen=True)
class Setup:
    """One configuration under test."""

    mix: str
    page_size: int
    policy: str
    admission: str = "branch+last"
    num_tokens: int = 120
    num_states: int = 8
    window: int = 10
    grid: int = 1
    id_bound: bool = False
    sharing: bool = True

    def cache(self) -> CacheManager:
        """Its cache: budgets of a few requests."""
        page, parts = self.page_size, self.mix.split("+")
        layout = CacheLayout(
            page,
            kv_bytes_per_token=2 if "full" in parts else 0,
            window=self.window if "window" in parts else 0,
            window_bytes_per_token=1 if "window" in parts else 0,
            state_bytes=STATE_BYTES if "state" in parts else 0,
            grid=self.grid,
        )
        pages = max(6, self.num_tokens // page)
        counts = [pages * ("full" in parts), pages, self.num_states]
        sizes = layout.slot_bytes
        slots = counts[:1] + counts[1:2] * ("window" in parts) + counts[2:] * ("state" in parts)
        budget = sum(n * size for n, size in zip(slots, sizes, strict=True))
        return CacheManager(
            layout,
            budget,
            num_slots=slots if self.id_bound else None,
            policy=self.policy,
            admission=self.admission,
            profile=Quadratic(),
            sharing=self.sharing,
        )


def setup_of(seed: int) -> Setup:
    """A configuration for each seed: all mixes, page sizes and policies in turn, the rest by chance."""
    draw = random.Random(seed)
    page = PAGE_SIZES[seed // len(MIXES) % len(PAGE_SIZES)]
    return Setup(
        MIXES[seed % len(MIXES)],
        page,
        POLICIES[seed // (len(MIXES) * len(PAGE_SIZES)) % len(POLICIES)],
        admission=draw.choice(ADMISSIONS),
        num_tokens=draw.choice((60, 120, 240)) * (3 if page == 16 else 1),
        num_states=draw.choice((3, 8, 20)),
        window=draw.choice((3, 10, 40)),
        grid=draw.choice((1, 1, 1, 3)),
        id_bound=draw.random() < 0.4,
        sharing=draw.random() < 0.95,
    )


class Traffic:
    """One cache and one device under random requests. Raises AssertionError at the first mistake."""

    def __init__(self, seed: int, setup: Setup) -> None:
        self.random = random.Random(seed)
        self.setup = setup
        self.parts = setup.mix.split("+")
        self.cache = setup.cache()
        self.device = FakeDevice(self.cache)
        self.running: list[Sequence] = []
        self.history: list[list[int]] = [[]]
        self.step = self.collected = -1
        self.longest = random.Random(seed).choice((None, 5, 20))
        """Tokens of the longest step, if requests ask for window pages step by step."""
        self.num_hits = self.num_denied = self.num_branches = self.num_victims = 0
        self.paths: set[Item] = set()
        self.cached: dict[Item, int] = {}
        self._num_evicted = 0
        self._watch_victims()
        actions: list[tuple[Callable[[], None], int]] = [(self.admit, 30), (self.launch, 40), (self.collect, 40)]
        actions += [(self.end, 14), (self.look, 4)]
        self._actions = [action for action, weight in actions for _ in range(weight)]

    def run(self, num_operations: int) -> None:
        """That many random calls, each followed by all checks."""
        for index in range(num_operations):
            if index % 331 == 330:
                self.random.choice((self.flush, self.fail, self.drain))()
            else:
                self.random.choice(self._actions)()
            self.compare()

    def drain(self) -> None:
        """End all requests and steps: nothing is left but what can be evicted."""
        while self.device.in_flight:
            self.collect()
        while self.running:
            self.end()
        cache = self.cache
        cache.check()
        assert cache.budget.used_bytes == cache.budget.evictable_bytes, "something leaked"
        assert cache.budget.available_bytes == min(cache.budget.num_bytes, self._space()), "something leaked"

    # -- calls

    def prompt(self) -> list[int]:
        """Tokens that often share a prefix with an earlier prompt or with a finished request."""
        base = self.random.choice(self.history)
        kept = base[: self.random.randint(0, len(base))] if self.random.random() < 0.5 else base
        page = min(self.setup.page_size, 6)
        tokens = kept + [self.random.randrange(3) for _ in range(self.random.randint(0, 4 * page))]
        tokens = tokens[: self.setup.num_tokens // 3] or [1]
        self.history = [*self.history[-15:], tokens]
        return tokens

    def admit(self) -> None:
        """Admit a new request, or be denied."""
        if len(self.running) == 5:
            return
        namespace, tokens = self.random.choice(NAMESPACES), self.prompt()
        keep = self.random.randint(0, 2) if self.random.random() < 0.2 else 0
        idle = not self.running and not self.device.in_flight
        before = self.cache.stats()
        handle = self.cache.admit(TokenKey(tokens), namespace, len(tokens), keep=keep, step=self.longest)
        if handle.denied:
            assert handle.shortfall_bytes > 0 and self.cache.stats() == before, "a denial changed something"
            assert not idle or keep or self._too_large(len(tokens)), "an idle cache denies what fits"
            self.num_denied += 1
            return
        limit = len(tokens) + self.random.randint(0, 12)
        self.running.append(Sequence(handle, namespace, list(tokens), limit, handle.num_cached))
        self.num_hits += handle.num_cached > 0
        self.num_branches += handle.num_matched > handle.num_cached

    def launch(self) -> None:
        """Plan a step of some of the running requests and launch it; at most two are in flight."""
        if len(self.device.in_flight) == 2:
            return
        rows = []
        for sequence in self.random.sample(self.running, len(self.running)):
            if self.random.random() < 0.8:
                row = self._plan(sequence)
                rows += [row] if row else []
        self.step += 1
        self.cache.launched(self.step)
        self.device.in_flight.append(rows)

    def _plan(self, sequence: Sequence) -> Row | None:
        """A chunk of the prompt, or one token."""
        known = len(sequence.tokens)
        to_run = known + sequence.pending - sequence.planned
        if to_run <= 0:
            return None
        start = sequence.planned
        if to_run == 1:
            if self.random.random() < 0.5:
                denied = self.cache.grow(sequence.handle, start + 1).denied
            else:
                denied = self.cache.grow_many([sequence.handle], [start + 1]).denied
            if denied:
                self._release(sequence, publish=True)
                return None
            end = start + 1
        else:
            end = start + self.random.randint(1, min(to_run, self.longest or to_run))
            if self.longest is not None:
                if self.random.random() < 0.8:
                    self.cache.publish(sequence.handle, min(start, known), start)
                if self.cache.grow(sequence.handle, end, start).denied:
                    self._release(sequence, publish=True)
                    return None
        saves = self.cache.plan_saves(sequence.handle, start, end)
        if to_run > 1:
            self.cache.publish(sequence.handle, end)
        sequence.planned = end
        emits = end == known + sequence.pending and end < sequence.limit
        sequence.pending += emits
        handle, first = sequence.handle, not sequence.started
        sequence.started = True
        pages, windows = handle.pages.tolist(), handle.window_pages.tolist()
        restore = handle.restore if first and handle.state >= 0 else None
        return Row(
            sequence,
            start,
            end,
            emits,
            pages,
            windows,
            handle.state,
            restore,
            saves,
        )

    def collect(self) -> None:
        """The oldest step in flight ends."""
        if self.device.in_flight:
            self.device.run_oldest(self.random.randrange(3))
            self.collected += 1
            self.cache.collected(self.collected)

    def end(self) -> None:
        """Finish, abort or retract a request."""
        if self.running:
            sequence = self.random.choice(self.running)
            self._release(sequence, publish=self.random.random() < 0.8)

    def _release(self, sequence: Sequence, *, publish: bool) -> None:
        self.running.remove(sequence)
        sequence.ended = True
        num_tokens = min(sequence.planned, len(sequence.tokens))
        if publish:
            self.history = [*self.history[-15:], list(sequence.tokens)]
        self.cache.release(sequence.handle, num_tokens, publish=publish, state_at=sequence.planned)

    def look(self) -> None:
        """The match of a query is what brute force finds, and asking changes nothing."""
        namespace, tokens = self.random.choice(NAMESPACES), self.prompt()
        match = self.cache.match(TokenKey(tokens), namespace)
        assert (match.num_tokens, match.num_matched) == self._brute_match(namespace, tokens)
        assert self.cache.match(TokenKey(tokens), namespace) == match

    def serve(self, tokens: list[int]) -> int:
        """A whole request in one call; returns the tokens it found cached."""
        handle = self.cache.admit(TokenKey(tokens), "", len(tokens))
        assert not handle.denied
        self.cache.publish(handle, len(tokens))
        self.cache.release(handle, len(tokens), publish=True)
        return handle.num_cached

    def flush(self) -> None:
        """Drop what is not held."""
        assert self.cache.flush() == (not self.running)
        self.cached = self.contents()

    def fail(self) -> None:
        """A step failed: all in flight is lost, and with it everything cached."""
        self.device.in_flight.clear()
        self.collected = self.step
        self.cache.collected(self.step)
        for sequence in list(self.running):
            self.running.remove(sequence)
            sequence.ended = True
            self.cache.release(sequence.handle, 0, publish=False, state_at=sequence.planned)
        self.cache.invalidate()
        self.cached = {}

    # -- comparison

    def compare(self) -> None:
        """The cache is consistent; what it lost was evicted, and nothing moved."""
        self.cache.check()
        now, before = self.contents(), self.cached
        gone = sum(item not in now or now[item] != slot for item, slot in before.items())
        evicted = sum(self.cache.eviction.evicted)
        assert gone <= evicted - self._num_evicted, "something vanished or moved"
        self._num_evicted = evicted
        self.cached = now
        if self.random.random() < 0.3:
            self.look()

    def contents(self) -> dict[Item, int]:
        """Every page and state in the tree, by the tokens it stands for."""
        found: dict[Item, int] = {}
        paths: dict[Node | None, bytes] = {None: b""}
        width = self.cache.tree.page_bytes
        self.paths.clear()
        for node in self.cache.tree.nodes():
            data = paths[node] = paths[node.parent] + node.key
            self.paths.update(
                ("path", node.namespace, data[:end]) for end in range(len(data), len(data) - len(node.key), -width)
            )
            for component in self.cache.components:
                slots = node.records[component.index].slots.tolist()
                for offset, slot in enumerate(reversed(slots)):
                    found[component.name, node.namespace, data[: len(data) - offset * width]] = slot
            if self.cache.states is not None:
                for position, slot in self.cache.states.guests.of(node):
                    found["state", node.namespace, data[: position * TOKEN_BYTES]] = slot
        return found

    def _brute_match(self, namespace: str, tokens: list[int]) -> tuple[int, int]:
        """(usable, matched) by their definitions."""
        cached, page, data = self.contents(), self.setup.page_size, tokens_to_bytes(tokens)
        prefixes = [data[: (i + 1) * page * TOKEN_BYTES] for i in range((len(tokens) - 1) // page)]
        matched = next((i for i, p in enumerate(prefixes) if ("path", namespace, p) not in self.paths), len(prefixes))
        unborn = self._unborn()
        for usable in range(matched, 0, -1):
            first = max(0, usable * page - self.setup.window) // page
            windows = [("window", namespace, prefix) for prefix in prefixes[first:usable]]
            state = ("state", namespace, prefixes[usable - 1])
            if "window" in self.parts and not all(item in cached for item in windows):
                continue
            if "state" not in self.parts or (state in cached and state not in unborn):
                return usable * page, matched * page
        return 0, matched * page

    def _unborn(self) -> set[Item]:
        """States whose step was not launched yet."""
        found: set[Item] = set()
        for _, (pin, _) in self.cache.insertion.unborn:
            path, node = b"", pin.node
            while node.parent is not None:
                path, node = node.key + path, node.parent
            found.add(("state", node.namespace, path))
        return found

    def _too_large(self, num_tokens: int) -> bool:
        """The request can not fit even alone."""
        cache, pages = self.cache, -(-num_tokens // self.setup.page_size)
        need = []
        for component in cache.components:
            count = pages if component.name != "state" else 1 + (self.setup.page_size > 1)
            need.append(count if component.slot_bytes else 0)
        if any(n > c.allocator.num_slots for n, c in zip(need, cache.components, strict=True)):
            return True
        return sum(n * c.slot_bytes for n, c in zip(need, cache.components, strict=True)) > cache.budget.num_bytes

    def _space(self) -> int:
        return sum(c.allocator.num_slots * c.slot_bytes for c in self.cache.components)

    def _watch_victims(self) -> None:
        """Every victim has the lowest tier and score of all candidates, found by looking at each."""
        order, pop = self.cache.order, self.cache.order.pop_below

        def watched(worth: float, component: int | None = None) -> Record | None:
            stamped = {id(r): order.score(r) for r in order}
            lowest = min((order.score(r) for r in order if component in (None, r.component)), default=None)
            record = pop(worth, component)
            if record is not None and not order.policy.looks_at_all:
                assert stamped[id(record)] == lowest, (stamped[id(record)], lowest)
                self.num_victims += 1
            return record

        order.pop_below = watched  # type: ignore[method-assign]
