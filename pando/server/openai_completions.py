"""`POST /v1/completions`: text in, text on."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.core.messages import Generate, TokenLogprobs
from pando.core.sampling import LogprobSpec
from pando.engine_client import Completion, Delta, EngineClient
from pando.errors import InvalidRequest, PandoError
from pando.grammar.report import may_be_relaxed
from pando.native import MAX_BATCH, positive_timeout, token_prompts
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
from pando.server.service import Service
from pando.server.sse import EventStream, collect_connected, encode_json
from pando.tokenizer.detokenizer import make_detokenizer
from pando.tokenizer.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


class CompletionBody(OpenAIBody, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class _Prompt(msgspec.Struct):
    """A prompt as text (for echo) and tokens."""

    text: str
    ids: list[int]


class _Work(msgspec.Struct):
    """A request made ready. Choice `prompt * n + k` is message of the same index."""

    body: CompletionBody
    reply_id: str
    model: str
    created: int
    prompts: list[_Prompt]
    messages: list[Generate]
    n: int

    def echo_of(self, index: int) -> str:
        """The text put in front of choice `index`."""
        return self.prompts[index // self.n].text if self.body.echo else ""


async def completions(request: Request) -> ASGIApp:
    """Serve /v1/completions."""
    body = await read_json(request, CompletionBody)
    service = service_of(request)
    model = service.check_model(body.model)
    client = service.require()
    _check(body)
    prompts = await _prompts(service, body)
    reply_id = request_id("cmpl")
    with openai_names(input_ids="prompt"):
        messages = _messages(client, body, prompts, body.rid or reply_id)
    work = _Work(body, reply_id, model, unix_time(), prompts, messages, len(messages) // len(prompts))
    generation = client.submit(messages, group=body.rid or reply_id)
    if body.stream:
        stream = EventStream(request.receive, generation, CompletionWriter(work, client))
        await stream.admit()
        return stream
    done = await collect_connected(request.receive, generation)
    raise_failures(done, grammar_field(body))
    return json_response(_reply(work, done, client))


def _check(body: CompletionBody) -> None:
    if body.suffix:
        raise InvalidRequest("suffix needs a fill-in-the-middle model, which this is not", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of other than n is not supported; leave it out", param="best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise InvalidRequest(f"logprobs is {body.logprobs}; give 0..20", param="logprobs")


async def _prompts(service: Service, body: CompletionBody) -> list[_Prompt]:
    tokenizer = service.require().tokenizer
    value = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not value:
        raise InvalidRequest("prompt is an empty list; give at least one prompt", param="prompt")
    if all(isinstance(text, str) for text in value):
        special = body.add_special_tokens
        return [_Prompt(text, await service.encode(text, add_special_tokens=special)) for text in value]
    rows = token_prompts(value, "prompt").ids
    return [_Prompt(tokenizer.decode(row) if body.echo else "", row) for row in rows]


def _messages(client: EngineClient, body: CompletionBody, prompts: list[_Prompt], rid: str) -> list[Generate]:
    spec = None
    if body.logprobs is not None:
        spec = LogprobSpec(start=0 if body.echo else -1, top=body.logprobs)
    messages: list[Generate] = []
    for index, prompt in enumerate(prompts):
        values = sampling_values(body, body.max_tokens)
        messages += client.sequences(
            prompt.ids,
            client.sampling(values, len(prompt.ids), default_max=DEFAULT_MAX_TOKENS),
            rid=rid if len(prompts) == 1 else f"{rid}-{index}",
            logprobs=spec,
            namespace=body.namespace,
            priority=body.priority or 0,
            timeout=positive_timeout(body.timeout),
            stream=bool(body.stream),
        )
        if len(messages) > MAX_BATCH:
            raise InvalidRequest(f"more than {MAX_BATCH} choices in one request; send several requests", param="prompt")
    return messages


class LogprobLists:
    """Builds the four parallel lists of one choice; offsets go on from call to call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = make_detokenizer(tokenizer)
        self._offset = 0

    def take(self, entries: list[TokenLogprobs]) -> dict[str, list[Any]]:
        """The `logprobs` object of these tokens."""
        text_of = self._tokenizer.token_text
        offsets = []
        for each in entries:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([each.token_id]))
        return {
            "tokens": [text_of(each.token_id) for each in entries],
            "token_logprobs": [each.logprob for each in entries],
            "top_logprobs": [
                {text_of(token): value for value, token in each.top} if each.logprob is not None else None
                for each in entries
            ],
            "text_offset": offsets,
        }


def _reply(work: _Work, done: list[Completion], client: EngineClient) -> dict[str, Any]:
    """The whole reply of a request that is not streamed."""
    tokenizer, field = client.tokenizer, grammar_field(work.body)
    totals = UsageTotals(len(done), work.n)
    choices = []
    for each in done:
        totals.update(each)
        choice: dict[str, Any] = {
            "index": each.index,
            "text": work.echo_of(each.index) + each.text,
            "logprobs": None,
            "finish_reason": finish_name(each.finish),
            "stop_reason": stop_reason(each.finish, work.messages[each.index].sampling),
            **grammar_report(client, work.messages[each.index], each.finish, each.text, field),
        }
        if work.body.logprobs is not None:
            choice["logprobs"] = LogprobLists(tokenizer).take(each.prompt_logprobs + each.logprobs)
        if work.body.return_token_ids:
            choice["token_ids"] = each.token_ids
            choice["prompt_token_ids"] = work.messages[each.index].input_ids
        choices.append(choice)
    return {
        "id": work.reply_id,
        "object": "text_completion",
        "created": work.created,
        "model": work.model,
        "choices": choices,
        "usage": totals.total(),
    }


class CompletionWriter:
    """Writes the chunks of a streamed completion."""

    def __init__(self, work: _Work, client: EngineClient) -> None:
        self._work = work
        self._client = client
        tokenizer = client.tokenizer
        head = {"id": work.reply_id, "object": "text_completion", "created": work.created, "model": work.model}
        self._head = b"data: " + encode_json(head)[:-1]
        self._lists = [LogprobLists(tokenizer) for _ in work.messages] if work.body.logprobs is not None else []
        self._totals = UsageTotals(len(work.messages), work.n)
        self._begun = [False] * len(work.messages)
        # Kept where the finished text may have to be checked against its schema.
        is_checked = any(may_be_relaxed(message.sampling.grammar) for message in work.messages)
        self._texts: list[list[str]] | None = [[] for _ in work.messages] if is_checked else None

    def begin(self) -> bytes:
        """Nothing: text chunks carry all there is."""
        return b""

    def write(self, deltas: list[Delta]) -> bytes:
        """One chunk per delta, unless its text is still held back."""
        for delta in deltas:
            self._totals.update(delta)
        return b"".join([self._chunk(delta) for delta in deltas])

    def end(self) -> bytes:
        """The usage chunk, if it was asked for."""
        if not self._work.body.include_usage:
            return b""
        return self._head + b',"choices":[],"usage":' + encode_json(self._totals.total()) + b"}\n\n"

    def fatal(self, delta: Delta) -> PandoError | None:
        """Any error: this dialect has no way to report one choice's."""
        return named_failure(delta.error, grammar_field(self._work.body))

    def _report(self, delta: Delta) -> bytes:
        """Fields of a choice whose grammar could not enforce everything."""
        if self._texts is None:
            return b""
        text, message = "".join(self._texts[delta.index]), self._work.messages[delta.index]
        report = grammar_report(self._client, message, delta.finish, text, grammar_field(self._work.body))
        return b"".join(b"," + encode_json(name) + b":" + encode_json(value) for name, value in report.items())

    def _chunk(self, delta: Delta) -> bytes:
        index = delta.index
        text = delta.text
        if self._texts is not None:
            self._texts[index].append(text)
        if not self._begun[index]:
            self._begun[index] = True
            text = self._work.echo_of(index) + text
        logprobs, extra = b"null", b""
        if self._lists and (entries := delta.prompt_logprobs + delta.logprobs):
            logprobs = encode_json(self._lists[index].take(entries))
        if self._work.body.return_token_ids and delta.token_ids:
            extra = b',"token_ids":' + encode_json(delta.token_ids)
        if not text and logprobs == b"null" and not extra and delta.finish is None:
            return b""
        finish = encode_json(finish_name(delta.finish))
        if delta.finish is not None:
            extra += b',"stop_reason":' + encode_json(stop_reason(delta.finish, self._work.messages[index].sampling))
            extra += self._report(delta)
        usage = b',"usage":' + encode_json(self._totals.total()) if self._work.body.usage_in_each else b""
        return b'%b,"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}]%b}\n\n' % (
            self._head,
            index,
            encode_json(text),
            logprobs,
            finish,
            extra,
            usage,
        )


routes = [post("/v1/completions", completions)]
