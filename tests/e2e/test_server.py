"""The real server with a tiny model: what a client sees, under load, and when clients leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.e2e.server import FAMILY, Server
from tests.tiny_models import assert_greedy, hf_logits, prompt_ids, tiny_checkpoint

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--max-total-tokens", "1000", "--max-running-requests", "8") as running:
        running.wait_ready()
        yield running


def until_idle(server: Server, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while (stats := server.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline, stats
        time.sleep(0.02)


def events(reply: httpx.Response) -> list[Any]:
    """The JSON of every event; the last line must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_it_generates_what_transformers_does(server: Server) -> None:
    prompt = prompt_ids(150, seed=100)
    found = server.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 8}, return_logprob=True)
    logprobs = [entry[0] for entry in found["meta_info"]["output_token_logprobs"]]
    assert_greedy(tiny_checkpoint(FAMILY), prompt, found["output_ids"], logprobs)
    assert found["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_the_same_prompt_twice_computes_one_token(server: Server) -> None:
    prompt = prompt_ids(500, seed=101)
    cold, warm = (
        server.generate(input_ids=prompt, sampling_params={**GREEDY, "max_new_tokens": 4})["meta_info"]
        for _ in range(2)
    )
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 499)
    assert cold["prompt_tokens"] == warm["prompt_tokens"] == 500


def test_prompt_logprobs_of_a_prefill_only_request(server: Server) -> None:
    prompt = prompt_ids(300, seed=102)  # longer than the step's budget
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    oracle = hf_logits(tiny_checkpoint(FAMILY), prompt).log_softmax(-1)
    for start in (0, 0, 7):
        found = server.generate(**body, logprob_start_len=start)
        entries = found["meta_info"]["input_token_logprobs"]
        assert len(entries) + start == found["meta_info"]["prompt_tokens"] == 300
        assert [entry[1] for entry in entries] == prompt[start:]
        for position, (logprob, token, *_) in enumerate(entries, start=start):
            if position == 0:
                assert logprob is None
            else:
                assert logprob == pytest.approx(float(oracle[position - 1][token]), abs=1e-3)
        assert found["output_ids"] == []


def test_a_stream_is_cumulative_and_ends(server: Server) -> None:
    body = {"text": "hello", "sampling_params": {**GREEDY, "max_new_tokens": 400}, "stream": True}
    with server.http.stream("POST", "/generate", json=body) as reply:
        assert reply.status_code == 200 and "text/event-stream" in reply.headers["content-type"]
        found = events(reply)
    texts = [entry["text"] for entry in found]
    assert len(found) > 5 and all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert found[-1]["meta_info"]["completion_tokens"] == 400
    whole = server.generate(**{**body, "stream": False})
    assert whole["text"] == texts[-1] and whole["output_ids"] == found[-1]["output_ids"]


def test_chat_completions_stream_and_whole(server: Server) -> None:
    body = {
        "model": FAMILY,
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 10,
        "temperature": 0,
    }
    whole = server.http.post("/v1/chat/completions", json=body).json()
    assert whole["object"] == "chat.completion" and whole["usage"]["completion_tokens"] <= 10
    with server.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        pieces = [choice["delta"].get("content") or "" for entry in events(reply) for choice in entry["choices"]]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]


def test_64_equal_prompts_at_once_compute_their_prefix_about_once(server: Server) -> None:
    before = server.stats()
    body = {"input_ids": prompt_ids(300, seed=103), "sampling_params": {**GREEDY, "max_new_tokens": 1}}
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda _: server.generate(**body)["output_ids"], range(64)))
    assert all(tokens == found[0] for tokens in found)
    after = server.stats()
    computed = after["computed_prompt_tokens_total"] - before["computed_prompt_tokens_total"]
    assert 300 <= computed <= 300 + 63
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == 64 * 300


def test_aborting_r1_leaves_r10(server: Server) -> None:
    def ask(rid: str, num: int) -> Any:
        body = {"rid": rid, "text": "abc" + rid, "sampling_params": {**GREEDY, "max_new_tokens": num}, "stream": True}
        with server.http.stream("POST", "/generate", json=body) as reply:
            return events(reply)[-1]["meta_info"]

    with ThreadPoolExecutor(2) as pool:
        one, ten = pool.submit(ask, "r1", 950), pool.submit(ask, "r10", 900)
        while server.stats()["num_running"] < 2:
            time.sleep(0.005)
        assert server.http.post("/abort_request", json={"rid": "r1"}).status_code == 200
        assert one.result()["finish_reason"]["type"] == "abort"
        assert ten.result()["finish_reason"] == {"type": "length", "length": 900}
        assert ten.result()["completion_tokens"] == 900


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_of_a_client_that_is_gone_is_free_quickly(server: Server, stream: bool) -> None:
    until_idle(server)
    before = server.stats()
    body = json.dumps({"text": "x", "sampling_params": {**GREEDY, "max_new_tokens": 990}, "stream": stream}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(head.encode() + body)
    while server.stats()["requests_total"] == before["requests_total"]:
        time.sleep(0.002)
    client.close()
    until_idle(server)
    after = server.stats()
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 990, "it was not ended early"
    assert after["finished_abort_total"] == before["finished_abort_total"] + 1


def test_more_than_the_pool_holds_waits_its_turn(server: Server) -> None:
    until_idle(server)
    before = server.stats()

    def ask(number: int) -> int:
        body = {"input_ids": prompt_ids(440, seed=110 + number), "sampling_params": {**GREEDY, "max_new_tokens": 60}}
        return len(server.generate(**body)["output_ids"])

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == [60] * 12
    after = server.stats()
    assert after["finished_error_total"] == before["finished_error_total"]
    assert after["num_running"] == after["num_waiting"] == 0


def test_too_long_a_prompt_and_other_mistakes_are_400(server: Server) -> None:
    for body, words in (
        ({"input_ids": [1] * 2000}, "1000"),
        ({"input_ids": [1] * 990, "sampling_params": {"max_new_tokens": 20}}, "1000"),
        ({"input_ids": [384]}, "384"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "temprature"),
        ({"text": "a", "sampling_params": {"logit_bias": {"384": 1}}}, "logit_bias"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [384]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 5}, "logprob_start_len"),
    ):
        reply = server.http.post("/generate", json=body)
        assert reply.status_code == 400 and words in reply.json()["error"]["message"], (body, reply.text)
        assert words.isdigit() or reply.json()["error"]["param"] == words, reply.text
    assert server.http.post("/generate", content=b"{nope").status_code == 400
    assert server.stats()["failed_steps_total"] == 0


def test_flush_and_counters_at_the_end(server: Server) -> None:
    until_idle(server)
    assert server.http.post("/flush_cache").status_code == 200
    stats = server.stats()
    assert stats["kv_tokens_used"] == stats["kv_tokens_held"] == 0, "nothing leaks"
    assert stats["cached_tokens_total"] + stats["computed_prompt_tokens_total"] == stats["prompt_tokens_total"]
    assert "Traceback" not in server.output
