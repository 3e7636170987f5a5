"""Starts and stops a server: an engine process, an HTTP server that answers from the first moment, a clean end.

listen -> /health says 503 and the phase -> engine ready -> serve
       -> first signal: /ready says 503, no new work, running requests may finish (DRAIN_SECONDS)
       -> second signal, or time over: what still runs ends with an error -> engine stopped -> exit
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import uvicorn

from pando.core.config import Config
from pando.core.info import EngineInfo
from pando.core.messages import Load
from pando.engine_client import EngineClient
from pando.engine_process import SpawnedEngine, start_engine_process
from pando.errors import ConfigError, EngineUnavailable
from pando.log import setup as setup_log
from pando.server.announce import Announcer
from pando.server.http import create_service_app
from pando.server.service import Service
from pando.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pando.transport import Transport

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
"""How long running requests may go on after the first signal."""
CLOSE_SECONDS = 2
"""How long connections get to take their last bytes."""
WATCH_SECONDS = 0.1
PORTS_TRIED = 50
INTERRUPTED = 130
"""Exit code after ctrl-C."""


class EngineHandle(Protocol):
    """The engine process."""

    def stop(self) -> None:
        """End it; returns when it is gone."""


class _Stopped(Exception):
    """A signal came while the engine was starting."""


def run_server(config: Config, announcer: Announcer | None = None, spawned: SpawnedEngine | None = None) -> int:
    """Serve until ctrl-C, SIGTERM or the engine's end. The exit code: 130 after ctrl-C, 0 after SIGTERM, else 1.

    spawned: the engine's process, if it has begun; it is the caller's to end if this raises. Raises ConfigError (port
    in use, bad model) and other errors of the start.
    """
    setup_log(config.log_level)
    announcer = announcer or Announcer()
    return run_loop(serve(config, announcer, spawned))


def run_loop(main: Coroutine[None, None, int]) -> int:
    """Run on uvloop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return int(uvloop.run(main))


async def serve(config: Config, announcer: Announcer, spawned: SpawnedEngine | None = None) -> int:
    """The whole life of a server; see the module's drawing. Returns the exit code."""
    service = Service(config)
    sock = listen(config.host, config.port)
    stop = _StopSignals()
    with stop.installed():
        async with _http_server(service, sock):
            tokenizer = _EarlyTokenizer(config)
            engine = _EngineStart(config, service, announcer, spawned)
            try:
                transport, info = await engine.run(stop)
                client = _connect(config, transport, info, tokenizer)
                service.client, service.phase = client, Load("ready")
            except _Stopped:
                return stop.exit_code
            except BaseException:
                engine.stop()
                raise
            port = sock.getsockname()[1]
            announcer.ready(config, info, port=port, can_chat=client.tokenizer.chat_template is not None)
            try:
                return await _until_the_end(service, client, stop, announcer)
            finally:
                await asyncio.to_thread(engine.stop)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError that names a free port if this one is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            free = next_free_port(host, port)
            hint = f"use --port {free}, which is free, or" if free else "choose another --port or"
            raise ConfigError(f"port {port} is in use; {hint} stop what listens there", param="port") from None
        raise ConfigError(f"can not listen on {host}:{port}: {error.strerror}", param="host") from None
    return sock


def next_free_port(host: str, port: int) -> int | None:
    """The first port above `port` that nobody listens on, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port + 1, min(port + PORTS_TRIED, 65536)):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, candidate))
            except OSError:
                continue
            return candidate
    return None


class _StopSignals:
    """Counts ctrl-C and SIGTERM. `first` and `second` are set by the first and second of them."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.exit_code = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen for the signals on the running loop, and give them back afterwards."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield  # a server inside somebody else's program: its signals are not ours
            return
        for number in signals:
            loop.add_signal_handler(number, self._on_signal, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)  # what came while the server was imported is handled now
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
        else:
            self.exit_code = INTERRUPTED if number == signal.SIGINT else 0
            self.first.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _http_server(service: Service, sock: socket.socket) -> AsyncIterator[None]:
    """HTTP on this socket while the context is open."""
    app = create_service_app(service)
    options = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    server = _Uvicorn(options)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


class _EngineStart:
    """Starts the engine in a thread, since starting blocks, and reports its phases on the loop."""

    def __init__(
        self, config: Config, service: Service, announcer: Announcer, spawned: SpawnedEngine | None = None
    ) -> None:
        self._config = config
        self._spawned = spawned
        self._service = service
        self._announcer = announcer
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[tuple[Transport, EngineInfo, EngineHandle]] = self._loop.create_future()
        self._handle: EngineHandle | None = None
        self._given_up = False

    async def run(self, stop: _StopSignals) -> tuple[Transport, EngineInfo]:
        """Wait until the engine serves. Raises what its start raised, or _Stopped after a signal."""
        self._announcer.phase(self._service.phase)
        # A daemon thread: after a signal nobody waits for an engine that takes minutes to load.
        threading.Thread(target=self._start, name="pando-start", daemon=True).start()
        while not self._done.done() and not stop.first.is_set():
            await asyncio.wait({self._done}, timeout=WATCH_SECONDS)
        if not self._done.done():
            self._given_up = True
            raise _Stopped
        transport, info, self._handle = self._done.result()
        return transport, info

    def stop(self) -> None:
        """End the engine process, if it was started. Blocks for seconds at most."""
        if self._handle is not None:
            self._handle.stop()

    def _start(self) -> None:
        try:
            started = start_engine_process(self._config, self._on_phase, self._spawned)
        except BaseException as error:
            self._settle(error=error)
        else:
            self._settle(started)

    def _settle(
        self,
        started: tuple[Transport, EngineInfo, EngineHandle] | None = None,
        error: BaseException | None = None,
    ) -> None:
        if self._given_up or self._loop.is_closed():
            if started is not None:
                started[2].stop()
        elif started is not None:
            self._loop.call_soon_threadsafe(self._done.set_result, started)
        elif error is not None:
            self._loop.call_soon_threadsafe(self._done.set_exception, error)

    def _on_phase(self, load: Load) -> None:
        """Called in the starting thread. Raising makes the start end its process."""
        if self._given_up:
            raise EngineUnavailable("stopped while starting")
        self._loop.call_soon_threadsafe(self._show_phase, load)

    def _show_phase(self, load: Load) -> None:
        self._service.phase = load
        self._announcer.phase(load)


class _EarlyTokenizer:
    """The tokenizer, read while the engine starts if its folder is known by then."""

    def __init__(self, config: Config) -> None:
        self._template = Path(config.chat_template) if config.chat_template else None
        self._folder = Path(config.tokenizer_path or config.model_path)
        self._found: Tokenizer | None = None
        self._thread: threading.Thread | None = None
        if (self._folder / "tokenizer.json").is_file():
            self._thread = threading.Thread(target=self._read, name="pando-tokenizer", daemon=True)
            self._thread.start()

    def of(self, info: EngineInfo) -> Tokenizer:
        """The engine's tokenizer. Raises ConfigError if it can not be read."""
        if self._thread is not None and str(self._folder) == info.tokenizer_path:
            self._thread.join()
            if self._found is not None:
                return self._found
        return Tokenizer.load(Path(info.tokenizer_path), self._template)

    def _read(self) -> None:
        with contextlib.suppress(ConfigError):  # the engine reads the same files and says what is wrong
            self._found = Tokenizer.load(self._folder, self._template)


def _connect(config: Config, transport: Transport, info: EngineInfo, early: _EarlyTokenizer) -> EngineClient:
    client = EngineClient(transport, early.of(info), info, random_seed=config.random_seed)
    client.start()
    return client


async def _until_the_end(service: Service, client: EngineClient, stop: _StopSignals, announcer: Announcer) -> int:
    """Serve until a signal or the engine's end, then let running requests finish."""
    while client.closed is None and not stop.first.is_set():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.first.wait(), WATCH_SECONDS)
    service.draining = True
    if client.closed is not None and not stop.first.is_set():
        announcer.say(f"the engine ended: {client.closed}; the server stops")
        return 1
    if client.num_open:
        announcer.say(f"stopping: {client.num_open} requests may finish in {DRAIN_SECONDS:.0f} s; ctrl-C again aborts")
        await _drain(client, stop)
    client.close()
    announcer.say("stopped")
    return stop.exit_code


async def _drain(client: EngineClient, stop: _StopSignals) -> None:
    deadline = asyncio.get_running_loop().time() + DRAIN_SECONDS
    while client.num_open and client.closed is None and not stop.second.is_set():
        if asyncio.get_running_loop().time() > deadline:
            break
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.second.wait(), WATCH_SECONDS)
