"""Checks finished replies against JSON schemas that the grammar could not enforce completely."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs

from pando.grammar.schema_tree import Schema


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


def _offline(uri: str) -> Any:
    """References to other documents are never fetched."""
    raise ValueError(f"{uri} is not in the schema, and nothing is fetched")
