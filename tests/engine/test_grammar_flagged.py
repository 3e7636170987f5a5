"""Schemas that no grammar can enforce whole, in the engine: widened, checked and told, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import pando
from pando.errors import InvalidGrammar, InvalidRequest

CLASHING: dict[str, Any] = {"type": "array", "items": {"enum": [7]}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
"""What a grammar can enforce of it leaves one text, and that breaks the rest."""
LUCKY: dict[str, Any] = {**CLASHING, "minItems": 1, "maxItems": 1, "contains": {"const": 7}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": [1]}},
    "required": ["a"],
    "additionalProperties": False,
}
TAGS: dict[str, Any] = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</a>"}


@pytest.fixture(scope="module")
def engine() -> Iterator[pando.Engine]:
    with pando.Engine(log_level="error", max_total_tokens=2048, num_threads=1) as started:
        yield started


def generate(engine: pando.Engine, **sampling: Any) -> dict[str, Any]:
    reply = engine.generate("Say it: ", sampling_params={"max_new_tokens": 30, "temperature": 0, **sampling})
    assert isinstance(reply, dict)
    return reply


@pytest.mark.parametrize(("schema", "kind"), [(CLASHING, "schema_violation"), (LUCKY, "schema_verified")])
def test_a_widened_schema_is_checked_and_told(engine: pando.Engine, schema: dict[str, Any], kind: str) -> None:
    reply = generate(engine, json_schema=schema)
    meta = reply["meta_info"]
    assert set(json.loads(reply["text"])) == {7}
    assert meta["finish_details"]["type"] == kind
    assert (meta["finish_details"]["message"] is None) == (kind == "schema_verified")
    assert meta["warnings"] and all(each["pointer"].startswith("#/") for each in meta["warnings"])


def test_strict_refuses_with_a_pointer(engine: pando.Engine) -> None:
    grammar = {
        "kind": "json_schema",
        "source": json.dumps({"properties": {"a": CLASHING}}),
        "options": {"strict": True},
    }
    with pytest.raises(InvalidGrammar, match="#/properties/a/uniqueItems"):
        generate(engine, grammar=grammar)


def test_exact_schemas_say_nothing(engine: pando.Engine) -> None:
    assert not {"finish_details", "warnings"} & set(generate(engine, json_schema=SCHEMA)["meta_info"])


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, '{"a": 1}'),
        ({"json_schema": SCHEMA}, '{"a": 1}'),
        ({"regex": "ab{3}c"}, "abbbc"),
        ({"ebnf": 'root ::= "x" "y"'}, "xy"),
        ({"structural_tag": {"type": "structural_tag", "format": TAG}}, '<a>{"a": 1}</a>'),
        ({"structural_tag": json.dumps({**TAGS, "at_least_one": True})}, '<a>{"a": 1}</a>'),
    ],
)
def test_the_four_kinds(engine: pando.Engine, sampling: dict[str, Any], text: str) -> None:
    assert generate(engine, **sampling)["text"].startswith(text)


@pytest.mark.parametrize(
    ("sampling", "error"),
    [
        ({"json_schema": SCHEMA, "regex": "a"}, "exclude each other"),
        ({"ebnf": "root ::= x", "structural_tag": TAGS}, "exclude each other"),
        ({"regex": 5}, "give a text"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": {"type": "poem"}}, "#/type"),
        ({"regex": "("}, "regex"),
        ({"ebnf": "root ::= nowhere"}, "ebnf"),
        ({"structural_tag": {"structures": []}}, "#/"),
        ({"structural_tag": {"format": {"type": "poem"}}}, "#/format/type"),
    ],
)
def test_mistakes_are_refused(engine: pando.Engine, sampling: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequest, match=error) as caught:
        generate(engine, **sampling)
    assert caught.value.status == 400
