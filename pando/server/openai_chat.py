"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.core.messages import Finish, Generate, TokenLogprobs
from pando.core.sampling import GrammarSpec, LogprobSpec
from pando.engine_client import Completion, Delta, EngineClient
from pando.errors import InvalidRequest, PandoError
from pando.grammar.report import may_be_relaxed
from pando.grammar.schema_tree import Schema
from pando.native import positive_timeout
from pando.server.exchange import json_response, post, read_json, service_of
from pando.server.openai_request import (
    OpenAIBody,
    UsageTotals,
    finish_name,
    grammar_field,
    grammar_report,
    named_failure,
    openai_names,
    raise_failures,
    request_id,
    sampling_values,
    stop_reason,
    unix_time,
)
from pando.server.parsers.events import CallArguments, CallBroken, CallEnd, CallStart, Event, Reasoning, Text
from pando.server.parsers.reply import ReplyFormat, ReplyParser
from pando.server.prompt import render_chat
from pando.server.sse import EventStream, collect_connected, encode_json
from pando.server.styles import ModelStyle, Start, switched_off
from pando.server.tool_choice import call_bans, forced_calls
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
    start = _start(service.style, body, text)
    renamed = {} if body.max_completion_tokens is None else {"max_new_tokens": "max_completion_tokens"}
    with openai_names(prompt="messages", **renamed):
        messages = _messages(client, body, input_ids, body.rid or reply_id, _Steering(service.style, start))
    grammar = messages[0].sampling.grammar
    enforced = grammar is not None and grammar.kind == "lark"
    shape = _reply_format(service.style, body, start, tools, enforced=enforced)
    chat = _Chat(body, reply_id, model, unix_time(), messages, shape)
    generation = client.submit(messages, group=body.rid or reply_id, letters=shape.letters)
    if body.stream:
        stream = EventStream(request.receive, generation, ChatWriter(chat, client))
        await stream.admit()
        return stream
    completions = await collect_connected(request.receive, generation)
    raise_failures(completions, grammar_field(body))
    return json_response(_reply(chat, completions, client))


class _Steering(msgspec.Struct):
    """What holds a reply to its form, beside the request itself."""

    style: ModelStyle
    start: Start


def _start(style: ModelStyle, body: ChatBody, prompt: str) -> Start:
    """Where the reply begins: with the answer, or with reasoning."""
    last = body.messages[-1] if body.continue_final_message and body.messages else None
    continued = None if last is None else str(last.get("content") or "")
    return style.start(prompt, continued=continued, switched_off=switched_off(body.chat_template_kwargs or {}))


def _messages(
    client: EngineClient, body: ChatBody, input_ids: list[int], rid: str, steering: _Steering
) -> list[Generate]:
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    values = sampling_values(body, limit)
    values["grammar"] = _grammar(client, body, values["grammar"], steering)
    if body.tools and body.tool_choice == "none":
        bans = call_bans(client.tokenizer, steering.style.tools)
        values["logit_bias"] = {**(values["logit_bias"] or {}), **{str(token): bias for token, bias in bans.items()}}
    params = client.sampling(values, len(input_ids))
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


def _grammar(
    client: EngineClient, body: ChatBody, asked: GrammarSpec | None, steering: _Steering
) -> GrammarSpec | None:
    """The grammar of the reply: of its tool calls or of its text, after the reasoning if there may be some."""
    style, parallel = steering.style, body.parallel_tool_calls is not False
    calls = forced_calls(client.tokenizer, body.tools or [], body.tool_choice, parallel=parallel, form=style.tools)
    if calls is not None and asked is not None:
        raise InvalidRequest("a forced or strict tool call and another format exclude each other", param="tool_choice")
    if calls is not None and style.reply.uses_channels:
        return calls  # this grammar holds every message, reasoning too
    found = calls or asked
    before = style.before(steering.start)
    return found if found is None or before is None else msgspec.structs.replace(found, after=before)


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
        _check_function(function, f"tools[{index}].function")
        names.append(function["name"])
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else function
        if not isinstance(function, dict) or name not in names:
            known = ", ".join(names[:20]) or "there are no tools"
            raise InvalidRequest(
                f"tool_choice names {name!r:.60}, which is not in tools ({known}); "
                'give {"type": "function", "function": {"name": ...}}',
                param="tool_choice",
            )
    elif choice == "required" and not names:
        raise InvalidRequest("tool_choice is required, but there are no tools", param="tool_choice")
    elif choice not in (None, "auto", "none", "required"):
        raise InvalidRequest(f"tool_choice is {choice!r}; give none, auto or required", param="tool_choice")
    return body.tools if names and choice != "none" else None


def _check_function(function: dict[str, Any], where: str) -> None:
    parameters, strict = function.get("parameters"), function.get("strict")
    if parameters is not None and not isinstance(parameters, dict | bool):
        raise InvalidRequest(f"{where}.parameters is {parameters!r:.60}; give a JSON schema", param=where)
    if strict not in (None, True, False):
        raise InvalidRequest(f"{where}.strict is {strict!r:.60}; give true or false", param=where)


def _reply_format(
    style: ModelStyle, body: ChatBody, start: Start, tools: list[dict[str, Any]] | None, *, enforced: bool
) -> ReplyFormat:
    """What to look for in the reply. enforced: a grammar holds its calls."""
    thinks = body.separate_reasoning and style.reasoning is not None
    schemas = {tool["function"]["name"]: _parameters(tool["function"]) for tool in tools or ()}
    calls = (1 if body.parallel_tool_calls is False else UNLIMITED_CALLS) if schemas and style.calls else 0
    return ReplyFormat(style.reply, thinks, thinks and start == "inside", calls, schemas, enforced)


def _parameters(function: dict[str, Any]) -> Schema:
    """The schema of a tool's arguments; anything where it has none that can be read."""
    found = function.get("parameters")
    return found if isinstance(found, (dict, bool)) else True


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


def _reply(chat: _Chat, completions: list[Completion], client: EngineClient) -> dict[str, Any]:
    """The whole reply of a request that is not streamed."""
    tokenizer = client.tokenizer
    totals = UsageTotals(len(completions), len(completions))
    reasoning_tokens = 0
    choices = []
    for done in completions:
        totals.update(done)
        parser = ReplyParser(chat.shape)
        events = parser.push(done.text, done.token_ids) + parser.finish()
        reasoning_tokens += parser.reasoning_tokens
        message, request = _message(events, chat.shape), chat.messages[done.index]
        choice: dict[str, Any] = {
            "index": done.index,
            "message": message,
            "logprobs": logprob_content(done.logprobs, tokenizer) if chat.body.logprobs else None,
            "finish_reason": _finish_reason(parser, done.finish),
            "stop_reason": stop_reason(done.finish, request.sampling),
            **grammar_report(client, request, done.finish, message["content"] or "", grammar_field(chat.body)),
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


def _finish_reason(parser: ReplyParser | None, finish: Finish | None) -> str | None:
    """`tool_calls` if there is a complete one and none was cut off by the limit."""
    kind = finish_name(finish)
    if parser is None or not parser.num_calls or kind == "length" and parser.broken:
        return kind
    return "tool_calls"


def _message(events: list[Event], shape: ReplyFormat) -> dict[str, Any]:
    """The message of a whole reply. A call that broke off is text in the place where it stands."""
    content, reasoning = [], []
    calls: dict[int, dict[str, Any]] = {}
    for each in events:
        if isinstance(each, Text):
            content.append(each.text)
        elif isinstance(each, Reasoning):
            reasoning.append(each.text)
        elif isinstance(each, CallStart):
            function = {"name": each.name, "arguments": ""}
            calls[each.index] = {"id": each.call_id or _call_id(), "type": "function", "function": function}
        elif isinstance(each, CallArguments):
            calls[each.index]["function"]["arguments"] += each.text
        elif isinstance(each, CallBroken):
            del calls[each.index]
            content.append(each.raw)
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if shape.thinks:
        message["reasoning_content"] = "".join(reasoning) or None
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatWriter:
    """Writes the chunks of a streamed chat. What is the same in all chunks is encoded once."""

    def __init__(self, chat: _Chat, client: EngineClient) -> None:
        self._chat = chat
        self._client = client
        head = {"id": chat.reply_id, "object": "chat.completion.chunk", "created": chat.created, "model": chat.model}
        self._head = b"data: " + encode_json(head)[:-1]
        self._prefix = [self._head + b',"choices":[{"index":%d,"delta":' % index for index in range(len(chat.messages))]
        self._parsers = [] if chat.shape.is_plain else [ReplyParser(chat.shape) for _ in chat.messages]
        # Kept where the finished text may have to be checked against its schema.
        is_checked = any(may_be_relaxed(message.sampling.grammar) for message in chat.messages)
        self._texts: list[list[str]] | None = [[] for _ in chat.messages] if is_checked else None
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
        return named_failure(delta.error, grammar_field(self._chat.body))

    def _write_one(self, delta: Delta) -> bytes:
        index = delta.index
        if self._parsers:
            bodies = self._parsed(delta)
        else:
            bodies = [self._content(index, delta.text)] if delta.text else []
        logprobs, extra = b"null", b""
        if self._chat.body.logprobs and delta.logprobs:
            logprobs = encode_json(logprob_content(delta.logprobs, self._client.tokenizer))
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
        # That a call ended, or broke off, needs no chunk: what was sent stays sent.
        shown = (each for each in events if not isinstance(each, CallEnd | CallBroken))
        return [self._event_body(delta.index, each) for each in shown]

    def _content(self, index: int, text: str) -> bytes:
        if self._texts is not None:
            self._texts[index].append(text)
        return b'{"content":' + encode_json(text) + self._content_tail

    def _event_body(self, index: int, each: Text | Reasoning | CallStart | CallArguments) -> bytes:
        if isinstance(each, Text):
            return self._content(index, each.text)
        if isinstance(each, Reasoning):
            return b'{"reasoning_content":' + encode_json(each.text) + b"}"
        if isinstance(each, CallStart):
            function = {"name": each.name, "arguments": ""}
            call = {"index": each.index, "id": each.call_id or _call_id(), "type": "function", "function": function}
        else:
            call = {"index": each.index, "function": {"arguments": each.text}}
        return encode_json({"tool_calls": [call]})

    def _last_chunk(self, delta: Delta) -> bytes:
        message = self._chat.messages[delta.index]
        reason = _finish_reason(self._parsers[delta.index] if self._parsers else None, delta.finish)
        extra = b',"stop_reason":' + encode_json(stop_reason(delta.finish, message.sampling))
        if self._texts is not None:
            text, field = "".join(self._texts[delta.index]), grammar_field(self._chat.body)
            report = grammar_report(self._client, message, delta.finish, text, field)
            extra += b"".join(b"," + encode_json(name) + b":" + encode_json(value) for name, value in report.items())
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
