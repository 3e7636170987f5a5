"""From the JSON schema of a request to one that the backend compiles, without changing what is right.

source -> limits -> one dialect -> rewrites that keep the meaning -> compile
                                                 | the backend can not
                    strict: refuse with pointers | else: widen, compile, flag; replies are checked at their end
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pando.errors import InvalidGrammar
from pando.grammar.dialect import has_inner_ids, hoist_references, modernise
from pando.grammar.limits import refuse
from pando.grammar.protocols import Issue
from pando.grammar.relax import relaxed, unsupported, without_faults, without_neighbours
from pando.grammar.rewrite import SMALL_STEPS, rewrite
from pando.grammar.schema_tree import Schema, children

Attempt = Callable[[Schema], str | None]
"""Tries to compile; returns why it can not be done, or None. The caller keeps what it compiled last."""

_SHAPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"), dict),
    **dict.fromkeys(("allOf", "anyOf", "oneOf", "enum", "prefixItems"), list),
    **dict.fromkeys(("pattern", "$ref", "format"), str),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (int, float)),
    **dict.fromkeys("minLength maxLength minItems maxItems minProperties maxProperties".split(), (int, float)),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), (int, float)),
    **dict.fromkeys(("additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"), (dict, bool)),
    "required": (list, bool),
    "type": (str, list),
    "items": (dict, bool, list),
    "dependencies": dict,
    "dependentRequired": dict,
}
"""What the value of a keyword must be."""

_TYPES = frozenset("null boolean integer number string array object any".split())


@dataclass(frozen=True, slots=True)
class Prepared:
    """The schema that compiled, and what it does not enforce."""

    schema: Schema
    relaxed: tuple[Issue, ...]


def malformed(schema: Schema, pointer: str = "#") -> Issue | None:
    """The first place where a keyword's value has the wrong type."""
    if not isinstance(schema, dict | bool):
        return Issue(pointer, "a schema is an object or a boolean")
    if isinstance(schema, bool):
        return None
    for key, kinds in _SHAPES.items():
        if key in schema and not isinstance(schema[key], kinds):
            return Issue(f"{pointer}/{key}", f"{key} can not be {type(schema[key]).__name__}")
    names = schema.get("type", [])
    for name in [names] if isinstance(names, str) else names:
        if not isinstance(name, str) or name not in _TYPES:
            return Issue(f"{pointer}/type", f"{name!r} is no type")
    if isinstance(schema.get("required"), list) and not all(isinstance(name, str) for name in schema["required"]):
        return Issue(f"{pointer}/required", "required lists names")
    for relative, child in children(schema):
        fault = malformed(child, pointer + relative)
        if fault is not None:
            return fault
    return None


def one_dialect(schema: Schema) -> Schema:
    """The schema in the words of the newest draft, with references that survive rewriting. It must not be malformed."""
    modern = modernise(schema)
    return modern if has_inner_ids(modern) else hoist_references(modern)


def prepare(schema: Schema, kind: str, strict: bool, attempt: Attempt, fault: Attempt) -> Prepared:
    """Find a form of the schema that compiles.

    attempt: compile a whole schema. fault: a cheaper check of one small schema. Raises InvalidGrammar: with pointers to
    what can not be enforced if `strict`, and for schemas that are malformed or allow nothing.
    """
    wrong = malformed(schema)
    if wrong is not None:
        raise refuse(wrong.pointer, wrong.message, kind)
    try:
        plain = one_dialect(schema)
        exact = rewrite(plain)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        # `malformed` looks at the common keywords only; what else is wrong is the schema's fault, not ours.
        raise refuse("#", f"the schema is malformed: {error!r}", kind) from None
    if isinstance(exact, bool):
        exact = {} if exact else {"enum": []}
    reason = _hopeless(exact) or attempt(exact)
    if reason is None:
        return Prepared(exact, ())
    if strict or is_unsatisfiable(reason):
        raise _refusal(exact, reason, kind)
    for wide, issues in _wider(plain, exact, fault):
        again = attempt(wide)
        if again is None:
            return Prepared(wide, tuple(issues))
    raise _refusal(exact, reason, kind)


def _hopeless(schema: Schema) -> str | None:
    """Why compiling need not be tried; overlapping `oneOf` may yet be found disjoint."""
    if schema == {"enum": []}:
        return "Unsatisfiable schema: nothing is allowed"
    issues = (issue for issue in unsupported(schema) if not issue.pointer.endswith("/oneOf"))
    return next((issue.message for issue in issues), None)


def _wider(plain: Schema, exact: Schema, fault: Attempt) -> Iterator[tuple[Schema, list[Issue]]]:
    """Forms that allow more and more, each with what it gives up."""
    wide, issues = relaxed(exact)
    yield wide, issues
    wider, more = without_faults(wide, fault)
    if more:
        yield wider, issues + more
    # Rewriting may have made a conjunction that the backend can not intersect: widen what it was made of.
    wide, issues = relaxed(rewrite(plain, SMALL_STEPS))
    yield wide, issues
    wider, more = without_faults(wide, fault)
    yield wider, issues + more
    alone, others = without_neighbours(wider)
    yield alone, issues + more + others


def is_unsatisfiable(reason: str) -> bool:
    """True if the backend found that nothing matches."""
    return "unsatisfiable" in reason.lower()


def _refusal(schema: Any, reason: str, kind: str) -> InvalidGrammar:
    issues = list(unsupported(schema))
    first = reason.splitlines()[0][:300] if reason else "it can not be compiled"
    if not issues or is_unsatisfiable(reason):
        return refuse("#", first, kind)
    others = f" (and {len(issues) - 1} more places)" if len(issues) > 1 else ""
    return refuse(issues[0].pointer, issues[0].message + others, kind)
