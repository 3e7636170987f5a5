"""The border between the API side and the engine: commands go in, frames of replies come out.

Two carriers of the same messages: a pair of queues inside one process, and a Unix socket pair between two. The engine
side is synchronous (`Inbox`), the API side lives on an asyncio loop (`Transport`). A frame is a 4-byte little-endian
length and a msgpack body; there is one frame per engine step, whatever the number of requests in it.
"""

from __future__ import annotations

import asyncio
import queue
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from pando.core.messages import Command, Frame, Reply
from pando.errors import EngineUnavailable

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 18
_MOST = 512
"""Commands after which a drain reads no more: a flood must not hold up the step."""

OnReplies = Callable[[list[Reply]], None]
OnClose = Callable[[str], None]


class Transport(Protocol):
    """The API side's end."""

    def start(self, loop: asyncio.AbstractEventLoop, on_replies: OnReplies, on_close: OnClose) -> None:
        """Deliver replies on `loop`; `on_close(reason)` once when the engine is gone."""

    def send(self, command: Command) -> None:
        """Queue a command for the engine. Thread-safe, never blocks; silently dropped after the engine is gone."""

    def close(self) -> None:
        """Give up the connection. Idempotent."""


class Inbox(Protocol):
    """The engine's end."""

    def drain(self, timeout: float | None) -> list[Command]:
        """Commands that have arrived. Waits up to `timeout` seconds for the first (0 = no wait, None = for ever)."""

    def send(self, replies: list[Reply]) -> None:
        """Send the replies of one step as one frame."""

    @property
    def closed(self) -> bool:
        """True once the API side is gone."""


class LocalTransport:
    """Both ends inside one process; the engine loop runs in a thread of its own."""

    def __init__(self) -> None:
        self.inbox = LocalInbox()

    def start(self, loop: asyncio.AbstractEventLoop, on_replies: OnReplies, on_close: OnClose) -> None:
        """Deliver replies on `loop`; `on_close(reason)` once when the engine is gone."""
        self.inbox.connect(loop, on_replies, on_close)

    def send(self, command: Command) -> None:
        """Queue a command for the engine."""
        self.inbox.commands.put(command)

    def close(self) -> None:
        """Wake the engine and tell it that nobody listens any more."""
        self.inbox.close("closed by the client")


class LocalInbox:
    """Engine end of LocalTransport. Replies sent before `connect` are kept for it."""

    def __init__(self) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._backlog: list[Reply] = []
        self._deliver: Callable[[list[Reply]], None] | None = None
        self._on_close: Callable[[str], None] | None = None
        self._close_reason: str | None = None

    def connect(self, loop: asyncio.AbstractEventLoop, on_replies: OnReplies, on_close: OnClose) -> None:
        """Deliver on `loop` from now on, the backlog first."""

        def call(function: Callable[..., None], argument: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(function, argument)

        with self._lock:
            self._deliver = lambda replies: call(on_replies, replies)
            self._on_close = lambda reason: call(on_close, reason)
            if self._backlog:
                self._deliver(self._backlog)
                self._backlog = []
            if self._close_reason is not None:
                self._on_close(self._close_reason)

    def drain(self, timeout: float | None) -> list[Command]:
        """Commands that have arrived; see Inbox."""
        commands: list[Command] = []
        try:
            first = self.commands.get(block=timeout != 0, timeout=timeout or None)
            while True:
                if first is not None:
                    commands.append(first)
                first = self.commands.get_nowait()
        except queue.Empty:
            return commands

    def send(self, replies: list[Reply]) -> None:
        """Deliver the replies of one step."""
        with self._lock:
            if self._deliver is None:
                self._backlog.extend(replies)
            else:
                self._deliver(replies)

    def close(self, reason: str) -> None:
        """Mark both ends closed and wake a waiting drain."""
        with self._lock:
            if self._close_reason is None:
                self._close_reason = reason
                if self._on_close is not None:
                    self._on_close(reason)
        self.commands.put(None)

    @property
    def closed(self) -> bool:
        """True once either side has closed."""
        return self._close_reason is not None


class FrameReader:
    """Cuts a byte stream into length-prefixed frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Frames completed by `data`, in order."""
        buffer = self._buffer
        buffer += data
        frames, at = [], 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            end = at + _LENGTH.size + length
            if len(buffer) < end:
                break
            frames.append(bytes(buffer[at + _LENGTH.size : end]))
            at = end
        del buffer[:at]
        return frames


def frame(body: bytes) -> bytes:
    """One length-prefixed frame."""
    return _LENGTH.pack(len(body)) + body


def _wait_readable(sock: socket.socket, timeout: float | None) -> bool:
    """Whether there is something to read (or the end), waiting up to `timeout` seconds, None = for ever."""
    poll = select.poll()  # select() refuses descriptors from 1024 on, which a host program may well have open
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


class SocketTransport:
    """API end of a socket to the engine process. Writes never block: what the socket refuses waits in a queue."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._outgoing: deque[memoryview] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Frame)
        self._frames = FrameReader()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early: deque[Reply] = deque()
        self._closed = False

    def receive(self, timeout: float) -> Reply | None:
        """The next reply before `start`, for whoever waits until the engine is ready; None after `timeout` seconds.

        Raises EngineUnavailable if the engine process ended.
        """
        while not self._early:
            if not _wait_readable(self._socket, timeout):
                return None
            try:
                data = self._socket.recv(_READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                raise EngineUnavailable("the engine process ended while starting; its log says why")
            for body in self._frames.feed(data):
                self._early.extend(self._decoder.decode(body).replies)
        return self._early.popleft()

    def start(self, loop: asyncio.AbstractEventLoop, on_replies: OnReplies, on_close: OnClose) -> None:
        """Read on `loop` from now on."""
        self._loop, self._on_replies, self._on_close = loop, on_replies, on_close
        if self._early:
            on_replies(list(self._early))
        loop.add_reader(self._socket.fileno(), self._readable)
        if self._outgoing:
            self._watch_writable()

    def send(self, command: Command) -> None:
        """Queue a command. Thread-safe."""
        data = frame(self._encoder.encode(command))
        with self._lock:
            if self._closed:
                return
            self._outgoing.append(memoryview(data))
            refused = not self._flush()
        if refused and self._loop is not None:
            self._loop.call_soon_threadsafe(self._watch_writable)

    def close(self) -> None:
        """Close the socket."""
        self._fail("closed by the client")

    def _flush(self) -> bool:
        """Write what the socket takes; True if nothing is left. The lock is held."""
        while self._outgoing:
            try:
                sent = self._socket.send(self._outgoing[0])
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self._outgoing.clear()
                return True
            if sent < len(self._outgoing[0]):
                self._outgoing[0] = self._outgoing[0][sent:]
            else:
                self._outgoing.popleft()
        return True

    def _watch_writable(self) -> None:
        if not self._closed and self._loop is not None:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        with self._lock:
            done = self._flush()
        if done and self._loop is not None and not self._closed:
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"the connection to the engine broke: {error}")
            return
        if not data:
            self._fail("the engine process ended")
            return
        for body in self._frames.feed(data):
            self._on_replies(self._decoder.decode(body).replies)

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._on_close(reason)
        self._socket.close()


class SocketInbox:
    """Engine end of the socket. Sends block when the API side is slower than the engine (back-pressure)."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._frames = FrameReader()
        self._closed = False

    def drain(self, timeout: float | None) -> list[Command]:
        """Commands that have arrived; see Inbox."""
        commands: list[Command] = []
        while not self._closed and len(commands) < _MOST and _wait_readable(self._socket, 0 if commands else timeout):
            try:
                data = self._socket.recv(_READ_BYTES)
            except OSError:
                data = b""
            if not data:
                self._closed = True
                break
            commands.extend(self._decoder.decode(body) for body in self._frames.feed(data))
        return commands

    def send(self, replies: list[Reply]) -> None:
        """Send the replies of one step as one frame."""
        if self._closed:
            return
        try:
            self._socket.sendall(frame(self._encoder.encode(Frame(replies))))
        except OSError:
            self._closed = True

    @property
    def closed(self) -> bool:
        """True once the API side is gone."""
        return self._closed
