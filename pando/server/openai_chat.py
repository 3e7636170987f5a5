"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.core.messages import Generate, TokenLogprobs
from pando.core.sampling import GrammarSpec, LogprobSpec
from pando.engine_client import Completion, Delta, EngineClient
from pando.errors import InvalidRequest, PandoError
from pando.native import positive_timeout
from pando.server.exchange import json_response, post, read_json, service_of
from pando.server.openai_request import (
    OpenAIBody,
    UsageTotals,
    finish_name,
    openai_names,
    raise_failures,
    request_id,
    sampling_values,
    stop_reason,
    unix_time,
)
from pando.server.parsers.hermes import CallArguments, CallStart, Text
from pando.server.parsers.reply import Event, Reasoning, ReplyFormat, ReplyParser
from pando.server.prompt import render_chat
from pando.server.sse import EventStream, collect_connected, encode_json
from pando.server.tool_choice import forced_calls
from pando.tokenizer.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
UNLIMITED_CALLS = 1 << 30


class ChatBody(OpenAIBody, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    separate_reasoning: bool = True


class _Chat(msgspec.Struct):
    """A request made ready: what goes to the engine and what the reply needs."""

    body: ChatBody
    reply_id: str
    model: str
    created: int
    messages: list[Generate]
    shape: ReplyFormat


async def chat_completions(request: Request) -> ASGIApp:
    """Serve /v1/chat/completions."""
    body = await read_json(request, ChatBody)
    service = service_of(request)
    model = service.check_model(body.model)
    client = service.require()
    tools = _tools(body)
    text = render_chat(
        client.tokenizer,
        body.messages,
        tools=tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=_template_variables(body),
    )
    input_ids = await service.encode(text, add_special_tokens=False)
    reply_id = request_id("chatcmpl")
    parallel = body.parallel_tool_calls is not False
    calls = forced_calls(client.tokenizer, body.tools or [], body.tool_choice, parallel=parallel)
    with openai_names(prompt="messages"):
        messages = _messages(client, body, input_ids, body.rid or reply_id, calls)
    shape = _reply_format(client.tokenizer, body, text, bool(tools))
    chat = _Chat(body, reply_id, model, unix_time(), messages, shape)
    generation = client.submit(messages, group=body.rid or reply_id)
    if body.stream:
        stream = EventStream(request.receive, generation, ChatWriter(chat, client.tokenizer))
        await stream.admit()
        return stream
    completions = await collect_connected(request.receive, generation)
    raise_failures(completions)
    return json_response(_reply(chat, completions, client.tokenizer))


def _messages(
    client: EngineClient, body: ChatBody, input_ids: list[int], rid: str, calls: GrammarSpec | None
) -> list[Generate]:
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    values = sampling_values(body, limit)
    if calls is not None and values["grammar"] is not None:
        raise InvalidRequest("a forced or strict tool call and another format exclude each other", param="tool_choice")
    params = client.sampling({**values, "grammar": calls or values["grammar"]}, len(input_ids))
    return client.sequences(
        input_ids,
        params,
        rid=rid,
        logprobs=_logprob_spec(body),
        namespace=body.namespace,
        priority=body.priority or 0,
        timeout=positive_timeout(body.timeout),
        stream=bool(body.stream),
    )


def _logprob_spec(body: ChatBody) -> LogprobSpec | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is {body.top_logprobs}; give 0..{MAX_TOP_LOGPROBS}", param="top_logprobs")
    return LogprobSpec(top=body.top_logprobs or 0) if body.logprobs else None


def _template_variables(body: ChatBody) -> dict[str, Any]:
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    return {**effort, **(body.chat_template_kwargs or {})}


def _tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """The tools that the model may call, or None."""
    names = []
    for index, tool in enumerate(body.tools or []):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"tools[{index}] has no function.name", param=f"tools[{index}]")
        names.append(function["name"])
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = (choice.get("function") or {}).get("name")
        if name not in names:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not in tools", param="tool_choice")
    elif choice == "required" and not names:
        raise InvalidRequest("tool_choice is required, but there are no tools", param="tool_choice")
    elif choice not in (None, "auto", "none", "required"):
        raise InvalidRequest(f"tool_choice is {choice!r}; give none, auto or required", param="tool_choice")
    return body.tools if names and choice != "none" else None


def _reply_format(tokenizer: Tokenizer, body: ChatBody, prompt: str, has_tools: bool) -> ReplyFormat:
    thinks = body.separate_reasoning and tokenizer.chat_template is not None and tokenizer.chat_template.thinks
    calls = (1 if body.parallel_tool_calls is False else UNLIMITED_CALLS) if has_tools else 0
    return ReplyFormat(thinks, thinks and prompt.rstrip().endswith("<think>"), calls)


def logprob_content(entries: list[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` object of a choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(each.token_id, each.logprob), "top_logprobs": [entry(token, value) for value, token in each.top]}
        for each in entries
    ]
    return {"content": content, "refusal": None}


def _reply(chat: _Chat, completions: list[Completion], tokenizer: Tokenizer) -> dict[str, Any]:
    """The whole reply of a request that is not streamed."""
    totals = UsageTotals(len(completions), len(completions))
    reasoning_tokens = 0
    choices = []
    for done in completions:
        totals.update(done)
        parser = ReplyParser(chat.shape, tokenizer)
        events = parser.push(done.text, done.token_ids) + parser.finish()
        reasoning_tokens += parser.reasoning_tokens
        choice: dict[str, Any] = {
            "index": done.index,
            "message": _message(events, chat.shape),
            "logprobs": logprob_content(done.logprobs, tokenizer) if chat.body.logprobs else None,
            "finish_reason": "tool_calls" if parser.num_calls else finish_name(done.finish),
            "stop_reason": stop_reason(done.finish, chat.messages[done.index].sampling),
        }
        if chat.body.return_token_ids:
            choice["token_ids"] = done.token_ids
        choices.append(choice)
    reply: dict[str, Any] = {
        "id": chat.reply_id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.model,
        "choices": choices,
        "usage": totals.total(reasoning_tokens),
    }
    if chat.body.return_token_ids:
        reply["prompt_token_ids"] = chat.messages[0].input_ids
    return reply


def _message(events: list[Event], shape: ReplyFormat) -> dict[str, Any]:
    content = "".join(each.text for each in events if isinstance(each, Text))
    reasoning = "".join(each.text for each in events if isinstance(each, Reasoning))
    calls: list[dict[str, Any]] = []
    for each in events:
        if isinstance(each, CallStart):
            function = {"name": each.name, "arguments": ""}
            calls.append({"id": _call_id(), "type": "function", "function": function})
        elif isinstance(each, CallArguments):
            calls[each.index]["function"]["arguments"] += each.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if shape.thinks:
        message["reasoning_content"] = reasoning or None
    if calls:
        message["tool_calls"] = calls
    return message


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatWriter:
    """Writes the chunks of a streamed chat. What is the same in all chunks is encoded once."""

    def __init__(self, chat: _Chat, tokenizer: Tokenizer) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        head = {"id": chat.reply_id, "object": "chat.completion.chunk", "created": chat.created, "model": chat.model}
        self._head = b"data: " + encode_json(head)[:-1]
        self._prefix = [self._head + b',"choices":[{"index":%d,"delta":' % index for index in range(len(chat.messages))]
        self._parsers = [] if chat.shape.is_plain else [ReplyParser(chat.shape, tokenizer) for _ in chat.messages]
        self._totals = UsageTotals(len(chat.messages), len(chat.messages))
        self._ids = bool(chat.body.return_token_ids)
        # Readers look for the key in each chunk, so it is there (null) wherever reasoning is possible at all.
        self._content_tail = b',"reasoning_content":null}' if chat.shape.thinks else b"}"

    def begin(self) -> bytes:
        """The role of each choice: a first sign of life."""
        extra = b""
        if self._ids:
            extra = b',"prompt_token_ids":' + encode_json(self._chat.messages[0].input_ids)
        role = b'{"role":"assistant","content":""' + self._content_tail
        return b"".join([self._chunk(index, role, extra=extra) for index in range(len(self._prefix))])

    def write(self, deltas: list[Delta]) -> bytes:
        """Chunks of these deltas, the last of a choice with its finish_reason."""
        for delta in deltas:
            self._totals.update(delta)
        return b"".join([self._write_one(delta) for delta in deltas])

    def end(self) -> bytes:
        """The usage chunk, if it was asked for."""
        if not self._chat.body.include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + encode_json(self._usage()) + b"}\n\n"

    def fatal(self, delta: Delta) -> PandoError | None:
        """Any error: this dialect has no way to report one choice's."""
        return delta.error

    def _write_one(self, delta: Delta) -> bytes:
        index = delta.index
        if self._parsers:
            bodies = self._parsed(delta)
        else:
            bodies = [b'{"content":' + encode_json(delta.text) + self._content_tail] if delta.text else []
        logprobs, extra = b"null", b""
        if self._chat.body.logprobs and delta.logprobs:
            logprobs = encode_json(logprob_content(delta.logprobs, self._tokenizer))
        if self._ids and delta.token_ids:
            extra = b',"token_ids":' + encode_json(delta.token_ids)
        if not bodies and (logprobs != b"null" or extra):  # tokens whose text is held back
            bodies = [b'{"content":""' + self._content_tail]
        chunks = [self._chunk(index, body) for body in bodies[1:]]
        if bodies:
            chunks.insert(0, self._chunk(index, bodies[0], logprobs=logprobs, extra=extra))
        if delta.finish is not None:
            chunks.append(self._last_chunk(delta))
        return b"".join(chunks)

    def _parsed(self, delta: Delta) -> list[bytes]:
        parser = self._parsers[delta.index]
        events = parser.push(delta.text, delta.token_ids)
        if delta.finish is not None:
            events += parser.finish()
        return [self._event_body(each) for each in events]

    def _event_body(self, each: Event) -> bytes:
        if isinstance(each, Text):
            return b'{"content":' + encode_json(each.text) + self._content_tail
        if isinstance(each, Reasoning):
            return b'{"reasoning_content":' + encode_json(each.text) + b"}"
        if isinstance(each, CallStart):
            function = {"name": each.name, "arguments": ""}
            call = {"index": each.index, "id": _call_id(), "type": "function", "function": function}
        else:
            call = {"index": each.index, "function": {"arguments": each.text}}
        return encode_json({"tool_calls": [call]})

    def _last_chunk(self, delta: Delta) -> bytes:
        called = self._parsers and self._parsers[delta.index].num_calls
        reason = "tool_calls" if called else finish_name(delta.finish)
        stopped_by = stop_reason(delta.finish, self._chat.messages[delta.index].sampling)
        extra = b',"stop_reason":' + encode_json(stopped_by)
        return self._chunk(delta.index, b"{}", finish=encode_json(reason), extra=extra)

    def _chunk(
        self, index: int, delta: bytes, *, logprobs: bytes = b"null", finish: bytes = b"null", extra: bytes = b""
    ) -> bytes:
        usage = b',"usage":' + encode_json(self._usage()) if self._chat.body.usage_in_each else b""
        prefix = self._prefix[index]
        return b'%b%b,"logprobs":%b,"finish_reason":%b%b}]%b}\n\n' % (prefix, delta, logprobs, finish, extra, usage)

    def _usage(self) -> dict[str, Any]:
        return self._totals.total(sum(parser.reasoning_tokens for parser in self._parsers))


routes = [post("/v1/chat/completions", chat_completions)]
