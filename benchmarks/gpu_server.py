"""Decoding through a whole server: `pando serve` as a process, streams over HTTP, what its device does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from benchmarks.gpu_engine import engine_options, first_line, prompt_tokens
from benchmarks.gpu_report import Figures
from benchmarks.gpu_shapes import Roofline, Scale, config_of, write_folder
from pando.bench.http import Connection
from pando.bench.serving import Client, Target, Trace
from pando.bench.workload import Turn
from pando.models.size import ModelSize

LOOK_SECONDS = 0.02
"""Between two looks at the server's counters."""

ROUND_SECONDS = 40.0
"""Longest wait for one batch's steps."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The engine's counters at one point of its loop."""

    steps: float
    tokens: float
    running: float
    device_seconds: float
    uptime: float

    @classmethod
    def parse(cls, text: str) -> Counters:
        """Of the text of `/metrics`. Raises KeyError if the engine does not answer."""
        values = {name: float(value) for name, value in re.findall(r"^(pando_\w+)(?:\{.*\})? (\S+)$", text, re.M)}
        names = ("steps_total", "generation_tokens_total", "num_running", "device_seconds_total", "uptime_seconds")
        return cls(*(values[f"pando_{name}"] for name in names))


@dataclass(frozen=True, slots=True)
class Window:
    """Steps between two looks, all of the same sequences."""

    first: Counters
    last: Counters

    @property
    def seconds(self) -> float:
        """By the engine's clock."""
        return self.last.uptime - self.first.uptime

    @property
    def tokens_per_second(self) -> float:
        """Of all streams together."""
        return (self.last.tokens - self.first.tokens) / self.seconds

    @property
    def idle(self) -> float:
        """Share of the time in which the device worked on no step."""
        return 1.0 - (self.last.device_seconds - self.first.device_seconds) / self.seconds


def run_server(name: str, scale: Scale, limits: dict[str, float]) -> Iterator[Figures]:
    """Streams at several batches: throughput, and the share of time in which the device stood still."""
    config = config_of(name, tiny=scale.tiny)
    size, dtype, roof = ModelSize.of_config(config), str(config["torch_dtype"]), Roofline.of(limits)
    began, num_failed = time.perf_counter(), 0
    with serving(write_folder(config), scale) as url:
        print(f"pando serve, {name}: ready in {time.perf_counter() - began:.0f} s", flush=True)
        for rows in scale.streams:
            try:
                window = asyncio.run(streams(url, rows, scale, size.spec.vocab_size))
            except Exception as error:
                num_failed += 1
                print(f"  {rows} streams FAILED: {first_line(error)}", flush=True)
                traceback.print_exc()
                continue
            context = scale.prompt + 2 * scale.lead + scale.timed_steps // 2
            share = roof.decode_seconds(size, dtype, rows, context) * window.tokens_per_second / rows
            print(
                f"  {rows:3} streams: {window.tokens_per_second:9,.0f} tok/s, {share:.1%} of the roofline, "
                f"device idle {window.idle:.2%} in {window.last.steps - window.first.steps:.0f} steps",
                flush=True,
            )
            yield {
                f"http {rows} tok/s": window.tokens_per_second,
                f"http {rows} roofline": share,
                f"http {rows} idle": window.idle,
            }
    if num_failed:
        yield {"failed": float(num_failed)}


@contextlib.contextmanager
def serving(folder: Path, scale: Scale) -> Iterator[str]:
    """A server of this model; its base URL. Raises RuntimeError if it ends before it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = engine_options(scale) | {"max_running_requests": max(scale.streams)}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "pando", "serve", str(folder), "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            if (code := server.poll()) is not None:
                raise RuntimeError(f"the server ended with code {code} before it was ready")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def answers(url: str) -> bool:
    """Whether the server is ready."""
    try:
        with urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


async def look(target: Target) -> Counters:
    """The server's counters, now."""
    connection = await Connection.open(target.address)
    try:
        response = await connection.request("GET", "/metrics", target.headers, b"", lambda event: None)
    finally:
        connection.close()
    return Counters.parse(response.body.decode())


async def streams(url: str, rows: int, scale: Scale, vocab_size: int) -> Window:
    """Hold `rows` streams open and look at the engine over `timed_steps` steps that have all of them in.

    Raises RuntimeError if a stream ends or fails before that, TimeoutError if it takes too long.
    """
    target = Target.of(url)
    client = Client(target)
    turn = Turn([], 1536)  # more than they will have time for
    prompts = [prompt_tokens(scale.prompt, 10_000 + 100 * rows + row, vocab_size) for row in range(rows)]
    open_streams = [asyncio.ensure_future(client.send(ids, turn)) for ids in prompts]
    try:
        return await asyncio.wait_for(steady_window(target, open_streams, rows, scale), ROUND_SECONDS)
    finally:
        for stream in open_streams:
            stream.cancel()
        await asyncio.gather(*open_streams, return_exceptions=True)
        client.close()
        await asyncio.wait_for(drained(target), ROUND_SECONDS)


async def steady_window(
    target: Target, open_streams: Sequence[asyncio.Future[Trace]], rows: int, scale: Scale
) -> Window:
    """The first `timed_steps` steps after all streams have some tokens."""
    start = await look(target)
    lead: Counters | None = None
    first: Counters | None = None
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = await look(target)
        for stream in open_streams:
            if stream.done():
                raise RuntimeError(f"a stream ended too early: {stream.result().error or 'all its tokens came'}")
        if now.running < rows or now.tokens == start.tokens:
            continue
        if lead is None:
            lead = now  # all are in the batch; the last prompt may still be read
        elif first is None and now.steps >= lead.steps + scale.lead:
            first = now
        elif first is not None and now.steps >= first.steps + scale.timed_steps:
            return Window(first, now)


async def drained(target: Target) -> None:
    """Wait until nothing runs."""
    while (await look(target)).running:
        await asyncio.sleep(LOOK_SECONDS)
