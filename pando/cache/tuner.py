"""Chooses among eviction policies by what each would have saved: every candidate runs as a shadow, always warm."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

CANDIDATES = ("reuse", "gdsf:0.25", "lru")
"""The first is used until another one has shown that it is better."""
WINDOW = 256
"""Requests that a comparison looks at."""
GAIN = 1.02
"""A challenger must save this much more than the policy in use, on both halves of the window and in the long run."""
MEMORY = 0.999
"""Weight that a request loses with each one after it, in the long run."""


class Tuner:
    """Compares what shadows of the cache, one per policy, saved of the last requests. Never on a window not yet full.

    The policy that saved most in the older half is the challenger; the newer half, which had no part in choosing it,
    must confirm the gain, and so must all requests so far, older ones counting less and less. So chance rarely
    switches, and a lasting change of the load does.
    """

    def __init__(self, candidates: Sequence[str] = CANDIDATES, window: int = WINDOW, gain: float = GAIN) -> None:
        self.candidates = tuple(candidates)
        self.choice = self.candidates[0]
        self._half = window // 2
        self._gain = gain
        self._saved: deque[Mapping[str, float]] = deque(maxlen=2 * self._half)
        self._since = 0
        self._long_run = dict.fromkeys(self.candidates, 0.0)

    def observe(self, saved: Mapping[str, float]) -> bool:
        """One request: what each policy's shadow saved of it. True if `choice` changed."""
        self._saved.append(saved)
        self._long_run = {name: MEMORY * total + saved[name] for name, total in self._long_run.items()}
        self._since += 1
        if len(self._saved) < 2 * self._half or self._since < self._half // 4:
            return False
        self._since = 0
        rows = list(self._saved)
        old, new = self._sums(rows[: self._half]), self._sums(rows[self._half :])
        best = max(self.candidates, key=lambda name: old[name])
        if best == self.choice or not all(
            part[best] > self._gain * part[self.choice] for part in (old, new, self._long_run)
        ):
            return False
        self.choice = best
        return True

    def _sums(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {name: sum(row[name] for row in rows) for name in self.candidates}
