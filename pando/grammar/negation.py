"""The opposite of a JSON schema where plain keywords can say it, and proofs that two schemas exclude each other.

Both are exact or silent: `negated` returns None, and `disjoint` False, where they do not know.
"""

from __future__ import annotations

import json
from typing import Any

from pando.grammar.schema_tree import ANNOTATIONS, Schema, resolve

TYPES = ("null", "boolean", "number", "string", "array", "object")
_MAX_DEPTH = 8
_MAX_STRINGS = 64
"""More excluded strings than this make a pattern too large."""


def types_of(schema: dict[str, Any]) -> frozenset[str]:
    """Types that `type` allows ("integer" kept apart from "number"); all if it is absent."""
    value = schema.get("type")
    if value is None:
        return frozenset(TYPES)
    return frozenset([value] if isinstance(value, str) else value)


def negated(schema: Schema, root: Schema, depth: int = 0) -> Schema | None:
    """A schema that allows exactly what `schema` forbids, or None if it can not be written."""
    if isinstance(schema, bool):
        return not schema
    if depth > _MAX_DEPTH or not isinstance(schema, dict):
        return None
    if "$ref" in schema and not set(schema) - ANNOTATIONS - {"$ref"}:
        target = resolve(root, schema["$ref"])
        return None if target is None else negated(target, root, depth + 2)
    alternatives: list[Schema] = []
    for key, value in schema.items():
        if key in ANNOTATIONS or key in ("additionalProperties", "items") and value is True:
            continue
        rule = _RULES.get(key)
        part = None if rule is None else rule(value, root, depth)
        if part is None:
            if key in _KNOWN or rule is not None:
                return None
            continue  # a keyword that no draft knows says nothing
        alternatives.append(part)
    return any_of(alternatives)


def any_of(alternatives: list[Schema]) -> Schema:
    """One schema that allows what any of these allows."""
    left = [each for each in alternatives if each is not False]
    if any(each is True or each == {} for each in left):
        return True
    if not left:
        return False
    return left[0] if len(left) == 1 else {"anyOf": left}


def all_of(parts: list[Schema]) -> Schema:
    """One schema that allows what all of these allow."""
    left = [each for each in parts if each is not True and each != {}]
    if any(each is False for each in left):
        return False
    if not left:
        return True
    return left[0] if len(left) == 1 else {"allOf": left}


def _not_type(value: Any, root: Schema, depth: int) -> Schema | None:
    named = set([value] if isinstance(value, str) else value)
    if "integer" in named and "number" not in named:
        return None
    left = [name for name in TYPES if name not in named]
    return {"type": left} if left else False


def _not_enum(values: Any, root: Schema, depth: int) -> Schema | None:
    if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
        return None
    strings = [value for value in values if isinstance(value, str)]
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    if len(strings) > _MAX_STRINGS or len(numbers) > _MAX_STRINGS:
        return None
    booleans = {value for value in values if isinstance(value, bool)}
    touched = {"string": strings, "number": numbers, "boolean": booleans, "null": None in values}
    parts: list[Schema] = [{"type": [name for name in TYPES if not touched.get(name)]}]
    if len(booleans) == 1:
        parts.append({"enum": [not booleans.pop()]})
    if strings:
        parts.append({"type": "string", "pattern": f"^{_other_than(strings)}$"})
    edges = [None, *numbers, None]
    for low, high in zip(edges, edges[1:], strict=False) if numbers else ():
        gap: dict[str, Any] = {"type": "number"}
        gap.update({} if low is None else {"exclusiveMinimum": low})
        gap.update({} if high is None else {"exclusiveMaximum": high})
        parts.append(gap)
    return any_of(parts)


def _not_const(value: Any, root: Schema, depth: int) -> Schema | None:
    return _not_enum([value], root, depth)


_ESCAPED = frozenset("\\^$.|?*+()[]{}/-&~#")


def _letter(char: str) -> str:
    return "\\" + char if char in _ESCAPED else char if char.isprintable() else f"\\x{{{ord(char):x}}}"


def _other_than(words: list[str]) -> str:
    """A regular expression for all strings but these: at each letter of their prefix tree go on, end or leave it."""
    choices: list[str] = [] if "" in words else [""]
    heads = sorted({word[0] for word in words if word})
    if not heads:
        return r"[\s\S]+"
    choices.append(f"[^{''.join(_letter(char) for char in heads)}][\\s\\S]*")
    choices += [_letter(char) + _other_than([word[1:] for word in words if word[:1] == char]) for char in heads]
    return f"({'|'.join(choices)})"


def _not_required(names: Any, root: Schema, depth: int) -> Schema | None:
    return any_of([{"type": "object", "properties": {name: False}} for name in names])


def _not_properties(properties: Any, root: Schema, depth: int) -> Schema | None:
    parts: list[Schema] = []
    for name, sub in properties.items():
        other = negated(sub, root, depth + 1)
        if other is None:
            return None
        if other is not False:
            parts.append({"type": "object", "properties": {name: other}, "required": [name]})
    return any_of(parts)


def _not_all(parts: Any, root: Schema, depth: int) -> Schema | None:
    others = [negated(part, root, depth + 1) for part in parts]
    return None if any(other is None for other in others) else any_of(others)


def _not_any(parts: Any, root: Schema, depth: int) -> Schema | None:
    others = [negated(part, root, depth + 1) for part in parts]
    return None if any(other is None for other in others) else all_of(others)


def _not_not(part: Any, root: Schema, depth: int) -> Schema | None:
    return part if isinstance(part, dict | bool) else None


def _flip(kind: str, opposite: str, shift: int) -> Any:
    """The rule of a bound: `kind` values beyond it, counted `shift` further."""

    def rule(value: Any, root: Schema, depth: int) -> Schema | None:
        bound = value + shift
        return False if shift < 0 and bound < 0 else {"type": kind, opposite: bound}

    return rule


_RULES: dict[str, Any] = {
    "type": _not_type,
    "enum": _not_enum,
    "const": _not_const,
    "required": _not_required,
    "properties": _not_properties,
    "allOf": _not_all,
    "anyOf": _not_any,
    "not": _not_not,
    "minimum": _flip("number", "exclusiveMaximum", 0),
    "maximum": _flip("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": _flip("number", "maximum", 0),
    "exclusiveMaximum": _flip("number", "minimum", 0),
    "minLength": _flip("string", "maxLength", -1),
    "maxLength": _flip("string", "minLength", 1),
    "minItems": _flip("array", "maxItems", -1),
    "maxItems": _flip("array", "minItems", 1),
}

_KNOWN = frozenset(
    "$dynamicRef $recursiveRef $ref additionalItems additionalProperties contains dependencies dependentRequired "
    "dependentSchemas else format if items maxContains maxProperties minContains minProperties multipleOf oneOf "
    "pattern patternProperties prefixItems propertyNames then unevaluatedItems unevaluatedProperties "
    "uniqueItems".split()
)


# ---- disjointness -------------------------------------------------------------------------------------------------


def disjoint(a: Schema, b: Schema, root: Schema, within: frozenset[str] | None = None, depth: int = 0) -> bool:
    """True if no value is allowed by both. `within`: types that the surroundings allow (default all)."""
    if a is False or b is False:
        return True
    if a is True or b is True or depth > _MAX_DEPTH:
        return False
    a, b = _flattened(a, root), _flattened(b, root)
    if not isinstance(a, dict) or not isinstance(b, dict):
        return a is False or b is False
    for one, other in ((a, b), (b, a)):
        for key in ("anyOf", "oneOf"):
            if one.get(key) and all(disjoint(part, other, root, within, depth + 1) for part in one[key]):
                return True
    shared = _shared_types(types_of(a), types_of(b))
    if within is not None:
        shared = _shared_types(shared, within)
    values = _values(a), _values(b)
    if not shared or _values_apart(values, (a, b)):
        return True
    if shared <= {"number", "integer"}:
        return _ranges_apart(a, b)
    if shared == {"object"}:
        return _objects_apart(a, b, root, depth)
    if shared == {"string"}:
        return _above(a.get("minLength"), b.get("maxLength")) or _above(b.get("minLength"), a.get("maxLength"))
    return shared == {"array"} and (
        _above(a.get("minItems"), b.get("maxItems")) or _above(b.get("minItems"), a.get("maxItems"))
    )


def _flattened(schema: Schema, root: Schema, depth: int = 0) -> Schema:
    """A schema with its reference and `allOf` drawn into one dict that says no more than they do.

    Where several say something about one keyword or property, the first is kept: good enough for a proof.
    """
    if not isinstance(schema, dict) or depth > _MAX_DEPTH or not ("$ref" in schema or "allOf" in schema):
        return schema
    parts = [resolve(root, schema["$ref"])] if "$ref" in schema else []
    made: dict[str, Any] = {key: value for key, value in schema.items() if key not in ("$ref", "allOf")}
    for part in [*parts, *schema.get("allOf", ())]:
        flat = _flattened(part, root, depth + 1)
        if flat is False:
            return False
        for key, value in flat.items() if isinstance(flat, dict) else ():
            if key == "required":
                made[key] = [*made.get(key, ()), *value]
            elif key == "properties":
                made[key] = {**value, **made.get(key, {})}
            else:
                made.setdefault(key, value)
    return made


def _shared_types(a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
    both = a & b
    if "integer" in a and "number" in b or "integer" in b and "number" in a:
        both |= {"integer"}
    return both


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _identity(value: Any) -> str:
    """Equal for values that JSON schema holds equal (1 and 1.0, objects in any order)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_identity, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{json.dumps(key)}:{_identity(each)}" for key, each in value.items())) + "}"
    return json.dumps(value)


def _values_apart(values: tuple[list[Any] | None, list[Any] | None], schemas: tuple[Any, Any]) -> bool:
    """True if finite sets of values do not meet, or the values of one have types that the other forbids."""
    first, second = values
    if first is not None and second is not None:
        return not {_identity(value) for value in first} & {_identity(value) for value in second}
    known, other = (first, schemas[1]) if first is not None else (second, schemas[0])
    return known is not None and not any(_type_name(value) in _widened(types_of(other)) for value in known)


def _type_name(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _widened(types: frozenset[str]) -> frozenset[str]:
    return types | {"number"} if "integer" in types else types


def _above(low: Any, high: Any) -> bool:
    return isinstance(low, int | float) and isinstance(high, int | float) and low > high


def _ranges_apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
    for one, other in ((a, b), (b, a)):
        for low, low_open in ((one.get("minimum"), False), (one.get("exclusiveMinimum"), True)):
            for high, high_open in ((other.get("maximum"), False), (other.get("exclusiveMaximum"), True)):
                if low is None or high is None:
                    continue
                if low > high or low == high and (low_open or high_open):
                    return True
    return False


def _objects_apart(a: dict[str, Any], b: dict[str, Any], root: Schema, depth: int) -> bool:
    for one, other in ((a, b), (b, a)):
        for name in one.get("required", ()):
            theirs = _property(other, name)
            if theirs is False:
                return True
            if name in other.get("required", ()) and disjoint(_property(one, name), theirs, root, None, depth + 1):
                return True
    return False


def _property(schema: dict[str, Any], name: str) -> Schema:
    """What a schema says about one property's value; True where it says nothing that is understood here."""
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    if schema.get("patternProperties"):
        return True
    return schema.get("additionalProperties", True)
