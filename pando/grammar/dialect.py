"""Brings schemas of older drafts, and references to any place in the document, into one shape."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pando.grammar.schema_tree import Schema, children, rebuilt, resolve

_DRAFT = re.compile(r"json-schema\.org/(?:draft-0?(\d+)|draft/(20\d\d-\d\d))/")
NEWEST = 2020
OLD = 7
"""The last draft in which `$ref` hides its neighbours and `dependencies` is a keyword."""

_PLAIN_REFERENCE = re.compile(r"#(/(\$defs|definitions)/[^/]+)?/?$")


def draft_of(schema: Schema) -> int | None:
    """3, 4, 6, 7, 2019 or 2020 as `$schema` says; None if it says nothing."""
    named = _DRAFT.search(str(schema.get("$schema", ""))) if isinstance(schema, dict) else None
    if named is None:
        return None
    return int(named[1]) if named[1] else int(named[2][:4])


def has_inner_ids(schema: Schema) -> bool:
    """True if a subschema is a resource of its own, so that `#` inside it does not mean the root."""

    def inner(node: Schema) -> bool:
        return any(
            isinstance(child, dict)
            and (any(isinstance(child.get(key), str) and not child[key].startswith("#") for key in ("$id", "id")))
            or inner(child)
            for _, child in children(node)
        )

    return inner(schema)


def modernise(schema: Schema) -> Schema:
    """The same schema in the words of draft 2020-12, as far as they exist; `$schema` is taken away."""
    draft = draft_of(schema)

    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict):
            return node
        if "$ref" in node and draft is not None and draft <= OLD:
            kept = {key: value for key, value in node.items() if key in ("$ref", "$defs", "definitions", "$id", "id")}
            return rebuilt(kept, pointer, change)
        made = rebuilt(node, pointer, change)
        for step in (_bounds, _tuples, _booleans, _counts):
            step(made, draft)
        return made

    made = change(schema, "#")
    if isinstance(made, dict):
        made.pop("$schema", None)
    return made


def _bounds(node: dict[str, Any], draft: int | None) -> None:
    """Draft 4 writes an open bound as a boolean beside the closed one."""
    for open_end, closed in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(node.get(open_end), bool):
            exclusive = node.pop(open_end)
            if exclusive and closed in node:
                node[open_end] = node.pop(closed)


def _tuples(node: dict[str, Any], draft: int | None) -> None:
    """Before 2020 the list of first items was `items`, and the rest `additionalItems`."""
    if isinstance(node.get("items"), list):
        rest = node.pop("additionalItems", True)
        node["prefixItems"] = node.pop("items")
        if rest is not True:
            node["items"] = rest
    elif draft is not None and draft < NEWEST:
        node.pop("additionalItems", None)  # without a list of first items it says nothing


def _booleans(node: dict[str, Any], draft: int | None) -> None:
    """`required: true` of draft 3 inside a property, `type: any`: neither means anything since draft 4."""
    if isinstance(node.get("required"), bool):
        node.pop("required")
    if node.get("type") == "any" and (draft is None or draft < 4):
        node.pop("type")


_COUNTS = tuple("minLength maxLength minItems maxItems minContains maxContains minProperties maxProperties".split())


def _counts(node: dict[str, Any], draft: int | None) -> None:
    """A count may be written as 2.0."""
    for key in _COUNTS:
        value = node.get(key)
        if isinstance(value, float) and value.is_integer():
            node[key] = int(value)


def hoist_references(schema: Schema) -> Schema:
    """Give every referenced place a name under `$defs`, so that rewriting around it leaves references whole."""
    if not isinstance(schema, dict):
        return schema
    names: dict[str, str] = {}
    waiting: list[str] = []

    def named(reference: str) -> str:
        if reference not in names:
            names[reference] = f"place-{len(names)}"
            waiting.append(reference)
        return names[reference]

    change = _renamer(schema, named)
    made = change(schema, "#")
    while waiting:
        reference = waiting.pop()
        made.setdefault("$defs", {})[names[reference]] = change(resolve(schema, reference), "#")
    return made


def _renamer(root: Schema, named: Callable[[str], str]) -> Callable[[Schema, str], Schema]:
    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict):
            return node
        made = rebuilt(node, pointer, change)
        reference = made.get("$ref")
        if isinstance(reference, str) and not _PLAIN_REFERENCE.match(reference):
            if resolve(root, reference) is not None:
                made["$ref"] = f"#/$defs/{named(reference)}"
        return made

    return change
