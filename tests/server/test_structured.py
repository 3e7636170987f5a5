"""Structured outputs of several APIs become one grammar."""

from __future__ import annotations

from typing import Any

import pytest

from pando.core.sampling import AS_SERVED, GrammarSpec
from pando.errors import InvalidRequest
from pando.server.structured import grammar_of

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"string"}}}'


def read(body: dict[str, Any]) -> GrammarSpec | None:
    return grammar_of(
        body.get("response_format"), body.get("structured_outputs"), regex=body.get("regex"), ebnf=body.get("ebnf")
    )


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "json_schema", TEXT),
        ({"response_format": {"type": "structural_tag", "tags": []}}, "structural_tag",
         '{"type":"structural_tag","tags":[]}'),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": TEXT}}, "json_schema", TEXT),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", '["yes","no"]'),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "ebnf", "root ::= x"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": "root ::= x"}, "ebnf", "root ::= x"),
    ],
)  # fmt: skip
def test_one_grammar(body: dict[str, Any], kind: str, source: str) -> None:
    assert read(body) == GrammarSpec(kind, source, AS_SERVED)  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {"json": None}}])
def test_none(body: dict[str, Any]) -> None:
    assert read(body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"structured_outputs": {"json": {}, "choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": ["a"]}}, "structured_outputs.grammar"),
    ],
)
def test_mistakes(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as e:
        read(body)
    assert e.value.param == param
