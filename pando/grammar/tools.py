"""From tools and a choice to a grammar of the whole reply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar, InvalidRequest
from pando.grammar.arguments import ArgumentRules
from pando.grammar.guidance import Source
from pando.grammar.lark import TEXT, LarkBuilder
from pando.grammar.limits import Limits
from pando.grammar.protocols import Issue
from pando.grammar.schema_tree import Schema
from pando.grammar.tool_formats import FORMATS, ToolFormat, tool_format

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_MAX_NUMBERED = 1_000
"""Calls that a format with numbered calls may hold."""


@dataclass(frozen=True, slots=True)
class Tool:
    """name, JSON schema of the arguments, and whether they must fit it (else they are any JSON object)."""

    name: str
    parameters: Schema
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolGrammar:
    """spec: the grammar of the reply, None if nothing needs enforcing. relaxed: what arguments are not held to, by
    tool. banned: tokens that would begin a call where none may be made."""

    spec: GrammarSpec | None
    relaxed: Mapping[str, tuple[Issue, ...]]
    banned: tuple[int, ...] = ()


def read_tools(tools: Sequence[Mapping[str, Any]], limits: Limits) -> list[Tool]:
    """Tools of an OpenAI request body. Raises InvalidRequest that names the place."""
    if len(tools) > limits.tools:
        raise InvalidRequest(f"{len(tools)} tools; the limit is {limits.tools}", param="tools")
    found: list[Tool] = []
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"tools[{index}] needs a function.name of letters, digits, `_`, `.` and `-`", param=f"tools[{index}]"
            )
        if any(other.name == name for other in found):
            raise InvalidRequest(f"tools[{index}] has the name of another: {name!r}", param=f"tools[{index}]")
        parameters = function.get("parameters")
        schema = {"type": "object", "properties": {}} if parameters is None else parameters
        found.append(Tool(name, schema, bool(function.get("strict"))))
    return found


class ToolCompiler:
    """Compiles for one format and the markers of one vocabulary. Raises InvalidRequest for an unknown format."""

    def __init__(
        self,
        form: str | ToolFormat,
        markers: Mapping[str, int],
        limits: Limits | None = None,
        whitespace: str = "spaced",
    ) -> None:
        found = form if isinstance(form, ToolFormat) else tool_format(form)
        if found is None:
            raise InvalidRequest(f"unknown tool format {form!r}; known: {', '.join(sorted(FORMATS))}", param="tools")
        self._form = found
        self._markers = markers
        self._limits = limits or Limits()
        self._whitespace = whitespace

    def compile(self, tools: Sequence[Tool], choice: str = "auto", *, parallel: bool = True) -> ToolGrammar:
        """The grammar of a reply that may (auto), must (required, or a tool's name) or must not (none) hold calls.

        Raises InvalidRequest for a choice that names no tool, InvalidGrammar for a strict tool whose schema can not be
        enforced.
        """
        if choice == "none" or not tools:
            first = next((name for name in self._markers if self._form.trigger.startswith(name)), None)
            return ToolGrammar(None, {}, () if first is None else (self._markers[first],))
        usable = [tool for tool in tools if choice in ("auto", "required") or tool.name == choice]
        if not usable:
            raise InvalidRequest(f"tool_choice names {choice!r}, which is not in tools", param="tool_choice")
        builder = LarkBuilder(self._markers)
        relaxed: dict[str, tuple[Issue, ...]] = {}
        bodies = []
        for index, tool in enumerate(usable):
            schema, issues = self._schema(tool)
            if issues:
                relaxed[tool.name] = issues
            rules = ArgumentRules(builder, schema, f"a{index}", self._whitespace)
            bodies.append(self._call(builder, tool.name, rules.add(self._form.arguments)))
            if rules.loose and tool.strict:
                where = f"parameters of tool {tool.name!r} at {rules.loose[0].pointer}"
                raise InvalidGrammar(f"{where}: {rules.loose[0].message}", param="tools")
            if rules.loose:
                relaxed[tool.name] = (*relaxed.get(tool.name, ()), *rules.loose)
        body = builder.rule("body", " | ".join(bodies))
        single = not parallel or choice not in ("auto", "required") or self._form.max_calls == 1
        start = self._reply(builder, body, single=single, free=choice == "auto")
        return ToolGrammar(GrammarSpec("lark", builder.source(start)), relaxed)

    def _schema(self, tool: Tool) -> tuple[Schema, tuple[Issue, ...]]:
        if not tool.strict and self._form.arguments == "json":
            return {"type": "object"}, ()
        spec = GrammarSpec("json_schema", json.dumps(tool.parameters), GrammarOptions(strict=tool.strict))
        try:
            source = Source(spec, self._limits, None, None)
        except InvalidGrammar as error:
            raise InvalidGrammar(f"parameters of tool {tool.name!r}: {error.message}", param="tools") from None
        return source.schema, source.relaxed

    def _call(self, builder: LarkBuilder, name: str, arguments: str) -> str:
        """A call from its name on: what follows the text that all calls begin with."""
        after = self._form.call_begin.partition("{name}")[2]
        before_number, number, after_number = after.partition("{index}")
        parts = [builder.fixed(name + before_number)]
        if number:
            parts += ["/[0-9]{1,4}/", builder.fixed(after_number)]
        return " ".join([*parts, arguments, builder.fixed(self._form.call_end)])

    def _reply(self, builder: LarkBuilder, body: str, *, single: bool, free: bool) -> str:
        form = self._form
        opening = form.call_begin.partition("{name}")[0]
        more = "" if single else f"({builder.fixed(form.separator + opening)} {body})*"
        ending = builder.fixed(form.section_end) if form.section_end else ""
        calls = f"{body} {more} {ending}"
        if form.answer:
            return self._messages(builder, f"{builder.fixed(form.trigger)} {calls}", free=free)
        if not free:
            return f"{builder.fixed(form.trigger) if form.trigger else ''} {calls}"
        if form.bare:
            other = builder.rule("OTHER", f"/([^\\{form.bare}](.|\\n)*)?/")
            return f"{other} | {builder.fixed(form.trigger)} {calls}"
        return f"{TEXT} | {builder.until('head', form.trigger)} {calls}"

    def _messages(self, builder: LarkBuilder, calls: str, *, free: bool) -> str:
        """Messages of other kinds, then calls or an answer."""
        form = self._form
        kinds = [
            f"{builder.fixed(begin)} {builder.until(f'other{index}', form.other_end)}"
            for index, begin in enumerate(form.others)
        ]
        others = builder.rule("others", f"({' | '.join(kinds)})*")
        if not free:
            return f"{others} {calls}"
        return f"{TEXT} | {builder.until('head', form.trigger)} {calls.removeprefix(builder.fixed(form.trigger))}" + (
            f" | {others} {calls} | {others} {builder.fixed(form.answer)} {TEXT}"
        )
