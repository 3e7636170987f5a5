"""The default policy: greedy dual with a learned probability of reuse."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pando.cache.node import Record
from pando.cache.value_flops import Worth

DECAY = 0.995
"""Weight of the past at every observation: about the last 200 of a class count."""
PRIOR = 2.0
"""Observations by which a class without a history of its own resembles all the others."""
EXPONENT = 0.25
"""How much the FLOPs saved per byte count beside the probability of reuse."""
UNIT = 1e5
"""FLOPs per byte that count as 1."""
LAST, BRANCH = 1, 2


class Reuse:
    """Greedy dual whose frequency is replaced by a probability: H = L + p(class) * (FLOPs saved / bytes)^0.25.

    A node's class says where it came from (the end of a request, or a fork), whether a request resumed there before,
    and its depth, in powers of four. p(class) is the share of the nodes of that class that were used again before they
    were evicted; old observations fade. So what agents leave behind and never come back to, or the state a
    conversation has just moved on from, is recognised by its kind and not only by its age. H is computed once, when a
    node is made or used; L is the H of the last victim at that time.
    """

    name = "reuse"
    whole_leaves = True
    looks_at_all = False

    def __init__(self, worth: Worth) -> None:
        self.floor = 0.0
        self._worth = worth
        self._index = 0 if worth.state is None else worth.state
        self._state_bytes = 0 if worth.state is None else worth.slot_bytes[worth.state]
        self._used: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._all_used, self._all_seen = PRIOR, 2 * PRIOR

    def rank(self, record: Record) -> tuple[int, float]:
        """H of the record's node; forks go when nothing else is left, and what nothing can resume from goes first."""
        if record.time >= 0:
            return 0, record.score
        node = record.node
        first = node.records[self._index]
        return int(len(node.children) > 1), first.score if len(first.slots) else 0.0

    def newcomer(self, tokens: int, above: int) -> float:
        """H of a state saved at a fork now."""
        return self._value(_class(BRANCH, False, tokens), tokens, above)

    def made(self, record: Record) -> None:
        """Nothing resumes from it yet."""

    def needed(self, record: Record, owner: Record) -> None:
        """A window is worth as much as what resumes behind it."""
        record.score = owner.node.records[self._index].score

    def touched(self, record: Record, num_hits: int) -> None:
        """Learn from hits, and give the node its H. Only states count where there are any, else KV."""
        if record.component != self._index:
            return
        node, kind = record.node, record.kind
        if kind and num_hits:
            self._learn(kind, 1.0)
        origin = kind & 3 or (BRANCH if node.children else LAST)
        record.kind = _class(origin, num_hits > 0 or bool(kind & 4), node.depth)
        record.score = self._value(record.kind, node.depth, self._worth.above(node))

    def evicted(self, record: Record, score: float) -> None:
        """The floor rises to the victim's H, and its class was not used again."""
        self.floor = max(self.floor, score)
        if record.time >= 0:
            return
        first = record.node.records[self._index]
        if first.kind:
            self._learn(first.kind, 0.0)
            first.kind = 0

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The lowest score."""
        return None

    def probability(self, kind: int) -> float:
        """Share of the nodes of a class that are used again."""
        overall = self._all_used / self._all_seen
        if kind not in self._seen:
            return overall
        return (self._used[kind] + PRIOR * overall) / (self._seen[kind] + PRIOR)

    def _value(self, kind: int, tokens: int, above: int) -> float:
        """H of what lets a request resume after `tokens` tokens rather than `above`; its bytes are all in between."""
        gain = self._worth.between(tokens, above)
        if gain <= 0:
            return self.floor
        size = self._worth.token_bytes * (tokens - above) + self._state_bytes
        return self.floor + self.probability(kind) * math.pow(gain / max(1.0, size) / UNIT, EXPONENT)

    def _learn(self, kind: int, used: float) -> None:
        if kind not in self._seen:
            self._used[kind], self._seen[kind] = PRIOR * self._all_used / self._all_seen, PRIOR
        self._used[kind] = self._used[kind] * DECAY + used
        self._seen[kind] = self._seen[kind] * DECAY + 1.0
        self._all_used = self._all_used * DECAY + used
        self._all_seen = self._all_seen * DECAY + 1.0


def _class(origin: int, used: bool, depth: int) -> int:
    """Origin in the lowest two bits, whether it was used in the next, half the logarithm of the depth above."""
    return origin | used << 2 | (depth.bit_length() - 1) // 2 << 3
