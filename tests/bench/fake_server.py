"""A server that streams numbers instead of text: enough of the native and completions API to test a load generator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


class FakeServer:
    """Answers every prompt with `gap` seconds between tokens; a request is cached as far as an earlier one reached."""

    def __init__(self, gap: float = 0.0, chunked: bool = True) -> None:
        self.gap = gap
        self.chunked = chunked
        self.seen: list[dict[str, Any]] = []
        self.authorizations: list[str] = []
        self.prefixes: set[tuple[int, ...]] = set()
        self.running = 0
        self.most_running = 0
        self.fail_with: tuple[int, str] | None = None
        self.connections = 0

    def cached(self, ids: list[int]) -> int:
        """Tokens of the longest earlier prompt + answer that starts this prompt, at most all but one."""
        best = max((len(p) for p in self.prefixes if tuple(ids[: len(p)]) == p), default=0)
        return min(best, len(ids) - 1)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                path = lines[0].split(" ")[1]
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
                self.authorizations.append(headers.get("authorization", ""))
                body = await reader.readexactly(int(headers["content-length"]))
                await self.answer(path, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        """Write one response."""
        if path == "/server_info":
            self.plain(writer, 200, {"vocab_size": 8192, "page_size": 1})
            return
        if self.fail_with is not None:
            self.plain(writer, self.fail_with[0], {"error": {"message": self.fail_with[1]}})
            return
        request = json.loads(body)
        self.seen.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            async for event in self.events(path, request):
                data = f"data: {event}\n\n".encode()
                # Cut every event in two, so that the client has to join pieces.
                for part in (data[:3], data[3:]):
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        finally:
            self.running -= 1

    async def events(self, path: str, request: dict[str, Any]) -> AsyncIterator[str]:
        """The events of one answer."""
        native = path == "/generate"
        ids = request["input_ids"] if native else request["prompt"]
        count = request["sampling_params"]["max_new_tokens"] if native else request["max_tokens"]
        cached, output = self.cached(ids), list(range(1000, 1000 + count))
        for index in range(count):
            await asyncio.sleep(self.gap)
            if native:
                meta = {"prompt_tokens": len(ids), "completion_tokens": index + 1, "cached_tokens": cached}
                yield json.dumps({"text": "x", "output_ids": output[: index + 1], "meta_info": meta})
            else:
                yield json.dumps({"choices": [{"text": "x"}]})
        self.prefixes.add(tuple(ids + output))
        if not native:
            usage = {"prompt_tokens": len(ids), "completion_tokens": count}
            yield json.dumps({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}}})
        yield "[DONE]"

    def plain(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        """A JSON response."""
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)


@asynccontextmanager
async def running(server: FakeServer) -> AsyncIterator[str]:
    """The server's base URL while it runs."""
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    try:
        host, port = listener.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        listener.close()
