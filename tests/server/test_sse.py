"""Streams over real connections: signs of life, clients that leave, engines that die."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from pando.server import sse
from tests.server.harness import Server, events, live, wait_until

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "max_tokens": 400}
NATIVE = {"text": "Hi", "sampling_params": {"ignore_eos": True, "max_new_tokens": 400}}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", {**CHAT, "prompt": "Hi"}), ("/generate", NATIVE)]


@pytest.fixture
def served() -> Iterator[tuple[Server, str]]:
    server = Server()
    server.engine.step_seconds = 0.01
    with live(server) as url:
        yield server, url


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_reader_that_leaves_frees_its_slot_at_once(
    served: tuple[Server, str], path: str, body: dict[str, object]
) -> None:
    server, url = served
    with httpx.stream("POST", url + path, json={**body, "stream": True}) as response:
        reader = response.iter_bytes()
        next(reader)
        assert len(server.engine.running) == 1
    assert wait_until(lambda: not server.engine.running) < 1.0
    assert len(server.engine.aborts) == 1
    assert server.client.num_open == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_waiting_client_that_leaves_frees_its_slot_too(
    served: tuple[Server, str], path: str, body: dict[str, object]
) -> None:
    server, url = served
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + path, json=body, timeout=0.3)
    wait_until(lambda: not server.engine.running)
    assert len(server.engine.aborts) == 1
    assert httpx.get(url + "/health").status_code == 200


def test_a_client_that_leaves_before_the_first_token(served: tuple[Server, str]) -> None:
    server, url = served
    server.engine.paused = True
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=0.2)
    wait_until(lambda: not server.engine.running)
    assert len(server.engine.aborts) == 1


def test_stream_begins_without_tokens_when_they_take_long(
    served: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = served
    monkeypatch.setattr(sse, "ADMISSION_SECONDS", 0.05)
    monkeypatch.setattr(sse, "PING_SECONDS", 0.05)
    server.engine.paused = True
    begin = time.monotonic()
    with httpx.stream("POST", url + "/v1/chat/completions", json={**CHAT, "max_tokens": 3, "stream": True}) as response:
        lines = response.iter_lines()
        assert '"role":"assistant"' in next(lines)
        assert time.monotonic() - begin < 2
        assert next(line for line in lines if line.startswith(":")) == ": ping"
        server.engine.paused = False
        rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert sum('"content"' in line for line in rest) >= 1


def test_late_errors_are_events_and_the_stream_ends(served: tuple[Server, str]) -> None:
    server, url = served
    server.engine.fail_at["x"] = (3, "step_failed", "logits are not finite")
    text = httpx.post(url + "/v1/chat/completions", json={**CHAT, "stream": True, "rid": "x"}).text
    last = events(text)[-1]
    assert last["error"]["code"] == "step_failed"
    assert set(last["error"]) == {"message", "type", "param", "code"}


def test_an_engine_that_dies_ends_streams_and_refuses_more(served: tuple[Server, str]) -> None:
    server, url = served
    with httpx.stream("POST", url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.transport._loop.call_soon_threadsafe(server.transport.die, "killed")
        rest = [line for line in lines if line]
    assert "engine_unavailable" in rest[-2] and rest[-1] == "data: [DONE]"
    assert httpx.post(url + "/v1/chat/completions", json=CHAT).status_code == 503
    assert httpx.get(url + "/health").json() == {"status": "dead", "reason": "killed"}


def test_many_streams_at_once_stay_apart(served: tuple[Server, str]) -> None:
    import asyncio

    server, url = served
    server.engine.step_seconds = 0.001

    async def one(http: httpx.AsyncClient, seed: int) -> tuple[str, str]:
        body = {**CHAT, "max_tokens": 30, "seed": seed}
        whole = (await http.post(url + "/v1/chat/completions", json=body)).json()
        parts = events((await http.post(url + "/v1/chat/completions", json={**body, "stream": True})).text)
        text = "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])
        return text, whole["choices"][0]["message"]["content"]

    async def main() -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(limits=limits, timeout=30) as http:
            pairs = await asyncio.gather(*[one(http, seed) for seed in range(40)])
        assert all(streamed == whole for streamed, whole in pairs)
        assert len({streamed for streamed, _ in pairs}) == 40

    asyncio.run(main())
