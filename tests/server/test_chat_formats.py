"""Tool calls, reasoning and flagged schemas through /v1/chat/completions: every format, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from pando.core.config import Config
from pando.core.messages import Finish, Generate, Output
from pando.grammar.tool_formats import FORMATS
from pando.server.parsers.harmony import MARKERS
from pando.server.parsers.shapes import marker_texts
from pando.tokenizer.chat_template import ChatTemplate
from pando.tokenizer.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.harness import Server, call, events
from tests.server.test_openai_chat import PATH, check_chunks, check_reply, sent, text_of
from tests.server.test_tool_parsers import SCHEMAS, VALUES, two_calls
from tests.tiny_tokenizers import CHAT_TEMPLATE, THINK_TEMPLATE

USER = [{"role": "user", "content": "Hello there"}]
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMAS[name]}} for name in SCHEMAS]


def with_markers(names: list[str], *, special: bool, template: str = CHAT_TEMPLATE) -> Tokenizer:
    """The byte-level tokenizer with further tokens: special ones do not show in text."""
    rust = RustTokenizer.from_str(tiny_tokenizers.byte_level_rust().to_str())
    tokens = [AddedToken(name, special=special, normalized=False) for name in names if rust.token_to_id(name) is None]
    (rust.add_special_tokens if special else rust.add_tokens)(tokens)
    return Tokenizer(rust, special_tokens={"eos_token": "<|im_end|>"}, chat_template=ChatTemplate(template))


def joined(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tool calls of a stream, put together as clients do."""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for each in chunk["choices"][0]["delta"].get("tool_calls", []) if chunk["choices"] else []:
            if "id" in each:
                assert each["index"] not in calls and each["function"]["arguments"] == ""
                calls[each["index"]] = {"id": each["id"], "name": each["function"]["name"], "arguments": ""}
            else:
                calls[each["index"]]["arguments"] += each["function"]["arguments"]
    return list(calls.values())


@pytest.mark.parametrize("kind", ["special tokens", "plain tokens", "text"])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
def test_calls_of_every_format(name: str, kind: str) -> None:
    form = FORMATS[name]
    names = [] if kind == "text" else marker_texts(form)
    tokenizer = with_markers(names, special=kind == "special tokens")
    lead = "" if form.bare else "Let me see. "

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(lead + two_calls(form))
        body = {"messages": USER, "tools": TOOLS}
        reply = (await http.post(PATH, json=body)).json()
        check_reply(reply)
        (choice,) = reply["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == (lead.strip() or None)
        calls = choice["message"]["tool_calls"]
        found = [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in calls]
        assert found == [("get_weather", VALUES), ("ping", {})]
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        check_chunks(chunks)
        streamed = joined(chunks)
        assert [(c["name"], c["arguments"]) for c in streamed] == [
            (c["function"]["name"], c["function"]["arguments"]) for c in calls
        ]
        assert text_of(chunks) == lead.strip() and chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        one = (await http.post(PATH, json={**body, "parallel_tool_calls": False})).json()
        assert len(one["choices"][0]["message"]["tool_calls"]) == 1

    call(test, tokenizer=tokenizer, config=Config(tool_call_parser=name))


def test_messages_in_channels() -> None:
    tokenizer = with_markers(list(MARKERS), special=True, template=CHAT_TEMPLATE + "{# <|channel|> <|message|> #}")
    text = (
        "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant<|channel|>commentary to=functions.ping "
        "<|constrain|>json<|message|>{}"
    )

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(text)
        body: dict[str, Any] = {"messages": USER, "tools": TOOLS}
        reply = (await http.post(PATH, json=body)).json()
        (choice,) = reply["choices"]
        assert choice["message"]["reasoning_content"] == "Let me think." and choice["message"]["content"] is None
        assert [each["function"]["name"] for each in choice["message"]["tool_calls"]] == ["ping"]
        assert reply["usage"]["reasoning_tokens"] == len(tokenizer.encode("Let me think."))
        chunks = events((await http.post(PATH, json={**body, "stream": True})).text)
        assert text_of(chunks, "reasoning_content") == "Let me think." and joined(chunks)[0]["name"] == "ping"
        server.engine.say("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!")
        plain = (await http.post(PATH, json={"messages": USER})).json()["choices"][0]["message"]
        assert (plain["reasoning_content"], plain["content"]) == ("Hm.", "Hi!")
        schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
        await http.post(PATH, json={"messages": USER, "response_format": schema})
        after = sent(server).sampling.grammar.after  # type: ignore[union-attr]
        assert after is not None and after.start == "inside" and after.committed == 2
        assert tokenizer.decode(after.end, skip_special_tokens=False) == "<|channel|>final<|message|>"

    call(test, tokenizer=tokenizer)


def test_the_format_is_told_by_the_template() -> None:
    tokenizer = with_markers([], special=True, template=CHAT_TEMPLATE + "{# <arg_key> <arg_value> #}")

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(two_calls(FORMATS["glm45"]))
        reply = (await http.post(PATH, json={"messages": USER, "tools": TOOLS})).json()
        assert len(reply["choices"][0]["message"]["tool_calls"]) == 2
        body = {"messages": USER, "tools": TOOLS, "tool_choice": "required"}
        await http.post(PATH, json=body)
        assert "<arg_key>" in sent(server).sampling.grammar.source  # type: ignore[union-attr]

    call(test, tokenizer=tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_call_is_text(stream: bool) -> None:
    text = 'So: <tool_call>{"name": "ping", "arguments": {"a": nope}}</tool_call>'

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say(text)
        response = await http.post(PATH, json={"messages": USER, "tools": TOOLS, "stream": stream})
        if stream:
            chunks = events(response.text)
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert text_of(chunks) == "So:nope}}</tool_call>"
            return
        (choice,) = response.json()["choices"]
        assert choice["message"]["content"] == text and "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"

    call(test)


def test_a_call_that_the_limit_cuts_off() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say('<tool_call>{"name": "ping", "arguments": {"a": "long long"}}</tool_call>')
        body = {"messages": USER, "tools": TOOLS, "max_tokens": 25}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
        assert choice["message"]["content"].startswith('<tool_call>{"name": "ping"')

    call(test)


def test_calls_are_banned_by_their_token() -> None:
    tokenizer = with_markers(["<tool_call>"], special=False)

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        body = {"messages": USER, "tools": TOOLS, "tool_choice": "none", "logit_bias": {"7": 1}}
        assert (await http.post(PATH, json=body)).status_code == 200
        assert sent(server).sampling.logit_bias == {7: 1.0, tokenizer.added_tokens["<tool_call>"]: -1e4}

    call(test, tokenizer=tokenizer)


def test_a_grammar_waits_for_the_reasoning() -> None:
    tokenizer = tiny_tokenizers.byte_level(chat_template=THINK_TEMPLATE)

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        await http.post(PATH, json={"messages": USER, "regex": "a+"})
        grammar = sent(server).sampling.grammar
        assert grammar is not None and grammar.kind == "regex" and grammar.after is not None
        assert grammar.after.start == "inside" and grammar.after.end == (tokenizer.added_tokens["</think>"],)
        await http.post(PATH, json={"messages": USER, "tools": TOOLS, "tool_choice": "required"})
        grammar = sent(server).sampling.grammar
        assert grammar is not None and grammar.kind == "lark" and grammar.after is not None
        await http.post(PATH, json={"messages": USER, "regex": "a+", "separate_reasoning": False})
        assert sent(server).sampling.grammar.after is not None  # type: ignore[union-attr]

    call(test, tokenizer=tokenizer)


UNIQUE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNIQUE}}
RELAXED = (("#/uniqueItems", "uniqueItems can not be enforced here"),)


def flagging(server: Server) -> None:
    """Have the engine report what a lenient grammar gave up."""
    emit = server.engine.emit

    def flagged(replies: list[Any]) -> None:
        emit([_flag(reply) for reply in replies])

    server.engine.emit = flagged


def _flag(reply: Any) -> Any:
    import msgspec

    if isinstance(reply, Output) and isinstance(reply.finish, Finish):
        return msgspec.structs.replace(reply, finish=msgspec.structs.replace(reply.finish, relaxed=RELAXED))
    return reply


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("[1, 2]", "schema_verified", None),
        ("[1, 1]", "schema_violation", "non-unique"),
        ("[1, ", "schema_violation", "not JSON"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_widened_schema_is_checked_and_told(text: str, kind: str, message: str | None, stream: bool) -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        flagging(server)
        server.engine.say(text)
        response = await http.post(PATH, json={"messages": USER, "response_format": FORMAT, "stream": stream})
        choice = events(response.text)[-1]["choices"][0] if stream else response.json()["choices"][0]
        assert choice["finish_details"]["type"] == kind
        assert message is None or message in choice["finish_details"]["message"]
        assert choice["warnings"] == [
            {
                "code": "schema_relaxed",
                "param": "response_format",
                "pointer": "#/uniqueItems",
                "message": "uniqueItems can not be enforced here",
            }
        ]
        page = (await http.get("/metrics")).text
        assert "\npando_schema_relaxed_total" in page
        assert server.client.metrics.relaxed == 1 and server.client.metrics.violations == (kind == "schema_violation")
        native = {"text": "x", "sampling_params": {"json_schema": UNIQUE}}
        meta = (await http.post("/generate", json=native)).json()["meta_info"]
        assert meta["finish_details"]["type"] == kind and meta["warnings"][0]["param"] == "sampling_params"
        done = {"prompt": "x", "response_format": FORMAT, "stream": stream, "max_tokens": 50}
        response = await http.post("/v1/completions", json=done)
        choice = events(response.text)[-1]["choices"][0] if stream else response.json()["choices"][0]
        assert choice["finish_details"]["type"] == kind

    call(test)


def test_an_unfinished_text_is_not_checked() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        flagging(server)
        server.engine.say("[1, 2]")
        body = {"messages": USER, "response_format": FORMAT, "max_tokens": 1}
        (choice,) = (await http.post(PATH, json=body)).json()["choices"]
        assert choice["finish_details"]["type"] == "schema_unverified" and choice["finish_reason"] == "length"

    call(test)


def test_exact_grammars_say_nothing_and_strict_is_passed_on() -> None:
    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("[1]")
        (choice,) = (await http.post(PATH, json={"messages": USER, "response_format": FORMAT})).json()["choices"]
        assert "finish_details" not in choice and "warnings" not in choice
        assert isinstance(sent(server), Generate) and not sent(server).sampling.grammar.options.strict  # type: ignore[union-attr]
        strict = {**FORMAT, "json_schema": {**FORMAT["json_schema"], "strict": True}}  # type: ignore[dict-item]
        await http.post(PATH, json={"messages": USER, "response_format": strict})
        assert sent(server).sampling.grammar.options.strict  # type: ignore[union-attr]
        wrong = {**FORMAT, "json_schema": {**FORMAT["json_schema"], "strict": "yes"}}  # type: ignore[dict-item]
        response = await http.post(PATH, json={"messages": USER, "response_format": wrong})
        assert response.status_code == 400 and "give true or false" in response.text

    call(test)


def test_markers_of_calls_are_looked_for_only_with_tools() -> None:
    form = FORMATS["kimi_k2"]
    tokenizer = with_markers(marker_texts(form), special=True, template=THINK_TEMPLATE)

    async def test(server: Server, http: httpx.AsyncClient) -> None:
        server.engine.say("why</think>So. <|tool_call_end|>")
        body: dict[str, Any] = {"messages": USER}
        message = (await http.post(PATH, json=body)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("why", "So. ")
        message = (await http.post(PATH, json={**body, "tools": TOOLS})).json()["choices"][0]["message"]
        assert message["content"] == "So. <|tool_call_end|>"

    call(test, tokenizer=tokenizer, config=Config(tool_call_parser="kimi_k2"))
