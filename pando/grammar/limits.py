"""Bounds on what a request may ask of the grammar compiler, and errors that say where they are crossed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pando.errors import InvalidGrammar
from pando.grammar.schema_tree import Schema, escape


@dataclass(frozen=True, slots=True)
class Limits:
    """source_bytes, regex_bytes: UTF-8. depth: nested objects and lists of the source. properties, enum: in the whole
    schema and in one list. repeat: highest bound in a regular expression. tools, choices: in one request.
    grammar_size, step_items, row_items, lexer_fuel, lexer_states: work of the backend (see its limits); a state that
    exceeds them ends with an error. row_items bounds what may come next: an optional property takes four."""

    source_bytes: int = 256 * 1024
    depth: int = 64
    properties: int = 5_000
    enum: int = 10_000
    regex_bytes: int = 16 * 1024
    repeat: int = 10_000
    tools: int = 1_024
    choices: int = 10_000
    grammar_size: int = 500_000
    step_items: int = 50_000
    row_items: int = 8_000
    step_lexer_fuel: int = 200_000
    initial_lexer_fuel: int = 1_000_000
    lexer_states: int = 100_000


_REPEAT = re.compile(r"\{(\d+)?(?:,(\d+)?)?\}")


def refuse(pointer: str, message: str, kind: str) -> InvalidGrammar:
    """The error to raise about a place in a source."""
    where = f"{kind} at {pointer}: " if pointer else f"{kind}: "
    return InvalidGrammar(where + message, param=kind)


def check_text(text: str, kind: str, limits: Limits) -> None:
    """Bounds that hold for every source. Raises InvalidGrammar."""
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > limits.source_bytes:
        raise refuse("", f"the source has {size} bytes; the limit is {limits.source_bytes}", kind)
    if "\0" in text:
        raise refuse("", "the source holds a NUL byte; write it as an escape", kind)
    if not _is_whole(text):
        raise refuse("", "the source holds half of a surrogate pair; write the whole letter", kind)


def _is_whole(text: str) -> bool:
    """False if half of a surrogate pair stands in the text, or is escaped in it where it is JSON."""
    try:
        text.encode()
        if "\\ud" in text.lower():
            json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except (ValueError, RecursionError):
        pass  # no JSON: its reader says so
    return True


def check_regex(pattern: str, pointer: str, kind: str, limits: Limits) -> None:
    """Size and repeat bounds of a regular expression. Raises InvalidGrammar."""
    if len(pattern.encode("utf-8", "surrogatepass")) > limits.regex_bytes:
        raise refuse(pointer, f"the regular expression is longer than {limits.regex_bytes} bytes", kind)
    if "\0" in pattern:
        raise refuse(pointer, "the regular expression holds a NUL byte; write it as an escape", kind)
    for found in _REPEAT.finditer(pattern):
        highest = max((int(bound) for bound in found.groups() if bound and len(bound) < 20), default=0)
        if highest > limits.repeat or any(bound and len(bound) >= 20 for bound in found.groups()):
            raise refuse(pointer, f"the repeat {found[0][:40]} exceeds the limit of {limits.repeat}", kind)


def parse_schema(text: str, kind: str, limits: Limits) -> Schema:
    """The schema of a source text within the limits. Raises InvalidGrammar with a pointer."""
    check_text(text, kind, limits)
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise refuse("", f"the source is not JSON: {error}", kind) from None
    if not isinstance(schema, dict | bool):
        raise refuse("#", "a schema is an object or a boolean", kind)
    check_schema(schema, kind, limits)
    return schema


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_schema(schema: Schema, kind: str, limits: Limits) -> None:
    """Depth, counts and regular expressions of a parsed schema. Raises InvalidGrammar with a pointer."""
    _Walk(kind, limits).visit(schema, "#", 1)


class _Walk:
    def __init__(self, kind: str, limits: Limits) -> None:
        self._kind = kind
        self._limits = limits
        self._properties = 0

    def visit(self, value: Any, pointer: str, depth: int) -> None:
        if depth > self._limits.depth:
            raise refuse(pointer, f"nested deeper than {self._limits.depth} levels", self._kind)
        if isinstance(value, list):
            for index, each in enumerate(value):
                if isinstance(each, dict | list):
                    self.visit(each, f"{pointer}/{index}", depth + 1)
        elif isinstance(value, dict):
            for key, each in value.items():
                if isinstance(each, dict | list | str):
                    self._keyword(key, each, f"{pointer}/{escape(key)}")
                    if not isinstance(each, str):
                        self.visit(each, f"{pointer}/{escape(key)}", depth + 1)

    def _keyword(self, key: str, value: Any, pointer: str) -> None:
        limits = self._limits
        if "\0" in key:
            raise refuse(pointer, "a key holds a NUL character", self._kind)
        if key == "properties" and isinstance(value, dict):
            self._properties += len(value)
            if self._properties > limits.properties:
                raise refuse(pointer, f"the schema has more than {limits.properties} properties", self._kind)
        elif key == "enum" and isinstance(value, list) and len(value) > limits.enum:
            raise refuse(pointer, f"{len(value)} values; the limit is {limits.enum}", self._kind)
        elif key == "pattern" and isinstance(value, str):
            check_regex(value, pointer, self._kind, limits)
        elif key == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                check_regex(pattern, f"{pointer}/{escape(pattern)}", self._kind, limits)
