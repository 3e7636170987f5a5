"""The life of a server: phases, ready, draining, signals, the engine's end, ports."""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from pando.core.config import Config
from pando.core.info import EngineInfo
from pando.core.messages import Load
from pando.engine_process import SpawnedEngine
from pando.errors import ConfigError, ModelNotFound
from pando.server import launch
from pando.server.announce import Announcer, base_url, curl, facts
from tests.fakes import FakeEngine, FakeTransport, fake_info
from tests.server.harness import events
from tests.tiny_tokenizers import byte_level, write_folder

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "max_tokens": 60}


class FakeStart:
    """Stands for `start_engine_process`: waits for `go`, then gives a fake engine or raises `error`."""

    def __init__(self, folder: Path) -> None:
        self.go = threading.Event()
        self.stopped = threading.Event()
        self.error: Exception | None = None
        self.engine = FakeEngine(byte_level(), step_seconds=0.005)
        self.transport = FakeTransport(self.engine)
        self.folder = folder

    def __call__(
        self, config: Config, on_phase: Callable[[Load], None], spawned: SpawnedEngine | None
    ) -> tuple[FakeTransport, EngineInfo, FakeStart]:
        on_phase(Load("weights", 0.5, "1 of 2 GB"))
        self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self.transport, fake_info(self.engine.tokenizer, tokenizer_path=str(self.folder)), self

    def stop(self) -> None:
        self.stopped.set()


class Run:
    """A server running on the test's loop."""

    def __init__(self, start: FakeStart) -> None:
        self.start = start
        self.output = io.StringIO()
        port = launch.next_free_port("127.0.0.1", 34000 + os.getpid() % 1000)
        assert port is not None
        self.url = f"http://127.0.0.1:{port}"
        announcer = Announcer(Console(file=self.output, width=100))
        self.task = asyncio.ensure_future(launch.serve(Config(port=port), announcer))
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20)

    async def until(self, path: str, status: int) -> httpx.Response:
        while True:
            try:
                response = await self.http.get(path)
                if response.status_code == status:
                    return response
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.01)


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an async test against a server whose engine start is a FakeStart."""
    start = FakeStart(write_folder(tmp_path))
    monkeypatch.setattr(launch, "start_engine_process", start)

    def run(test: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            running = Run(start)
            try:
                async with running.http:
                    await asyncio.wait_for(test(running), 30)
            finally:
                start.go.set()
                running.task.cancel()

        asyncio.run(main())

    return run


def interrupt(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_from_loading_to_a_clean_end(life: Callable[..., None], number: signal.Signals, code: int) -> None:
    async def test(run: Run) -> None:
        loading = await run.until("/health", 503)
        while loading.json()["phase"] != "weights":
            loading = await run.until("/health", 503)
        assert loading.json()["detail"] == "1 of 2 GB"
        assert (await run.http.post("/v1/chat/completions", json=CHAT)).status_code == 503
        run.start.go.set()
        await run.until("/health", 200)
        reply = await run.http.post("/v1/chat/completions", json=CHAT)
        assert reply.json()["usage"]["completion_tokens"] == 60
        interrupt(number)
        assert await run.task == code
        assert run.start.stopped.is_set()
        text = run.output.getvalue()
        assert "✓ starting the engine" in text
        assert "✓ loading weights 50% · 1 of 2 GB" in text
        assert f"{run.url}/v1" in text and "Pando serves tiny" in text
        assert "stopped" in text.splitlines()[-1]
        with pytest.raises(httpx.TransportError):
            await run.http.get("/health")

    life(test)


def test_running_requests_finish_after_the_first_signal(life: Callable[..., None]) -> None:
    async def test(run: Run) -> None:
        run.start.go.set()
        await run.until("/ready", 200)
        request = asyncio.create_task(run.http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        while not run.start.engine.running:
            await asyncio.sleep(0.005)
        interrupt()
        ready = await run.until("/ready", 503)
        assert ready.json()["status"] == "draining"
        refused = await run.http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        parts = events((await request).text)
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
        assert await run.task == 130

    life(test)


def test_the_second_signal_aborts(life: Callable[..., None]) -> None:
    async def test(run: Run) -> None:
        run.start.go.set()
        run.start.engine.step_seconds = 0.05
        await run.until("/ready", 200)
        body = {**CHAT, "max_tokens": 400, "stream": True}
        request = asyncio.create_task(run.http.post("/v1/chat/completions", json=body))
        while not run.start.engine.running:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.2)
        interrupt()
        await run.until("/ready", 503)
        interrupt()
        assert events((await request).text)[-1]["error"]["code"] == "engine_unavailable"
        assert await asyncio.wait_for(run.task, 5) == 130
        assert run.start.stopped.is_set()

    life(test)


def test_a_signal_while_loading_ends_at_once(life: Callable[..., None]) -> None:
    async def test(run: Run) -> None:
        await run.until("/health", 503)
        interrupt()
        assert await asyncio.wait_for(run.task, 5) == 130
        assert not run.start.stopped.is_set()
        run.start.go.set()
        assert await asyncio.to_thread(run.start.stopped.wait, 5), "an engine that comes too late is stopped"

    life(test)


def test_an_error_of_the_start_is_raised(life: Callable[..., None]) -> None:
    async def test(run: Run) -> None:
        await run.until("/health", 503)
        run.start.error = ModelNotFound("no such folder")
        run.start.go.set()
        with pytest.raises(ModelNotFound, match="no such folder"):
            await run.task

    life(test)


def test_the_engines_end_ends_the_server(life: Callable[..., None]) -> None:
    async def test(run: Run) -> None:
        run.start.go.set()
        await run.until("/ready", 200)
        run.start.transport.die("the engine process ended")
        assert await asyncio.wait_for(run.task, 5) == 1
        assert "the engine process ended" in run.output.getvalue()

    life(test)


def test_a_taken_port_names_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use; use --port \d+, which is free"):
            launch.listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"can not listen on 192\.0\.2\.1"):
        launch.listen("192.0.2.1", 30000)


def test_box_tells_who_can_reach_the_server() -> None:
    info = fake_info(byte_level(), num_parameters=8_400_000)
    local = dict(facts(Config(), info, "http://x"))
    assert "--host 0.0.0.0" in local["Access"]
    assert local["Model"].startswith("org/tiny (8.4 M parameters")
    assert local["At once"] == "64 sequences, 8 of them at full context"
    assert "open to everyone" in dict(facts(Config(host="0.0.0.0"), info, "http://x"))["Access"]
    assert "Access" not in dict(facts(Config(host="0.0.0.0", api_key=("k",)), info, "http://x"))


def test_live_line_runs_on_a_terminal_and_leaves_a_mark() -> None:
    output = io.StringIO()
    announcer = Announcer(Console(file=output, width=100, force_terminal=True))
    announcer.phase(Load("weights", 0.25, "[odd] detail"))
    assert "loading weights 25% · \\[odd] detail" in announcer.__rich__()
    announcer.phase(Load("weights", 1.0, "done"))
    announcer.say("and on")
    last = output.getvalue().splitlines()
    assert "loading weights · done" in last[-2] and "and on" in last[-1]


def test_urls_and_the_command_to_copy() -> None:
    assert base_url("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert base_url("::1", 8000) == "http://[::1]:8000"
    words = shlex.split(curl("http://h:1", Config(api_key=("secret",)), can_chat=True))
    assert words[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert "Authorization: Bearer KEY" in words
    assert "secret" not in " ".join(words)
    assert "/v1/completions" in curl("http://h:1", Config(), can_chat=False)


def test_the_tokenizer_is_read_while_the_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path)
    early = launch._EarlyTokenizer(Config(model_path=str(folder)))
    assert early._thread is not None
    early._thread.join()
    read: list[Path] = []
    load = launch.Tokenizer.load
    monkeypatch.setattr(launch.Tokenizer, "load", lambda path, template: read.append(path) or load(path, template))
    tokenizer = early.of(fake_info(byte_level(), tokenizer_path=str(folder)))
    assert tokenizer is early._found and read == []
    (tmp_path / "other").mkdir()
    other = write_folder(tmp_path / "other")
    assert early.of(fake_info(byte_level(), tokenizer_path=str(other))) is not tokenizer and read == [other]


def test_an_early_tokenizer_that_is_broken_is_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    early = launch._EarlyTokenizer(Config(model_path=str(tmp_path)))
    with pytest.raises(ConfigError):
        early.of(fake_info(byte_level(), tokenizer_path=str(tmp_path)))
    assert launch._EarlyTokenizer(Config())._thread is None
