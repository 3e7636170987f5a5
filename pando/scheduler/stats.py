"""Exact counters of the engine: hit + miss tokens = prompt tokens, always."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pando.scheduler.request import Request


@dataclass(slots=True)
class Stats:
    """Totals since start. Tokens are counted when their request is first admitted; recomputation is apart."""

    requests: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    generation_tokens: int = 0
    forced_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
    device_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})

    def count_admission(self, request: Request, num_cached: int, first: bool) -> None:
        """A request was admitted with `num_cached` tokens found; `first` is False after a retraction."""
        if first:
            self.hit_tokens += num_cached
            self.miss_tokens += request.prompt_len - num_cached
        else:
            self.recomputed_tokens += request.known - num_cached
