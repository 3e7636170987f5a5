"""Rewrites of a JSON schema that keep its meaning, into keywords that grammars can enforce."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pando.grammar.dialect import has_inner_ids
from pando.grammar.negation import all_of, any_of, disjoint, negated, types_of
from pando.grammar.schema_tree import ANNOTATIONS, Schema, rebuilt, resolve, same

FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
"""Formats that are enforced."""

Step = Callable[[dict[str, Any], Schema], None]
"""Changes one node, whose subschemas are rewritten already; the second argument is the document."""

_MAX_CHOICES = 64
"""A rewrite that makes more alternatives than this is left out: the schema stays as it is."""

_POINTER = r"(/([^/~]|~[01])*)*"
FORMAT_PATTERNS = {
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
}
"""Formats that a pattern says completely."""

_SPACES = "\t-\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_CLASSES = {
    "d": ("0-9", "\0-/:-\U0010ffff"),
    "w": ("A-Za-z0-9_", "\0-/:-@[-^`{-\U0010ffff"),
    "s": (
        _SPACES,
        "\0-\x08\x0e-\x1f!-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
        "\u3001-\ufefe\uff00-\U0010ffff",
    ),
}
"""What ECMA 262 means by a class, and all that is not in it; other dialects let them match every script."""


def rewrite(schema: Schema, steps: Sequence[Step] | None = None) -> Schema:
    """An equivalent schema. Keywords without an equivalent stay where they are; `relax.unsupported` finds them."""
    chosen = _STEPS if steps is None else steps
    # Where parts are documents of their own, `#` in them is not this document: nothing is followed.
    root = None if has_inner_ids(schema) else schema

    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict):
            return node
        made = rebuilt(node, pointer, change)
        made.pop("x-guidance", None)
        for step in chosen:
            step(made, root)
        return made

    return change(schema, "#")


def _add(node: dict[str, Any], part: Schema) -> None:
    """Narrow the node by one more schema."""
    if part is True or part == {}:
        return
    if isinstance(part, dict) and set(part) == {"anyOf"} and "anyOf" not in node:
        node["anyOf"] = part["anyOf"]
    else:
        node["allOf"] = [*node.get("allOf", ()), part]


def _choices(node: dict[str, Any]) -> int:
    """Alternatives that the node's conjunctions multiply to."""
    count = max(1, len(node.get("anyOf", ())))
    for part in node.get("allOf", ()):
        if isinstance(part, dict):
            count *= max(1, len(part.get("anyOf", ())))
    return count


def _trivial(node: dict[str, Any], root: Schema) -> None:
    """Keywords that say nothing where they stand."""
    if node.get("uniqueItems") is False or "uniqueItems" in node and node.get("maxItems", 2) <= 1:
        node.pop("uniqueItems")
    if "contains" not in node or node.get("minContains") == 0 and "maxContains" not in node:
        for key in ("contains", "minContains", "maxContains"):
            node.pop(key, None)
    if "if" not in node:
        node.pop("then", None)
        node.pop("else", None)
    for key in ("not", "propertyNames"):
        if node.get(key) is (key != "not"):
            node.pop(key)
    for key in ("minProperties", "minItems", "minLength"):
        if node.get(key) == 0:
            node.pop(key)
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        if node.get(key) == {}:
            node.pop(key)
    parts = node.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict):
        rest = {key: value for key, value in node.items() if key != "allOf"}
        if not set(rest) - ANNOTATIONS and not set(rest) & set(parts[0]):
            node.pop("allOf")
            node.update(parts[0])


_INDEPENDENT = frozenset(
    "const enum exclusiveMaximum exclusiveMinimum format maxItems maxLength maximum minItems minLength minimum "
    "multipleOf pattern required type".split()
)
"""Keywords that mean the same whatever stands beside them."""


def _repeats(node: dict[str, Any], root: Schema) -> None:
    """What stands beside a reference and is said by its target as well. (Recursion stays possible without it.)"""
    target = resolve(root, node["$ref"]) if "$ref" in node else None
    if isinstance(target, dict):
        for key in [key for key in node if key in _INDEPENDENT and key in target and same(target[key], node[key])]:
            node.pop(key)


def _formats(node: dict[str, Any], root: Schema) -> None:
    """A format that is not enforced is an annotation, as the specification has it."""
    name = node.get("format")
    if not isinstance(name, str) or name in FORMATS:
        return
    pattern = FORMAT_PATTERNS.get(name)
    node.pop("format")
    if pattern is not None:
        _add(node, {"anyOf": [{"type": [t for t in _NOT_STRING]}, {"type": "string", "pattern": pattern}]})


_NOT_STRING = ("null", "boolean", "number", "array", "object")


def _patterns(node: dict[str, Any], root: Schema) -> None:
    """Say patterns as the grammar backends read them."""
    if isinstance(node.get("pattern"), str):
        node["pattern"] = portable(node["pattern"])
    if isinstance(node.get("patternProperties"), dict):
        node["patternProperties"] = {portable(key): value for key, value in node["patternProperties"].items()}


def portable(pattern: str) -> str:
    """An ECMA 262 pattern in the dialect of the grammar backends."""
    made, inside, index = [], False, 0
    while index < len(pattern):
        char = pattern[index]
        if char == "\\" and index + 1 < len(pattern):
            made.append(_escape(pattern[index + 1], inside))
            index += 2
            continue
        if char == "[" and not inside:
            empty = {"[^]": r"[\s\S]"}.get(pattern[index : index + 3])
            if empty is not None:
                made.append(empty)
                index += 3
                continue
            inside = True
        elif char == "[" or inside and char in "&~" and pattern[index + 1 : index + 2] == char:
            char = "\\" + char  # nested classes and set operations are not of this dialect
        elif char == "]":
            inside = False
        made.append(char)
        index += 1
    return "".join(made)


def _escape(letter: str, inside: bool) -> str:
    if letter.lower() in _CLASSES:
        members = "".join(map(_spelled, _CLASSES[letter.lower()][letter.isupper()]))
        return members if inside else f"[{members}]"
    if letter in "<>" or not inside and not letter.isalnum() and letter not in r"\^$.|?*+()[]{}-":
        return letter  # an escape without need, such as \/ or \@; \< would be the start of a word
    return "\\" + letter


def _spelled(char: str) -> str:
    """A character of a class; those that are hard to read, or mean something there, as escapes."""
    if char == "-" or char.isascii() and char.isalnum():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else char


def _dependencies(node: dict[str, Any], root: Schema) -> None:
    """`dependencies` and its two successors: without the property, or with what it asks for."""
    asked: list[tuple[str, str, Schema]] = []
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        for name, value in (node.get(key) or {}).items():
            asked.append((key, name, {"required": value} if isinstance(value, list) else value))
    if not asked or 2 ** len(asked) * _choices(node) > _MAX_CHOICES:
        return
    for key, name, part in asked:
        node.pop(key, None)
        if part is True or part == {} or part == {"required": []}:
            continue
        present = all_of([{"required": [name]}, part])
        if isinstance(part, dict) and set(part) == {"required"}:
            present = {"required": [name, *(other for other in part["required"] if other != name)]}
        absent = {"properties": {name: False}}
        always = name in node.get("required", ()) and types_of(node) == {"object"}
        _add(node, present if always else any_of([absent, present]))


def _conditions(node: dict[str, Any], root: Schema) -> None:
    """`if` A `then` B `else` C is (A and B) or (not A and C)."""
    if "if" not in node:
        return
    other = negated(node["if"], root)
    if other is None or 2 * _choices(node) > _MAX_CHOICES:
        return
    asked, then, otherwise = node.pop("if"), node.pop("then", True), node.pop("else", True)
    if then is True and otherwise is True:
        return
    _add(node, any_of([all_of([asked, then]), all_of([other, otherwise])]))


def _negations(node: dict[str, Any], root: Schema) -> None:
    if "not" not in node:
        return
    other = negated(node["not"], root)
    if other is not None and _choices({"allOf": [other]}) * _choices(node) <= _MAX_CHOICES:
        node.pop("not")
        _add(node, other)


def _exactly_one(node: dict[str, Any], root: Schema) -> None:
    """`oneOf` is `anyOf` where no two alternatives share a value; else each is told what the others take."""
    branches = node.get("oneOf")
    if not isinstance(branches, list) or not branches:
        return
    within = types_of(node) if "type" in node else None
    # What the neighbours require narrows every branch: {required: [kind]} beside branches on `kind` is common.
    beside: dict[str, Any] = {key: node[key] for key in ("required", "type") if key in node}
    closed = [_with(beside, branch) for branch in branches]
    meets = [
        [j for j in range(len(branches)) if j != i and not disjoint(closed[i], closed[j], root, within)]
        for i in range(len(branches))
    ]
    parts: list[Schema] = []
    for i, branch in enumerate(branches):
        others = [_without_type(branches[j], closed[i]) for j in meets[i]]
        opposites = [negated(other, root) for other in others]
        if any(opposite is None for opposite in opposites):
            return
        parts.append(all_of([branch, *opposites]))
    if sum(_choices({"allOf": [part]} if isinstance(part, dict) else {}) for part in parts) > _MAX_CHOICES:
        if any(meets):
            return
    node.pop("oneOf")
    _add(node, any_of(parts))


def _without_type(other: Schema, branch: Schema) -> Schema:
    """`other` as it looks to values of the branch's types: its own type is no news where it covers them."""
    if isinstance(other, dict) and isinstance(branch, dict) and "type" in other and "type" in branch:
        if types_of(branch) <= types_of(other):
            return {key: value for key, value in other.items() if key != "type"}
    return other


def _with(beside: dict[str, Any], branch: Schema) -> Schema:
    """A branch with its neighbours' required properties and types, for proofs only."""
    return {"allOf": [branch], **beside} if isinstance(branch, dict) and beside else branch


def _property_names(node: dict[str, Any], root: Schema) -> None:
    """`propertyNames` as the only properties there are."""
    rule = node.get("propertyNames")
    if not isinstance(rule, dict) or "patternProperties" in node:
        return
    keys = set(rule) - ANNOTATIONS - {"type"}
    if rule.get("type", "string") != "string":
        return
    values = node.get("additionalProperties", True)
    named = node.get("properties", {})
    if keys == {"enum"}:
        names = [name for name in rule["enum"] if isinstance(name, str)]
        node["properties"] = {
            **{name: value if name in names else False for name, value in named.items()},
            **{name: values for name in names if name not in named},
        }
        node["additionalProperties"] = False
    elif not keys:
        pass
    elif keys <= {"minLength", "maxLength"} and not named:
        low, high = rule.get("minLength", 0), rule.get("maxLength", "")
        node["patternProperties"] = {f"^[\\s\\S]{{{low},{high}}}$": values}
        node["additionalProperties"] = False
    elif keys == {"pattern"} and not named:
        node["patternProperties"] = {rule["pattern"]: values}
        node["additionalProperties"] = False
    else:
        return
    node.pop("propertyNames")


_ANYTHING = frozenset(("", "^", "$", ".*$", "^.*$"))
_LOOKS = re.compile(r"\$|\(\?[=!<]|\\[bBzZ]")
"""What makes a match depend on the text behind it."""


def _matches_all(pattern: str) -> bool:
    """True if every name holds a match: the pattern matches the empty text at its start, whatever follows."""
    if pattern in _ANYTHING:
        return True
    if _LOOKS.search(pattern):
        return False
    try:
        return re.compile(pattern).match("") is not None
    except re.error:
        return False


def _any_name(node: dict[str, Any], root: Schema) -> None:
    """A pattern that every name matches speaks of all properties, and leaves none that is additional."""
    patterns = node.get("patternProperties")
    if not isinstance(patterns, dict) or len(patterns) != 1 or not _matches_all(next(iter(patterns))):
        return
    ((_, every),) = node.pop("patternProperties").items()
    own = node.get("properties", {})
    if own:
        node["properties"] = {name: each if same(each, every) else all_of([each, every]) for name, each in own.items()}
    node["additionalProperties"] = every


_APPLICATORS = frozenset(
    "$dynamicRef $recursiveRef $ref allOf anyOf contains dependencies dependentSchemas else if not oneOf then".split()
)


def _unevaluated(node: dict[str, Any], root: Schema) -> None:
    """Without keywords that evaluate parts elsewhere, what is not evaluated is what is additional."""
    if set(node) & _APPLICATORS:
        return
    for key, other in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if key in node:
            value = node.pop(key)
            node.setdefault(other, value)


def _some_property(node: dict[str, Any], root: Schema) -> None:
    """`minProperties: 1` of a closed object: the first property that is present is the first, or the second, ..."""
    if node.get("minProperties") != 1 or node.get("maxProperties") is not None:
        return
    if node.get("required"):
        node.pop("minProperties")  # said already
        return
    names = [name for name, value in node.get("properties", {}).items() if value is not False]
    if node.get("additionalProperties", True) is not False or node.get("patternProperties") or "anyOf" in node:
        return
    if not 0 < len(names) * _choices(node) <= _MAX_CHOICES or types_of(node) != {"object"}:
        return
    node.pop("minProperties")
    firsts = [{"properties": dict.fromkeys(names[:i], False), "required": [name]} for i, name in enumerate(names)]
    _add(node, any_of(firsts))


_STEPS = (
    _unevaluated,  # first: the others move keywords to where they would count as evaluated
    _trivial,
    _repeats,
    _formats,
    _patterns,
    _property_names,
    _any_name,
    _some_property,
    _dependencies,
    _conditions,
    _negations,
    _exactly_one,
)

SMALL_STEPS = (_trivial, _repeats, _formats, _patterns, _any_name)
"""Rewrites that do not make alternatives."""
