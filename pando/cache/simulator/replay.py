"""Replays a trace against a `CacheManager`, one request after the other, with nothing behind the slots.

The calls are those of the engine: admit, plan the states to save, publish, grow, release. All tokens of a request, the
output included, count as computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from pando.cache.budget import CacheLayout
from pando.cache.handle import CacheHandle
from pando.cache.key import TOKEN_BYTES, TokenKey
from pando.cache.manager import CacheManager
from pando.cache.simulator.models import SimulatedModel
from pando.cache.simulator.report import Report
from pando.cache.simulator.traces import Trace, TraceRequest
from pando.cache.spec import CachePlan, SlidingWindow
from pando.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration of the cache. budget_bytes: math.inf = nothing is ever evicted."""

    model: SimulatedModel
    policy: str
    admission: str
    budget_bytes: float
    page_size: int


def layout_of(plan: CachePlan, page_size: int) -> CacheLayout:
    """The plan's layers gathered into groups."""
    windows = [layer for layer in plan.layers if isinstance(layer, SlidingWindow)]
    per_token = sum(layer.bytes_per_token for layer in windows)
    return CacheLayout(
        page_size=page_size,
        kv_bytes_per_token=plan.bytes_per_token - per_token,
        window=max((layer.window for layer in windows), default=0),
        window_bytes_per_token=per_token,
        state_bytes=plan.bytes_per_state,
    )


class Replay:
    """One run over a trace."""

    def __init__(self, setup: Setup, trace: Trace) -> None:
        self.setup = setup
        self._trace = trace
        self._layout = layout_of(setup.model.plan, setup.page_size)
        self.cache = CacheManager(
            self._layout,
            _enough(self._layout, trace) if math.isinf(setup.budget_bytes) else int(setup.budget_bytes),
            policy=setup.policy,
            admission=setup.admission,
            profile=setup.model.flops,
        )
        self.report = Report.of(setup.model, self._layout)
        self._step = 0

    def run(self, progress: Callable[[], None] | None = None) -> Report:
        """Replay all requests; `progress` is called after each. Returns the report, also kept in `report`."""
        start = time.perf_counter()
        for request in self._trace:
            self.serve(request)
            if progress is not None:
                progress()
        report, setup = self.report, self.setup
        report.seconds = time.perf_counter() - start
        report.setup = {
            "model": setup.model.name,
            "policy": setup.policy,
            "admission": setup.admission,
            "budget": {"device": None if math.isinf(setup.budget_bytes) else int(setup.budget_bytes)},
            "page_size": setup.page_size,
        }
        stats = self.cache.stats()
        report.evictions = {name: slots.num_evicted for name, slots in stats.by_component.items()}
        report.held_bytes = stats.held_bytes
        return report

    def serve(self, request: TraceRequest) -> int:
        """One request from admission to release; returns the tokens of its prompt that were in the cache."""
        key = TokenKey()
        key.data += request.prompt
        if request.whole_prompt:
            key.data += request.output[:TOKEN_BYTES]  # what follows a whole prompt makes its last page matchable
        padded = len(request.prompt) // TOKEN_BYTES
        handle = self.cache.admit(key, "", padded, limit=padded)
        if handle.denied:
            self.report.refused(request.prompt_len)
            return 0
        del key.data[len(request.prompt) :]
        hits = min(handle.num_cached, request.prompt_len)
        restored = int(handle.restore >= 0)
        saves = self._step_of(handle, handle.num_cached, padded)
        total = padded + request.output_len
        key.data += request.output
        kept = not self.cache.grow(handle, total).denied
        if kept:
            saves += self._step_of(handle, padded, total)
        else:
            del key.data[len(request.prompt) :]
            total = padded
        self.cache.release(handle, total, publish=True, state_at=total if self._layout.state_bytes else None)
        self.report.served(request.prompt_len, hits, computed=total - handle.num_cached, restored=restored, saved=saves)
        return hits

    def _step_of(self, handle: CacheHandle, start: int, end: int) -> int:
        """A step that computes positions [start, end); returns the number of states it saves."""
        if start >= end:
            return 0
        self._step += 1
        saves = self.cache.plan_saves(handle, start, end)
        self.cache.publish(handle, end)
        self.cache.launched(self._step)
        self.cache.collected(self._step)
        return len(saves)


def _enough(layout: CacheLayout, trace: Trace) -> int:
    """Bytes that hold everything a trace could leave behind."""
    page, pages, states = layout.page_size, 0, 0
    for request in trace:
        pages += -(-(len(request.prompt) // TOKEN_BYTES + request.output_len) // page) + 1
        states += 4
    return (pages * page * (layout.kv_bytes_per_token + layout.window_bytes_per_token)) + states * layout.state_bytes


def parse_budget(text: str) -> float:
    """Bytes of the device tier in `device=4e9`, or in a number alone; `inf` is without bound. Raises ConfigError."""
    tiers = dict(_tier(part) for part in text.split(","))
    unknown = sorted(set(tiers) - {"device"})
    if unknown:
        raise ConfigError(f"budget {text!r}: the only tier is device, not {', '.join(unknown)}")
    return tiers["device"]


def _tier(part: str) -> tuple[str, float]:
    name, _, number = part.rpartition("=")
    try:
        size = float(number)
    except ValueError:
        size = math.nan
    if not size > 0:
        raise ConfigError(f"budget {part!r} is not a number of bytes; write for instance device=4e9 or device=inf")
    return name.strip() or "device", size
