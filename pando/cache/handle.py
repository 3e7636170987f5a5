"""What the cache hands to the scheduler: matches, handles, and the answers to requests for pages.

Every answer that may be a refusal carries `denied`, so that callers branch on data: `if answer.denied: ...`.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from pando.cache.components import Receipt
from pando.cache.key import TokenKey
from pando.cache.node import Node

NO_GUEST = (0, -1, 0)

PageWrite = tuple[int, int, int]
"""(group, page index, page id): this page of a request is at this id from now on."""


class PrefixMatch(NamedTuple):
    """The longest reusable prefix of a query. Valid until the next call that changes the cache.

    num_tokens: tokens that need not be computed, whole pages. num_matched: tokens that the tree knows, >= num_tokens; a
    state or a window is lacking for the rest. anchor: equal for two queries whose matches end in the same node; waiting
    requests can be grouped by it. node: where the known tokens end, None in an unknown namespace. resume: where
    `num_tokens` end.
    """

    num_tokens: int
    num_matched: int
    anchor: Hashable
    node: Node | None
    resume: Node | None


@dataclass(frozen=True, slots=True)
class Denied:
    """Bytes are lacking; nothing was changed. Releasing `shortfall_bytes` would make the same call succeed."""

    denied: ClassVar[Literal[True]] = True
    shortfall_bytes: int


class CacheHandle:
    """One running request's hold on the cache, from `admit` to `release`. Read it; only the manager changes it.

        page index   0 ........... num_tree_pages ............ len(pages)
        pages        | the tree's, locked |  the request's own   |

        page index   0 ....... first_window_page ... num_window_tree_pages ... len(window_pages)
        window_pages |   -1   | the tree's, locked  |     the request's own     |

    key: the request's tokens. num_cached: tokens found at admission; computing starts behind them. num_matched: tokens
    whose KV the tree had then; their pages are the tree's, though those behind num_cached are computed once more.
    pages: page ids in position order. state: slot of the recurrent state that the request's steps read and write, -1
    without states. restore: slot to copy there before its first step, -1 = start from zeros. node: where the tree's
    pages end. num_planned: tokens published, so the next step starts there. checkpoints: positions whose states are to
    be saved. saves: (position, slot, step that saves) of states not in the tree yet. spare, spare_at, spare_step:
    slot for the state at the last whole page (-1 = none), its position, the step that saves it. guest_at: position of a
    guest to be saved (0 = none); guest: (position, slot, step) of one that is not in the tree yet. saving: the step
    planned last that saves states of the handle, and their positions. scratch: slot of a state that the request may go
    back to, -1 = none.
    """

    __slots__ = (
        "checkpoints", "first_window_page", "guest", "guest_at", "key", "namespace", "node", "num_cached",
        "num_matched", "num_planned", "num_tree_pages", "num_window_tree_pages", "pages", "prompt_len", "receipt",
        "restore", "saves", "saving", "scratch", "spare", "spare_at", "spare_step", "state", "window_pages",
    )  # fmt: skip
    denied: ClassVar[Literal[False]] = False

    def __init__(self, key: TokenKey, namespace: str, node: Node, num_cached: int, pages: array[int]) -> None:
        self.key = key
        self.namespace = namespace
        self.node = node
        self.receipt: Receipt = ()
        self.num_cached = self.num_planned = num_cached
        self.num_matched = node.depth
        self.num_tree_pages = len(pages)
        self.pages = pages
        self.window_pages = array("i")
        self.first_window_page = self.num_window_tree_pages = 0
        self.state = self.restore = self.spare = self.scratch = -1
        self.spare_at = self.spare_step = 0
        self.prompt_len = len(key)
        self.checkpoints: list[int] = []
        self.saves: list[tuple[int, int, int]] = []
        self.guest_at = 0
        self.guest = NO_GUEST
        self.saving: tuple[int, list[int]] = (0, [])

    def coming(self, launched: int) -> list[int]:
        """Positions of states that no step up to `launched` saved, but a later one will."""
        step, positions = self.saving
        planned = positions if step > launched else []
        return [*self.checkpoints, *planned, *([self.guest_at] if self.guest_at else [])]


class GrowResult:
    """Page-table writes of one handle. Empty if there was room."""

    __slots__ = ("writes",)
    denied: ClassVar[Literal[False]] = False

    def __init__(self, writes: list[PageWrite]) -> None:
        self.writes = writes


class PageWrites:
    """Page-table writes of many handles as columns: `page_id[i]` at `page_index[i]` of `group[i]` for `row[i]`."""

    __slots__ = ("group", "page_id", "page_index", "row")
    denied: ClassVar[Literal[False]] = False

    def __init__(self) -> None:
        self.row: list[int] = []
        self.group: list[int] = []
        self.page_index: list[int] = []
        self.page_id: list[int] = []


@dataclass(frozen=True, slots=True)
class SlotStats:
    """One id space at one moment, in slots: num_slots = free + quarantined + evictable + locked; evicted in total."""

    num_slots: int
    num_free: int
    num_quarantined: int
    num_evictable: int
    num_evicted: int

    @property
    def num_locked(self) -> int:
        """Held by running requests, shared or their own."""
        return self.num_slots - self.num_free - self.num_quarantined - self.num_evictable


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The cache at one moment. The first six count pages of full attention, or of windows where there is no other KV:
    num_pages is the sum of the next four.

    num_locked: held by running requests, shared or their own. num_held_tokens: tokens whose KV is resident (or about
    to be), each counted once. evicted_tokens: total since the start. held_bytes: of all components, without what rests
    in quarantine; budget_bytes: what they may use together. by_component: each id space, by "full", "window", "state".
    """

    num_pages: int
    num_free: int
    num_quarantined: int
    num_evictable: int
    num_locked: int
    num_held_tokens: int
    num_handles: int
    evicted_tokens: int
    held_bytes: int
    budget_bytes: int
    by_component: dict[str, SlotStats]
