"""Writes JSON documents with their properties in the order of a schema, which is the order that grammars enforce."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from pando.grammar.schema_tree import Schema, resolve

_MAX_DEPTH = 12

Fits = Callable[[Schema, Any], bool]
"""Whether a value fits a subschema."""


def in_schema_order(value: Any, schema: Schema, root: Schema, fits: Fits) -> Any:
    """`value` with objects' properties ordered as the schema lists them, others after them as they were."""
    if isinstance(value, list):
        return [
            in_schema_order(each, {"allOf": list(_items(schema, root, value, fits, index))}, root, fits)
            for index, each in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    about: dict[str, list[Schema]] = {}
    listed: list[str] = []
    late: list[str] = []
    for node in _nodes(schema, root, value, fits):
        named = node.get("properties", {})
        listed += named
        late += node.get("required", ())
        patterns = list(node.get("patternProperties", {}).values())
        rest = [node["additionalProperties"]] if isinstance(node.get("additionalProperties"), dict) else []
        for name in value:
            about.setdefault(name, []).extend([named[name]] if name in named else [*patterns, *rest])
    names = [name for name in dict.fromkeys([*listed, *late, *value]) if name in value]
    return {name: in_schema_order(value[name], {"allOf": about.get(name, [])}, root, fits) for name in names}


def _nodes(schema: Schema, root: Schema, value: Any, fits: Fits, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The schema and those applied at the same place: its reference, all of `allOf`, alternatives that fit."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return
    own = False
    for key, sub in schema.items():  # the order of keywords is the order of what they bring
        parts: list[Schema] = []
        if key == "$ref":
            parts = [resolve(root, sub)]
        elif key == "allOf":
            parts = sub
        elif key in ("anyOf", "oneOf"):
            parts = [branch for branch in sub if fits(branch, value)][:1] or sub
        elif key == "properties":
            yield schema
            own = True
        for part in parts:
            yield from _nodes(part, root, value, fits, depth + 1)
    if not own:
        yield schema


def _items(schema: Schema, root: Schema, value: list[Any], fits: Fits, index: int) -> Iterator[Schema]:
    for node in _nodes(schema, root, value, fits):
        first = node.get("prefixItems", [])
        if index < len(first):
            yield first[index]
        elif isinstance(node.get("items"), dict):
            yield node["items"]


def compact(value: Any) -> str:
    """The JSON text of a value without white space."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
