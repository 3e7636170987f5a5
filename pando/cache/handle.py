"""What the cache hands to the scheduler: matches, handles, and the answers to requests for pages.

Every answer that may be a refusal carries `denied`, so that callers branch on data: `if answer.denied: ...`.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pando.cache.components import Receipt
from pando.cache.key import TokenKey
from pando.cache.node import Node


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest reusable prefix of a query. Valid until the next call that changes the cache.

    num_tokens: tokens that need not be computed, whole pages. anchor: equal for two queries whose matches end in the
    same node; waiting requests can be grouped by it. node: where the match ends, None in an unknown namespace.
    """

    num_tokens: int
    anchor: Hashable
    node: Node | None


@dataclass(frozen=True, slots=True)
class Denied:
    """Pages are lacking; nothing was changed. Releasing `shortfall_pages` pages would make the same call succeed."""

    denied: ClassVar[Literal[True]] = True
    shortfall_pages: int


class CacheHandle:
    """One running request's hold on the cache, from `admit` to `release`. Read it; only the manager changes it.

        page index   0 ........... num_tree_pages ............ len(pages)
        pages        | the tree's, locked |  the request's own   |

    key: the request's tokens. pages: page ids in position order. num_cached: tokens found at admission.
    num_tree_pages: leading pages that belong to the tree (found or published). node: where they end. A new handle's
    pages are those found; the manager adds the reserved ones.
    """

    __slots__ = ("key", "namespace", "node", "num_cached", "num_tree_pages", "pages", "receipt")
    denied: ClassVar[Literal[False]] = False

    def __init__(
        self, key: TokenKey, namespace: str, node: Node, receipt: Receipt, pages: array[int], num_cached: int
    ) -> None:
        self.key = key
        self.namespace = namespace
        self.node = node
        self.receipt = receipt
        self.num_cached = num_cached
        self.num_tree_pages = len(pages)
        self.pages = pages


class GrowResult:
    """New pages of one handle: `page_ids[i]` belongs at page index `first_page + i`. Empty if there was room."""

    __slots__ = ("first_page", "page_ids")
    denied: ClassVar[Literal[False]] = False

    def __init__(self, first_page: int, page_ids: array[int]) -> None:
        self.first_page = first_page
        self.page_ids = page_ids


class PageWrites:
    """New pages of many handles as columns: handle `row[i]` of the call has `page_id[i]` at `page_index[i]`."""

    __slots__ = ("page_id", "page_index", "row")
    denied: ClassVar[Literal[False]] = False

    def __init__(self) -> None:
        self.row: list[int] = []
        self.page_index: list[int] = []
        self.page_id: list[int] = []


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The pool at one moment, in pages: num_pages = free + quarantined + evictable + locked. And what was evicted.

    num_locked: held by running requests, shared or their own. num_held_tokens: tokens whose KV is resident (or about
    to be), each counted once. evicted_tokens: total since the start.
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
