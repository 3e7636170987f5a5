"""Bounds on sources: errors with the place, before anything is compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pando.errors import InvalidGrammar, InvalidRequest
from pando.grammar.limits import Limits, check_regex, parse_schema
from pando.grammar.tools import read_tools
from tests.grammar.vocabularies import aspen_tokenizer, compiled


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (deep(70), "#" + "/items" * 64 + ": nested deeper than 64"),
        ({"properties": {f"p{i}": {} for i in range(5001)}}, "#/properties: the schema has more than 5000"),
        ({"items": {"enum": list(range(10001))}}, "#/items/enum: 10001 values"),
        ({"properties": {"a": {"pattern": "a{1,10001}"}}}, "#/properties/a/pattern: the repeat {1,10001}"),
        ({"patternProperties": {"x{99999}": {}}}, "#/patternProperties/x{99999}: the repeat"),
        ({"pattern": "a" * 16385}, "#/pattern: the regular expression is longer"),
        ({"pattern": "a\0b"}, "#/pattern: the regular expression holds a NUL"),
        ({"properties": {"a\0": {}}}, "a key holds a NUL"),
    ],
)
def test_schemas_beyond_the_limits(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        compiled("json_schema", json.dumps(schema))
    assert says in caught.value.message and caught.value.status == 400


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark", "ebnf", "choice", "structural_tag"])
def test_any_source_is_bounded(kind: str) -> None:
    with pytest.raises(InvalidGrammar, match="262144"):
        compiled(kind, " " * 262145)
    with pytest.raises(InvalidGrammar, match="NUL"):
        compiled(kind, '"a\0"')


def test_schemas_at_the_limits_compile() -> None:
    assert parse_schema(json.dumps(deep(40)), "json_schema", Limits()) == deep(40)
    compiled("json_schema", json.dumps({"type": "string", "maxLength": 10**6}))
    compiled("json_schema", json.dumps({"type": "array", "maxItems": 10**6, "items": {"type": "integer"}}))
    check_regex("[a-z]{1,10000}x{3}", "", "regex", Limits())


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "object",
            "properties": {f"p{i}": {"pattern": "^[a-z]{1,40}-[0-9]{2,8}$", "maxLength": 60} for i in range(60)},
        },
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(400)}},
        {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(12)]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"oneOf": [{"properties": {f"k{i}": {"const": i}}} for i in range(24)]},
        {"not": {"anyOf": [{"properties": {f"k{i}": {"enum": ["x" * i, "y" * i]}}} for i in range(30)]}},
        {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}]},
    ],
    ids=range(7),
)
def test_pathological_schemas_end(schema: dict[str, Any]) -> None:
    """Compiled or refused, in finite work, never another error."""
    try:
        grammar = compiled("json_schema", json.dumps(schema), strict=False)
    except InvalidGrammar as error:
        assert error.message
    else:
        assert grammar.new_state().error() is None


def test_tools_are_bounded() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(InvalidRequest, match="3 tools; the limit is 2"):
        read_tools([tool] * 3, Limits(tools=2))


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", r'{"const": "\ud800"}'),
        ("json_schema", r'{"type": "object", "properties": {"\uDFFF": {}}}'),
        ("structural_tag", r'{"type": "structural_tag", "format": {"type": "const_string", "value": "\ud800"}}'),
        ("choice", r'["\ud800"]'),
        ("regex", "\ud800"),
        ("ebnf", 'root ::= "\ud800"'),
    ],
)
def test_half_of_a_surrogate_pair_is_refused(kind: str, source: str) -> None:
    with pytest.raises(InvalidGrammar, match="half of a surrogate pair"):
        compiled(kind, source)


def test_whole_surrogate_pairs_are_letters() -> None:
    assert compiled("json_schema", r'{"const": "\ud83d\ude00"}') is not None


def test_a_grammar_that_nothing_matches_says_so() -> None:
    with pytest.raises(InvalidGrammar, match="no text can match it"):
        compiled("regex", r"[^\s\S]")


def test_many_optional_properties_can_be_followed() -> None:
    properties = {f"p{i}": {"type": "null"} for i in range(1500)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    state = compiled("json_schema", json.dumps(schema)).new_state()
    tokens = aspen_tokenizer().encode('{"p7":null,"p1400', add_special_tokens=False)
    assert state.accept(tokens) == len(tokens), state.error()
