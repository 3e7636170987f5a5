"""Widening of a JSON schema: what no grammar can enforce is taken away, so that every valid document still fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pando.grammar.protocols import Issue
from pando.grammar.schema_tree import ANNOTATIONS, Schema, children, rebuilt

UNSUPPORTED = frozenset(
    "$dynamicRef $recursiveRef contains dependencies dependentRequired dependentSchemas if not propertyNames "
    "unevaluatedItems unevaluatedProperties uniqueItems".split()
)
_COMPANIONS = {"if": ("then", "else"), "contains": ("minContains", "maxContains")}

_SUSPECTS = (
    ("format",),
    ("pattern",),
    ("multipleOf",),
    ("patternProperties", "additionalProperties"),
    ("minProperties", "maxProperties"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("enum",),
)
"""Keywords that a backend may fail on by themselves, in the order in which they are given up."""


def unsupported(schema: Schema, pointer: str = "#") -> Iterator[Issue]:
    """Places of a rewritten schema that grammars can not enforce."""
    if isinstance(schema, dict):
        for key in schema:
            if key in UNSUPPORTED:
                yield Issue(f"{pointer}/{key}", f"{key} can not be enforced here")
        if "oneOf" in schema:
            yield Issue(f"{pointer}/oneOf", "its alternatives may overlap, and exactly one can not be enforced here")
        reference = schema.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            yield Issue(f"{pointer}/$ref", f"the reference {reference[:80]!r} leaves the document")
    for relative, child in children(schema):
        yield from unsupported(child, pointer + relative)


def relaxed(schema: Schema) -> tuple[Schema, list[Issue]]:
    """A schema that allows at least what `schema` does, without unsupported keywords, and what was given up."""
    issues = [Issue(issue.pointer, issue.message, fatal=False) for issue in unsupported(schema)]

    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict):
            return node
        kept = {key: value for key, value in node.items() if key not in UNSUPPORTED}
        for key, companions in _COMPANIONS.items():
            if key in node:
                kept = {name: value for name, value in kept.items() if name not in companions}
        reference = kept.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            kept.pop("$ref")
        made = rebuilt(kept, pointer, change)
        branches = made.pop("oneOf", None)
        if branches is not None and "anyOf" in made:
            made["allOf"] = [*made.get("allOf", ()), {"anyOf": branches}]
        elif branches is not None:
            made["anyOf"] = branches
        return made

    return change(schema, "#"), issues


def without_neighbours(schema: Schema) -> tuple[Schema, list[Issue]]:
    """A wider schema in which a reference stands alone: a backend may fail to narrow one that recurs."""
    issues: list[Issue] = []

    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict) or "$ref" not in node or pointer == "#":
            return rebuilt(node, pointer, change) if isinstance(node, dict) else node
        beside = [key for key in node if key != "$ref" and key not in ANNOTATIONS]
        if beside:
            issues.append(Issue(f"{pointer}/{beside[0]}", "it can not narrow a reference here", fatal=False))
        kept = {key: value for key, value in node.items() if key not in beside}
        return rebuilt(kept, pointer, change)

    return change(schema, "#"), issues


def without_faults(schema: Schema, fault: Callable[[Schema], str | None]) -> tuple[Schema, list[Issue]]:
    """A wider schema in which no single node is one that the backend can not compile; `fault` says why it can not."""
    issues: list[Issue] = []

    def change(node: Schema, pointer: str) -> Schema:
        if not isinstance(node, dict):
            return node
        made = rebuilt(node, pointer, change)
        reason = fault(_shallow(made)) if any(key in made for group in _SUSPECTS for key in group) else None
        if reason is not None:
            dropped = next((g for g in _SUSPECTS if fault(_shallow(_without(made, g))) is None), sum(_SUSPECTS, ()))
            issues.append(Issue(f"{pointer}/{dropped[0]}", reason.splitlines()[0][:200], fatal=False))
            made = _without(made, dropped)
        return made

    return change(schema, "#"), issues


def _without(node: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The node without these keywords; what a property may be without them is left open."""
    if "patternProperties" not in node:
        keys = tuple(key for key in keys if key != "additionalProperties")
    return {key: value for key, value in node.items() if key not in keys}


def _shallow(node: dict[str, Any]) -> Schema:
    """The node with everything below it allowed."""
    kept = {key: value for key, value in node.items() if key not in ("$ref", "$defs", "definitions", "allOf", "anyOf")}
    if kept.get("type") == []:
        kept.pop("type")
    return rebuilt(kept, "", lambda child, _: child if isinstance(child, bool) else True)
