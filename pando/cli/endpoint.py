"""Where `pando chat` and `pando generate` send a turn: a server's URL here, an engine in this process in `local.py`."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pando.bench.address import Address
from pando.errors import AuthenticationFailed, EngineUnavailable, InvalidRequest, from_code

Message = dict[str, str]
"""One chat message: role and content."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a finished turn, and why it ended ("stop", "length", "abort")."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: str


class Endpoint(Protocol):
    """Something that continues a conversation or a text."""

    model: str

    def chat(self, messages: list[Message], options: Mapping[str, object]) -> Iterator[str | Usage]:
        """Yield the reply's text in pieces, then one Usage. Closing the iterator aborts the request.

        `options` are sampling parameters by their native names. Raises PandoError.
        """
        ...

    def complete(self, prompt: str, options: Mapping[str, object]) -> Iterator[str | Usage]:
        """The same for plain text, without the chat template."""
        ...

    def close(self) -> None:
        """Give back what the endpoint holds."""
        ...


OPENAI_NAMES = {"max_new_tokens": "max_tokens", "sampling_seed": "seed", "min_new_tokens": "min_tokens"}
"""Sampling parameters that the OpenAI API spells differently; the rest keep their names."""


class HttpEndpoint:
    """An OpenAI-compatible server. Raises ConfigError on a bad URL and EngineUnavailable if nobody answers."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        self._address = Address.parse(url)
        self.url = self._address.url
        self._timeout = timeout
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        models = self.get("/v1/models")["data"]
        if not models:
            raise EngineUnavailable(f"{self.url} serves no model")
        self.model: str = models[0]["id"]

    def chat(self, messages: list[Message], options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        body = {"messages": messages, **self._common(options)}
        return self._stream("/v1/chat/completions", body)

    def complete(self, prompt: str, options: Mapping[str, object]) -> Iterator[str | Usage]:
        """See Endpoint."""
        return self._stream("/v1/completions", {"prompt": prompt, **self._common(options)})

    def close(self) -> None:
        """Nothing is held between requests."""

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`."""
        connection, response = self._request("GET", path, None)
        try:
            parsed = json.loads(response.read())
        except ValueError:
            raise EngineUnavailable(f"{self.url}{path} did not answer with JSON: is this a model server?") from None
        finally:
            connection.close()
        assert isinstance(parsed, dict), parsed
        return parsed

    def _common(self, options: Mapping[str, object]) -> dict[str, object]:
        named = {OPENAI_NAMES.get(name, name): value for name, value in options.items()}
        return {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **named}

    def _request(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        address = self._address
        kind = http.client.HTTPSConnection if address.secure else http.client.HTTPConnection
        connection = kind(address.host, address.port, timeout=self._timeout)
        try:
            connection.request(
                method, address.base + path, json.dumps(body) if body is not None else None, self._headers
            )
            response = connection.getresponse()
        except OSError as error:
            raise EngineUnavailable(f"no answer from {self.url}: {error}; is `pando serve` running there?") from None
        if response.status >= 400:
            text = response.read().decode(errors="replace")
            connection.close()
            raise _error(response.status, text)
        return connection, response

    def _stream(self, path: str, body: Mapping[str, object]) -> Iterator[str | Usage]:
        connection, response = self._request("POST", path, body)
        finish = "stop"
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if chunk.get("error"):
                    raise _error(500, data.decode())
                for choice in chunk.get("choices", ()):
                    finish = choice.get("finish_reason") or finish
                    text = choice["text"] if "text" in choice else choice["delta"].get("content")
                    if text:
                        yield text
                if chunk.get("usage"):
                    yield _usage(chunk["usage"], finish)
        finally:
            connection.close()


def _usage(usage: Mapping[str, Any], finish: str) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], details.get("cached_tokens", 0), usage["completion_tokens"], finish)


def _error(status: int, text: str) -> Exception:
    """The PandoError that a server's error body stands for."""
    try:
        error = json.loads(text)["error"]
        message, code = str(error["message"]), str(error.get("code"))
    except (ValueError, KeyError, TypeError):
        message, code = text.strip()[:500] or f"HTTP status {status}", ""
    if status in (401, 403):
        return AuthenticationFailed(f"{message} (give --api-key or set PANDO_API_KEY)")
    if status < 500 and not code:
        return InvalidRequest(message)
    return from_code(code, message)
