"""An OpenAI-compatible server in a thread, with scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeApi:
    """Answers "echo: <last message>" word by word. `fail_with`: (status, body) for the next generation."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.keys: list[str | None] = []
        self.fail_with: tuple[int, object] | None = None
        self.late_error: str | None = None
        self.models = ["echo-1"]
        self.url = ""

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Chunks of one answer."""
        chat = "chat" in path
        text = "echo: " + (body["messages"][-1]["content"] if chat else body["prompt"])
        words = text.split(" ")
        for index, word in enumerate(words):
            piece = word if index == 0 else " " + word
            yield {"choices": [{"index": 0, "delta": {"content": piece}} if chat else {"index": 0, "text": piece}]}
        if self.late_error is not None:
            yield {"error": {"message": self.late_error, "code": "step_failed"}}
        end = {"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})}
        usage = {"prompt_tokens": 10, "completion_tokens": len(words), "prompt_tokens_details": {"cached_tokens": 4}}
        yield {"choices": [end], "usage": None}
        yield {"choices": [], "usage": usage}


def _handler(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.keys.append(self.headers["authorization"])
            if self.path == "/html/v1/models":
                self.reply(200, b"<html>", "text/html")
            else:
                self.reply(200, json.dumps({"data": [{"id": name} for name in api.models]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            api.requests.append((self.path, body))
            if api.fail_with is not None:
                status, value = api.fail_with
                self.reply(status, value.encode() if isinstance(value, str) else json.dumps(value).encode())
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            for event in api.events(self.path, body):
                self.wfile.write(f": ping\n\ndata: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


@contextmanager
def running() -> Iterator[FakeApi]:
    """The server while it runs, with its `url`."""
    api = FakeApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
