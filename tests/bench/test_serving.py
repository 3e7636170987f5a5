"""The load generator against a server whose answers are known."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pando.bench.address import Address
from pando.bench.http import Connection
from pando.bench.report import Result
from pando.bench.serving import Target, measure, run
from pando.bench.workload import Workload
from pando.errors import ConfigError, EngineUnavailable
from tests.bench.fake_server import FakeServer, running


def bench(
    server: FakeServer, workload: Workload, *, api: str = "native", rate: float | None = None, limit: int | None = None
) -> tuple[Result, int]:
    """The result, and the number of progress ticks."""
    ticks = [0]

    def tick() -> None:
        ticks[0] += 1

    async def go() -> Result:
        async with running(server) as url:
            return await run(Target.of(url + "/v1/", "secret", api), workload, rate, limit, tick)

    return asyncio.run(go()), ticks[0]


@pytest.mark.parametrize("api", ["native", "completions"])
def test_counts_are_exact(api: str) -> None:
    server = FakeServer()
    result, ticks = bench(server, Workload(num_prompts=10, input_len=20, output_len=5), api=api, limit=4)
    assert (result.requests, result.prompt_tokens, result.output_tokens, ticks) == (10, 200, 50, 10)
    assert result.errors == {} and result.cached_tokens == 0
    assert set(server.authorizations) == {"bearer secret"}


def test_measure_runs_its_own_loop() -> None:
    """The way the command takes: uvloop, whose transports differ from asyncio's, and a server elsewhere."""
    ready, finished, urls = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with running(FakeServer()) as url:
            urls.append(url)
            ready.set()
            await asyncio.get_running_loop().run_in_executor(None, finished.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        work = Workload(num_prompts=5, input_len=8, output_len=3)
        result = measure(Target.of(urls[0]), work, max_concurrency=2, progress=False)
        assert (result.requests, result.output_tokens, result.errors) == (5, 15, {})
    finally:
        finished.set()
        thread.join()


def test_concurrency_is_kept() -> None:
    server = FakeServer(gap=0.005)
    bench(server, Workload(num_prompts=12, input_len=4, output_len=3), limit=3)
    assert server.most_running == 3
    assert server.connections == 4, "three workers' connections and the one for /server_info"


def test_times_are_the_servers() -> None:
    result, _ = bench(FakeServer(gap=0.02), Workload(num_prompts=4, input_len=4, output_len=5), limit=4)
    assert 0.018 < result.ttft.p50 < 0.08
    assert 0.018 < result.itl.p50 < 0.04
    assert 0.018 < result.tpot.p50 < 0.06
    assert 0.095 < result.e2e.p50 < 0.3


def test_rate_spreads_arrivals() -> None:
    server = FakeServer()
    start = time.perf_counter()
    result, _ = bench(server, Workload(num_prompts=20, input_len=4, output_len=2, workload_seed=3), rate=100.0)
    assert result.requests == 20
    assert 0.08 < time.perf_counter() - start < 1.0
    assert result.name == "rate 100/s"


def test_conversations_go_on_with_the_answer() -> None:
    server = FakeServer()
    workload = Workload(dataset="multi-turn", num_prompts=2, num_turns=3, prefix_len=10, input_len=5, output_len=4)
    result, _ = bench(server, workload, limit=1)
    first, second, third = (seen["input_ids"] for seen in server.seen[:3])
    assert second[: len(first) + 4] == [*first, 1000, 1001, 1002, 1003]
    assert [len(first), len(second), len(third)] == [15, 24, 33]
    # Turn 2 finds turn 1 and its answer, turn 3 all of turn 2 and its answer.
    assert result.cached_tokens == 2 * (19 + 28)


def test_errors_are_counted_not_raised() -> None:
    server = FakeServer()
    server.fail_with = (503, "the pool is full")
    result, _ = bench(server, Workload(num_prompts=3, input_len=4, output_len=2), limit=2)
    assert result.requests == 0 and result.errors == {"503: the pool is full": 3}


def test_multi_turn_needs_the_native_api() -> None:
    with pytest.raises(ConfigError, match="native"):
        bench(FakeServer(), Workload(dataset="multi-turn"), api="completions", limit=1)


def test_nobody_there() -> None:
    async def go() -> None:
        async with running(FakeServer()) as url:
            pass
        await run(Target.of(url), Workload(), None, 1, lambda: None)

    with pytest.raises(EngineUnavailable, match="pando serve"):
        asyncio.run(go())


def test_broken_connection_is_an_error() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda")
        writer.close()

    async def go() -> None:
        listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        connection = await Connection.open(Address("127.0.0.1", port, False, ""))
        try:
            await connection.request("GET", "/", {}, b"", lambda data: None)
        finally:
            listener.close()

    with pytest.raises(ConnectionError, match="closed"):
        asyncio.run(go())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1/v1/", Address("h", 1, False, "")),
        ("h:1", Address("h", 1, False, "")),
        ("https://h/deep/v1", Address("h", 443, True, "/deep")),
        ("http://h", Address("h", 80, False, "")),
    ],
)
def test_addresses(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected


def test_bad_address() -> None:
    with pytest.raises(ConfigError, match="ftp"):
        Address.parse("ftp://h")
