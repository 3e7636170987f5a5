"""Render chats with aspen's chat template, the way transformers and Pando do."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, object]
TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")


def to_json(value: object) -> str:
    """JSON as chat templates expect it: readable Unicode, keys in their given order, no HTML escapes."""
    return json.dumps(value, ensure_ascii=False)


@cache
def load_template() -> Template:
    """The compiled template."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    return environment.from_string(TEMPLATE_PATH.read_text("utf-8"))


def render(
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    *,
    add_generation_prompt: bool = False,
    enable_thinking: bool = False,
) -> str:
    """Return the prompt text of a chat."""
    return load_template().render(
        messages=list(messages),
        tools=list(tools) if tools else None,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=enable_thinking,
    )
