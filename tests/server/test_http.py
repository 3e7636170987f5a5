"""What all routes share: keys, errors, limits, paths, ids; and the operator's routes."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from pando.core.config import Config
from pando.core.messages import Load
from pando.server import exchange
from pando.server.http import create_service_app
from pando.server.service import Service
from tests.server.harness import TOKENIZER, Server, call, events

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
LONG = {"text": "Hi", "sampling_params": {"ignore_eos": True, "max_new_tokens": 400}}
KEYED = Config(api_key=("one", "two"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic one"}, 401),
        ({"x-api-key": "on"}, 401),
        ({"authorization": "Bearer one"}, 200),
        ({"authorization": "bearer two"}, 200),
        ({"x-api-key": "two"}, 200),
    ],
)
def test_keys_guard_every_route_but_probes(headers: dict[str, str], status: int) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for path, body in (("/v1/chat/completions", CHAT), ("/generate", {"text": "Hi"})):
            response = await http.post(path, json=body, headers=headers)
            assert response.status_code == status
            if status == 401:
                assert response.json()["error"]["type"] == "authentication_error"
        for path in ("/v1/models", "/server_info", "/flush_cache", "/models", "//v1/models"):
            assert (await http.get(path, headers=headers)).status_code == status
        for path in ("/health", "/ready", "/metrics", "/"):
            assert (await http.get(path, headers=headers)).status_code == 200

    call(test, config=KEYED)


@pytest.mark.parametrize("body", [b"", b"not json", b"[1, 2]", b'"text"', b"\xff\xfe", b'{"messages":', b"[" * 100_000])
@pytest.mark.parametrize(
    "path", ["/generate", "/v1/chat/completions", "/v1/completions", "/tokenize", "/abort_request"]
)
def test_bodies_that_are_no_json_object_are_400(path: str, body: bytes) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post(path, content=body)
        assert response.status_code == 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    call(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_413(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_LIMIT", 1000)

    async def parts() -> Any:
        for _ in range(5):
            yield b"x" * 300

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post("/generate", content=parts() if chunked else b"x" * 1500)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"

    call(test)


def test_unknown_paths_and_methods_say_so() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        missing = await http.get("/v1/nothing")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "route_not_found"
        hint = await http.post("/chat/completions", json=CHAT)
        assert hint.status_code == 404 and "/v1/chat/completions" in hint.json()["error"]["message"]
        assert (await http.post("/v1/v1/models", json={})).json()["error"]["message"].endswith("end in one /v1")
        wrong = await http.get("/generate")
        assert wrong.status_code == 405
        assert "GET" in wrong.json()["error"]["message"]

    call(test)


def test_slashes_too_many_are_forgiven() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for path in ("/v1//models", "//v1/models", "/v1/models/"):
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/v1//chat/completions/", json=CHAT)).status_code == 200

    call(test)


def test_request_ids_are_echoed_or_made() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        assert (await http.get("/health", headers={"x-request-id": "abc"})).headers["x-request-id"] == "abc"
        made = {(await http.get("/health")).headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3

    call(test)


def test_surprises_are_500_without_details(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        def broken(*args: Any, **options: Any) -> None:
            raise RuntimeError("secret /path/of/mine")

        monkeypatch.setattr(server.client, "sampling", broken)
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 500
        assert response.headers["x-should-retry"] == "false"
        assert "secret" not in response.text
        assert "secret" in caplog.text

    call(test)


def test_front_page_is_text_for_programs() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        assert (await http.get("/")).text == "Pando is running"
        assert (await http.head("/")).status_code == 200
        assert (await http.get("/ui/../http.py")).status_code == 404

    call(test)


def test_health_while_loading_ready_and_dead() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        assert (await http.get("/health")).json() == {"status": "ok"}
        assert (await http.get("/ready")).json() == {"status": "ok", "ready": True}
        server.service.draining = True
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 503
        server.service.draining = False
        server.client.last_reply_at -= 100
        stalled = await http.get("/health")
        assert stalled.status_code == 503 and "silent for 100 s" in stalled.json()["reason"]
        server.transport.die("killed")
        dead = await http.get("/health")
        assert dead.status_code == 503 and dead.json() == {"status": "dead", "reason": "killed"}
        gone = await http.post("/v1/chat/completions", json=CHAT)
        assert gone.status_code == 503 and gone.headers["retry-after"] == "1"

    call(test)


def test_loading_server_tells_its_phase() -> None:
    async def main() -> None:
        service = Service(Config())
        service.phase = Load("weights", 0.5, "1 of 2 GB")
        transport = httpx.ASGITransport(create_service_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            health = await http.get("/health")
            assert health.status_code == 503
            body = health.json()
            assert (body["status"], body["phase"], body["fraction"]) == ("loading", "weights", 0.5)
            assert (await http.get("/ready")).status_code == 503
            assert "still loading (weights)" in (await http.get("/v1/models")).json()["error"]["message"]
            assert "pando_up 0" in (await http.get("/metrics")).text

    asyncio.run(main())


def test_health_generate_runs_a_token_unless_some_flowed() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for _ in range(2):
            assert (await http.get("/health_generate")).status_code == 200
        assert len(server.engine.prompts) == 1
        server.client.last_token_at = 0.0
        server.engine.reject = ("step_failed", "broken")
        assert (await http.get("/health_generate")).status_code == 503

    call(test)


def test_info_routes() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for path in ("/get_model_info", "/model_info"):
            info = (await http.get(path)).json()
            assert info["model_path"] == info["tokenizer_path"] == "org/tiny"
            assert info["is_generation"] is True
            assert info["weight_version"] == "default"
        info = (await http.get("/server_info")).json()
        assert (info["page_size"], info["max_total_num_tokens"], info["version"]) == (1, 4096, "0.0-test")
        assert info["stats"]["kv_tokens_total"] == 100
        assert (await http.get("/stats")).json()["kv_tokens_used"] == 35
        assert re.fullmatch(r"\d+\.\d+\S*", (await http.get("/version")).json()["version"])

    call(test)


def test_flush_cache_only_when_idle() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        await http.post("/generate", json={"text": "Hello there"})
        assert (await http.get("/flush_cache")).status_code == 200
        meta = (await http.post("/generate", json={"text": "Hello there"})).json()["meta_info"]
        assert meta["cached_tokens"] == 0
        server.engine.paused = True
        task = asyncio.create_task(http.post("/generate", json={"text": "Hello there"}))
        await asyncio.sleep(0.02)
        refused = await http.post("/flush_cache")
        assert refused.status_code == 400 and "running" in refused.text
        server.engine.paused = False
        assert (await task).status_code == 200
        assert (await http.post("/flush_cache")).status_code == 200

    call(test)


def test_abort_is_exact_and_can_take_all() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.step_seconds = 0.002
        tasks = {
            rid: asyncio.create_task(http.post("/generate", json={**LONG, "rid": rid})) for rid in ("r1", "r10", "r2")
        }
        await asyncio.sleep(0.05)
        assert (await http.post("/abort_request", json={"rid": "r1"})).status_code == 200
        aborted = (await tasks["r1"]).json()["meta_info"]
        assert aborted["id"] == "r1" and aborted["finish_reason"]["type"] == "abort"
        assert sorted(server.engine.running) == ["r10", "r2"]
        assert (await http.post("/abort_request", json={"rid": "r"})).status_code == 200
        assert sorted(server.engine.running) == ["r10", "r2"]
        assert (await http.post("/abort_request", json={"abort_all": True})).status_code == 200
        for rid in ("r10", "r2"):
            assert (await tasks[rid]).json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert (await http.post("/abort_request", json={})).status_code == 400

    call(test)


def test_an_aborted_stream_ends_with_its_text_so_far() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.step_seconds = 0.002
        task = asyncio.create_task(http.post("/generate", json={**LONG, "rid": "s", "stream": True}))
        await asyncio.sleep(0.05)
        await http.post("/abort_request", json={"rid": "s"})
        last = events((await task).text)[-1]
        assert last["meta_info"]["finish_reason"]["err_type"] == "request_aborted"
        assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) > 0

    call(test)


def test_aborting_a_chat_is_its_error() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.step_seconds = 0.002
        body = {**CHAT, "max_tokens": 400, "ignore_eos": True, "rid": "c", "n": 2}
        task = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await asyncio.sleep(0.05)
        await http.post("/abort_request", json={"rid": "c"})
        assert (await task).status_code == 499
        assert not server.engine.running

    call(test)


def test_pause_and_continue() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        assert (await http.post("/pause_generation")).status_code == 200
        assert (await http.get("/ready")).json()["status"] == "paused"
        task = asyncio.create_task(http.post("/generate", json={"text": "Hi"}))
        await asyncio.sleep(0.03)
        assert not task.done()
        assert (await http.post("/continue_generation")).status_code == 200
        assert (await task).status_code == 200
        assert (await http.get("/ready")).status_code == 200

    call(test)


def test_tokenize_and_detokenize() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        text = "Hello 🙂 dog"
        ids = TOKENIZER.encode(text)
        for path in ("/tokenize", "/v1/tokenize"):
            reply = (await http.post(path, json={"prompt": text, "return_token_strs": True})).json()
            assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 512)
            assert reply["token_strs"][0] == TOKENIZER.token_text(ids[0])
        assert (await http.post("/detokenize", json={"tokens": ids})).json()["prompt"] == text
        both = (await http.post("/v1/detokenize", json={"tokens": [ids, ids[:1]]})).json()["prompt"]
        assert both == [text, TOKENIZER.decode(ids[:1])]
        chat = (await http.post("/tokenize", json={"messages": CHAT["messages"]})).json()
        rendered = TOKENIZER.decode(chat["tokens"], skip_special_tokens=False)
        assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        several = (await http.post("/tokenize", json={"prompt": ["a", "the dog"]})).json()
        assert several["count"] == [len(row) for row in several["tokens"]]
        for body in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
            assert (await http.post("/tokenize", json=body)).status_code == 400
        for tokens in (["a"], [-1], None, [[1], 2]):
            assert (await http.post("/detokenize", json={"tokens": tokens})).status_code == 400

    call(test)


def test_metrics_page_lists_every_name() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        await http.post("/generate", json={"text": "Hi"})  # ratios need a first prompt
        names = set(re.findall(r"^# TYPE (\S+)", (await http.get("/metrics")).text, re.MULTILINE))
        page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
        listed = set(re.findall(r"`((?:pando_|vllm:|sglang:|http_)[a-z_0-9]+)`", page))
        assert names <= listed
        foreign = {name for name in listed if not name.startswith("pando_")}
        assert foreign <= names, "the page promises names that are not there"

    call(test)


def test_metrics_are_prometheus_text_under_all_names() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        await http.post("/generate", json={"text": "Hello there", "stream": True})
        await http.post("/generate", json={})
        text = (await http.get("/metrics")).text
        values = {}
        for line in text.splitlines():
            assert re.fullmatch(
                r"# TYPE [a-z_:0-9]+ (counter|gauge|histogram)|[a-z_:0-9]+(\{.*\})? [-+0-9.e]+", line
            ), line
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                assert name not in values
                values[name] = float(value)
        model = '{model_name="tiny"}'
        prompt = len(TOKENIZER.encode("Hello there"))
        for name in ("pando_prompt_tokens_total", "vllm:prompt_tokens_total", "sglang:prompt_tokens_total"):
            assert values[name + model] == prompt
        assert values["vllm:kv_cache_usage_perc" + model] == values["sglang:token_usage" + model] == 0.25
        assert "# TYPE pando_kv_tokens_total gauge" in text and "# TYPE pando_prompt_tokens_total counter" in text
        assert values["pando_time_to_first_token_seconds_count" + model] == 1
        assert values['vllm:e2e_request_latency_seconds_bucket{model_name="tiny",le="+Inf"}'] == 1
        assert values['http_requests_total{method="POST",handler="/generate",status="2xx"}'] == 1
        assert values['http_requests_total{method="POST",handler="/generate",status="4xx"}'] == 1
        buckets = [value for name, value in values.items() if name.startswith("pando_e2e_request_latency_seconds_b")]
        assert buckets == sorted(buckets)

    call(test)
