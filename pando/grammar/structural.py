"""Structural tags: free text in which a trigger begins a part that follows a schema, as JSON from a request.

Two spellings are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and
`{"type": "structural_tag", "format": F}`, where F is one of

    {"type": "triggered_tags", "triggers", "tags", "at_least_one", "stop_after_first"}
    {"type": "token_triggered_tags", "trigger_tokens", "tags", ...}      the same, triggers are tokens
    {"type": "tags_with_separator", "tags", "separator", "at_least_one", "stop_after_first"}
    {"type": "tag", "begin", "content", "end"}
    {"type": "sequence", "elements"}, {"type": "or", "elements"}
    {"type": "json_schema", "json_schema"}, {"type": "regex", "pattern"}, {"type": "const_string", "value"}
    {"type": "any_text"}, {"type": "token", "token"}

`content` and `elements` are formats again. A begin, an end or a trigger may be a token, as `{"type": "token", "token":
id or spelling}`; a text that is a token of the vocabulary is that token anyway.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llguidance import regex_to_lark

from pando.core.sampling import GrammarSpec
from pando.grammar.lark import TEXT, LarkBuilder, json_rule
from pando.grammar.limits import Limits, check_regex, check_text, refuse
from pando.grammar.protocols import Issue
from pando.grammar.schema_tree import Schema

_KIND = "structural_tag"
_MAX_DEPTH = 16

PrepareSchema = Callable[[Schema, str], tuple[Schema, tuple[Issue, ...]]]
"""(schema, pointer) to the schema that compiles and what it does not enforce; raises InvalidGrammar."""

Format = Mapping[str, Any]


def structural_lark(
    spec: GrammarSpec, limits: Limits, markers: Mapping[str, int], prepare: PrepareSchema
) -> tuple[str, tuple[Issue, ...]]:
    """The grammar of a structural tag, and what its schemas are not held to. Raises InvalidGrammar with a pointer."""
    form = read_format(spec.source, limits)
    rules = _Rules(spec, limits, markers, prepare)
    start = rules.add(form, "#/format" if "structures" not in form else "#", "", 0)
    return rules.builder.source(start), tuple(rules.relaxed)


def read_format(source: str, limits: Limits) -> Format:
    """The format of a source in the newer spelling; `structures` of the older one stay. Raises InvalidGrammar."""
    check_text(source, _KIND, limits)
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise refuse("", f"the source is not JSON: {error}", _KIND) from None
    if not isinstance(value, dict):
        raise refuse("#", "give an object", _KIND)
    form = value.get("format")
    if isinstance(form, dict):
        return form
    return {**value, "type": "triggered_tags", "structures": value.get("structures")}


def schema_parts(source: str, limits: Limits) -> Iterator[tuple[str, str, Schema]]:
    """(begin, end, schema) of each part of a text that a schema is meant to hold; begin is "" for the whole text."""
    form = read_format(source, limits)
    if form.get("type") == "json_schema":
        yield "", "", form.get("json_schema", {})
    for tag in form.get("structures") or ():
        yield str(tag.get("begin", "")), _spelling(tag.get("end", "")), tag.get("schema", {})
    yield from _tag_parts(form)


def _tag_parts(form: Format) -> Iterator[tuple[str, str, Schema]]:
    content = form.get("content")
    if form.get("type") == "tag" and isinstance(content, dict) and content.get("type") == "json_schema":
        yield _spelling(form.get("begin")), _spelling(form.get("end", "")), content.get("json_schema", {})
    below = [content, *(form.get("elements") or ()), *(form.get("tags") or ())]
    for each in below:
        if isinstance(each, dict):
            yield from _tag_parts({"type": "tag", **each} if "begin" in each else each)


def _spelling(value: Any) -> str:
    """A begin or an end as text, as far as it has one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    value = value.get("token", "") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


class _Rules:
    """Writes the rules of one source. relaxed: what its schemas are not held to."""

    def __init__(self, spec: GrammarSpec, limits: Limits, markers: Mapping[str, int], prepare: PrepareSchema) -> None:
        self.builder = LarkBuilder(markers)
        self.relaxed: list[Issue] = []
        self._whitespace = spec.options.whitespace
        self._limits = limits
        self._markers = markers
        self._names = {token: name for name, token in markers.items()}
        self._prepare = prepare
        self._count = 0

    def add(self, form: Format, pointer: str, end: str, depth: int) -> str:
        """A format, and the text that ends it, as the right side of a rule."""
        if depth > _MAX_DEPTH:
            raise refuse(pointer, f"nested deeper than {_MAX_DEPTH} formats", _KIND)
        kind = form.get("type")
        closing = self.builder.fixed(end) if end else ""
        if kind == "any_text":
            return self.builder.until(self._name(), end) if end else TEXT
        if kind == "tag":
            return f"{self._tag(form, pointer, '', depth)} {closing}"
        if kind in ("triggered_tags", "token_triggered_tags"):
            return self._triggered(form, pointer, end, depth)
        if kind == "tags_with_separator":
            return f"{self._separated(form, pointer, depth)} {closing}"
        if kind == "sequence":
            return self._sequence(_list(form, "elements", pointer), pointer, end, depth)
        if kind == "or":
            parts = [
                self.add(each, f"{pointer}/elements/{i}", end, depth + 1)
                for i, each in enumerate(_list(form, "elements", pointer))
            ]
            return f"({' | '.join(parts)})"
        return f"{self._leaf(form, pointer)} {closing}"

    def _name(self) -> str:
        self._count += 1
        return f"part{self._count}"

    def _leaf(self, form: Format, pointer: str) -> str:
        kind = form.get("type")
        if kind == "json_schema":
            schema, issues = self._prepare(form.get("json_schema", {}), pointer)
            place = (
                pointer.removesuffix("/content") + "/schema" if "/structures/" in pointer else f"{pointer}/json_schema"
            )
            self.relaxed += [Issue(place + each.pointer.removeprefix("#"), each.message, each.fatal) for each in issues]
            return self.builder.rule(self._name(), json_rule(schema, self._whitespace))
        if kind == "regex" and isinstance(form.get("pattern"), str):
            check_regex(form["pattern"], f"{pointer}/pattern", _KIND, self._limits)
            return self.builder.rule(self._name(), f"/{regex_to_lark(form['pattern'])}/")
        if kind == "const_string" and isinstance(form.get("value"), str):
            return self.builder.fixed(form["value"])
        if kind == "token":
            return self.builder.fixed(self._text(form, pointer))
        raise refuse(f"{pointer}/type", f"{kind!r} is not known, or its value is missing", _KIND)

    def _text(self, value: Any, pointer: str) -> str:
        """A text, or the spelling of a token."""
        if isinstance(value, dict) and value.get("type") == "token":
            token = value.get("token")
            name = self._names.get(token) if isinstance(token, int) else token
            if not isinstance(name, str) or name not in self._markers:
                raise refuse(pointer, f"{token!r} is no special or added token of this model", _KIND)
            return name
        if not isinstance(value, str):
            raise refuse(pointer, "give a text", _KIND)
        return value

    def _tag(self, tag: Format, pointer: str, done: str, depth: int) -> str:
        """A tag without `done`, which its begin starts with."""
        end = tag.get("end", "")
        end = self._text(end[0] if isinstance(end, list) and len(end) == 1 else end, f"{pointer}/end")
        content = tag.get("content")
        if not isinstance(content, dict):
            raise refuse(f"{pointer}/content", "give an object with a type", _KIND)
        begin = self.begin_of(tag, pointer)[len(done) :]
        head = self.builder.fixed(begin) if begin else ""
        return f"{head} {self.add(content, f'{pointer}/content', end, depth + 1)}"

    def begin_of(self, tag: Format, pointer: str) -> str:
        """The text that begins a tag."""
        begin = self._text(tag.get("begin"), f"{pointer}/begin")
        if not begin:
            raise refuse(f"{pointer}/begin", "give a text", _KIND)
        return begin

    def _tags(self, form: Format, pointer: str) -> list[tuple[Format, str]]:
        """(tag, pointer) of each tag; those of the older spelling in the newer one."""
        key = "tags" if form.get("structures") is None and "structures" not in form else "structures"
        tags = _list(form, key, pointer)
        if len(tags) > self._limits.tools:
            raise refuse(pointer, f"{len(tags)} tags; the limit is {self._limits.tools}", _KIND)
        if key == "structures":
            tags = [{**tag, "content": {"type": "json_schema", "json_schema": tag.get("schema", {})}} for tag in tags]
        return [(tag, f"{pointer}/{key}/{index}") for index, tag in enumerate(tags)]

    def _triggered(self, form: Format, pointer: str, end: str, depth: int) -> str:
        """Text in which a trigger begins a tag."""
        if end:
            raise refuse(pointer, "text with triggers can only come last", _KIND)
        key = "trigger_tokens" if form.get("type") == "token_triggered_tags" else "triggers"
        tags = self._tags(form, pointer)
        triggers = [self._trigger(each, key, f"{pointer}/{key}") for each in _items(form, key, pointer)]
        bodies: dict[str, list[str]] = {}
        for tag, place in tags:
            begin = self.begin_of(tag, place)
            trigger = max((each for each in triggers if begin.startswith(each)), key=len, default=None)
            if trigger is None:
                raise refuse(f"{place}/begin", f"{begin!r} begins with none of the triggers", _KIND)
            # A trigger that ends inside a token of the vocabulary is that whole token.
            whole = [name for name in self._markers if begin.startswith(name) and name.startswith(trigger)]
            trigger = max([trigger, *whole], key=len)
            bodies.setdefault(trigger, []).append(self._tag(tag, place, trigger, depth))
        must, once = bool(form.get("at_least_one")), bool(form.get("stop_after_first"))
        groups = []
        for trigger, parts in bodies.items():
            head = self.builder.fixed(trigger) if must else self.builder.until(self._name(), trigger)
            groups.append(f"{head} ({' | '.join(parts)})")
        group = self.builder.rule(self._name(), " | ".join(groups))
        if must:
            return group if once else f"{group} {group}*"
        return f"({TEXT} | {group})" if once else f"{group}* {TEXT}"

    def _trigger(self, value: Any, key: str, pointer: str) -> str:
        """The text of a trigger; of a token trigger, the spelling of its token."""
        is_token = key == "trigger_tokens" and not isinstance(value, dict)
        text = self._text({"type": "token", "token": value} if is_token else value, pointer)
        if not text:
            raise refuse(pointer, "give a list of at least one text", _KIND)
        return text

    def _separated(self, form: Format, pointer: str, depth: int) -> str:
        """Tags with a text between them."""
        separator = self._text(form.get("separator", ""), f"{pointer}/separator")
        parts = [self._tag(tag, place, "", depth) for tag, place in self._tags(form, pointer)]
        tag = self.builder.rule(self._name(), " | ".join(parts))
        between = self.builder.fixed(separator) if separator else ""
        several = tag if form.get("stop_after_first") else f"{tag} ({between} {tag})*"
        return several if form.get("at_least_one") else f"({several})?"

    def _sequence(self, elements: list[dict[str, Any]], pointer: str, end: str, depth: int) -> str:
        """Formats one after the other. Free text reaches to the text that the next one begins with."""
        parts, done = [], ""
        for index, each in enumerate(elements):
            place, is_last = f"{pointer}/elements/{index}", index == len(elements) - 1
            if each.get("type") == "any_text" and not is_last:
                done = self._first_text(elements[index + 1], f"{pointer}/elements/{index + 1}")
                parts.append(self.builder.until(self._name(), done))
                continue
            if not done:
                parts.append(self.add(each, place, end if is_last else "", depth + 1))
            elif each.get("type") == "tag":
                parts.append(self._tag(each, place, done, depth + 1))
            if done and is_last and end:
                parts.append(self.builder.fixed(end))
            done = ""
        return " ".join(parts)

    def _first_text(self, form: Format, pointer: str) -> str:
        """The text that a format begins with."""
        if form.get("type") == "tag":
            return self.begin_of(form, pointer)
        if form.get("type") == "const_string" and form.get("value"):
            return self._text(form["value"], f"{pointer}/value")
        if form.get("type") == "token":
            return self._text(form, pointer)
        raise refuse(pointer, "after any_text, give a tag, a const_string or a token", _KIND)


def _items(value: Format, key: str, pointer: str) -> list[Any]:
    items = value.get(key)
    if not isinstance(items, list) or not items:
        raise refuse(f"{pointer}/{key}", "give a list of at least one text", _KIND)
    return items


def _list(value: Format, key: str, pointer: str) -> list[dict[str, Any]]:
    items = value.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(each, dict) for each in items):
        raise refuse(f"{pointer}/{key}", "give a list of at least one object", _KIND)
    return items
