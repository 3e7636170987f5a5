"""What a record is worth in arithmetic: the FLOPs that a hit on it saves, beyond what the next best one would save."""

from __future__ import annotations

from typing import Protocol

from pando.cache.node import Node, Record


class FlopProfile(Protocol):
    """The arithmetic of a model's prefill."""

    def flops(self, num_tokens: int) -> float:
        """Floating-point operations of a prefill of `num_tokens` tokens from an empty cache."""


class LinearProfile:
    """Every token costs the same: what remains if nothing is known of a model."""

    def flops(self, num_tokens: int) -> float:
        """One per token."""
        return float(num_tokens)


class Worth:
    """FLOPs and bytes of records.

    The FLOPs saved by a state are those of a prefill to its depth less those to the nearest state above it; so along a
    path of states they add up to the whole. KV is worth what the state at its end is worth; without states, its own
    tokens. KV that no state needs is worth nothing.
    """

    def __init__(
        self, profile: FlopProfile, slot_bytes: tuple[int, ...], page_size: int, window: int | None, state: int | None
    ) -> None:
        self._flops = profile.flops
        self.token_bytes = slot_bytes[0] / page_size
        self.slot_bytes = slot_bytes
        self._window = window
        self.state = state

    def between(self, tokens: int, above: int) -> float:
        """FLOPs saved by resuming after `tokens` tokens instead of after `above`."""
        return self._flops(tokens) - self._flops(above)

    def above(self, node: Node) -> int:
        """Depth from which a request must start if nothing of `node` is there."""
        parent = node.parent
        state = self.state
        if state is None:
            return 0 if parent is None else parent.depth
        while parent is not None and not len(parent.records[state].slots):
            parent = parent.parent
        return 0 if parent is None else parent.depth

    def saved(self, record: Record) -> float:
        """FLOPs saved if `record` is kept."""
        node = record.node
        if record.component == self._window:
            return self.between(record.reach, self.above(node)) if record.reach else 0.0
        if self.state is not None and not len(node.records[self.state].slots):
            return 0.0
        return self.between(node.depth, self.above(node))

    def bytes(self, record: Record) -> int:
        """Bytes of `record`."""
        return len(record.slots) * self.slot_bytes[record.component]

    def freed(self, record: Record) -> int:
        """Bytes that become free if `record` is evicted by whole nodes: a leaf goes with all it holds."""
        node = record.node
        return self.bytes(record) if node.children else sum(map(self.bytes, node.records))
