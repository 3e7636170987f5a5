"""Where the subschemas of a JSON schema are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

Schema = Any
"""A JSON schema: a dict, True or False."""

SINGLE = frozenset(
    "additionalItems additionalProperties contains else if items not propertyNames then unevaluatedItems "
    "unevaluatedProperties".split()
)
LISTS = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
MAPS = frozenset({"$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"})

ANNOTATIONS = frozenset(
    "$anchor $comment $id $schema $vocabulary contentEncoding contentMediaType contentSchema default deprecated "
    "description example examples id readOnly title writeOnly $defs definitions".split()
)
"""Keywords that no instance can break."""


def escape(part: str) -> str:
    """One part of a JSON pointer."""
    return part.replace("~", "~0").replace("/", "~1")


def children(schema: Schema) -> Iterator[tuple[str, Schema]]:
    """(relative pointer, subschema) of each direct subschema, in order."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in SINGLE and isinstance(value, dict | bool):
            yield f"/{key}", value
        elif key in LISTS and isinstance(value, list):
            yield from ((f"/{key}/{index}", each) for index, each in enumerate(value))
        elif key in MAPS and isinstance(value, dict):
            for name, each in value.items():
                if isinstance(each, dict | bool):
                    yield f"/{key}/{escape(name)}", each


def rebuilt(schema: dict[str, Any], pointer: str, change: Callable[[Schema, str], Schema]) -> dict[str, Any]:
    """A copy whose direct subschemas are `change(subschema, pointer)`."""
    made: dict[str, Any] = {}
    for key, value in schema.items():
        here = f"{pointer}/{key}"
        if key in SINGLE and isinstance(value, dict | bool):
            made[key] = change(value, here)
        elif key in LISTS and isinstance(value, list):
            made[key] = [change(each, f"{here}/{index}") for index, each in enumerate(value)]
        elif key in MAPS and isinstance(value, dict):
            made[key] = {
                name: change(each, f"{here}/{escape(name)}") if isinstance(each, dict | bool) else each
                for name, each in value.items()
            }
        else:
            made[key] = value
    return made


def resolve(root: Schema, reference: object) -> Schema | None:
    """The subschema that a local reference (`#`, `#/...`) names, or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node = root
    for part in reference[1:].split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    if reference not in ("#", "#/") and not reference.startswith("#/"):
        return None  # an anchor
    return node if isinstance(node, dict | bool) else None


def same(one: Any, other: Any) -> bool:
    """True if two parts of schemas are written alike; 1 and true are not."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
