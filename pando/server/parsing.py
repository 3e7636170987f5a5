"""The parsers of replies over HTTP: for text that was generated elsewhere, or without them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from pando.errors import InvalidRequest
from pando.grammar.reasoning_formats import ReasoningFormat
from pando.grammar.tool_formats import DEFAULT_FORMAT, FORMATS, ToolFormat
from pando.server.exchange import json_response, post, read_json, service_of
from pando.server.parsers.events import CallArguments, CallBroken, CallStart, Event, Reasoning, Text
from pando.server.parsers.reply import ReplyFormat, ReplyParser, ReplyStyle
from pando.server.styles import named_reasoning_format, named_tool_format

_ALL_CALLS = 1 << 30


class ParseCallsBody(msgspec.Struct, kw_only=True):
    """The body of /parse_function_call. Without tool_call_parser, the model's own format."""

    text: str
    tools: list[dict[str, Any]]
    tool_call_parser: str | None = None


class SeparateReasoningBody(msgspec.Struct, kw_only=True):
    """The body of /separate_reasoning. Without reasoning_parser, the model's own markers."""

    text: str
    reasoning_parser: str | None = None


async def parse_function_call(request: Request) -> ASGIApp:
    """Text and calls of a whole reply."""
    body = await read_json(request, ParseCallsBody)
    form = named_tool_format(body.tool_call_parser, service_of(request).style.tools)
    names = {}
    for index, tool in enumerate(body.tools):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"tools[{index}] has no function.name", param=f"tools[{index}]")
        names[function["name"]] = function.get("parameters", True)
    events = _parsed(body.text, ReplyFormat(ReplyStyle(form, None), max_calls=_ALL_CALLS, tools=names))
    calls: dict[int, dict[str, Any]] = {}
    text = ""
    for each in events:
        if isinstance(each, Text):
            text += each.text
        elif isinstance(each, CallStart):
            calls[each.index] = {"tool_index": list(names).index(each.name), "name": each.name, "parameters": ""}
        elif isinstance(each, CallArguments):
            calls[each.index]["parameters"] += each.text
        elif isinstance(each, CallBroken):
            del calls[each.index]
            text += each.raw
    return json_response({"normal_text": text, "calls": list(calls.values())})


async def separate_reasoning(request: Request) -> ASGIApp:
    """Reasoning and answer of a whole reply."""
    body = await read_json(request, SeparateReasoningBody)
    form = named_reasoning_format(body.reasoning_parser, service_of(request).style.reasoning)
    style = ReplyStyle(_calls_beside(form), form)
    inside = form.absent == "inside" and form.end in body.text
    events = _parsed(body.text, ReplyFormat(style, thinks=True, starts_inside=inside))
    thought = "".join(each.text for each in events if isinstance(each, Reasoning))
    return json_response({"reasoning_text": thought, "text": "".join(e.text for e in events if isinstance(e, Text))})


def _parsed(text: str, shape: ReplyFormat) -> list[Event]:
    parser = ReplyParser(shape)
    return parser.push(text, ()) + parser.finish()


def _calls_beside(form: ReasoningFormat) -> ToolFormat:
    return FORMATS["harmony" if form.is_channels else DEFAULT_FORMAT]


routes = [post("/parse_function_call", parse_function_call), post("/separate_reasoning", separate_reasoning)]
