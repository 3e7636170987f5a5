"""Chats as prompts: rendered with the model's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pando.errors import InvalidRequest
from pando.tokenizer.tokenizer import Tokenizer


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
