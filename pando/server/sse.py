"""Server-sent events straight over ASGI, and the watch for clients that leave.

Nothing is sent until the engine has taken the request in: an error before the first token is a plain HTTP status. If
the first token takes longer than ADMISSION_SECONDS the stream begins without it, as a sign of life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.types import Message, Receive, Scope, Send

from pando.engine_client import Completion, Delta, Generation, collect
from pando.errors import PandoError, RequestAborted

logger = logging.getLogger(__name__)

ADMISSION_SECONDS = 0.5
"""How long the status line waits for the first token or error."""
PING_SECONDS = 15.0
"""Pause between comment lines while a stream has not begun; proxies drop silent connections."""

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

encode_json: Callable[[object], bytes] = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """One event of JSON data."""
    return b"data: " + encode_json(value) + b"\n\n"


def error_body(error: PandoError) -> dict[str, object]:
    """An error as all JSON dialects write it, with all four keys."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


class StreamWriter(Protocol):
    """Writes one dialect's events."""

    def begin(self) -> bytes:
        """Events that come before any token."""

    def write(self, deltas: list[Delta]) -> bytes:
        """Events of these deltas."""

    def end(self) -> bytes:
        """Events after the last token."""

    def fatal(self, delta: Delta) -> PandoError | None:
        """The error that ends the whole stream, if this delta brings one."""


class EventStream:
    """An ASGI response that streams a generation. `await admit()` first; it raises what should be a plain status."""

    def __init__(self, receive: Receive, generation: Generation, writer: StreamWriter) -> None:
        self._generation = generation
        self._writer = writer
        self._watch = asyncio.ensure_future(watch_disconnect(receive, generation))
        self._first = asyncio.ensure_future(generation.next_deltas())

    async def admit(self) -> None:
        """Wait a moment for the first token or an error. Raises the error."""
        try:
            await asyncio.wait({self._first}, timeout=ADMISSION_SECONDS)
            if self._first.done():
                self._raise_errors(self._first.result())
        except BaseException:
            self._close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
            await self._send_all(send)
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        body = self._writer.begin()
        try:
            while not self._first.done():
                await send(_part(body))
                body = PING
                await asyncio.wait({self._first}, timeout=PING_SECONDS)
            body = b"" if body is PING else body
            deltas = self._first.result()
            while deltas:
                self._raise_errors(deltas)
                await send(_part(body + self._writer.write(deltas)))
                body = b""
                deltas = await self._generation.next_deltas()
            body += self._writer.end()
        except RequestAborted as error:
            if self._generation.cancelled:  # nobody is there to read
                return
            body += event(error_body(error))
        except PandoError as error:
            body += event(error_body(error))
        except Exception:
            logger.exception("a stream broke")
            body += event(error_body(PandoError("internal error; the server's log has more")))
        await send({"type": "http.response.body", "body": body + DONE, "more_body": False})

    def _raise_errors(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            error = self._writer.fatal(delta)
            if error is not None:
                raise error

    def _close(self) -> None:
        self._generation.cancel()
        self._watch.cancel()
        if not self._first.cancel() and not self._first.cancelled():
            self._first.exception()  # looked at, so that asyncio does not report it as lost


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def watch_disconnect(receive: Receive, generation: Generation) -> None:
    """Cancel the generation when the client leaves. The request's body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


async def collect_connected(receive: Receive, generation: Generation) -> list[Completion]:
    """All of a generation, cancelled when the client leaves. Raises RequestAborted then."""
    watch = asyncio.ensure_future(watch_disconnect(receive, generation))
    try:
        return await collect(generation)
    finally:
        watch.cancel()
