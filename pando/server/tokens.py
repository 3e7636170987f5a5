"""Text to tokens and back over HTTP: what a prompt costs, and what the model really sees."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.errors import InvalidRequest
from pando.server.exchange import json_response, post, read_json, service_of
from pando.server.prompt import render_chat


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of /tokenize: a text or a chat."""

    prompt: str | list[str] | None = None
    text: str | list[str] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of /detokenize: token ids."""

    tokens: list[Any] | None = None
    input_ids: list[Any] | None = None
    model: str | None = None
    skip_special_tokens: bool = False


async def tokenize(request: Request) -> ASGIApp:
    """Tokens of a text, of several, or of a chat as the model's template renders it."""
    body = await read_json(request, TokenizeBody)
    service = service_of(request)
    service.check_model(body.model)
    tokenizer = service.require().tokenizer
    prompt = body.prompt if body.prompt is not None else body.text
    if (prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None:
        text = render_chat(
            tokenizer,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        rows = [await service.encode(text, add_special_tokens=False)]
    else:
        texts = prompt if isinstance(prompt, list) else [prompt or ""]
        rows = [await service.encode(text, add_special_tokens=body.add_special_tokens) for text in texts]
    single = not isinstance(prompt, list)
    reply: dict[str, Any] = {
        "tokens": rows[0] if single else rows,
        "count": len(rows[0]) if single else [len(row) for row in rows],
        "max_model_len": service.require().info.context_length,
    }
    if body.return_token_strs:
        strings = [[tokenizer.token_text(token) for token in row] for row in rows]
        reply["token_strs"] = strings[0] if single else strings
    return json_response(reply)


async def detokenize(request: Request) -> ASGIApp:
    """Text of tokens."""
    body = await read_json(request, DetokenizeBody)
    service = service_of(request)
    service.check_model(body.model)
    tokenizer = service.require().tokenizer
    ids = body.tokens if body.tokens is not None else body.input_ids
    if ids is None:
        raise InvalidRequest("give tokens", param="tokens")
    nested = bool(ids) and isinstance(ids[0], list)
    try:
        rows = msgspec.convert(ids if nested else [ids], list[list[int]])
    except msgspec.ValidationError:
        raise InvalidRequest("tokens takes a list of token ids, or a list of such lists", param="tokens") from None
    wrong = next((token for row in rows for token in row if not 0 <= token < 2**32), None)
    if wrong is not None:
        raise InvalidRequest(f"{wrong} is not a token id", param="tokens")
    texts = [tokenizer.decode(row, skip_special_tokens=body.skip_special_tokens) for row in rows]
    return json_response({"prompt": texts if nested else texts[0], "text": texts if nested else texts[0]})


routes = [
    post("/tokenize", tokenize),
    post("/v1/tokenize", tokenize),
    post("/detokenize", detokenize),
    post("/v1/detokenize", detokenize),
]
