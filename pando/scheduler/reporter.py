"""One log line every ten seconds while there is work: who runs, who waits, how fast, how full, how much was shared."""

from __future__ import annotations

import logging
import time

from pando.scheduler.admission import Admission
from pando.scheduler.stats import Stats

_log = logging.getLogger(__name__)

EVERY_SECONDS = 10.0


class Reporter:
    """Remembers the counters of its last line; a line shows what came since."""

    def __init__(self) -> None:
        self._at = time.monotonic()
        self._hit = self._miss = self._generated = self._steps = 0

    def tick(self, stats: Stats, admission: Admission) -> None:
        """Log a line if it is time and something happened since the last one."""
        seconds = time.monotonic() - self._at
        if seconds < EVERY_SECONDS:
            return
        if stats.steps != self._steps:
            hit, miss = stats.hit_tokens - self._hit, stats.miss_tokens - self._miss
            cache = admission.cache.stats()
            _log.info(
                "running %d, waiting %d | in %.0f tok/s, out %.0f tok/s | cached %.0f%% of prompts | cache %.0f%% full",
                len(admission.running),
                len(admission.waiting),
                (hit + miss) / seconds,
                (stats.generation_tokens - self._generated) / seconds,
                100 * hit / max(1, hit + miss),
                100 * cache.held_bytes / max(1, cache.budget_bytes),
            )
        self._at = time.monotonic()
        self._hit, self._miss, self._steps = stats.hit_tokens, stats.miss_tokens, stats.steps
        self._generated = stats.generation_tokens
