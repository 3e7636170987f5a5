"""Prompts as they come in: chats to be rendered, lists of token ids, and what belongs to a prompt beside its text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pando.errors import InvalidRequest
from pando.tokenizer.tokenizer import Tokenizer

MAX_BATCH = 4096
"""Sequences of one HTTP request at most."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt. `variables` is a request's chat_template_kwargs. Raises InvalidRequest if there is no template."""
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
            param="messages",
        )
    return template.render(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        variables={**tokenizer.special_tokens, **(variables or {})},
    )


class TokenPrompts(msgspec.Struct):
    """The prompts of a body, encoded; is_batch tells whether the reply is a list."""

    ids: list[list[int]]
    is_batch: bool


def token_prompts(value: list[Any], param: str) -> TokenPrompts:
    """A list of token ids, or a list of such lists. Raises InvalidRequest for anything else."""
    try:
        if value and isinstance(value[0], list):
            return TokenPrompts(msgspec.convert(value, list[list[int]]), True)
        return TokenPrompts([msgspec.convert(value, list[int])], False)
    except msgspec.ValidationError:
        raise InvalidRequest(f"{param} takes a list of token ids, or a list of such lists", param=param) from None


def positive_timeout(timeout: float | None) -> float | None:
    """A request's timeout in seconds. Raises InvalidRequest if it is not positive."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise InvalidRequest(f"timeout is {timeout}; give seconds above 0", param="timeout")
    return timeout


def cache_namespace(*parts: str | None) -> str:
    """The part of the cache key that keeps requests apart; "" shares with everybody."""
    return "\0".join(part or "" for part in parts) if any(parts) else ""
