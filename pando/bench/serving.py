"""Load on a running server: sends a workload at a rate or a concurrency and measures what its clients see."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from pando.bench.address import Address
from pando.bench.http import Connection, Response, error_text
from pando.bench.report import Distribution, Result
from pando.bench.workload import Conversation, Turn, Workload
from pando.errors import ConfigError, EngineUnavailable

FIRST_ID = 300
"""Ids below may be special tokens or bytes; random prompts leave them out."""

Tick = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how to talk to it. api: native (`/generate`) | completions (`/v1/completions`)."""

    address: Address
    headers: dict[str, str]
    api: str = "native"

    @classmethod
    def of(cls, url: str, api_key: str | None = None, api: str = "native") -> Target:
        """Target at a base URL. Raises ConfigError."""
        address = Address.parse(url)
        headers = {"host": f"{address.host}:{address.port}", "content-type": "application/json"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        return cls(address, headers, api)


@dataclass(slots=True)
class Trace:
    """What one request's client saw: perf_counter times, and the last event that carried counts."""

    sent: float
    times: list[float] = field(default_factory=list)
    last: bytes = b""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    output_ids: list[int] = field(default_factory=list)
    error: str = ""

    def on_event(self, data: bytes) -> None:
        """Note an event's time. Only the last one is ever parsed, after the stream: this runs for every token."""
        if data != b"[DONE]":
            self.times.append(time.perf_counter())
            self.last = data


class Client:
    """Sends turns over a pool of connections."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._idle: list[Connection] = []

    async def send(self, ids: list[int], turn: Turn) -> Trace:
        """One streamed request of prompt `ids`; failures end up in the trace."""
        path, body = self._body(ids, turn.output_len)
        trace = Trace(time.perf_counter())
        try:
            connection = self._idle.pop() if self._idle else await Connection.open(self.target.address)
            trace.sent = time.perf_counter()
            response = await connection.request("POST", path, self.target.headers, body, trace.on_event)
        except OSError as error:
            trace.error = f"{type(error).__name__}: {error}"
            return trace
        if connection.usable:
            self._idle.append(connection)
        self._read(trace, response)
        return trace

    async def get(self, path: str) -> Any:
        """The JSON at `path`. Raises EngineUnavailable if nobody answers."""
        address = self.target.address
        try:
            connection = await Connection.open(address)
            response = await connection.request("GET", address.base + path, self.target.headers, b"", _ignore)
            connection.close()
        except OSError as error:
            raise EngineUnavailable(f"no answer from {address.url}: {error}; is `pando serve` running there?") from None
        if response.status != 200:
            raise EngineUnavailable(f"{path} answers {error_text(response)}")
        return json.loads(response.body)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _body(self, ids: list[int], output_len: int) -> tuple[str, bytes]:
        base = self.target.address.base
        if self.target.api == "completions":
            body = {
                "model": "",
                "prompt": ids,
                "max_tokens": output_len,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            return f"{base}/v1/completions", json.dumps(body).encode()
        sampling = {"max_new_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True}
        return f"{base}/generate", json.dumps(body).encode()

    def _read(self, trace: Trace, response: Response) -> None:
        """Fill in the counts from the last event, or the error."""
        if response.status != 200:
            trace.error = error_text(response)
            return
        try:
            last = json.loads(trace.last)
            if "error" in last and last["error"]:
                trace.error = str(last["error"].get("message", last["error"]))
            elif self.target.api == "completions":
                usage = last["usage"]
                details = usage.get("prompt_tokens_details") or {}
                trace.prompt_tokens, trace.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                trace.cached_tokens = details.get("cached_tokens", 0)
                # The chunk with the usage is no token.
                trace.times.pop()
            else:
                meta = last["meta_info"]
                trace.prompt_tokens, trace.output_tokens = meta["prompt_tokens"], meta["completion_tokens"]
                trace.cached_tokens, trace.output_ids = meta["cached_tokens"], last.get("output_ids") or []
                finish = meta.get("finish_reason") or {}
                if finish.get("type") == "abort":
                    trace.error = str(finish.get("message", "aborted"))
        except (ValueError, KeyError, TypeError) as error:
            trace.error = f"unreadable stream ({error!r}): {trace.last[:120]!r}"


def _ignore(_: bytes) -> None:
    """No events are expected."""


async def converse(client: Client, conversation: Conversation, tick: Tick) -> list[Trace]:
    """All turns of a conversation, each after the one before; stops at the first error."""
    ids: list[int] = []
    traces: list[Trace] = []
    for turn in conversation.turns:
        ids = ids + turn.new_ids
        trace = await client.send(ids, turn)
        traces.append(trace)
        tick()
        if trace.error:
            break
        ids = ids + trace.output_ids
    return traces


async def at_concurrency(jobs: list[Callable[[], Coroutine[Any, Any, list[Trace]]]], limit: int) -> list[Trace]:
    """Run the jobs, `limit` at a time."""
    waiting = iter(jobs)
    traces: list[Trace] = []

    async def worker() -> None:
        for job in waiting:
            traces.extend(await job())

    await asyncio.gather(*(worker() for _ in range(min(limit, len(jobs)))))
    return traces


async def at_rate(
    jobs: list[Callable[[], Coroutine[Any, Any, list[Trace]]]], rate: float, rng: random.Random
) -> list[Trace]:
    """Start the jobs with exponential gaps (Poisson arrivals), whether or not earlier ones are done."""
    start, due = time.perf_counter(), 0.0
    running = []
    for job in jobs:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        running.append(asyncio.ensure_future(job()))
        due += rng.expovariate(rate)
    return [trace for traces in await asyncio.gather(*running) for trace in traces]


def summary(name: str, traces: list[Trace], seconds: float, settings: dict[str, Any]) -> Result:
    """Result of these traces."""
    good = [trace for trace in traces if not trace.error and trace.times]
    return Result(
        name=name,
        seconds=seconds,
        requests=len(good),
        errors=dict(Counter(trace.error or "no token came" for trace in traces if trace.error or not trace.times)),
        prompt_tokens=sum(trace.prompt_tokens for trace in good),
        cached_tokens=sum(trace.cached_tokens for trace in good),
        output_tokens=sum(trace.output_tokens for trace in good),
        ttft=Distribution.of([trace.times[0] - trace.sent for trace in good]),
        itl=Distribution.of([b - a for trace in good for a, b in zip(trace.times, trace.times[1:], strict=False)]),
        tpot=Distribution.of([(t.times[-1] - t.times[0]) / (t.output_tokens - 1) for t in good if t.output_tokens > 1]),
        e2e=Distribution.of([trace.times[-1] - trace.sent for trace in good]),
        settings=settings,
    )


async def run(
    target: Target, workload: Workload, request_rate: float | None, max_concurrency: int | None, tick: Tick
) -> Result:
    """Measure once. Give exactly one of request_rate (per second) and max_concurrency."""
    if (request_rate is None) == (max_concurrency is None):
        raise ConfigError("give a request rate or a concurrency", param="request_rate")
    if workload.dataset == "multi-turn" and target.api != "native":
        raise ConfigError("multi-turn needs --api native: it goes on with the answer's token ids", param="api")
    client = Client(target)
    try:
        info = await client.get("/server_info")
        vocab = range(FIRST_ID, max(FIRST_ID + 100, int(info.get("vocab_size", 4096))))
        jobs = [_job(client, item, tick) for item in workload.conversations(vocab)]
        start = time.perf_counter()
        if request_rate is not None:
            traces = await at_rate(jobs, request_rate, random.Random(workload.workload_seed))
            name = f"rate {request_rate:g}/s"
        else:
            assert max_concurrency is not None
            traces = await at_concurrency(jobs, max_concurrency)
            name = f"concurrency {max_concurrency}"
        seconds = time.perf_counter() - start
    finally:
        client.close()
    settings = {**asdict(workload), "api": target.api, "server": info}
    return summary(name, traces, seconds, settings)


def _job(client: Client, item: Conversation, tick: Tick) -> Callable[[], Coroutine[Any, Any, list[Trace]]]:
    return lambda: converse(client, item, tick)


def measure(
    target: Target,
    workload: Workload,
    *,
    request_rate: float | None = None,
    max_concurrency: int | None = None,
    progress: bool = True,
) -> Result:
    """Measure once, with a progress bar on standard error; see `run`. Raises ConfigError, EngineUnavailable."""
    import uvloop

    loop = uvloop.new_event_loop()
    try:
        with progress_bar(workload.num_requests, progress) as tick:
            return loop.run_until_complete(run(target, workload, request_rate, max_concurrency, tick))
    finally:
        loop.close()


def progress_bar(total: int, shown: bool) -> AbstractContextManager[Tick]:
    """A bar that each call of the yielded function moves by one; invisible if not `shown`."""
    if not shown:
        return nullcontext(lambda: None)
    from pando.bench.progress import Bar

    return Bar(total)
