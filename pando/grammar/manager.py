"""Compiles grammars beside the engine: a few threads, one compile for equal requests, a bounded cache.

    submit(rid, spec) --> cached: ready at the next poll
                      --> refused lately: the same error again
                      --> compiling already: wait for it
                      --> else compile in the pool
    poll()            --> [(rid, grammar or error)], never blocks

The shape is that of the scheduler's admission gate, so that a request's prompt may be read from caches meanwhile.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, PandoError, StepFailed
from pando.grammar.preparing import LARGE
from pando.grammar.protocols import CompiledGrammar, GrammarCompiler

_log = logging.getLogger(__name__)

Outcome = CompiledGrammar | PandoError


@dataclass(frozen=True, slots=True)
class CacheBounds:
    """num_bytes, num_grammars: what is kept of compiled grammars. refusals_s, num_refusals: how long and how many
    errors are repeated without compiling again. deadline_s: longest wait of a request for its grammar."""

    num_bytes: int = 256 << 20
    num_grammars: int = 4_096
    refusals_s: float = 30.0
    num_refusals: int = 1_024
    deadline_s: float = 30.0


@dataclass
class ManagerStats:
    """Counts since the start; `num_bytes` and `num_cached` are of now."""

    submitted: int = 0
    hits: int = 0
    joined: int = 0
    compiled: int = 0
    refused: int = 0
    timed_out: int = 0
    evicted: int = 0
    num_bytes: int = 0
    num_cached: int = 0
    compile_ms: float = 0.0


@dataclass
class _Compile:
    """A compile that runs, when it began, and the requests that wait for it."""

    began: float
    future: Future[Outcome]
    waiting: list[str] = field(default_factory=list)


NICENESS = 5
"""Of the compiles' threads, where threads have one. Not more: they hold the interpreter now and then, and whoever waits
for it would wait for the processor with them."""


def _step_back() -> None:
    """Let the threads that compute steps go before this one."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        try:
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
        except OSError as error:
            _log.debug("the compiles' threads keep their priority: %s", error)


class GrammarManager:
    """Owns the pools and the cache. All methods return at once and may be called from any thread but `close`.

    num_threads: for sources of ordinary size; large ones have a thread of their own. around: entered in the thread for
    the time of each compile.
    """

    def __init__(
        self,
        backend: GrammarCompiler,
        num_threads: int = 1,
        bounds: CacheBounds | None = None,
        clock: Callable[[], float] = time.monotonic,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._backend = backend
        self._bounds = bounds or CacheBounds()
        self._clock = clock
        self._around = around
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pando-grammar", initializer=_step_back)
        # Apart, so that a small one need not wait for the large ones before it.
        self._large = ThreadPoolExecutor(1, thread_name_prefix="pando-grammar-large", initializer=_step_back)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._refusals: OrderedDict[str, tuple[float, PandoError]] = OrderedDict()
        self._running: dict[str, _Compile] = {}
        self._keys: dict[str, str] = {}
        self._ready: deque[tuple[str, Outcome]] = deque()
        self._stats = ManagerStats()

    def submit(self, rid: str, spec: GrammarSpec) -> None:
        """Ask for a grammar on behalf of a request; `poll` reports it under `rid`."""
        key = self._backend.key(spec)
        with self._lock:
            self._stats.submitted += 1
            self._keys[rid] = key
            known = self._known(key)
            if known is not None:
                self._stats.hits += 1
                self._ready.append((rid, known))
                return
            compile_ = self._running.get(key)
            if compile_ is None:
                pool = self._pool if len(spec.source) < LARGE else self._large
                compile_ = _Compile(self._clock(), pool.submit(self._compile, spec))
                self._running[key] = compile_
            else:
                self._stats.joined += 1
            compile_.waiting.append(rid)

    def poll(self) -> list[tuple[str, Outcome]]:
        """Requests whose grammar is ready or has failed since the last call."""
        with self._lock:
            for key in [key for key, each in self._running.items() if self._settled(each)]:
                self._settle(key, self._running.pop(key))
            ready = [(rid, outcome) for rid, outcome in self._ready if self._keys.pop(rid, None) is not None]
            self._ready.clear()
        return ready

    def cancel(self, rid: str) -> None:
        """The request is gone; `poll` will not report it. A compile that others may want goes on."""
        with self._lock:
            key = self._keys.pop(rid, None)
            self._ready = deque(entry for entry in self._ready if entry[0] != rid)  # another may take its name
            compile_ = self._running.get(key) if key is not None else None
            if compile_ is not None and rid in compile_.waiting:
                compile_.waiting.remove(rid)
                if not compile_.waiting and compile_.future.cancel():
                    del self._running[key]  # type: ignore[arg-type]

    def stats(self) -> ManagerStats:
        """A copy of the counters."""
        with self._lock:
            return ManagerStats(**{**vars(self._stats), "num_cached": len(self._cache)})

    def close(self) -> None:
        """Stop the pools; waits for compiles that run."""
        for pool in (self._pool, self._large):
            pool.shutdown(wait=True, cancel_futures=True)

    def _compile(self, spec: GrammarSpec) -> Outcome:
        try:
            with self._around():
                return self._backend.compile(spec)
        except PandoError as error:
            return error
        except BaseException as error:  # a panic of native code is none of Exception, and must not end the engine
            _log.exception("compiling a grammar failed")
            return StepFailed(f"internal error while compiling the grammar: {error!r}")

    def _known(self, key: str) -> Outcome | None:
        grammar = self._cache.get(key)
        if grammar is not None:
            self._cache.move_to_end(key)
            return grammar
        until, error = self._refusals.get(key, (0.0, None))
        if error is not None and self._clock() < until:
            return error
        self._refusals.pop(key, None)
        return None

    def _settled(self, compile_: _Compile) -> bool:
        return compile_.future.done() or self._clock() - compile_.began > self._bounds.deadline_s

    def _settle(self, key: str, compile_: _Compile) -> None:
        if compile_.future.done():
            outcome: Outcome = compile_.future.result()
        else:
            # The thread can not be stopped; the backend's own limits end it. Nobody waits for it any longer.
            outcome = InvalidGrammar(f"the grammar did not compile in {self._bounds.deadline_s:g} s; simplify it")
            self._stats.timed_out += 1
        self._ready.extend((rid, outcome) for rid in compile_.waiting)
        if isinstance(outcome, PandoError):
            self._stats.refused += 1
            if isinstance(outcome, InvalidGrammar):
                self._refusals[key] = (self._clock() + self._bounds.refusals_s, outcome)
                while len(self._refusals) > self._bounds.num_refusals:
                    self._refusals.popitem(last=False)
        else:
            self._stats.compiled += 1
            self._stats.compile_ms += outcome.compile_ms
            self._keep(key, outcome)

    def _keep(self, key: str, grammar: CompiledGrammar) -> None:
        """Cache a grammar, dropping the least recently used beyond the bounds. States that exist live on."""
        self._cache[key] = grammar
        self._stats.num_bytes += grammar.nbytes
        while self._cache and (
            self._stats.num_bytes > self._bounds.num_bytes or len(self._cache) > self._bounds.num_grammars
        ):
            _, dropped = self._cache.popitem(last=False)
            self._stats.num_bytes -= dropped.nbytes
            self._stats.evicted += 1
