"""A device that only remembers: steps run in order on slots whose content is the prefix it was computed from.

Every slot that a step reads must hold what the request needs there, whatever was evicted, shared, copied or handed out
in between. So a mistake in any decision of the cache shows as wrong content.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from pando.cache.handle import CacheHandle
from pando.cache.manager import CacheManager


@dataclass(eq=False)
class Sequence:
    """A running request: tokens planned so far, tokens that launched steps will still bring."""

    handle: CacheHandle
    namespace: str
    tokens: list[int]
    limit: int
    planned: int
    pending: int = 0
    started: bool = False
    ended: bool = False
    chain: list[int] = field(default_factory=list)

    def prefix(self, num_tokens: int) -> int:
        """Identity of the first `num_tokens` tokens; of tokens that will never be known, something else."""
        if not self.chain:
            self.chain = [hash(("root", self.namespace))]
        while len(self.chain) <= min(num_tokens, len(self.tokens)):
            self.chain.append(hash((self.chain[-1], self.tokens[len(self.chain) - 1])))
        return self.chain[num_tokens] if num_tokens < len(self.chain) else hash(("garbage", id(self), num_tokens))


@dataclass(frozen=True)
class Row:
    """One sequence in one step."""

    sequence: Sequence
    start: int
    end: int
    emits: bool
    pages: list[int]
    window_pages: list[int]
    state: int
    restore: int | None
    saves: list[tuple[int, int]]


class FakeDevice:
    """Memory of all components, and the steps in flight."""

    def __init__(self, cache: CacheManager) -> None:
        self.page_size = cache.page_size
        self.has_kv = cache.kv.slot_bytes > 0
        self.window = 0 if cache.window is None else cache.window.window
        self.memory: list[dict[int, int]] = [{}, {}]
        self.states: dict[int, int] = {}
        self.in_flight: deque[list[Row]] = deque()

    def run_oldest(self, token: int) -> None:
        """The oldest step runs; each sequence that emits gets a token."""
        rows = self.in_flight.popleft()
        self._copy(rows)
        for row in rows:
            self._store(row)
        for row in rows:
            if not row.sequence.ended:
                self._read(row)
        self._advance(rows)
        for row in rows:
            if row.emits:
                row.sequence.pending -= 1
                if not row.sequence.ended:
                    row.sequence.tokens.append(token)
                    row.sequence.handle.key.append(token)

    def _copy(self, rows: list[Row]) -> None:
        """Before anything else, states are copied: all read, then all written."""
        copies = [
            (row, self.states.get(row.restore, 0)) for row in rows if row.restore is not None and row.restore >= 0
        ]
        for row, content in copies:
            self.states[row.state] = content
        for row in rows:
            if row.restore == -1:
                assert row.start == 0, "a sequence begins in the middle without a state"
                self.states[row.state] = row.sequence.prefix(0)

    def _slots(self, row: Row, group: int, position: int) -> int:
        page = (row.pages, row.window_pages)[group][position // self.page_size]
        assert page >= 0, "a position has no page"
        return page * self.page_size + position % self.page_size

    def _store(self, row: Row) -> None:
        for position in range(row.start, row.end):
            content = row.sequence.prefix(position + 1)
            if self.has_kv:
                self.memory[0][self._slots(row, 0, position)] = content
            if self.window:
                self.memory[1][self._slots(row, 1, position)] = content

    def _read(self, row: Row) -> None:
        if self.has_kv:
            for position in range(row.end):
                content = self.memory[0].get(self._slots(row, 0, position))
                assert content == row.sequence.prefix(position + 1), f"wrong KV at {position}"
        if self.window:
            for position in range(max(0, row.start - self.window + 1), row.end):
                content = self.memory[1].get(self._slots(row, 1, position))
                assert content == row.sequence.prefix(position + 1), f"wrong window KV at {position}"
        if row.state >= 0:
            assert self.states[row.state] == row.sequence.prefix(row.start), f"wrong state after {row.start}"

    def _advance(self, rows: list[Row]) -> None:
        written = [row.state for row in rows if row.state >= 0] + [slot for row in rows for _, slot in row.saves]
        assert len(written) == len(set(written)), "two rows of a step write one state"
        for row in rows:
            if row.state >= 0:
                self.states[row.state] = row.sequence.prefix(row.end)
            for position, slot in row.saves:
                assert row.start < position <= row.end
                self.states[slot] = row.sequence.prefix(position)
