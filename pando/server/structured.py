"""Structured outputs of the OpenAI API, and of vLLM and SGLang beside it, as one grammar.

A schema that says `strict` is enforced exactly or refused with a JSON pointer. Without, what no grammar can enforce is
left out, the finished text is checked against the whole schema, and the reply says so (`pando/grammar/report.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pando.core.sampling import AS_SERVED, STRICTLY, GrammarOptions, GrammarSpec
from pando.errors import InvalidRequest

_STRUCTURED = {"json": "json_schema", "regex": "regex", "choice": "choice", "grammar": "ebnf"}
"""vLLM's fields of `structured_outputs`."""

_STRUCTURED_TYPES: dict[str, tuple[type, ...]] = {
    "json": (str, dict, bool),
    "regex": (str,),
    "choice": (list,),
    "grammar": (str,),
}


def grammar_of(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    *,
    regex: str | None,
    ebnf: str | None,
) -> GrammarSpec | None:
    """What a request's output must match, or None. Raises InvalidRequest if it asks for two things or none right."""
    found = {
        "response_format": _of_format(response_format),
        "structured_outputs": _of_structured(structured_outputs),
        "regex": None if regex is None else GrammarSpec("regex", regex, AS_SERVED),
        "ebnf": None if ebnf is None else GrammarSpec("ebnf", ebnf, AS_SERVED),
    }
    asked = [name for name, spec in found.items() if spec is not None]
    if len(asked) > 1:
        raise InvalidRequest(f"{asked[0]} and {asked[1]} exclude each other; give one", param=asked[1])
    return found[asked[0]] if asked else None


def _of_format(wanted: Mapping[str, Any] | None) -> GrammarSpec | None:
    if wanted is None or wanted.get("type") == "text":
        return None
    kind = wanted.get("type")
    if kind == "json_object":
        return GrammarSpec("json_object", "", AS_SERVED)
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(schema, (Mapping, bool)):
            raise InvalidRequest("response_format.json_schema.schema must be a schema", param="response_format")
        return GrammarSpec("json_schema", _json(schema), _reading(inner.get("strict")))
    if kind == "structural_tag":
        return GrammarSpec("structural_tag", _json(wanted), _reading(wanted.get("strict")))
    raise InvalidRequest(
        f"response_format.type is {kind!r}; give text, json_object, json_schema or structural_tag",
        param="response_format",
    )


def _reading(strict: object) -> GrammarOptions:
    if strict not in (None, True, False):
        raise InvalidRequest(f"strict is {strict!r}; give true or false", param="response_format")
    return STRICTLY if strict else AS_SERVED


def _of_structured(wanted: Mapping[str, Any] | None) -> GrammarSpec | None:
    given = [(name, value) for name, value in (wanted or {}).items() if value is not None]
    if not given:
        return None
    name, value = given[0]
    if len(given) > 1 or name not in _STRUCTURED:
        raise InvalidRequest(
            f"structured_outputs has {', '.join(name for name, _ in given)}; give one of {', '.join(_STRUCTURED)}",
            param="structured_outputs",
        )
    kind = _STRUCTURED[name]
    if not isinstance(value, _STRUCTURED_TYPES[name]):
        what = {"choice": "a list of texts", "json": "a JSON schema"}.get(name, "a text")
        raise InvalidRequest(
            f"structured_outputs.{name} is {value!r:.60}; give {what}", param=f"structured_outputs.{name}"
        )
    return GrammarSpec(kind, value if isinstance(value, str) else _json(value), AS_SERVED)  # type: ignore[arg-type]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
