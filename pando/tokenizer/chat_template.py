"""Chat templates: a list of messages becomes a prompt, by the Jinja program that came with the model.

The environment offers what templates are written against (block trimming, loop controls, `raise_exception`,
`strftime_now`, unescaped `tojson`, the `generation` block) and is a sandbox: templates are downloaded code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pando.errors import ConfigError, InvalidRequest

Message = dict[str, Any]
"""A chat message as templates see it: role, content (text), and for tools tool_calls, tool_call_id, name."""

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Names a message's reasoning comes under; templates read the first two."""

_CONTINUE_MARK = "\ue000pando-continues-here\ue001"
"""Put at the end of a message that is to be continued; private-use letters, so no text holds it by chance."""


class ChatTemplate:
    """A compiled chat template. `tool_source` is a second template that some models have for requests with tools."""

    def __init__(self, source: str, *, tool_source: str | None = None) -> None:
        self.source = source
        self._template = _compile(source)
        self._tool_template = _compile(tool_source) if tool_source else self._template

    @property
    def thinks(self) -> bool:
        """True if the template knows `<think>` blocks."""
        return "<think>" in self.source or "</think>" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        continue_final_message: leave the last message open, so that the model goes on writing it. variables: further
        names for the template: bos_token and other special tokens, and a request's chat_template_kwargs.
        Raises InvalidRequest with the template's own words if it refuses the messages.
        """
        chat = normalize_messages(messages)
        if continue_final_message:
            _mark_last(chat)
        template = self._tool_template if tools else self._template
        names = {
            **(variables or {}),
            "messages": chat,
            "tools": list(tools) if tools else None,
            "documents": (variables or {}).get("documents"),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = template.render(names)
        except RecursionError:
            raise InvalidRequest("messages or tools are nested too deeply; flatten them", param="messages") from None
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return _cut_at_mark(text) if continue_final_message else text


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in the one form that templates can count on. Raises InvalidRequest that names the message.

    Text parts are joined by newlines, `developer` becomes `system`, arguments of tool calls become objects, null
    content becomes "", reasoning is found under `reasoning_content`.
    """
    if not messages:
        raise InvalidRequest("messages is empty; give at least one message", param="messages")
    return [_normalize(message, index) for index, message in enumerate(messages)]


def _normalize(message: Mapping[str, Any], index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} has no role; give an object with role and content", param=where)
    plain: Message = {name: value for name, value in message.items() if value is not None}
    if plain["role"] == "developer":
        plain["role"] = "system"
    plain["content"] = _content_text(message.get("content"), where)
    reasoning = next((plain[name] for name in _REASONING_NAMES if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    if plain.get("tool_calls"):
        if not isinstance(plain["tool_calls"], list):
            raise InvalidRequest(f"{where}.tool_calls is not a list of calls", param=f"{where}.tool_calls")
        plain["tool_calls"] = [_normalize_call(call, f"{where}.tool_calls") for call in plain["tool_calls"]]
    else:
        plain.pop("tool_calls", None)
    return plain


def _content_text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content is neither text nor a list of parts", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else part
        if kind not in (None, "text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise InvalidRequest(
                f"{where} has a content part of type {kind!r}; this model takes text parts only", param=where
            )
        texts.append(text)
    return "\n".join(texts)


def _normalize_call(call: object, where: str) -> object:
    """A tool call with its arguments as an object; text that is no JSON stays text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or "name" not in function:
        raise InvalidRequest(f"{where}: a tool call needs function.name and function.arguments", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            pass
        except RecursionError:
            raise InvalidRequest(f"{where}: arguments are nested too deeply; flatten them", param=where) from None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}


def _mark_last(chat: list[Message]) -> None:
    if chat[-1]["role"] != "assistant":
        raise InvalidRequest(
            f"continue_final_message continues an assistant message; the last one is from {chat[-1]['role']!r}",
            param="continue_final_message",
        )
    chat[-1]["content"] += _CONTINUE_MARK


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK)
    if at < 0:
        raise InvalidRequest(
            "the model's chat template leaves out the final message, so it can not be continued",
            param="continue_final_message",
        )
    return text[:at]


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks text for training; here it is just its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML letters, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    functions: dict[str, Callable[..., str]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment


_ENVIRONMENT = _environment()


def _compile(source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template is broken at line {error.lineno}: {error}", param="chat_template"
        ) from None
