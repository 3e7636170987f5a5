"""/generate: one prompt or many, whole or streamed, with logprobs."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.fakes import fake_logprob
from tests.server.harness import TOKENIZER, Server, call, events

IDS = TOKENIZER.encode("Hello world, hello there!")


def test_one_prompt_gives_one_object() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("Paris 🙂.")
        body = {"text": "The capital of France is", "sampling_params": {"temperature": 0}, "rid": "my-id"}
        reply = (await http.post("/generate", json=body)).json()
        assert reply["text"] == "Paris 🙂."
        meta = reply["meta_info"]
        assert meta["id"] == "my-id"
        assert meta["finish_reason"] == {"type": "stop", "matched": TOKENIZER.eos_token_id}
        assert meta["prompt_tokens"] == len(TOKENIZER.encode(body["text"]))
        assert meta["completion_tokens"] == len(reply["output_ids"])
        assert meta["cached_tokens"] == 0
        assert meta["e2e_latency"] > 0
        again = (await http.post("/generate", json=body)).json()
        assert again["meta_info"]["cached_tokens"] == meta["prompt_tokens"] - 1

    call(test)


def test_lists_of_prompts_and_n_give_lists_in_prompt_order() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"text": ["Hello", "Good dog"], "sampling_params": {"max_new_tokens": 3, "n": 2}}
        rows = (await http.post("/generate", json=body)).json()
        lengths = [len(TOKENIZER.encode(text)) for text in body["text"] for _ in range(2)]
        assert [row["meta_info"]["prompt_tokens"] for row in rows] == lengths
        body = {
            "input_ids": [IDS, IDS[:4]],
            "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 5}],
            "rid": ["a", "b"],
        }
        rows = (await http.post("/generate", json=body)).json()
        assert [row["meta_info"]["id"] for row in rows] == ["a", "b"]
        assert [len(row["output_ids"]) for row in rows] == [2, 5]
        single = (await http.post("/generate", json={"text": ["Hello"]})).json()
        assert isinstance(single, list) and len(single) == 1

    call(test)


def test_stream_is_cumulative_and_ends_like_the_whole_reply() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("One 🙂 two three STOP four")
        body = {"text": "Hello", "sampling_params": {"stop": "STOP"}}
        whole = (await http.post("/generate", json=body)).json()
        response = await http.post("/generate", json={**body, "stream": True})
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        parts = events(response.text)
        assert len(parts) > 3
        assert parts[-1]["text"] == whole["text"] == "One 🙂 two three "
        assert parts[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "STOP"}
        assert parts[-1]["output_ids"] == whole["output_ids"]
        for before, after in zip(parts, parts[1:], strict=False):
            assert after["text"].startswith(before["text"])
            assert before["meta_info"]["finish_reason"] is None

    call(test)


def test_batch_stream_tells_sequences_apart_by_index() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"text": ["Hello", "dog"], "sampling_params": {"max_new_tokens": 6}, "stream": True}
        parts = events((await http.post("/generate", json=body)).text)
        last = {part["index"]: part for part in parts}
        assert sorted(last) == [0, 1]
        assert all(len(part["output_ids"]) == 6 for part in last.values())

    call(test)


def test_logprobs_follow_the_wire_contract() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for start in (0, 3, len(IDS) - 1):
            body = {
                "input_ids": IDS,
                "sampling_params": {"max_new_tokens": 4, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": 2,
                "token_ids_logprob": [5, 9],
                "return_text_in_logprobs": True,
            }
            reply = (await http.post("/generate", json=body)).json()
            meta = reply["meta_info"]
            assert len(meta["input_token_logprobs"]) + start == meta["prompt_tokens"]
            assert [entry[1] for entry in meta["input_token_logprobs"]] == IDS[start:]
            assert (meta["input_token_logprobs"][0][0] is None) == (start == 0)
            assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
            first = meta["output_token_logprobs"][0]
            assert first[0] == fake_logprob(first[1], len(IDS))
            assert first[2] == TOKENIZER.token_text(first[1])
            assert meta["output_top_logprobs"][0][0] == first
            assert [entry[1] for entry in meta["output_token_ids_logprobs"][0]] == [5, 9]

    call(test)


def test_outputs_only_and_no_text_by_default() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 2}, "return_logprob": True}
        meta = (await http.post("/generate", json=body)).json()["meta_info"]
        assert meta["input_token_logprobs"] == []
        assert [entry[2] for entry in meta["output_token_logprobs"]] == [None, None]
        assert "output_top_logprobs" not in meta

    call(test)


def test_prefill_only_fills_the_cache() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 0}}
        reply = (await http.post("/generate", json=body)).json()
        assert (reply["text"], reply["output_ids"]) == ("", [])
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        body["sampling_params"] = {"max_new_tokens": 1}
        assert (await http.post("/generate", json=body)).json()["meta_info"]["cached_tokens"] == len(IDS) - 1

    call(test)


def test_absent_limit_is_128() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        reply = (await http.post("/generate", json={"text": "Hi", "sampling_params": {"ignore_eos": True}})).json()
        assert reply["meta_info"]["completion_tokens"] == 128

    call(test)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [10**7]}, "input_ids"),
        ({"text": ""}, "text"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": {"nonsense": 1}}, "nonsense"),
        ({"text": "a", "sampling_params": {"json_schema": "{}", "regex": "a"}}, "regex"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "timeout": 0}, "timeout"),
        ({"text": "a", "stream": "yes"}, "stream"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
        ({"text": "word " * 600}, "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_400_and_name_the_field(body: dict[str, Any], param: str, stream: bool) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post("/generate", json={"stream": stream, **body})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert error["message"]

    call(test)


def test_engine_errors_before_the_first_token_are_statuses_and_later_ones_events() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for stream in (False, True):
            server.engine.reject = ("kv_capacity_exceeded", "the prompt needs 9000 tokens; the pool has 4096")
            response = await http.post("/generate", json={"text": "Hi", "stream": stream})
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert "9000 tokens" in response.json()["error"]["message"]
        server.engine.reject = None
        server.engine.fail_at["x"] = (3, "step_failed", "not finite")
        parts = events((await http.post("/generate", json={"text": "Hi", "stream": True, "rid": "x"})).text)
        assert parts[-1]["error"]["code"] == "step_failed"
        assert len(parts[-2]["output_ids"]) == 3
        assert (await http.post("/generate", json={"text": "Hi", "rid": "x"})).status_code == 500

    call(test)


def test_one_failed_prompt_of_a_batch_is_an_abort_among_good_replies() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.fail_at["b"] = (0, "step_failed", "not finite")
        rows = (await http.post("/generate", json={"text": ["Hi", "dog"], "rid": ["a", "b"]})).json()
        assert rows[0]["meta_info"]["finish_reason"]["type"] == "stop"
        assert rows[1]["meta_info"]["finish_reason"] == {
            "type": "abort",
            "message": "not finite",
            "status_code": 500,
            "err_type": "step_failed",
        }

    call(test)


def test_namespaces_share_nothing_and_are_passed_on() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        for extra in ({}, {"cache_salt": "a"}, {"extra_key": "a"}):
            body = {"text": "Hi", "sampling_params": {"max_new_tokens": 1}, **extra}
            assert (await http.post("/generate", json=body)).status_code == 200
        spaces = [command.namespace for command in server.engine.commands]  # type: ignore[union-attr]
        assert spaces[0] == ""
        assert len(set(spaces)) == 3

    call(test)


def test_cache_breakpoints_are_checked_and_passed_on() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}}
        assert (await http.post("/generate", json={**body, "cache_breakpoints": [2, 3]})).status_code == 200
        assert server.engine.commands[-1].cache_breakpoints == [2, 3]  # type: ignore[union-attr]
        for wrong in ([0], [4], [1] * 17):
            reply = await http.post("/generate", json={**body, "cache_breakpoints": wrong})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "cache_breakpoints"

    call(test)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"text": ""}, "text"),
        ({"text": None, "input_ids": [[5], []]}, "input_ids"),
        ({"sampling_params": {"temperature": "x"}}, "temperature"),
        ({"sampling_params": {"grammar": {"kind": "regex", "source": "a", "after": {}}}}, "grammar"),
        ({"return_logprob": True, "top_logprobs_num": 1025}, "top_logprobs_num"),
        ({"return_logprob": True, "token_ids_logprob": [1] * 1025}, "token_ids_logprob"),
        ({"priority": 2**40}, "priority"),
        ({"sampling_params": {"sampling_seed": 2**64}}, "sampling_seed"),
    ],
)
def test_values_out_of_bounds_are_named(change: dict[str, Any], param: str) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        reply = await http.post("/generate", json={"text": "Hi", **change})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == param

    call(test)


def test_null_is_the_same_as_absent() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"text": "Hi", "stream": None, "cache_breakpoints": None, "sampling_params": None, "rid": None}
        assert (await http.post("/generate", json=body)).status_code == 200

    call(test)


@pytest.mark.parametrize("code", ["invalid_grammar", "grammar_error"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_grammar_names_its_field(stream: bool, code: str) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.fail_at["a"] = (0, code, "regex: broken")
        body = {"text": "Hi", "rid": "a", "stream": stream, "sampling_params": {"regex": "("}}
        reply = await http.post("/generate", json=body)
        assert reply.status_code == 400
        assert (reply.json()["error"]["param"], reply.json()["error"]["code"]) == ("sampling_params", code)

    call(test)
