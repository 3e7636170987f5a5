"""`POST /generate`: Pando's own request shape, one prompt or many, streamed as cumulative text or whole."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import ASGIApp

from pando.core.messages import Generate
from pando.engine_client import Completion, Delta, EngineClient
from pando.errors import PandoError, RequestAborted
from pando.native import (
    GenerateBody,
    encode_prompts,
    native_messages,
    native_reply,
    raise_failure,
    refuse_unsupported,
    text_length,
    with_field,
)
from pando.server.exchange import json_response, post, read_json, service_of
from pando.server.service import LONG_TEXT, run_long
from pando.server.sse import EventStream, collect_connected, event


async def generate(request: Request) -> ASGIApp:
    """Serve /generate."""
    body = await read_json(request, GenerateBody)
    service = service_of(request)
    client = service.require()
    refuse_unsupported(body)
    encode = client.tokenizer.encode
    prompts = await run_long(text_length(body) > LONG_TEXT, lambda: encode_prompts(body, encode))
    messages, per_prompt = native_messages(client, body, prompts)
    as_list = prompts.is_batch or per_prompt > 1
    group = body.rid if isinstance(body.rid, str) else None
    generation = client.submit(messages, group=group)
    if body.stream:
        stream = EventStream(request.receive, generation, _Writer(client, messages, body, as_list))
        await stream.admit()
        return stream
    completions = await collect_connected(request.receive, generation)
    if not as_list:
        raise_failure(completions[0].finish)
    replies = [
        native_reply(done, message, client, with_text=body.return_text_in_logprobs)
        for done, message in zip(completions, messages, strict=True)
    ]
    return json_response(replies if as_list else replies[0])


class _Writer:
    """Streams cumulative text: every event is the whole reply so far."""

    def __init__(self, client: EngineClient, messages: list[Generate], body: GenerateBody, as_list: bool) -> None:
        self._client = client
        self._messages = messages
        self._with_text = body.return_text_in_logprobs
        self._as_list = as_list
        self._completions = [Completion(message.rid, index) for index, message in enumerate(messages)]

    def begin(self) -> bytes:
        return b""

    def write(self, deltas: list[Delta]) -> bytes:
        return b"".join([self._event(delta) for delta in deltas])

    def end(self) -> bytes:
        return b""

    def fatal(self, delta: Delta) -> PandoError | None:
        """A failure of the only sequence. One of several is reported in its place, as is an abort by an operator."""
        error = delta.error
        return None if error is None or self._as_list or isinstance(error, RequestAborted) else with_field(error)

    def _event(self, delta: Delta) -> bytes:
        completion = self._completions[delta.index]
        completion.add(delta)
        reply = native_reply(completion, self._messages[delta.index], self._client, with_text=self._with_text)
        return event({"index": delta.index, **reply} if self._as_list else reply)


routes = [post("/generate", generate)]
