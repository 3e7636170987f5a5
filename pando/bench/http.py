"""A small HTTP/1.1 client for streams of server-sent events, made to cost little per event.

A load generator that is slower than the server measures itself. So: one protocol object per connection, no queue and
no task switch per event; the callback runs inside `data_received`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from pando.bench.address import Address

OnEvent = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Response:
    """Status and, unless the body was a stream of events, the body."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body = bytearray()
        self._status = 0
        self._left = -1  # bytes of the body (or chunk, with its CRLF) to come; -1: no head yet
        self._chunked = False
        self._on_event: OnEvent | None = None
        self._done: asyncio.Future[Response] | None = None

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect. Raises OSError."""
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if address.secure else None
        _, connection = await loop.create_connection(cls, address.host, address.port, ssl=context)
        return connection

    @property
    def usable(self) -> bool:
        """True while the connection is open."""
        return self._transport is not None and not self._transport.is_closing()

    async def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes, on_event: OnEvent
    ) -> Response:
        """Send one request; `on_event` gets each event's data as it arrives. Raises ConnectionError if it breaks off.

        Bodies that are no event stream (errors, JSON) come back in the Response.
        """
        assert self._transport is not None and self._done is None, "one request at a time"
        head = [f"{method} {path} HTTP/1.1", f"content-length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        self._on_event, self._left, self._body = on_event, -1, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write("\r\n".join([*head, "\r\n"]).encode() + body)
        try:
            return await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._done = None

    def close(self) -> None:
        """Close; a running request ends with ConnectionError."""
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        # A cast, because uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(str(exc or "the server closed the connection")))

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        while self._advance():
            pass

    def _advance(self) -> bool:
        """Consume one head, chunk or body; False if more bytes are needed."""
        if self._done is None or self._done.done():
            return False
        if self._left < 0:
            return self._read_head()
        if not self._chunked:
            return self._read_plain()
        return self._read_chunk()

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        self._status = int(lines[0].split(" ", 2)[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        self._left = int(headers.get("content-length", "0"))
        if "text/event-stream" not in headers.get("content-type", ""):
            self._on_event = None
        return True

    def _read_plain(self) -> bool:
        take = min(self._left, len(self._buffer))
        self._append(self._buffer[:take])
        del self._buffer[:take]
        self._left -= take
        if self._left == 0:
            self._finish()
        return False

    def _read_chunk(self) -> bool:
        line_end = self._buffer.find(b"\r\n")
        if line_end < 0:
            return False
        size = int(bytes(self._buffer[:line_end]).split(b";")[0], 16)
        end = line_end + 2 + size
        if len(self._buffer) < end + 2:
            return False
        if size:
            self._append(self._buffer[line_end + 2 : end])
        del self._buffer[: end + 2]
        if size == 0:
            self._finish()
        return True

    def _append(self, data: bytearray) -> None:
        self._body += data
        if self._on_event is None:
            return
        while (end := self._body.find(b"\n\n")) >= 0:
            if self._body.startswith(b"data:"):
                self._on_event(bytes(self._body[5:end]).strip())
            del self._body[: end + 2]

    def _finish(self) -> None:
        assert self._done is not None
        self._done.set_result(Response(self._status, bytes(self._body)))


def error_text(response: Response) -> str:
    """One line about a response that is an error."""
    try:
        return f"{response.status}: {json.loads(response.body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status}: {response.body[:200].decode(errors='replace')}"
