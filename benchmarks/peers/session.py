"""Inside a peer's environment: loads one engine, runs the jobs on stdin, prints events. Standard library only.

stdin: {"settings": {...}, "jobs": [...]}. stdout has one JSON object a line: {"event": "ready", ...} after the first
token, {"event": "sample", ...} for each sample, {"event": "failure", ...} for a job that failed, {"event": "done"}.
What an engine prints itself goes to stderr.
"""

from __future__ import annotations

import bisect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from benchmarks.peers.machine import LoadMeter

PAUSE_SECONDS = 2.0
"""Before each sample, for every engine: what one does when it has nothing to do, it has done, as in a server."""
SEEN_SECONDS = 1.0
"""How long a process without jobs stays after its first token: its peak memory is read from the outside."""

Arrived = Callable[[int, list[int]], None]
"""Called when tokens arrive: index of the prompt, the new token ids."""
Figures = dict[str, float]
"""Of one sample: seconds, output_tokens, first_seconds, decode_tokens, decode_seconds; see `measure`."""


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts to continue together, greedily, by exactly `num_tokens`; EOS is a token like any other.

    prefix: tokens that they have in common, for engines that do not find out themselves.
    """

    prompts: list[list[int]]
    num_tokens: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """How an engine is loaded. model: folder or file in the engine's format; context: longest sequence in tokens;
    pool_tokens: what all sequences of the largest job hold together; requests: most sequences at once."""

    model: str
    variant: str
    context: int
    pool_tokens: int
    requests: int
    threads: int


class Engine(Protocol):
    """What most adapters in `engines/` give."""

    version: str

    def generate(self, work: Work, arrived: Arrived) -> None:
        """Do the work; returns when all tokens have arrived."""


class Measured(Protocol):
    """What `serve` runs: an engine that gives the figures of a sample. `Timed` makes one of an Engine."""

    version: str
    first_tokens: list[int]
    """First token of each prompt of the last sample, if known: engines with the same weights should agree."""

    def sample(self, work: Work) -> Figures:
        """The figures of `measure`."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that arrived together. seconds: since the requests were handed in."""

    seconds: float
    index: int
    tokens: int


def measure(arrivals: list[Arrival], seconds: float) -> Figures:
    """Figures of one sample: total, time until every sequence has begun, and the decode while none has ended.

    The decode begins when the last sequence got its first token and ends when the first sequence got its last one:
    between the two all sequences are in every step. Tokens of one step do not arrive at one instant, so a sequence's
    count at a border is read off the line between its arrivals; else up to a whole step would be lost.
    """
    curves: dict[int, list[tuple[float, float]]] = {}
    for arrival in arrivals:
        curve = curves.setdefault(arrival.index, [])
        curve.append((arrival.seconds, arrival.tokens + (curve[-1][1] if curve else 0.0)))
    begin = max(curve[0][0] for curve in curves.values())
    end = max(begin, min(curve[-1][0] for curve in curves.values()))
    return {
        "seconds": seconds,
        "output_tokens": sum(arrival.tokens for arrival in arrivals),
        "first_seconds": begin,
        "decode_tokens": sum(tokens_at(curve, end) - tokens_at(curve, begin) for curve in curves.values()),
        "decode_seconds": end - begin,
    }


def tokens_at(curve: list[tuple[float, float]], seconds: float) -> float:
    """Tokens of a sequence at a time between its first and its last arrival; curve: (seconds, tokens so far)."""
    at = bisect.bisect_left(curve, (seconds, 0.0))
    if at == 0:
        return curve[0][1]
    if at == len(curve):
        return curve[-1][1]
    (t0, n0), (t1, n1) = curve[at - 1], curve[at]
    return n0 + (n1 - n0) * (seconds - t0) / (t1 - t0)


class Timed:
    """Takes the times of an engine's tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.version = engine.version
        self.first_tokens: list[int] = []

    def sample(self, work: Work) -> Figures:
        """Generate once. RuntimeError if tokens are missing."""
        arrivals: list[Arrival] = []
        first: dict[int, int] = {}

        def arrived(index: int, tokens: list[int]) -> None:
            arrivals.append(Arrival(time.perf_counter() - begun, index, len(tokens)))
            first.setdefault(index, tokens[0])

        begun = time.perf_counter()
        self.engine.generate(work, arrived)
        seconds = time.perf_counter() - begun
        got, due = sum(arrival.tokens for arrival in arrivals), len(work.prompts) * work.num_tokens
        if got != due:
            raise RuntimeError(f"{got} tokens instead of {due}")
        self.first_tokens = [first[index] for index in range(len(work.prompts))]
        return measure(arrivals, seconds)


def serve(load: Callable[[Settings], Measured]) -> None:
    """Run the jobs on stdin with the engine that `load` makes. A job that fails is reported; the others go on."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    order = json.load(sys.stdin)
    settings = Settings(**order["settings"])
    engine = load(settings)
    engine.sample(Work([list(range(300, 308))], 1))
    _print(events, event="ready", at=time.time(), version=engine.version)
    if order["jobs"]:
        _warm_up(engine, settings)
    else:
        time.sleep(SEEN_SECONDS)
    for job in order["jobs"]:
        try:
            _run(engine, job, events)
        except Exception as error:  # the engine is foreign code: whatever it raises is the result of this job
            traceback.print_exc()
            _print(events, event="failure", scenario=job["scenario"], message=f"{type(error).__name__}: {error}"[:300])
    _print(events, event="done")
    # Some engines hang or crash while they are taken down; nothing is left to do.
    os._exit(0)


def _run(engine: Measured, job: dict[str, Any], events: TextIO) -> None:
    for prompts, primer in zip(job["samples"], job["primers"], strict=True):
        if primer:
            engine.sample(Work(primer, 1, job["prefix"]))
        time.sleep(PAUSE_SECONDS)
        load = LoadMeter.start(os.getpid())
        figures = engine.sample(Work(prompts, job["num_tokens"], job["prefix"]))
        foreign = load.foreign_cores()
        first = engine.first_tokens
        _print(events, event="sample", scenario=job["scenario"], foreign_cores=foreign, first_tokens=first, **figures)


def _warm_up(engine: Measured, settings: Settings) -> None:
    """A long prompt and a wide batch, with tokens that no job has."""
    low, high = 8, 200
    long = [low + i % (high - low) for i in range(min(512, settings.context - 8))]
    engine.sample(Work([long], 4))
    wide = [[low + (i * 7 + j) % (high - low) for j in range(16)] for i in range(settings.requests)]
    engine.sample(Work(wide, 4))


def _print(events: TextIO, **fields: object) -> None:
    print(json.dumps(fields), file=events, flush=True)
