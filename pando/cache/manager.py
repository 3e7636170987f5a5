"""CacheManager: what the scheduler calls. Matches prefixes, reserves pages and states, publishes what was computed.

    match -> admit -> [ grow -> plan_saves -> publish ]* -> release      launched(step), collected(step) around steps

`publish` is called when the step that computes the tokens is planned. That is sound because steps run in order on the
device and store their KV before they attend: whoever matches those pages runs later. For the same reason an evicted
slot can be handed out at once: the steps that still read it run before the one that writes it anew. Slots that a
request frees itself may still be written by a launched step, so they go through the allocator's quarantine. A state
that a step saves is copied by whoever resumes there before a step runs, so it can be found once its step was launched.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial

from pando.cache.admission import CheckpointPolicy, checkpoints_of
from pando.cache.budget import CacheLayout
from pando.cache.components import Pin, Receipt
from pando.cache.components_window import WindowKV
from pando.cache.handle import (
    CacheHandle,
    CacheStats,
    Denied,
    GrowResult,
    PageWrite,
    PageWrites,
    PrefixMatch,
)
from pando.cache.invariants import check_manager
from pando.cache.key import TOKEN_BYTES, TokenKey
from pando.cache.manager_eviction import Eviction
from pando.cache.manager_insert import Insertion, forget
from pando.cache.manager_stats import cache_stats, held_tokens
from pando.cache.manager_store import Store
from pando.cache.node import Node, pages_of
from pando.cache.spec import FULL, WINDOW
from pando.cache.tuner import CANDIDATES, TUNED, Tuning
from pando.cache.value import Policy
from pando.cache.value_flops import FlopProfile, LinearProfile

_NO_GROWTH = GrowResult([])

DEFAULT_POLICY = "reuse"
DEFAULT_ADMISSION = "branch+last+room"


class CacheManager:
    """The prefix cache of one replica, on host integers. Not thread-safe: one scheduler owns it.

    layout: what the model keeps. budget_bytes: what all of it may take. num_slots: the id spaces (pages of full
    attention, window pages, states; those the layout has, in this order), by default as many as the budget holds.
    policy, admission: a name (`POLICY_NAMES`, `ADMISSION_NAMES`) or an object. profile: the model's arithmetic.
    sharing=False matches and publishes nothing. `tuning`: what chooses the policy, if that is "tuned".
    """

    def __init__(
        self,
        layout: CacheLayout,
        budget_bytes: int,
        *,
        num_slots: Sequence[int] | None = None,
        policy: str | Policy = DEFAULT_POLICY,
        admission: str | CheckpointPolicy = DEFAULT_ADMISSION,
        profile: FlopProfile | None = None,
        sharing: bool = True,
    ) -> None:
        self.page_size = layout.page_size
        self.page_bytes = sum(layout.slot_bytes[:2] if layout.window else layout.slot_bytes[:1])
        self.sharing = sharing
        if num_slots is None:
            num_slots = [budget_bytes // size if size else 0 for size in layout.slot_bytes]
        self.tuning: Tuning | None = None
        if policy == TUNED:
            of = partial(CacheManager, layout, budget_bytes, num_slots=num_slots, admission=admission, profile=profile)
            self.tuning, policy = Tuning({name: of(policy=name) for name in CANDIDATES}), CANDIDATES[0]
        self.store = Store(layout, budget_bytes, list(num_slots), policy, profile or LinearProfile())
        store = self.store
        self.tree, self.kv, self.window, self.states = store.tree, store.kv, store.window, store.states
        self.components, self.order, self.budget, self.events = (
            store.components, store.order, store.budget, store.events,
        )  # fmt: skip
        self.allocator = self.kv.allocator
        self.eviction = Eviction(store)
        self.insertion = Insertion(store)
        self.admission = checkpoints_of(admission)
        self.handles: set[CacheHandle] = set()
        self._has_kv = layout.kv_bytes_per_token > 0
        self._grid = math.lcm(layout.page_size, layout.grid)
        self._keeps_spare = self.states is not None and sharing and self.page_size > 1 and self.admission.keeps_last
        self._slack = max(1, min(layout.window, 1024) // (4 * layout.page_size))

    # -- finding

    def page_after(self, key: TokenKey, num_tokens: int) -> bytes:
        """The page of `key` that follows its first `num_tokens` tokens (whole pages); shorter at its end."""
        start = num_tokens * TOKEN_BYTES
        return bytes(key.data[start : start + self.tree.page_bytes])

    def match(self, tokens: bytes | TokenKey, namespace: str, limit: int | None = None) -> PrefixMatch:
        """The longest cached prefix of `tokens` that leaves at least one token to compute. Changes nothing.

        limit: tokens to match at most; None = all but the last.
        """
        data = tokens.data if isinstance(tokens, TokenKey) else tokens
        most = len(data) // TOKEN_BYTES - 1
        stop = max(0, (most if limit is None else min(limit, most)) // self.page_size) * self.tree.page_bytes
        node, num_bytes = self.tree.find(data, stop, namespace) if self.sharing else (None, 0)
        if node is None:
            return PrefixMatch(0, 0, (namespace, 0), None, None)
        matched = num_bytes // TOKEN_BYTES
        resume, usable = (node, matched) if len(self.components) == 1 else self._usable(node, matched)
        return PrefixMatch(usable, matched, (namespace, node.id), node, resume)

    def _usable(self, node: Node, num_tokens: int) -> tuple[Node, int]:
        """What all components can resume from; each shortens it, until none does."""
        usable, before = num_tokens, -1
        while usable != before:
            before = usable
            for component in reversed(self.components):
                node, usable = component.usable(node, usable)
        return node, usable

    # -- a request's way

    def admit(
        self,
        key: TokenKey,
        namespace: str,
        num_tokens_needed: int,
        *,
        limit: int | None = None,
        keep: int = 0,
        hints: Sequence[int] = (),
        step: int | None = None,
    ) -> CacheHandle | Denied:
        """Lock the longest cached prefix of `key` and reserve all that positions [0, num_tokens_needed) need, or deny.

        `handle.num_cached` tokens need not be computed. The key stays the caller's, who appends tokens to it.
        limit: tokens to take from the cache at most. keep: pages that must stay available afterwards. hints: positions
        of the prompt after which the caller expects others to go on; their states are saved too. step: tokens that the
        caller runs at once at most: window pages for a window and a step are reserved, and `grow` has to be asked for
        more before each step; None = for all tokens.
        """
        match = self.match(key, namespace, limit)
        need, shortfall = self._demand(match, num_tokens_needed, keep, step)
        if shortfall > 0 and match.num_tokens and self.states is not None and not self.handles:
            # What it resumes from takes room beside its own state. Nobody will ever free any: start from zero instead.
            match = match._replace(num_tokens=0, resume=None)
            need, shortfall = self._demand(match, num_tokens_needed, keep, step)
        if shortfall > 0:
            return Denied(shortfall)
        handle = self._hold(match, key, namespace)
        if self.states is not None and self.sharing:
            handle.checkpoints = self._checkpoints(handle, hints)
            if self.admission.uses_room:
                at = self._on_grid(handle, handle.prompt_len - 1)
                handle.guest_at = at if at > handle.num_cached and at not in handle.checkpoints else 0
        if not self.budget.has_free(need):
            self.eviction.make_room(need)
        handle.pages.extend(self.allocator.take(need[0]))
        if self.window is not None:
            handle.window_pages.extend(self.window.allocator.take(need[1]))
        if self.states is not None:
            handle.state = self.states.allocator.take_one()
            handle.spare = self.states.allocator.take_one() if self._keeps_spare else -1
        self.handles.add(handle)
        return handle

    def _demand(self, match: PrefixMatch, num_tokens: int, keep: int, step: int | None) -> tuple[list[int], int]:
        """Slots of each component that a request of `num_tokens` on `match` needs, and the bytes lacking for them."""
        page = self.page_size
        num_pages = -(-num_tokens // page)
        need = [max(0, num_pages - match.num_matched // page) if self._has_kv else 0]
        if self.window is not None:
            seen = num_tokens if step is None else min(num_tokens, match.num_tokens + self.window.window + step)
            need.append(max(0, -(-seen // page) - match.num_tokens // page))
        if self.states is not None:
            need.append(1 + self._keeps_spare)
        if self.budget.has_free([count + keep for count in need]):
            return need, 0
        kept = [self.kv.num_to_lock(match.node, match.num_matched) + (keep if self._has_kv else 0)]
        if self.window is not None:
            # Of its window a running request lets go as many pages as it takes, a few tokens later.
            ahead = min(keep, len(self.handles) * (self._slack + 1))
            kept.append(self.window.num_to_lock(match.resume, match.num_tokens) + ahead)
        if self.states is not None:
            kept.append(self.states.num_to_lock(match.resume, match.num_tokens))
        return need, self.budget.shortfall(need, kept)

    def grow(self, handle: CacheHandle, num_tokens: int, start: int | None = None) -> GrowResult | Denied:
        """Make pages exist for positions [0, num_tokens) of the handle. Returns the new ones.

        start: where its next step starts, for handles with windows; None = at the last of these tokens.
        """
        if self.window is not None:
            grown = self._grow_groups(self.window, [handle], [num_tokens], [num_tokens - 1 if start is None else start])
            if grown.denied:
                return grown
            return GrowResult(list(zip(grown.group, grown.page_index, grown.page_id, strict=True)))
        pages = handle.pages
        first = len(pages)
        need = -(-num_tokens // self.page_size) - first
        if need <= 0 or not self._has_kv:
            return _NO_GROWTH
        if need > self.allocator.num_free or self.budget.binds:
            shortfall = self._make_room([need])
            if shortfall > 0:
                return Denied(shortfall)
        if need == 1:
            slot = self.allocator.take_one()
            pages.append(slot)
            return GrowResult([(FULL, first, slot)])
        new = self.allocator.take(need)
        pages.extend(new)
        return GrowResult([(FULL, index, slot) for index, slot in enumerate(new, first)])

    def grow_many(self, handles: Sequence[CacheHandle], num_tokens: Sequence[int]) -> PageWrites | Denied:
        """`grow` of every handle to its own number of tokens, all or none, with the new pages as columns.

        The next step of a handle with windows starts at its last token: what it can not see any more is let go.
        """
        if self.window is not None:
            return self._grow_groups(self.window, handles, num_tokens, [count - 1 for count in num_tokens])
        page_size, writes = self.page_size, PageWrites()
        if not self._has_kv:
            return writes
        rows, indices = writes.row, writes.page_index
        for row, (handle, count) in enumerate(zip(handles, num_tokens, strict=True)):
            first = len(handle.pages)
            need = -(-count // page_size) - first
            if need == 1:
                rows.append(row)
                indices.append(first)
            elif need > 1:
                rows.extend([row] * need)
                indices.extend(range(first, first + need))
        if rows:
            count = len(rows)
            if count > self.allocator.num_free or self.budget.binds:
                shortfall = self._make_room([count])
                if shortfall > 0:
                    return Denied(shortfall)
            writes.page_id = self.allocator.take(count).tolist()
            writes.group = [FULL] * count
            for row, page in zip(rows, writes.page_id, strict=True):
                handles[row].pages.append(page)
        return writes

    def plan_saves(self, handle: CacheHandle, start: int, end: int) -> list[tuple[int, int]]:
        """States that the step over positions [start, end) must save: (position, slot), start < position <= end.

        What is saved is the state after `position` tokens. Call it before `publish(handle, end)`, which shares them.
        Where keeping one is worth less than what would have to go, there is none.
        """
        states = self.states
        if states is None or not self.sharing or not handle.node.live:
            return []
        step = states.allocator.newest_launched + 1
        saves: list[tuple[int, int]] = []
        while handle.checkpoints and handle.checkpoints[0] <= end:
            position = handle.checkpoints.pop(0)
            slot = self._slot_for(handle, position) if position > start else -1
            if slot >= 0:
                handle.saves.append((position, slot, step))
                saves.append((position, slot))
        if start < handle.guest_at <= end:
            saves += self._invite(handle, step)
        if saves:
            handle.saving = step, [position for position, _ in saves]
        at = end // self.page_size * self.page_size if end - start == 1 else self._on_grid(handle, end)
        if handle.spare >= 0 and at > max(start, handle.spare_at) and at + self.page_size > handle.prompt_len:
            handle.spare_at, handle.spare_step = at, step
            saves.append((at, handle.spare))
        return saves

    def publish(self, handle: CacheHandle, num_tokens: int, start: int | None = None) -> list[PageWrite]:
        """Let others match the full pages of the handle's first `num_tokens` tokens, all computed or being planned.

        Returns page-table writes: pages that another request published first replace the handle's own.
        start: the handle's next step starts behind so many tokens, >= num_tokens: window pages that it can not see are
        let go, which may make room for a long step; None = that step was just planned, and starts at those published.
        """
        if start is None:
            return self._publish(handle, num_tokens, handle.num_planned)
        return self._slide(self.window, handle, num_tokens, start) if self.window is not None else []

    def release(self, handle: CacheHandle, num_tokens: int, *, publish: bool, state_at: int | None = None) -> None:
        """End the handle: publish its first `num_tokens` tokens if asked, free its own slots, drop its locks.

        state_at: tokens that the working state has read, all launched steps included; kept if it fits `num_tokens`.
        """
        assert handle in self.handles, "the handle was released before"
        if publish:
            self.publish(handle, num_tokens)
        self.handles.remove(handle)
        self.allocator.retire(handle.pages[handle.num_tree_pages :])
        if self.window is not None:
            own = max(handle.num_window_tree_pages, handle.first_window_page)
            self.window.allocator.retire(handle.window_pages[own:])
        if self.states is not None:
            self._release_states(handle, num_tokens if publish else 0, state_at)
        node = handle.node
        self._touch(node, 0)
        self._unlock(handle.receipt)
        self._settle(node)
        if self.tuning is not None and self.sharing and publish and num_tokens:
            data = bytes(handle.key.data[: num_tokens * TOKEN_BYTES])
            chosen = self.tuning.observe(data, min(handle.prompt_len, num_tokens), handle.namespace)
            if chosen is not None:
                self.store.use(chosen)

    # -- steps

    def launched(self, step: int) -> None:
        """Step `step` was launched. What is freed from now on rests until it is collected; its states can be found."""
        for component in self.components:
            component.allocator.launched(step)
        if self.insertion.unborn:
            self._deliver(step)
        if self.states is not None and self.insertion.arriving:
            self.insertion.attach_guests(self.states, step)

    def collected(self, step: int) -> None:
        """Step `step` has ended, well or not. Slots freed before the next launch can be used again."""
        for component in self.components:
            component.allocator.collected(step)
        if self.insertion.unborn:
            self._deliver(step)

    # -- forgetting

    def invalidate(self) -> None:
        """A step failed: nothing published so far may be matched again. Locked slots go when they are released."""
        roots = list(self.tree.roots.values())
        for node in self.tree.nodes():
            node.live = False
        self.tree.roots.clear()
        for root in roots:
            self.eviction.drop_unlocked(root)
        if self.events.active:
            self.events.cleared()

    def flush(self) -> bool:
        """Drop everything that no request holds. False if requests hold anything."""
        for root in list(self.tree.roots.values()):
            self.eviction.drop_unlocked(root)
        if self.events.active and not self.tree.roots:
            self.events.cleared()
        return not self.handles

    # -- looking

    @property
    def num_held_tokens(self) -> int:
        """Tokens whose KV is resident or being planned, in the tree and in handles, each counted once. O(handles)."""
        return held_tokens(self.store, self.handles)

    def stats(self) -> CacheStats:
        """Counts of this moment. O(handles)."""
        return cache_stats(self.store, self.handles, self.eviction.evicted)

    def check(self) -> None:
        """Recompute every fact from scratch and assert that it agrees. For tests; O(everything)."""
        check_manager(self.store, self.handles, self.insertion.unborn)

    # -- inner: admission

    def _hold(self, match: PrefixMatch, key: TokenKey, namespace: str) -> CacheHandle:
        """A handle on the matched prefix, locked, with nothing reserved yet."""
        node = match.node if match.node is not None else self.tree.root(namespace)
        node = self.tree.cut_at(node, match.num_matched)
        handle = CacheHandle(key, namespace, node, match.num_tokens, self._path_pages(node))
        handle.num_tree_pages = match.num_matched // self.page_size
        resume = node if match.num_tokens == match.num_matched else self.tree.cut_at(node, match.num_tokens)
        if self.states is not None:
            self.insertion.settle_guest(self.states, resume)
        receipt: Receipt = (self.kv.lock(node),)
        if self.window is not None:
            first = self.window.first_page(match.num_tokens)
            pin = self.insertion.lock_window(self.window, resume, first * self.page_size)
            handle.window_pages = array("i", [-1]) * first + self.window.pages_under(pin)
            handle.first_window_page, handle.num_window_tree_pages = first, len(handle.window_pages)
            receipt += (pin,)
        if self.states is not None:
            if match.num_tokens:
                handle.restore = self.states.slot(resume)
                receipt += (self.states.lock(resume),)
        handle.receipt = receipt
        if match.num_tokens:
            self._touch(resume, 1)
        return handle

    def _checkpoints(self, handle: CacheHandle, hints: Sequence[int]) -> list[int]:
        """Positions whose states the handle should save, ascending, on pages and on the grid."""
        wanted = [*hints, *self.admission.positions(handle.num_cached, handle.num_matched, handle.prompt_len)]
        rounded = {self._on_grid(handle, min(position, handle.prompt_len)) for position in wanted}
        return sorted(position for position in rounded if position > handle.num_cached)

    def _on_grid(self, handle: CacheHandle, position: int) -> int:
        """The last position up to `position` where a state can be saved and found."""
        start = handle.num_cached
        return start + (position - start) // self._grid * self._grid

    def _slot_for(self, handle: CacheHandle, position: int) -> int:
        """A slot for the state after `position` tokens, or -1 if it is there already or not worth its room."""
        states = self.states
        assert states is not None
        node: Node | None = handle.node
        while node is not None and node.depth > position:
            node = node.parent
        if node is not None and node.depth == position and states.slot(node) >= 0:
            return -1
        above = max([handle.num_cached, *(saved for saved, _, _ in handle.saves)])
        need = [0] * (len(self.components) - 1) + [1]
        if not self.eviction.try_room(need, self.order.policy.newcomer(position, min(above, position))):
            return -1
        return states.allocator.take_one()

    def _invite(self, handle: CacheHandle, step: int) -> list[tuple[int, int]]:
        """The handle's guest is saved by the step being planned, if there is room."""
        states, position = self.states, handle.guest_at
        assert states is not None
        handle.guest_at = 0
        if not self.budget.has_free([0] * (len(self.components) - 1) + [1]):
            return []
        handle.guest = (position, states.allocator.take_one(), step)
        self.insertion.arriving.append(handle)
        return [(position, handle.guest[1])]

    def _path_pages(self, node: Node) -> array[int]:
        """Pages of all tokens from the root to the end of `node`."""
        path = []
        current: Node | None = node
        while current is not None:
            path.append(current)
            current = current.parent
        pages = array("i")
        for part in reversed(path):
            pages.extend(pages_of(part.records[0].slots))
        return pages

    def _unlock(self, receipt: Receipt) -> None:
        for pin in reversed(receipt):
            self.components[pin.component].unlock(pin)
            if not pin.node.live:
                self._purge(pin)

    def _purge(self, pin: Pin) -> None:
        """What an invalidated lock no longer holds can not be evicted, so it goes at once."""
        node: Node | None = pin.node
        while node is not None and node.depth >= pin.start and node.parent is not None:
            self.eviction.purge(node)
            node = node.parent

    def _touch(self, node: Node, num_hits: int) -> None:
        self.order.touch(node)
        for component in self.components:
            component.touch(node, num_hits)
        if self.window is not None:
            self.insertion.use_window(self.window, node, num_hits)

    # -- inner: growing and publishing

    def _make_room(self, need: list[int]) -> int:
        """Room for `need[i]` slots of each component; the bytes lacking, if it can not be had."""
        need = need + [0] * (len(self.components) - len(need))
        if self.budget.has_free(need):
            return 0
        shortfall = self.budget.shortfall(need, [0] * len(need))
        if shortfall <= 0:
            self.eviction.make_room(need)
        return shortfall

    def _grow_groups(
        self, window: WindowKV, handles: Sequence[CacheHandle], num_tokens: Sequence[int], starts: Sequence[int]
    ) -> PageWrites | Denied:
        """`grow_many` of both groups of pages; `starts`: where the handles' next steps start."""
        writes, counts = PageWrites(), [0, 0]
        for group in (FULL, WINDOW) if self._has_kv else (WINDOW,):
            for row, (handle, count) in enumerate(zip(handles, num_tokens, strict=True)):
                first = len(handle.pages if group == FULL else handle.window_pages)
                need = -(-count // self.page_size) - first
                if need > 0:
                    counts[group] += need
                    writes.row.extend([row] * need)
                    writes.page_index.extend(range(first, first + need))
        if writes.row:
            shortfall = self._make_room(counts)
            if shortfall > 0:
                return Denied(shortfall)
            full, own = self.allocator.take(counts[FULL]), window.allocator.take(counts[WINDOW])
            for row, page in zip(writes.row, full, strict=False):
                handles[row].pages.append(page)
            for row, page in zip(writes.row[len(full) :], own, strict=True):
                handles[row].window_pages.append(page)
            writes.page_id = [*full, *own]
            writes.group = [FULL] * len(full) + [WINDOW] * len(own)
        for row, (handle, start) in enumerate(zip(handles, starts, strict=True)):
            # Once it is worth the call.
            if window.first_page(start) - handle.first_window_page >= self._slack:
                for group, index, slot in self._slide(window, handle, min(len(handle.key), start), start):
                    writes.row.append(row)
                    writes.group.append(group)
                    writes.page_index.append(index)
                    writes.page_id.append(slot)
        return writes

    def _slide(self, window: WindowKV, handle: CacheHandle, num_tokens: int, start: int) -> list[PageWrite]:
        """Let go of window pages that a step behind `start` tokens can not see; the first `num_tokens` are known."""
        if not self.sharing or not handle.node.live:
            self._forget(handle, window.first_page(start))
            return []
        return self._publish(handle, num_tokens, start) if num_tokens >= handle.num_planned else []

    def _forget(self, handle: CacheHandle, first: int) -> None:
        """A handle that shares nothing frees its own window pages in front of page `first`."""
        own = max(handle.first_window_page, handle.num_window_tree_pages)
        if self.window is not None and first > own:
            self.window.allocator.retire(handle.window_pages[own:first])
            forget(handle, first)

    def _publish(self, handle: CacheHandle, num_tokens: int, start: int) -> list[PageWrite]:
        """`publish`, while a step is planned that starts behind `start` tokens of the handle."""
        num_pages = num_tokens // self.page_size
        writes: list[PageWrite] = []
        if not self.sharing or not handle.node.live:
            return writes
        behind = self.window is not None and self.window.first_page(start) > handle.first_window_page
        if (
            num_tokens <= start
            and num_pages <= handle.num_tree_pages
            and not (behind and num_tokens >= handle.num_planned)
        ):
            return writes
        if num_pages > handle.num_tree_pages:
            assert num_tokens <= len(handle.key), (num_tokens, len(handle.key))
            assert not self._has_kv or num_pages <= len(handle.pages), (num_tokens, len(handle.pages))
            self.insertion.extend(handle, num_pages, writes)
        if self.window is not None:
            writes += self.insertion.slide(self.window, handle, num_tokens, start)
        if self.states is not None:
            self._drop_restored(handle)
            self.insertion.attach_saves(self.states, handle, num_pages * self.page_size)
        handle.num_planned = max(handle.num_planned, num_tokens)
        return writes

    def _drop_restored(self, handle: CacheHandle) -> None:
        """The first step is planned: the state it copies is read before anything can be written there."""
        *others, last = handle.receipt
        assert self.states is not None
        if last.component == self.states.index:
            self.states.unlock(last)
            handle.receipt = tuple(others)

    # -- inner: releasing

    def _release_states(self, handle: CacheHandle, num_tokens: int, state_at: int | None) -> None:
        """Keep the last state of the handle's first `num_tokens` tokens, free the others."""
        states = self.states
        assert states is not None
        now = states.allocator.newest_launched
        own = [(slot, step) for _, slot, step in handle.saves]
        own += [(handle.state, now), (handle.spare, handle.spare_step), (handle.scratch, now)]
        if handle in self.insertion.arriving:
            own.append(handle.guest[1:])
            self.insertion.drop_guest(handle)
        shared = self.sharing and handle.node.live and self.admission.keeps_last and num_tokens > 0
        if shared and state_at == num_tokens and num_tokens % self.page_size == 0:
            own.remove((handle.state, now))
            self.insertion.attach_state(states, handle, num_tokens, handle.state, now)
        elif shared and handle.spare >= 0 and 0 < handle.spare_at <= num_tokens:
            own.remove((handle.spare, handle.spare_step))
            self.insertion.attach_state(states, handle, handle.spare_at, handle.spare, handle.spare_step)
        for slot, step in own:
            if slot >= 0:
                states.allocator.retire(array("i", [slot]), planned=step > now)

    def _settle(self, node: Node) -> None:
        """`node` lost a lock: tidy up around it."""
        if not node.live:
            self.eviction.drop_dead_path(node)
        elif node.parent is None:
            self.tree.drop_root_if_idle(node)
        elif not self.eviction.prune(node):
            self.tree.merge_upwards(node)

    def _deliver(self, step: int) -> None:
        """States saved by steps up to `step` can be found and evicted."""
        states = self.states
        assert states is not None
        due = [locks for at, locks in self.insertion.unborn if at <= step]
        self.insertion.unborn = [(at, locks) for at, locks in self.insertion.unborn if at > step]
        for locks in due:
            node = locks[0].node
            states.planned.discard(node.records[states.index])
            self._unlock(locks)
            self._settle(node)
