"""Checks finished replies against JSON schemas that the grammar could not enforce completely."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import jsonschema_rs

from pando.core.sampling import GrammarSpec
from pando.errors import PandoError
from pando.grammar.limits import Limits
from pando.grammar.schema_tree import Schema
from pando.grammar.structural import schema_parts


class Verifier:
    """Validates documents against one schema. Raises ValueError if the schema itself is not valid."""

    def __init__(self, schema: Schema) -> None:
        try:
            self._validator = jsonschema_rs.validator_for(schema, retriever=_offline)
        except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
            raise ValueError(str(error).splitlines()[0]) from None

    def is_valid(self, value: Any) -> bool:
        """True if the parsed document fits."""
        return bool(self._validator.is_valid(value))

    def violation(self, text: str) -> str | None:
        """Why a text is no document of this schema, with the place; None if it is one."""
        try:
            value = json.loads(text)
        except ValueError as error:
            return f"not JSON: {error}"
        for fault in self._validator.iter_errors(value):
            place = "/".join(str(part) for part in fault.instance_path)
            return f"at #/{place}: {fault.message}"[:500]
        return None


def check_text(spec: GrammarSpec, text: str) -> tuple[bool | None, str | None]:
    """Whether a finished text follows its source, and why not; None if that can not be told."""
    try:
        if spec.kind == "json_schema":
            fault = verifier_of(spec.source).violation(text)
            return fault is None, fault
        return _check_tags(spec.source, text)
    except (ValueError, PandoError) as error:
        return None, f"the text can not be checked: {error}"


@lru_cache(maxsize=64)
def verifier_of(source: str) -> Verifier:
    """The verifier of a schema's text. Raises ValueError."""
    return Verifier(json.loads(source))


def _check_tags(source: str, text: str) -> tuple[bool | None, str | None]:
    """Every tagged part of a text whose content has a schema."""
    checked = 0
    for begin, end, schema in schema_parts(source, Limits()):
        verifier = verifier_of(json.dumps(schema))
        for part in text.split(begin)[1:] if begin else [text]:
            fault = verifier.violation(part.partition(end)[0] if end else part)
            if fault is not None:
                return False, f"in {begin!r}: {fault}" if begin else fault
            checked += 1
    # Tags that are special tokens do not show in the text, so none found proves nothing.
    return (True, None) if checked else (None, "no tagged part is seen in the text")


def _offline(uri: str) -> Any:
    """References to other documents are never fetched."""
    raise ValueError(f"{uri} is not in the schema, and nothing is fetched")
