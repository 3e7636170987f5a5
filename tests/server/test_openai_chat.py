"""/v1/chat/completions, raw and through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from pando.core.messages import Generate
from tests.server.harness import TOKENIZER, Server, call, events, live
from tests.tiny_tokenizers import THINK_TEMPLATE, byte_level

USER = [{"role": "user", "content": "Hello there"}]
RENDERED = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
PATH = "/v1/chat/completions"
DEEP_CALL = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999 + "]" * 9999}}]}]


def sent(server: Server) -> Generate:
    """The last request that the engine got."""
    return [command for command in server.engine.commands if isinstance(command, Generate)][-1]


def text_of(chunks: list[dict[str, Any]], field: str = "content") -> str:
    return "".join(choice["delta"].get(field) or "" for chunk in chunks for choice in chunk["choices"])


def check_reply(reply: dict[str, Any]) -> None:
    TypeAdapter(ChatCompletion).validate_python(reply)
    for name in ("id", "object", "created", "model", "choices", "usage"):
        assert name in reply


def check_chunks(chunks: list[dict[str, Any]]) -> None:
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk).validate_python(chunk)
        assert "error" not in chunk
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


def test_whole_reply() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("Hi 🙂!")
        reply = (await http.post(PATH, json={"model": "tiny", "messages": USER, "unknown": {"x": 1}})).json()
        check_reply(reply)
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Hi 🙂!", "refusal": None}
        assert choice["finish_reason"] == "stop"
        assert choice["stop_reason"] is None
        assert reply["model"] == "tiny"
        request = sent(server)
        assert request.input_ids == TOKENIZER.encode(RENDERED, add_special_tokens=False)
        assert request.sampling.max_new_tokens == 512 - len(request.input_ids)
        assert reply["usage"] == {
            "prompt_tokens": len(request.input_ids),
            "completion_tokens": len(TOKENIZER.encode("Hi 🙂!")) + 1,
            "total_tokens": len(request.input_ids) + len(TOKENIZER.encode("Hi 🙂!")) + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "reasoning_tokens": 0,
        }
        again = (await http.post(PATH, json={"messages": USER})).json()
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(request.input_ids) - 1

    call(test)


def test_stream_order_and_text() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say('He said: "Hi" 🙂\n{x}')
        body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
        response = await http.post(PATH, json=body)
        assert response.headers["cache-control"] == "no-cache"
        chunks = events(response.text)
        check_chunks(chunks)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(chunks) == 'He said: "Hi" 🙂\n{x}'
        assert chunks[-2]["choices"][0]["delta"] == {}
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]] == [None] * (len(chunks) - 2) + [
            "stop"
        ]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == len(TOKENIZER.encode('He said: "Hi" 🙂\n{x}')) + 1
        assert all("usage" not in chunk for chunk in chunks[:-1])

    call(test)


def test_usage_in_each_chunk_when_asked() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"messages": USER, "stream": True, "stream_options": options, "max_tokens": 5}
        chunks = events((await http.post(PATH, json=body)).text)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 5

    call(test)


def test_n_choices_stream_side_by_side() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"messages": USER, "n": 3, "seed": 4, "max_tokens": 9}
        whole = (await http.post(PATH, json=body)).json()
        check_reply(whole)
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        for index, choice in enumerate(whole["choices"]):
            mine = [{"choices": [c for c in chunk["choices"] if c["index"] == index]} for chunk in chunks]
            assert text_of(mine) == choice["message"]["content"]
        assert whole["usage"]["completion_tokens"] == 27
        assert whole["usage"]["prompt_tokens"] == len(sent(server).input_ids)

    call(test)


def test_sampling_fields_reach_the_engine() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {
            "messages": USER,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "frequency_penalty": 0.2,
            "presence_penalty": -0.3,
            "repetition_penalty": 1.1,
            "logit_bias": {"5": -100, "7": 2},
            "max_completion_tokens": 9,
            "max_tokens": 500,
            "min_tokens": 2,
            "stop": ["a", "b"],
            "stop_token_ids": [11],
            "seed": 99,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            "priority": 3,
            "cache_salt": "me",
            "rid": "mine",
            "timeout": 30,
        }
        assert (await http.post(PATH, json=body)).status_code == 200
        request = sent(server)
        assert (request.rid, request.seed, request.priority, request.timeout) == ("mine", 99, 3, 30)
        assert request.namespace.startswith("me")
        params = request.sampling
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
        assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.2, -0.3, 1.1)
        assert params.logit_bias == {5: -100.0, 7: 2.0}
        assert (params.max_new_tokens, params.min_new_tokens) == (9, 2)
        assert (params.stop, params.stop_token_ids) == (["a", "b"], [11])
        assert params.ignore_eos and params.no_stop_trim and not params.skip_special_tokens

    call(test)


def test_stop_string_names_its_reason_in_both_modes() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("one two three")
        body = {"messages": USER, "stop": " th"}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert (choice["message"]["content"], choice["stop_reason"]) == ("one two", " th")
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        assert text_of(chunks) == "one two"
        assert chunks[-1]["choices"][0]["stop_reason"] == " th"

    call(test)


def test_logprobs_have_one_entry_per_token() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("Hi 🙂")
        body = {"messages": USER, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
        reply = (await http.post(PATH, json=body)).json()
        check_reply(reply)
        (choice,) = reply["choices"]
        content = choice["logprobs"]["content"]
        assert len(content) == reply["usage"]["completion_tokens"] == len(choice["token_ids"])
        assert bytes(sum((entry["bytes"] for entry in content[:-1]), [])).decode() == "Hi 🙂"
        assert all(len(entry["top_logprobs"]) == 3 for entry in content)
        assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"]
        assert reply["prompt_token_ids"] == sent(server).input_ids
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        check_chunks(chunks)
        streamed = [entry for c in chunks for x in c["choices"] for entry in (x["logprobs"] or {}).get("content", [])]
        ids = [token for c in chunks for x in c["choices"] for token in x.get("token_ids", [])]
        assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]
        assert ids == choice["token_ids"]

    call(test)


def test_continued_message_is_left_open() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        messages = [*USER, {"role": "assistant", "content": "Well,"}]
        await http.post(PATH, json={"messages": messages, "continue_final_message": True})
        assert TOKENIZER.decode(sent(server).input_ids, skip_special_tokens=False).endswith("assistant\nWell,")

    call(test)


def test_reasoning_is_split_off_and_counted() -> None:
    tokenizer = byte_level(chat_template=THINK_TEMPLATE)

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("\nLet me see.\n</think>\n\nIt is 5.")
        reply = (await http.post(PATH, json={"messages": USER})).json()
        message = reply["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me see.", "It is 5.")
        expected = len(tokenizer.encode("\nLet me see.\n"))
        assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == expected
        body = {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}
        chunks = events((await http.post(PATH, json=body)).text)
        check_chunks(chunks)
        assert text_of(chunks, "reasoning_content") == "Let me see."
        assert text_of(chunks) == "It is 5."
        assert chunks[-1]["usage"]["reasoning_tokens"] == expected
        together = (await http.post(PATH, json={"messages": USER, "separate_reasoning": False})).json()
        assert "</think>" in together["choices"][0]["message"]["content"]

    call(test, tokenizer=tokenizer)


CALL_TEXT = 'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>'


def test_tool_calls_come_whole_and_streamed() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(CALL_TEXT + "\n" + CALL_TEXT[6:])
        reply = (await http.post(PATH, json={"messages": USER, "tools": TOOLS})).json()
        check_reply(reply)
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Sure."
        calls = choice["message"]["tool_calls"]
        assert [each["function"]["name"] for each in calls] == ["get_weather"] * 2
        assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Oslo", "days": [1, 2]}
        assert len({each["id"] for each in calls}) == 2
        chunks = events((await http.post(PATH, json={"messages": USER, "tools": TOOLS, "stream": True})).text)
        check_chunks(chunks)
        deltas = [d for c in chunks for x in c["choices"] for d in x["delta"].get("tool_calls", [])]
        starts = [delta for delta in deltas if "id" in delta]
        assert [(delta["index"], delta["function"]["name"]) for delta in starts] == [
            (0, "get_weather"),
            (1, "get_weather"),
        ]
        pieces = [delta["function"]["arguments"] for delta in deltas if delta["index"] == 0]
        assert len(pieces) > 3
        assert "".join(pieces) == calls[0]["function"]["arguments"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    call(test)


def test_one_call_at_most_and_none_at_all() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(CALL_TEXT + "\n" + CALL_TEXT[6:])
        body = {"messages": USER, "tools": TOOLS, "parallel_tool_calls": False}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert len(choice["message"]["tool_calls"]) == 1
        (choice,) = (await http.post(PATH, json={"messages": USER, "tools": TOOLS, "tool_choice": "none"})).json()[
            "choices"
        ]
        assert "tool_calls" not in choice["message"] and "<tool_call>" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"

    call(test)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "no role"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"temperature": "hot"}, "temperature", "float"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0..20"),
        ({"max_tokens": 5000}, "max_tokens", "maximum context length is 512 tokens"),
        ({"messages": [{"role": "user", "content": "dog " * 600}]}, "messages", "maximum context length is 512 tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must be a schema"),
        ({"response_format": {"type": "poem"}}, "response_format", "poem"),
        ({"regex": "a+", "ebnf": "root ::= x"}, "ebnf", "exclude each other"),
        ({"structured_outputs": {"poem": "x"}}, "structured_outputs", "give one of json"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "tool_choice", "exclude each other"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "not in tools",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": "x"}}, "tool_choice", "not in tools (get"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": "x"}}]}, "tools[0].function", "give a JSON schema"),
        ({"tools": [{"function": {"name": "f", "strict": "x"}}]}, "tools[0].function", "true or false"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls", "not a list"),
        ({"messages": DEEP_CALL}, "messages[0].tool_calls", "nested too deeply"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", "give a text"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice", "list of texts"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "max_completion_tokens is -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "min_tokens 9 exceeds max_tokens 8"),
        ({"seed": 2**64}, "seed", "seed is 18446744073709551616"),
        ({"top_k": 2**31}, "top_k", "top_k is"),
        ({"priority": 2**40}, "priority", "2147483647"),
        ({"logit_bias": {"abc": 1}}, "logit_bias", "logit_bias"),
        ({"stop_regex": "(a|a)*b"}, "stop_regex", "may take for ever"),
        ({"n": 0}, "n", "0"),
        ({"stop": ""}, "stop", "empty"),
        ({"lora_path": "x"}, "lora_path", "not supported"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "vocabulary"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_400_and_name_the_field(change: dict[str, Any], param: str, words: str, stream: bool) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post(PATH, json={"messages": USER, "stream": stream, **change})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert words in error["message"]
        if "context length" in words:
            assert error["code"] == "context_length_exceeded"

    call(test)


def test_model_without_template_points_to_completions() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        response = await http.post(PATH, json={"messages": USER})
        assert response.status_code == 400
        assert "/v1/completions" in response.text and "--chat-template" in response.text

    call(test, tokenizer=byte_level(chat_template=None))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, openai.OpenAI]]:
    server = Server()
    with live(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield server, client


def test_official_client_whole_and_streamed(served: tuple[Server, openai.OpenAI]) -> None:
    server, client = served
    server.engine.say("Paris is the capital. 🙂")
    messages: Any = USER
    reply = client.chat.completions.create(model="tiny", messages=messages)
    assert reply.choices[0].message.content == "Paris is the capital. 🙂"
    assert isinstance(reply.usage, CompletionUsage) and reply.usage.total_tokens > 0
    with client.chat.completions.create(model="tiny", messages=messages, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "Paris is the capital. 🙂"


def test_official_stream_helper_merges_tool_calls(served: tuple[Server, openai.OpenAI]) -> None:
    server, client = served
    server.engine.say(CALL_TEXT)
    messages: Any = USER
    tools: Any = TOOLS
    with client.chat.completions.stream(model="tiny", messages=messages, tools=tools) as stream:
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert json.loads(calls[0].function.arguments) == {"city": "Oslo", "days": [1, 2]}
    assert final.choices[0].message.content == "Sure."


def test_official_client_maps_errors(served: tuple[Server, openai.OpenAI]) -> None:
    server, client = served
    messages: Any = USER
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-x", messages=messages)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=9999)
    server.engine.fail_at["late"] = (2, "step_failed", "not finite")
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.chat.completions.create(model="tiny", messages=messages, stream=True, extra_body={"rid": "late"}))
