"""Bare text as a JSON value of the type that a schema gives it.

Where the schema allows text, text stays text, whatever it looks like; numbers keep every digit.
"""

from __future__ import annotations

import ast
import json
from typing import Any

from pando.grammar.schema_tree import Schema, resolve
from pando.server.parsers.scan import json_text

_MAX_DEPTH = 16
_WORDS = {"True": "true", "False": "false", "None": "null"}


def parameter(root: Schema, key: str) -> Schema:
    """The schema of a property of a tool's parameters; True (anything) if it has none."""
    schema = _followed(root, root)
    properties = schema.get("properties") if isinstance(schema, dict) else None
    found = properties.get(key, True) if isinstance(properties, dict) else True
    return found if isinstance(found, (dict, bool)) else True


def argument(text: str, schema: Schema, root: Schema) -> str:
    """JSON for a bare text. Text that fits no other type becomes a string."""
    kinds = _kinds(schema, root, 0)
    plain = text.strip()
    if isinstance(schema, dict) and isinstance(schema.get("enum"), list):
        return _of_enum(text, schema["enum"])
    if "string" in kinds and "any" not in kinds:
        return "null" if "null" in kinds and plain == "null" else _string(text)
    written = _scalar(plain)
    if written is not None and ("any" in kinds or _kind(written) & kinds):
        return written
    return _string(text)


def _followed(schema: Schema, root: Schema) -> Schema:
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        schema = resolve(root, schema["$ref"])
    return schema


def _kinds(schema: Schema, root: Schema, depth: int) -> frozenset[str]:
    """Names of the types that a schema allows; "any" where it does not say."""
    schema = _followed(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return frozenset(["any"])
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset([named])
    if isinstance(named, list):
        return frozenset(each for each in named if isinstance(each, str))
    if "const" in schema:
        return _kind(json.dumps(schema["const"]))
    if isinstance(schema.get("enum"), list):
        return frozenset().union(*(_kind(json.dumps(value)) for value in schema["enum"]))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            return frozenset().union(*(_kinds(part, root, depth + 1) for part in schema[key]))
    if isinstance(schema.get("properties"), dict):
        return frozenset(["object"])
    return frozenset(["any"])


def _kind(written: str) -> frozenset[str]:
    """Types that a JSON text has."""
    if written[0] in "-0123456789":
        # 5.0 is an integer, too, as schemas see it.
        is_whole = not set(written) & set(".eE") or float(written).is_integer()
        return frozenset(["number", "integer"]) if is_whole else frozenset(["number"])
    names = {"{": "object", "[": "array", '"': "string", "t": "boolean", "f": "boolean"}
    return frozenset([names.get(written[0], "null")])


def _scalar(plain: str) -> str | None:
    """The text as JSON that is no string: as it is, or as Python writes it; None if it is neither."""
    plain = _WORDS.get(plain, plain)
    try:
        value = json.loads(plain, parse_int=str, parse_float=str, parse_constant=_refuse)
        return None if plain.startswith('"') and isinstance(value, str) else plain
    except (ValueError, RecursionError):
        pass
    if plain[:1] not in ("{", "["):
        return None
    try:
        return json_text(ast.literal_eval(plain))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


MAX_NUMBER = 4000
"""Letters of a value that is compared with those of an `enum`: Python reads no longer numbers."""


def _of_enum(text: str, values: list[Any]) -> str:
    """The value that the text names: a string as it is, anything else as JSON."""
    if text in values or text.strip() in values:
        return _string(text if text in values else text.strip())
    written = _scalar(text.strip())
    if written is None or len(written) > MAX_NUMBER:
        return _string(text)
    for value in values:
        if not isinstance(value, str) and _same(json.loads(written), value):
            return written
    return _string(text)


def _same(left: Any, right: Any) -> bool:
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
