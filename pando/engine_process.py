"""Starts an engine in a process of its own. No torch here: whoever waits for an engine need not load it twice."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pando.core.config import Config
from pando.core.info import EngineInfo
from pando.core.messages import ControlReply, Failure, Load
from pando.errors import EngineUnavailable, from_code
from pando.transport import SocketTransport, Transport

OnPhase = Callable[[Load], None]
START_SECONDS = 3600.0
"""Longest wait for a sign of life of a starting engine; large checkpoints load for minutes between two of them."""
STOP_SECONDS = 5.0


@dataclass(slots=True)
class EngineProcess:
    """Handle on the engine process."""

    process: subprocess.Popen[bytes]

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def stop(self, timeout: float = STOP_SECONDS) -> None:
        """End the process: politely, then not."""
        if self.is_alive():
            self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(slots=True)
class SpawnedEngine:
    """An engine process that has begun, and our end of its socket."""

    handle: EngineProcess
    socket: socket.socket

    def stop(self) -> None:
        """End it."""
        self.handle.stop()
        self.socket.close()


def spawn_engine(config: Config) -> SpawnedEngine:
    """Begin an engine process: it imports torch and loads the model while the caller does something else."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "pando.engine_main", str(theirs.fileno())]
    # A terminal sends ctrl-C to both. A child inherits what is blocked, so it stays quiet even while it imports torch.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    spawned = SpawnedEngine(EngineProcess(process), ours)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(config))
        process.stdin.close()
    except BaseException:
        spawned.stop()
        raise
    return spawned


def start_engine_process(
    config: Config, on_phase: OnPhase = lambda load: None, spawned: SpawnedEngine | None = None
) -> tuple[Transport, EngineInfo, EngineProcess]:
    """Start an engine in a process of its own and wait until it serves. Blocks; call it in a thread beside a loop.

    on_phase gets the phases of the start. spawned: the process, if it has begun already; it is ended if the start
    fails. Raises what the engine raised while starting, or EngineUnavailable.
    """
    spawned = spawned or spawn_engine(config)
    try:
        transport = SocketTransport(spawned.socket)
        return transport, _await_ready(transport, on_phase), spawned.handle
    except BaseException:
        spawned.stop()
        raise


def _await_ready(transport: SocketTransport, on_phase: OnPhase) -> EngineInfo:
    while True:
        reply = transport.receive(START_SECONDS)
        if isinstance(reply, Load):
            on_phase(reply)
        elif isinstance(reply, Failure):
            raise from_code(reply.code, reply.message, reply.param)
        elif isinstance(reply, ControlReply):
            return msgspec.convert(reply.result, EngineInfo)
        else:
            raise EngineUnavailable(f"the engine gave no sign of life for {START_SECONDS:.0f} s")
