"""The client side of `pando chat --url`: streams, counts and errors of an OpenAI-compatible server."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pando.cli.endpoint import HttpEndpoint, Usage
from pando.errors import (
    AuthenticationFailed,
    CapacityExceeded,
    ConfigError,
    EngineUnavailable,
    InvalidRequest,
    StepFailed,
)
from tests.cli.fake_api import FakeApi, running


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with running() as server:
        yield server


def test_chat_streams_text_then_counts(api: FakeApi) -> None:
    endpoint = HttpEndpoint(api.url + "/v1/", "secret")
    assert endpoint.model == "echo-1"
    pieces = list(endpoint.chat([{"role": "user", "content": "a b"}], {"max_new_tokens": 5, "sampling_seed": 1}))
    assert pieces == ["echo:", " a", " b", Usage(10, 4, 3, "stop")]
    path, body = api.requests[0]
    assert path == "/v1/chat/completions"
    assert body["max_tokens"] == 5 and body["seed"] == 1 and body["model"] == "echo-1"
    assert body["stream_options"] == {"include_usage": True}
    assert api.keys == ["Bearer secret"]


def test_complete_uses_the_other_route(api: FakeApi) -> None:
    pieces = list(HttpEndpoint(api.url).complete("x", {}))
    assert "".join(p for p in pieces if isinstance(p, str)) == "echo: x"
    assert api.requests[0][0] == "/v1/completions" and api.keys == [None]


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (401, {"error": {"message": "bad key"}}, AuthenticationFailed, "PANDO_API_KEY"),
        (503, {"error": {"message": "full", "code": "kv_capacity_exceeded"}}, CapacityExceeded, "full"),
        (400, "not json at all", InvalidRequest, "not json"),
    ],
)
def test_error_bodies_become_errors(api: FakeApi, status: int, body: object, kind: type[Exception], text: str) -> None:
    api.fail_with = (status, body)
    with pytest.raises(kind, match=text):
        list(HttpEndpoint(api.url).chat([{"role": "user", "content": "x"}], {}))


def test_error_inside_the_stream(api: FakeApi) -> None:
    api.late_error = "the step failed"
    pieces = HttpEndpoint(api.url).chat([{"role": "user", "content": "x"}], {})
    assert next(pieces) == "echo:"
    with pytest.raises(StepFailed, match="the step failed"):
        list(pieces)


def test_not_a_model_server(api: FakeApi) -> None:
    with pytest.raises(EngineUnavailable, match="JSON"):
        HttpEndpoint(api.url + "/html")
    api.models = []
    with pytest.raises(EngineUnavailable, match="no model"):
        HttpEndpoint(api.url)


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EngineUnavailable, match="pando serve"):
            HttpEndpoint(url, timeout=5)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "https:///v1"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        HttpEndpoint(url)
