"""What a replay found: counts, and the shares that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pando.cache.budget import CacheLayout
from pando.cache.simulator.models import SimulatedModel


@dataclass(slots=True)
class Bucket:
    """Requests whose prompts have about the same length."""

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0


@dataclass(slots=True)
class Report:
    """Counts of one replay. seconds: wall time, reading of the trace included. refused_requests fitted into no budget.

    buckets: by the power of two at or above the prompt's length. evictions: slots by component (pages of "full" and
    "window", "state"). Bytes: of KV written, of states saved beside a step and restored before one.
    """

    model: SimulatedModel
    layout: CacheLayout
    setup: dict[str, object] = field(default_factory=dict)
    requests: int = 0
    refused_requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    hit_requests: int = 0
    computed_tokens: int = 0
    states_saved: int = 0
    states_restored: int = 0
    prompt_flops: float = 0.0
    saved_flops: float = 0.0
    buckets: dict[int, Bucket] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    held_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, model: SimulatedModel, layout: CacheLayout) -> Report:
        """An empty report."""
        return cls(model, layout)

    def served(self, prompt_len: int, hits: int, *, computed: int, restored: int, saved: int) -> None:
        """A request ended: `hits` of its prompt's tokens were cached, `computed` tokens were written."""
        self.requests += 1
        self.prompt_tokens += prompt_len
        self.hit_tokens += hits
        self.hit_requests += hits > 0
        self.computed_tokens += computed
        self.states_restored += restored
        self.states_saved += saved
        self.prompt_flops += self.model.flops.flops(prompt_len)
        self.saved_flops += self.model.flops.flops(hits)
        bucket = self.buckets.setdefault(1 << max(0, prompt_len - 1).bit_length(), Bucket())
        bucket.requests += 1
        bucket.prompt_tokens += prompt_len
        bucket.hit_tokens += hits

    def refused(self, prompt_len: int) -> None:
        """A request that the budget can not hold ran without the cache."""
        self.refused_requests += 1
        self.served(prompt_len, 0, computed=0, restored=0, saved=0)

    @property
    def token_hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def flops_saved(self) -> float:
        """Share of the prompts' operations that the cache saved."""
        return self.saved_flops / self.prompt_flops if self.prompt_flops else 0.0

    @property
    def requests_per_second(self) -> float:
        """Replayed requests per second of wall time."""
        return self.requests / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, object]:
        """The report for programs, ready for JSON."""
        slot_bytes = dict(zip(self.evictions, self.layout.slot_bytes, strict=True))
        per_token = self.layout.kv_bytes_per_token + self.layout.window_bytes_per_token
        return {
            **self.setup,
            "requests": self.requests,
            "refused_requests": self.refused_requests,
            "prompt_tokens": self.prompt_tokens,
            "hit_tokens": self.hit_tokens,
            "token_hit_rate": self.token_hit_rate,
            "request_hit_rate": self.hit_requests / self.requests if self.requests else 0.0,
            "flops_saved": self.flops_saved,
            "flops_saved_total": self.saved_flops,
            "flops_total": self.prompt_flops,
            "hits_by_length": [
                {
                    "up_to": limit,
                    "requests": bucket.requests,
                    "prompt_tokens": bucket.prompt_tokens,
                    "hit_tokens": bucket.hit_tokens,
                    "token_hit_rate": bucket.hit_tokens / bucket.prompt_tokens if bucket.prompt_tokens else 0.0,
                }
                for limit, bucket in sorted(self.buckets.items())
            ],
            "bytes_moved": {
                "kv_written": self.computed_tokens * per_token,
                "states_saved": self.states_saved * self.layout.state_bytes,
                "states_restored": self.states_restored * self.layout.state_bytes,
            },
            "evictions": {
                name: {"slots": count, "bytes": count * slot_bytes[name]} for name, count in self.evictions.items()
            },
            "held_bytes": self.held_bytes,
            "seconds": self.seconds,
            "requests_per_second": self.requests_per_second,
        }

    def as_text(self) -> str:
        """The report for people."""
        facts = self.as_dict()
        budget = self.setup["budget"]
        assert isinstance(budget, dict)
        moved, evicted = facts["bytes_moved"], facts["evictions"]
        assert isinstance(moved, dict) and isinstance(evicted, dict)
        lines = [
            f"{self.setup['model']}, policy {self.setup['policy']}, admission {self.setup['admission']}, "
            f"budget {size_text(budget['device'])}, pages of {self.setup['page_size']}",
            f"  requests     {self.requests} in {self.seconds:.1f} s ({self.requests_per_second:,.0f}/s), "
            f"{self.refused_requests} did not fit",
            f"  token hits   {self.token_hit_rate:.4f}  ({self.hit_tokens:,} of {self.prompt_tokens:,} prompt tokens)",
            f"  FLOPs saved  {self.flops_saved:.4f}  ({self.saved_flops:.3e} of {self.prompt_flops:.3e})",
            "  moved        " + ", ".join(f"{name.replace('_', ' ')} {size_text(b)}" for name, b in moved.items()),
            "  evicted      "
            + ", ".join(f"{name} {c['slots']:,} ({size_text(c['bytes'])})" for name, c in evicted.items()),
            "  prompt up to     requests    token hits",
        ]
        for limit, bucket in sorted(self.buckets.items()):
            rate = bucket.hit_tokens / bucket.prompt_tokens if bucket.prompt_tokens else 0.0
            lines.append(f"  {limit:>12,} {bucket.requests:>12,}        {rate:.4f}")
        return "\n".join(lines)


def size_text(num_bytes: float | None) -> str:
    """`4 GB`; None and infinity are unbounded."""
    if num_bytes is None or math.isinf(num_bytes):
        return "unbounded"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {name}"
    return f"{num_bytes:.0f} B"
