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
    for keyword, node in _nodes(schema, root, value, fits):
        if keyword == "properties":
            listed += node[keyword]
        elif keyword == "required":
            late += node[keyword]
        else:
            for name in value:
                about.setdefault(name, []).extend(_about(node, name))
    names = [name for name in dict.fromkeys([*listed, *late, *value]) if name in value]
    return {name: in_schema_order(value[name], {"allOf": about.get(name, [])}, root, fits) for name in names}


def _about(node: dict[str, Any], name: str) -> list[Schema]:
    """What a node may say about the value of a property."""
    if name in node.get("properties", {}):
        return [node["properties"][name]]
    return [*node.get("patternProperties", {}).values(), node.get("additionalProperties", True)]


def _nodes(
    schema: Schema, root: Schema, value: Any, fits: Fits, depth: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema and those applied at the same place: its reference, all of `allOf`, an alternative that fits.

    In the order of their keywords, which is the order of what they bring: ("properties", node) and ("required", node)
    where these stand, and ("", node) once for each.
    """
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return
    for key, sub in schema.items():
        parts: list[Schema] = []
        if key in ("properties", "required"):
            yield key, schema
        elif key == "$ref":
            parts = [resolve(root, sub)]
        elif key == "allOf":
            parts = sub
        elif key in ("anyOf", "oneOf"):
            parts = [branch for branch in sub if fits(branch, value)][:1] or sub
        for part in parts:
            yield from _nodes(part, root, value, fits, depth + 1)
    yield "", schema


def _items(schema: Schema, root: Schema, value: list[Any], fits: Fits, index: int) -> Iterator[Schema]:
    for keyword, node in _nodes(schema, root, value, fits):
        first = node.get("prefixItems", [])
        if keyword == "" and index < len(first):
            yield first[index]
        elif keyword == "" and isinstance(node.get("items"), dict):
            yield node["items"]


def compact(value: Any) -> str:
    """The JSON text of a value without white space."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
