"""Older drafts in the words of the newest, and references that survive rewriting."""

from __future__ import annotations

from typing import Any

import pytest

from pando.grammar.dialect import draft_of, has_inner_ids, hoist_references, modernise
from pando.grammar.schema_tree import resolve


def of_draft(number: int, **keywords: Any) -> dict[str, Any]:
    return {"$schema": f"http://json-schema.org/draft-0{number}/schema#", **keywords}


@pytest.mark.parametrize(
    ("schema", "modern"),
    [
        (of_draft(4, minimum=3, exclusiveMinimum=True), {"exclusiveMinimum": 3}),
        (of_draft(4, maximum=3, exclusiveMaximum=False), {"maximum": 3}),
        (of_draft(6, items=[True], additionalItems=False), {"prefixItems": [True], "items": False}),
        (of_draft(6, items={"type": "null"}, additionalItems=False), {"items": {"type": "null"}}),
        ({"items": [{}]}, {"prefixItems": [{}]}),
        (of_draft(7, properties={"a": {"$ref": "#", "type": "null"}}), {"properties": {"a": {"$ref": "#"}}}),
        ({"$ref": "#/$defs/a", "type": "null"}, {"$ref": "#/$defs/a", "type": "null"}),
        (of_draft(3, type="any", properties={"a": {"required": True}}), {"properties": {"a": {}}}),
        (
            {"properties": {"minimum": {"enum": [{"items": [1]}]}}},
            {"properties": {"minimum": {"enum": [{"items": [1]}]}}},
        ),
    ],
)
def test_modernise(schema: dict[str, Any], modern: dict[str, Any]) -> None:
    assert modernise(schema) == modern


def test_draft() -> None:
    assert draft_of(of_draft(7)) == 7 and draft_of({}) is None and draft_of(True) is None
    assert draft_of({"$schema": "https://json-schema.org/draft/2019-09/schema"}) == 2019


def test_references_to_any_place_get_a_name() -> None:
    schema = {
        "properties": {"a": {"oneOf": [{"type": "null"}, {"$ref": "#/properties/c~1d"}]}, "c/d": {"$ref": "#"}},
        "items": {"$ref": "#/properties/a/oneOf/1"},
        "$defs": {"plain": {"$ref": "#/$defs/plain"}},
    }
    made = hoist_references(schema)
    first = made["items"]["$ref"]
    assert first.startswith("#/$defs/") and resolve(made, first) == made["properties"]["a"]["oneOf"][1]
    assert resolve(made, resolve(made, first)["$ref"]) == {"$ref": "#"}
    assert made["$defs"]["plain"] == {"$ref": "#/$defs/plain"} and made["properties"]["c/d"] == {"$ref": "#"}


def test_resolve() -> None:
    root = {"$defs": {"a b": [{"x": True}]}, "p": 3}
    assert resolve(root, "#") is root and resolve(root, "#/$defs/a b/0/x") is True
    assert resolve(root, "#/p") is None and resolve(root, "#name") is None and resolve(root, "other.json") is None
    assert resolve(root, "#/$defs/a b/7") is None and resolve(root, 5) is None


def test_inner_resources() -> None:
    assert has_inner_ids({"$defs": {"a": {"items": {"$id": "other.json"}}}})
    assert not has_inner_ids(
        {"$id": "root.json", "$defs": {"a": {"id": "#anchor"}}, "properties": {"$id": {"type": "string"}}}
    )


def test_a_count_may_be_written_as_a_float() -> None:
    assert modernise({"maxLength": 2.0, "items": {"minItems": 1.0}, "minimum": 2.0}) == {
        "maxLength": 2,
        "items": {"minItems": 1},
        "minimum": 2.0,
    }
