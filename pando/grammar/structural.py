"""Structural tags: free text in which a trigger begins a part that follows a schema, as JSON from a request.

Two spellings are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and
`{"type": "structural_tag", "format": F}` where F is `{"type": "triggered_tags", "triggers", "tags", "at_least_one",
"stop_after_first"}` or one `{"type": "tag", "begin", "content", "end"}`; content is `{"type": "json_schema",
"json_schema"}`, `{"type": "regex", "pattern"}`, `{"type": "const_string", "value"}` or `{"type": "any_text"}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from pando.core.sampling import GrammarSpec
from pando.grammar.lark import TEXT, LarkBuilder, json_rule
from pando.grammar.limits import Limits, check_regex, refuse
from pando.grammar.protocols import Issue
from pando.grammar.schema_tree import Schema

_KIND = "structural_tag"

PrepareSchema = Callable[[Schema, str], tuple[Schema, tuple[Issue, ...]]]
"""(schema, pointer) to the schema that compiles and what it does not enforce; raises InvalidGrammar."""


@dataclass(frozen=True, slots=True)
class Tag:
    """begin, content (`{"type": ...}`) and end of one tag, and where it stands in the source."""

    begin: str
    content: Mapping[str, Any]
    end: str
    pointer: str


@dataclass(frozen=True, slots=True)
class TagSet:
    """Tags by their triggers. must: at least one, without text before it. once: the text ends after the first."""

    triggers: tuple[str, ...]
    tags: tuple[Tag, ...]
    must: bool = False
    once: bool = False


def structural_lark(
    spec: GrammarSpec, limits: Limits, markers: Mapping[str, int], prepare: PrepareSchema
) -> tuple[str, tuple[Issue, ...]]:
    """The grammar of a structural tag, and what its schemas are not held to. Raises InvalidGrammar with a pointer."""
    tags = read_tags(spec.source, limits)
    builder = LarkBuilder(markers)
    relaxed: list[Issue] = []
    groups: list[str] = []
    for number, trigger in enumerate(tags.triggers):
        bodies = []
        for index, tag in enumerate(tags.tags):
            if _trigger_of(tag, tags.triggers) == trigger:
                content, issues = _content(builder, tag, f"c{number}_{index}", spec, limits, prepare)
                relaxed += issues
                bodies.append(f"{builder.fixed(tag.begin[len(trigger) :])} {content}")
        if bodies:
            head = builder.fixed(trigger) if tags.must else builder.until(f"head{number}", trigger)
            groups.append(f"{head} ({' | '.join(bodies)})")
    group = builder.rule("tag", " | ".join(groups))
    if tags.must:
        rest = "" if tags.once else f"{group}*"
        return builder.source(f"{group} {rest}"), tuple(relaxed)
    return builder.source(f"{TEXT} | {group}" if tags.once else f"{group}* {TEXT}"), tuple(relaxed)


def read_tags(source: str, limits: Limits) -> TagSet:
    """The tags of a source in either spelling. Raises InvalidGrammar with a pointer."""
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise refuse("", f"the source is not JSON: {error}", _KIND) from None
    if not isinstance(value, dict):
        raise refuse("#", "give an object", _KIND)
    form = value.get("format")
    if not isinstance(form, dict):
        tags = tuple(_structure(each, f"#/structures/{i}") for i, each in enumerate(_list(value, "structures", "#")))
        found = TagSet(_texts(value, "triggers", "#"), tags)
    elif form.get("type") == "triggered_tags":
        tags = tuple(_tag(each, f"#/format/tags/{i}") for i, each in enumerate(_list(form, "tags", "#/format")))
        triggers = _texts(form, "triggers", "#/format")
        found = TagSet(triggers, tags, bool(form.get("at_least_one")), bool(form.get("stop_after_first")))
    elif form.get("type") == "tag":
        tag = _tag(form, "#/format")
        found = TagSet((tag.begin,), (tag,), must=True, once=True)
    else:
        raise refuse("#/format/type", f"{form.get('type')!r} is not known; give triggered_tags or tag", _KIND)
    if len(found.tags) > limits.tools:
        raise refuse("#", f"{len(found.tags)} tags; the limit is {limits.tools}", _KIND)
    for tag in found.tags:
        if _trigger_of(tag, found.triggers) is None:
            raise refuse(f"{tag.pointer}/begin", f"{tag.begin!r} begins with none of the triggers", _KIND)
    return found


def _trigger_of(tag: Tag, triggers: tuple[str, ...]) -> str | None:
    return max((trigger for trigger in triggers if tag.begin.startswith(trigger)), key=len, default=None)


def _list(value: Mapping[str, Any], key: str, pointer: str) -> list[dict[str, Any]]:
    items = value.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(each, dict) for each in items):
        raise refuse(f"{pointer}/{key}", "give a list of at least one object", _KIND)
    return items


def _texts(value: Mapping[str, Any], key: str, pointer: str) -> tuple[str, ...]:
    items = value.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(each, str) and each for each in items):
        raise refuse(f"{pointer}/{key}", "give a list of at least one text", _KIND)
    return tuple(dict.fromkeys(items))


def _structure(value: dict[str, Any], pointer: str) -> Tag:
    """A tag of the older spelling, which has a schema in place of content."""
    return _tag({**value, "content": {"type": "json_schema", "json_schema": value.get("schema", {})}}, pointer)


def _tag(value: dict[str, Any], pointer: str) -> Tag:
    end = value.get("end", "")
    end = end[0] if isinstance(end, list) and len(end) == 1 else end
    content = value.get("content")
    if not isinstance(value.get("begin"), str) or not value["begin"]:
        raise refuse(f"{pointer}/begin", "give a text", _KIND)
    if not isinstance(end, str):
        raise refuse(f"{pointer}/end", "give a text", _KIND)
    if not isinstance(content, dict):
        raise refuse(f"{pointer}/content", "give an object with a type", _KIND)
    return Tag(value["begin"], content, end, pointer)


def _content(
    builder: LarkBuilder, tag: Tag, name: str, spec: GrammarSpec, limits: Limits, prepare: PrepareSchema
) -> tuple[str, tuple[Issue, ...]]:
    """The inside of a tag and its end."""
    kind, pointer = tag.content.get("type"), f"{tag.pointer}/content"
    end = builder.fixed(tag.end) if tag.end else ""
    if kind == "json_schema":
        schema, issues = prepare(tag.content.get("json_schema", {}), pointer)
        return f"{builder.rule(name, json_rule(schema, spec.options.whitespace))} {end}", issues
    if kind == "regex" and isinstance(tag.content.get("pattern"), str):
        pattern = tag.content["pattern"]
        check_regex(pattern, f"{pointer}/pattern", _KIND, limits)
        return f"{builder.rule(name, f'/{regex_to_lark(pattern)}/')} {end}", ()
    if kind == "const_string" and isinstance(tag.content.get("value"), str):
        return f"{builder.fixed(tag.content['value'])} {end}", ()
    if kind == "any_text" and tag.end:
        return builder.until(name, tag.end), ()
    raise refuse(f"{pointer}/type", f"{kind!r} is not known, or its value is missing", _KIND)
