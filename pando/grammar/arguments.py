"""Arguments of a tool call as grammar rules, by encoding."""

from __future__ import annotations

import json
from typing import Any

from llguidance import regex_to_lark

from pando.grammar.lark import TEXT, LarkBuilder, json_rule, literal
from pando.grammar.negation import types_of
from pando.grammar.protocols import Issue
from pando.grammar.schema_tree import ANNOTATIONS, Schema, escape, resolve
from pando.grammar.tool_formats import ARGUMENT_PAIR, XML_PARAMETER, Encoding

_MAX_DEPTH = 16


_OBJECT_KEYS = frozenset("type properties required additionalProperties".split())
_COUNTS = frozenset(
    "minItems maxItems prefixItems contains minContains maxContains uniqueItems unevaluatedItems minProperties "
    "maxProperties patternProperties propertyNames dependentRequired dependentSchemas unevaluatedProperties allOf "
    "not if then else".split()
)
"""Keywords that Python literals are not held to."""
_LENGTHS = frozenset(["minLength", "maxLength"])


class ArgumentRules:
    """Adds the rules of one tool's arguments to a builder. `schema` has been prepared; names begin with `prefix`.

    loose: places of the schema that the rules do not enforce, for encodings other than JSON.
    """

    def __init__(self, builder: LarkBuilder, schema: Schema, prefix: str, whitespace: str) -> None:
        self._builder = builder
        self._root = schema
        self._prefix = prefix
        self._whitespace = whitespace
        self._count = 0
        self.loose: list[Issue] = []

    def add(self, encoding: Encoding) -> str:
        """The rule that stands for the arguments."""
        if encoding == "json":
            return self._rule(json_rule(self._object(self._root), self._whitespace))
        self._note(self._followed(self._root), "#", _OBJECT_KEYS)
        if encoding == "python":
            return self._keywords(self._root, "=", 0, "#", quoted=False) or '""'
        begin, end = XML_PARAMETER if encoding == "xml" else ARGUMENT_PAIR
        items = []
        for name, sub, required in self._properties(self._root):
            rule = self._rule(
                f"{self._builder.fixed(begin.replace('{name}', name))} {self._element(sub, end, _below(name))}"
            )
            items.append(rule if required else f"{rule}?")
        return self._rule(" ".join(items) or '""')

    def _rule(self, right: str, *, lazy: bool = False) -> str:
        self._count += 1
        return self._builder.rule(f"{self._prefix}_{self._count}", right, lazy=lazy)

    def _object(self, schema: Schema) -> Schema:
        """The schema, of objects only: arguments are never anything else."""
        if isinstance(schema, dict) and types_of(schema) != {"object"} and "type" not in schema:
            return {"type": "object", **schema}
        return schema if isinstance(schema, dict) else {"type": "object"}

    def _followed(self, schema: Schema) -> Schema:
        for _ in range(_MAX_DEPTH):
            if not isinstance(schema, dict) or set(schema) != {"$ref"}:
                break
            schema = resolve(self._root, schema["$ref"])
        return schema

    def _properties(self, schema: Schema) -> list[tuple[str, Schema, bool]]:
        """(name, schema, required) of each property; required ones that are not described come last."""
        schema = self._followed(schema)
        if not isinstance(schema, dict):
            return []
        required = schema.get("required", [])
        listed = schema.get("properties", {})
        found = [(name, sub, name in required) for name, sub in listed.items() if sub is not False]
        return found + [(name, True, True) for name in required if name not in listed]

    def _note(self, schema: Schema, pointer: str, allowed: frozenset[str]) -> None:
        """Remember keywords that are not enforced here."""
        for key in schema if isinstance(schema, dict) else ():
            if key not in allowed and key not in ANNOTATIONS and key != "$ref":
                message = f"{key} can not be enforced in this format of tool calls"
                self.loose.append(Issue(f"{pointer}/{escape(key)}", message, fatal=False))

    # ---- elements: text as it is, everything else as JSON ----------------------------------------------------------

    def _element(self, schema: Schema, end: str, pointer: str) -> str:
        """A value and the text that closes its element."""
        schema = self._followed(schema)
        if not isinstance(schema, dict):
            return self._builder.until(self._name(), end)
        closing = self._builder.fixed(end)
        if isinstance(schema.get("enum"), list) or "const" in schema:
            self._note(schema, pointer, frozenset(["enum", "const", "type"]))
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            texts = [value if isinstance(value, str) else _json(value) for value in values]
            return f"({' | '.join(literal(text) for text in texts)}) {closing}"
        if self._takes_text(schema, 0):
            return self._builder.until(self._name(), end, self._inside(schema, pointer))
        return f"{self._rule(json_rule(self._with_definitions(schema), 'compact'))} {closing}"

    def _takes_text(self, schema: Schema, depth: int) -> bool:
        """True if any text is a value: models write it bare, whatever else the schema allows."""
        schema = self._followed(schema)
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return True
        branches = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(branches, list) and "type" not in schema:
            return any(self._takes_text(branch, depth + 1) for branch in branches)
        return "string" in types_of(schema) and not _is_alternatives(schema)

    def _inside(self, schema: dict[str, Any], pointer: str) -> str:
        """What a bare text matches."""
        keys = frozenset(schema) - ANNOTATIONS - {"type"}
        if types_of(schema) == {"string"} and keys:
            pattern = str(schema.get("pattern"))
            if keys <= _LENGTHS:
                return f"/(.|\\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"
            if keys == {"pattern"} and _is_whole(pattern):
                return f"/{regex_to_lark(pattern[1:-1])}/"
        branches = schema.get("anyOf", schema.get("oneOf"))
        for index, branch in enumerate(branches if isinstance(branches, list) else ()):
            branch = self._followed(branch)
            if isinstance(branch, dict) and "string" in types_of(branch):
                self._note(
                    branch, f"{pointer}/{'anyOf' if 'anyOf' in schema else 'oneOf'}/{index}", frozenset(["type"])
                )
        self._note(schema, pointer, frozenset(["type", "anyOf", "oneOf"]))
        return TEXT

    def _name(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"

    def _with_definitions(self, schema: Schema) -> Schema:
        if not isinstance(schema, dict) or not isinstance(self._root, dict):
            return schema
        return {**{key: self._root[key] for key in ("$defs", "definitions") if key in self._root}, **schema}

    # ---- Python literals -------------------------------------------------------------------------------------------

    def _keywords(self, schema: Schema, equals: str, depth: int, pointer: str, *, quoted: bool) -> str:
        """`name=value, ...` in order, optional ones left out; with `quoted` the inside of a dict."""
        parts = []
        for name, sub, must in self._properties(schema):
            value = self._python(sub, depth + 1, pointer + _below(name)[1:])
            parts.append((self._rule(f"{literal((_json(name) if quoted else name) + equals)} {value}"), must))
        # `rest`: what may follow after some item has been written; `fresh`: what may stand where none has.
        rest, fresh = "", ""
        for item, must in reversed(parts):
            after = self._rule(f'", " {item} {rest}')
            first = self._rule(f"{item} {rest}")
            fresh = first if must else self._rule(f"{first} | {fresh}" if fresh else f'{first} | ""')
            rest = after if must else self._rule(f"{after} | {rest}" if rest else f'{after} | ""')
        return fresh

    def _python(self, schema: Schema, depth: int, pointer: str) -> str:
        schema = self._followed(schema)
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return self._any_python()
        if isinstance(schema.get("enum"), list) or "const" in schema:
            self._note(schema, pointer, frozenset(["enum", "const", "type"]))
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return f"({' | '.join(literal(_python_text(value)) for value in values)})"
        for key in ("anyOf", "oneOf"):
            if key in schema:
                self._note(schema, pointer, frozenset([key, "type"]))
                parts = [self._python(part, depth + 1, f"{pointer}/{key}/{i}") for i, part in enumerate(schema[key])]
                return f"({' | '.join(parts)})"
        if "type" not in schema:
            self._note(schema, pointer, frozenset())
            return self._any_python()
        self._note({key: True for key in schema if key in _COUNTS}, pointer, frozenset())
        return f"({' | '.join(self._typed(name, schema, depth, pointer) for name in sorted(types_of(schema)))})"

    def _typed(self, name: str, schema: dict[str, Any], depth: int, pointer: str) -> str:
        if name == "null":
            return '"None"'
        if name == "boolean":
            return '("True" | "False")'
        if name == "array":
            item = self._rule(self._python(schema.get("items", True), depth + 1, f"{pointer}/items"))
            return self._rule(f'"[" ({item} (", " {item})*)? "]"')
        if name == "object":
            if not schema.get("properties"):
                values = schema.get("additionalProperties", True)
                return self._any_dict(self._python(values, depth + 1, f"{pointer}/additionalProperties"))
            return self._rule(f'"{{" {self._keywords(schema, ": ", depth + 1, pointer, quoted=True)} "}}"')
        kept = {key: value for key, value in schema.items() if key not in ("$defs", "definitions", "items")}
        return self._rule(json_rule({**kept, "type": name}, "compact"))

    def _any_dict(self, value: str) -> str:
        pair = self._rule(f"{json_rule({'type': 'string'}, 'compact')}")
        return self._rule(f'"{{" ({pair} ": " {value} (", " {pair} ": " {value})*)? "}}"')

    def _any_python(self) -> str:
        name = self._name()
        scalar = self._rule(json_rule({"type": ["string", "number"]}, "compact"))
        key = self._rule(json_rule({"type": "string"}, "compact"))
        items = f'"[" ({name} (", " {name})*)? "]"'
        pairs = f'"{{" ({key} ": " {name} (", " {key} ": " {name})*)? "}}"'
        return self._builder.rule(name, f'{scalar} | "True" | "False" | "None" | {items} | {pairs}')


def _below(name: str) -> str:
    """The pointer of a property."""
    return f"#/properties/{escape(name)}"


def _is_whole(pattern: str) -> bool:
    """True if the pattern names whole texts, so that what is between its anchors says the same."""
    inside = pattern[1:-1]
    plain = pattern.startswith("^") and pattern.endswith("$") and not pattern.endswith("\\$")
    return plain and not any(sign in inside for sign in ("|", "^", "$", "\\b", "(?"))


def _is_alternatives(schema: Schema) -> bool:
    return isinstance(schema, dict) and any(key in schema for key in ("anyOf", "oneOf", "allOf"))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python_text(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, bool) else _json(value)
