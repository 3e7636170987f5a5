"""A server around a fake engine: inside the test's loop, or on a real port in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
import uvicorn

from pando.core.config import Config
from pando.engine_client import EngineClient
from pando.server.http import create_service_app
from pando.server.service import Service
from pando.tokenizer.tokenizer import Tokenizer
from tests.fakes import FakeEngine, FakeTransport, fake_info
from tests.tiny_tokenizers import byte_level

TOKENIZER = byte_level()


class Server:
    """The parts of a server under test."""

    def __init__(self, tokenizer: Tokenizer = TOKENIZER, config: Config | None = None, **info: Any) -> None:
        self.engine = FakeEngine(tokenizer)
        self.transport = FakeTransport(self.engine)
        self.client = EngineClient(self.transport, tokenizer, fake_info(tokenizer, **info), random_seed=1)
        self.service = Service(config or Config(), self.client)
        self.app = create_service_app(self.service)

    @asynccontextmanager
    async def http(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        """An HTTP client that calls the app directly."""
        self.client.start()
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20, **options) as http:
            yield http


def call(test: Callable[[Server, httpx.AsyncClient], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a test against a fresh server; afterwards nothing may be left open."""

    async def main() -> None:
        server = Server(**options)
        async with server.http() as http:
            await asyncio.wait_for(test(server, http), 30)
        assert server.client.num_open == 0

    asyncio.run(main())


def events(text: str) -> list[Any]:
    """The JSON events of a stream, which must end in [DONE]."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]", text
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines[:-1]]


@contextmanager
def live(server: Server) -> Iterator[str]:
    """The server on a free port; gives its base URL. The engine lives on the server's loop."""
    started = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            server.client.start()
        await server.app(scope, receive, send)

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2)
    runner = uvicorn.Server(config)

    def run() -> None:
        started.set()
        asyncio.run(runner.serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    deadline = time.monotonic() + 10
    while not runner.started and time.monotonic() < deadline:
        time.sleep(0.01)
    port = runner.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        runner.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Seconds until the condition held; fails if it never does."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "the condition never held"
        time.sleep(0.002)
    return time.monotonic() - begin
