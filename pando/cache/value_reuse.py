"""The default policy: greedy dual with a learned probability of reuse."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pando.cache.node import Record
from pando.cache.value_flops import Worth

DECAY = 0.995
"""Weight of the past at every observation: about the last 200 of a class count."""
PRIOR = 1.0
"""Observations by which a class without a history of its own resembles all the others."""
LAST, BRANCH = 1, 2
DEPTH_SHIFT = 3
_DEPTHS = [2 * 4**exponent for exponent in range(32)]
"""Tokens in the middle of each class of depth."""
WORTHLESS = -1
"""Group of records from which nothing can resume."""


class Reuse:
    """Greedy dual whose frequency is replaced by a probability: H = L + p(class) * d(depth).

    L is the H of the last victim, as it was when the node was last used. A node's class says where it came from (the
    end of a request, or a fork), whether a request resumed there before, and, where recurrent states decide, its depth
    in powers of four. p(class) is the share of the nodes of that class that were used again before being evicted; old
    observations fade. So what agents leave behind and never come back to, or the state a conversation has just moved on
    from, is recognised by its kind and not only by its age. Among equals the one used longest ago goes first.

    d is what a hit saves per byte: after n tokens it saves n, and n tokens' KV and a state are kept for it. Scaled to 1
    for KV alone it is n * kv / (n * kv + state), with n from the class: states of short prefixes are dear.

    Without recurrent states every node can be resumed from, so classes differ less: there the square root of p counts,
    and d is 1, as it is without KV.
    """

    name = "reuse"
    whole_leaves = True
    looks_at_all = False

    def __init__(self, worth: Worth) -> None:
        self.floor = 0.0
        self._worth = worth
        self._has_states = worth.state is not None
        self._index = 0 if worth.state is None else worth.state
        kv, state = worth.token_bytes, worth.slot_bytes[-1]
        self._density = [n * kv / (n * kv + state) if kv else 1.0 for n in _DEPTHS]
        self._used: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._all_used, self._all_seen = PRIOR, 2 * PRIOR

    def __copy__(self) -> Reuse:
        """Another one that has learned the same so far."""
        twin = Reuse(self._worth)
        twin.floor = self.floor
        twin._used, twin._seen = dict(self._used), dict(self._seen)
        twin._all_used, twin._all_seen = self._all_used, self._all_seen
        return twin

    def place(self, record: Record) -> tuple[int, int, float]:
        """The node's class and L; forks go when nothing else is left, and what nothing can resume from goes first."""
        if record.time >= 0:
            return 0, record.kind, record.floor
        node = record.node
        first = node.records[self._index]
        tier = int(len(node.children) > 1)
        return (tier, first.kind, first.floor) if len(first.slots) else (tier, WORTHLESS, -1.0)

    def bias(self, group: int) -> float:
        """What a class adds to L."""
        if group == WORTHLESS:
            return 0.0
        if not self._has_states:
            return math.sqrt(self.probability(group))
        return self.probability(group) * self._density[group >> DEPTH_SHIFT]

    def newcomer(self, tokens: int, above: int) -> float:
        """H of a state saved at a fork now."""
        return self.floor + self.bias(self._class(BRANCH, False, tokens))

    def made(self, record: Record) -> None:
        """Nothing resumes from it yet."""

    def needed(self, record: Record, owner: Record) -> None:
        """A window is worth as much as what resumes behind it."""
        first = owner.node.records[self._index]
        record.kind, record.floor = first.kind, first.floor

    def touched(self, record: Record, num_hits: int) -> None:
        """Learn from hits, and lift the node to the present L. Only states count where there are any, else KV."""
        if record.component != self._index:
            return
        node, kind = record.node, record.kind
        if kind and num_hits:
            self._learn(kind, 1.0)
        origin = kind & 3 or (BRANCH if node.children else LAST)
        record.kind = self._class(origin, num_hits > 0 or bool(kind & 4), node.depth)
        record.floor = self.floor

    def evicted(self, record: Record, score: float) -> None:
        """L rises to the victim's H, and its class was not used again."""
        self.floor = max(self.floor, score)
        if record.time >= 0:
            return
        first = record.node.records[self._index]
        if first.kind:
            self._learn(first.kind, 0.0)
            if self._has_states:
                first.kind = 0  # KV may go in parts: what is left keeps its class

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The lowest score."""
        return None

    def probability(self, kind: int) -> float:
        """Share of the nodes of a class that are used again."""
        overall = self._all_used / self._all_seen
        if kind not in self._seen:
            return overall
        return (self._used[kind] + PRIOR * overall) / (self._seen[kind] + PRIOR)

    def _learn(self, kind: int, used: float) -> None:
        if kind not in self._seen:
            self._used[kind], self._seen[kind] = PRIOR * self._all_used / self._all_seen, PRIOR
        self._used[kind] = self._used[kind] * DECAY + used
        self._seen[kind] = self._seen[kind] * DECAY + 1.0
        self._all_used = self._all_used * DECAY + used
        self._all_seen = self._all_seen * DECAY + 1.0

    def _class(self, origin: int, used: bool, depth: int) -> int:
        """Origin in the lowest two bits, whether it was used in the next, half the logarithm of the depth above."""
        return origin | used << 2 | ((depth.bit_length() - 1) // 2 << DEPTH_SHIFT if self._has_states else 0)
