"""The eviction policies: orders among records, by name."""

from __future__ import annotations

from collections.abc import Iterator

from pando.cache.node import Record
from pando.cache.value import Policy
from pando.cache.value_flops import Worth
from pando.cache.value_reuse import Reuse
from pando.errors import ConfigError

POLICY_NAMES = ("reuse", "lru", "lru_leaf", "marconi:ALPHA", "gdsf:BETA", "tuned")
"""What a cache understands: `policy_of` all but the last, which is a choice among them (`tuner.py`)."""


class Lru:
    """Least recently used node first. Candidates: nodes with at most one child; an inner one gives up its state only.

    A fork keeps what it has while both branches live, unless nothing else is left.
    """

    name = "lru"
    whole_leaves = True
    looks_at_all = False
    most_children = 1

    def place(self, record: Record) -> tuple[int, int, float]:
        """The time of the last hit that ended in the node, or that needed the window."""
        if record.time >= 0:
            return 0, 0, record.time
        return int(len(record.node.children) > self.most_children), 0, record.node.last_use

    def bias(self, group: int) -> float:
        """There is one group."""
        return 0.0

    def newcomer(self, tokens: int, above: int) -> float:
        """Whatever comes is more recent than what is there."""
        return float("inf")

    def made(self, record: Record) -> None:
        """The node's time is all there is."""

    def touched(self, record: Record, num_hits: int) -> None:
        """The node's time is all there is."""

    def needed(self, record: Record, owner: Record) -> None:
        """The record's time is all there is."""

    def evicted(self, record: Record, score: float) -> None:
        """Nothing ages."""

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The lowest score."""
        return None


class LruLeaf(Lru):
    """Least recently used leaf first: an inner node keeps its state until it is a leaf."""

    name = "lru_leaf"
    most_children = 0


class Marconi(Lru):
    """Recency plus alpha times the FLOPs saved per byte, both scaled to [0, 1] over the candidates (arXiv 2411.19379).

    The scale moves with every candidate, so each choice looks at all of them: for comparison, not for large trees.
    """

    looks_at_all = True

    def __init__(self, alpha: float, worth: Worth) -> None:
        self.name = f"marconi:{alpha:g}"
        self.alpha = alpha
        self._worth = worth

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The least sum of scaled recency and alpha times scaled efficiency."""
        records = [record for record in candidates if record.time < 0]
        if not records:
            return None
        times = [record.node.last_use for record in records]
        gains = [self._worth.saved(r) / max(1, self._worth.freed(r)) for r in records]
        first, fewest = min(times), min(gains)
        span, width = (max(times) - first) or 1, (max(gains) - fewest) or 1.0
        scores = [(t - first) / span + self.alpha * (g - fewest) / width for t, g in zip(times, gains, strict=True)]
        return records[min(range(len(records)), key=lambda i: (scores[i], times[i]))]


class Gdsf:
    """Greedy dual: H = L + frequency^beta * FLOPs saved / bytes, where L is the H of the last victim when last used.

    (Greedy-Dual-Size-Frequency, Cherkasova 1998, with FLOPs as the cost.) Every record is a candidate of its own.
    """

    whole_leaves = False
    looks_at_all = False

    def __init__(self, beta: float, worth: Worth) -> None:
        self.name = f"gdsf:{beta:g}"
        self.beta = beta
        self.floor = 0.0
        self._worth = worth

    def place(self, record: Record) -> tuple[int, int, float]:
        """H of the record."""
        gain = self._worth.saved(record) / max(1, self._worth.bytes(record))
        return 0, 0, record.floor + record.frequency**self.beta * gain

    def bias(self, group: int) -> float:
        """There is one group."""
        return 0.0

    def newcomer(self, tokens: int, above: int) -> float:
        """H of a state used once, now."""
        assert self._worth.state is not None
        return self.floor + self._worth.between(tokens, above) / max(1, self._worth.slot_bytes[self._worth.state])

    def made(self, record: Record) -> None:
        """Its H starts from the present floor."""
        record.floor = self.floor

    def touched(self, record: Record, num_hits: int) -> None:
        """Its H starts from the present floor."""
        record.floor = self.floor

    def needed(self, record: Record, owner: Record) -> None:
        """Its H starts from the present floor."""
        record.floor = self.floor

    def evicted(self, record: Record, score: float) -> None:
        """The floor rises to the victim's H: what is not used sinks relative to what is."""
        self.floor = max(self.floor, score)

    def choose(self, candidates: Iterator[Record]) -> Record | None:
        """The lowest score."""
        return None


def policy_of(policy: str | Policy, worth: Worth) -> Policy:
    """The policy of this name (see `POLICY_NAMES`), or the object itself. Raises ConfigError for an unknown name."""
    if not isinstance(policy, str):
        return policy
    name, _, parameter = policy.partition(":")
    try:
        if name in ("reuse", "lru", "lru_leaf") and not parameter:
            return Reuse(worth) if name == "reuse" else Lru() if name == "lru" else LruLeaf()
        if name == "marconi":
            return Marconi(float(parameter or 1.0), worth)
        if name == "gdsf":
            return Gdsf(float(parameter or 0.25), worth)
    except ValueError:
        pass
    raise ConfigError(f"unknown eviction policy {policy!r}; choose one of {', '.join(POLICY_NAMES)}")
