"""Sources read in a process of their own: Python works on a large schema for up to a second, and holds up the loop.

An interpreter runs one thread at a time, so whatever reads a schema in the engine's process makes the next step wait,
again and again. The other process answers with the grammar in the backend's own words; compiling that is native work,
beside which the loop goes on. It can be ended, too, which a thread can not.
"""

from __future__ import annotations

import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping

import msgspec

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, StepFailed
from pando.grammar.limits import Limits
from pando.grammar.protocols import Issue

LARGE = 4_096
"""Bytes of a source from which on it is worth another process: smaller ones are read within milliseconds."""
_SIZE = struct.Struct("<I")
_START_SECONDS = 60.0


class Job(msgspec.Struct, frozen=True):
    """A source to be read. markers: the vocabulary's, by text."""

    spec: GrammarSpec
    limits: Limits
    markers: dict[str, int]


class PreparedSource(msgspec.Struct, frozen=True):
    """A source in the backend's words, checked but not compiled. error: why that can not be; the rest is empty then."""

    grammar: str = ""
    relaxed: list[Issue] = []
    error: str | None = None
    param: str | None = None


class Preparer:
    """Reads sources in processes that start when they are needed, one for each thread that asks at the same time.

    deadline_s: of one source; its process is ended then.
    """

    def __init__(self, limits: Limits, markers: Mapping[str, int], deadline_s: float = 15.0) -> None:
        self._limits = limits
        self._markers = dict(markers)
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end_all, self._idle)

    def prepare(self, spec: GrammarSpec) -> PreparedSource:
        """Blocks its thread, not the interpreter. Raises InvalidGrammar (also at the deadline) and StepFailed."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        try:
            process = process or _start()
            answer = _exchange(
                process, msgspec.msgpack.encode(Job(spec, self._limits, self._markers)), self._deadline_s
            )
        except BaseException:
            if process is not None:
                _end(process)
            raise
        if answer is None:
            _end(process)
            raise InvalidGrammar(
                f"the grammar could not be read in {self._deadline_s:g} s; simplify it", param=spec.kind
            )
        with self._lock:
            self._idle.append(process)
        prepared = msgspec.msgpack.decode(answer, type=PreparedSource)
        if prepared.error is not None:
            raise InvalidGrammar(prepared.error, param=prepared.param)
        return prepared

    def close(self) -> None:
        """End the processes that are idle."""
        with self._lock:
            _end_all(self._idle)

    @property
    def num_idle(self) -> int:
        """Processes that wait for work."""
        return len(self._idle)


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pando.grammar.preparing_worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    if _exchange(process, b"", _START_SECONDS) is None:
        _end(process)
        raise StepFailed("the process that reads grammars does not start")
    return process


def _exchange(process: subprocess.Popen[bytes], message: bytes, seconds: float) -> bytes | None:
    """Send a frame and wait for one; None if the process ended or none came in time."""
    assert process.stdin is not None and process.stdout is not None
    until = time.monotonic() + seconds
    try:
        write_frame(process.stdin.fileno(), message)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(max(0.0, until - time.monotonic())):
                return None
        return read_frame(process.stdout.fileno())
    except OSError:
        return None


def write_frame(fd: int, body: bytes) -> None:
    """A length, then the body. Raises OSError if nobody reads."""
    view = memoryview(_SIZE.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int) -> bytes | None:
    """The next frame's body; None at the end."""
    head = _read(fd, _SIZE.size)
    return None if head is None else _read(fd, _SIZE.unpack(head)[0])


def _read(fd: int, size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(fd, size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        _end(processes.pop())
