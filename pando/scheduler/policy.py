"""Order of the waiting requests. One protocol; each policy's cost per admission does not grow with the queue.

`LongestPrefix` keeps requests in buckets: those whose cached prefix ends at the same tree node and continues with the
same page. Members of a bucket share at least one more page, so when one of them is admitted and publishes its prompt
the others' prefix grows with it. Only a bucket's head is scored, at arrival and again when the head changes or the
bucket's prefix grew; a heap orders the buckets, stale entries are skipped when popped. Every `FAIR_EVERY`-th
admission takes the oldest request instead, so a request that entered behind k others runs after at most FAIR_EVERY *
(k + 1) admissions.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Protocol

from pando.cache.manager import CacheManager
from pando.scheduler.request import Request, State

FAIR_EVERY = 8


class WaitingQueue(Protocol):
    """Waiting requests in the order they should be admitted."""

    def __len__(self) -> int:
        """Number of waiting requests."""

    def __iter__(self) -> Iterator[Request]:
        """All waiting requests, in no particular order."""

    def push(self, request: Request) -> None:
        """Add a request that arrived."""

    def push_front(self, request: Request) -> None:
        """Add a request that was retracted: it goes before those that have not run yet."""

    def peek(self) -> Request | None:
        """The next request to admit; the same one until it is popped or removed, or another becomes better."""

    def repeated(self, request: Request) -> bool:
        """True if the request that `peek` returned is followed by one with the same prompt. Looks at a few, O(1)."""

    def pop(self, request: Request) -> None:
        """Take out the request that `peek` returned: it was admitted."""

    def remove(self, request: Request) -> None:
        """Take out any request: it was aborted or failed. Cost O(1)."""


class Ordered:
    """First come first served, or by priority (larger first) and then arrival."""

    def __init__(self, by_priority: bool) -> None:
        self._sign = -1 if by_priority else 0
        self._heap: list[tuple[int, int, Request]] = []
        self._members: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())

    def push(self, request: Request) -> None:
        """Add a request; its arrival number places it, also after a retraction."""
        self._members[request.rid] = request
        heapq.heappush(self._heap, (self._sign * request.priority, request.order, request))

    push_front = push

    def peek(self) -> Request | None:
        """The first request that still waits."""
        heap = self._heap
        while heap and self._members.get(heap[0][2].rid) is not heap[0][2]:
            heapq.heappop(heap)
        return heap[0][2] if heap else None

    def repeated(self, request: Request) -> bool:
        """Whoever follows the first is one of its two children in the heap."""
        return any(_same(request, other) and other.rid in self._members for _, _, other in self._heap[1:3])

    def pop(self, request: Request) -> None:
        """Take out the request that `peek` returned."""
        heapq.heappop(self._heap)
        del self._members[request.rid]

    def remove(self, request: Request) -> None:
        """Take out any request; its heap entry is skipped when it surfaces."""
        del self._members[request.rid]


class Bucket:
    """Waiting requests that share a cached prefix and the page after it, oldest first."""

    __slots__ = ("key", "requests", "version")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.requests: deque[Request] = deque()
        self.version = 0


class LongestPrefix:
    """Longest cached prefix first, ties by arrival, with bounded unfairness (see the module's text)."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._members: dict[str, Request] = {}
        self._front: deque[Request] = deque()
        self._by_age: deque[Request] = deque()
        self._buckets: dict[Hashable, Bucket] = {}
        self._home: dict[str, Bucket] = {}
        self._heap: list[tuple[int, int, int, Bucket]] = []
        self._admissions = 0
        self._grown: Bucket | None = None
        """Bucket of the request admitted last: scored again at the next look, when its prompt has been published."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members.values())

    def push(self, request: Request) -> None:
        """Score the request by one match and put it into its bucket."""
        self._members[request.rid] = request
        self._by_age.append(request)
        self._place(request)

    def push_front(self, request: Request) -> None:
        """A retracted request goes first: it holds the place it had."""
        self._members[request.rid] = request
        self._front.append(request)

    def peek(self) -> Request | None:
        """A retracted one, else the oldest at its turn, else the head of the best bucket."""
        if self._grown is not None:
            grown, self._grown = self._grown, None
            self._rescore(grown)
        for queue in (self._front, self._by_age):
            while queue and not self._waits(queue[0]):
                queue.popleft()
        if self._front:
            return self._front[0]
        if self._by_age and self._admissions % FAIR_EVERY == FAIR_EVERY - 1:
            return self._by_age[0]
        bucket = self._best()
        return bucket.requests[0] if bucket else None

    def repeated(self, request: Request) -> bool:
        """Equal prompts are in one bucket, in the order in which they came."""
        bucket = self._home.get(request.rid)
        first = () if bucket is None else islice(bucket.requests, 4)
        return any(_same(request, other) and self._waits(other) for other in first)

    def pop(self, request: Request) -> None:
        """Take out an admitted request; the rest of its bucket has a longer prefix as soon as it is published."""
        del self._members[request.rid]
        self._admissions += 1
        self._grown = self._home.pop(request.rid, None)

    def remove(self, request: Request) -> None:
        """Take out any request; its places in deques are skipped when they surface."""
        del self._members[request.rid]
        self._home.pop(request.rid, None)

    def _waits(self, request: Request) -> bool:
        return request.state is State.WAITING and self._members.get(request.rid) is request

    def _place(self, request: Request) -> None:
        match = self._cache.match(request.key, request.namespace, request.reusable)
        key = (match.anchor, self._cache.page_after(request.key, match.num_tokens))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Bucket(key)
        bucket.requests.append(request)
        self._home[request.rid] = bucket
        if bucket.requests[0] is request:
            self._schedule(bucket, match.num_tokens)

    def _schedule(self, bucket: Bucket, num_tokens: int) -> None:
        bucket.version += 1
        heapq.heappush(self._heap, (-num_tokens, bucket.requests[0].order, bucket.version, bucket))

    def _rescore(self, bucket: Bucket) -> None:
        """Give the bucket's new head its current score. The bucket stays together: its members share a prefix."""
        self._trim(bucket)
        if bucket.requests:
            head = bucket.requests[0]
            match = self._cache.match(head.key, head.namespace, head.reusable)
            self._schedule(bucket, match.num_tokens)

    def _trim(self, bucket: Bucket) -> None:
        """Drop members that were admitted or removed; an empty bucket is forgotten."""
        requests = bucket.requests
        while requests and not self._waits(requests[0]):
            requests.popleft()
        if not requests and self._buckets.get(bucket.key) is bucket:
            del self._buckets[bucket.key]

    def _best(self) -> Bucket | None:
        while self._heap:
            _, order, version, bucket = self._heap[0]
            if version == bucket.version:
                self._trim(bucket)
                if bucket.requests and bucket.requests[0].order == order:
                    return bucket
                heapq.heappop(self._heap)
                self._rescore(bucket)
            else:
                heapq.heappop(self._heap)
        return None


def _same(one: Request, other: Request) -> bool:
    """Two requests with one prompt."""
    return one is not other and one.namespace == other.namespace and one.key.data == other.key.data


def waiting_queue(policy: str, cache: CacheManager) -> WaitingQueue:
    """The queue of `Config.schedule_policy`: lpm, fcfs or priority."""
    if policy == "lpm":
        return LongestPrefix(cache)
    return Ordered(by_priority=policy == "priority")
