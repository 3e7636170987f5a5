"""JSON schemas against a validator: every keyword by hand, then random schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.check import subschema_check
from pando.grammar.order import compact, in_schema_order
from pando.grammar.verify import Verifier
from tests.grammar.random_schemas import random_schema, random_value
from tests.grammar.vocabularies import aspen, backend, compiled, fits

OBJECT = {"type": "object"}
AB = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}

# schema, accepted, refused: enforced exactly, so that strict mode takes them
EXACT: list[tuple[Any, list[Any], list[Any]]] = [
    (True, [1, "x", [], {}, None], []),
    ({}, [1.5, "x", [[]], {"a": {}}], []),
    ({"type": "integer"}, [0, -3, 10**12], [1.5, "1", None]),
    ({"type": ["string", "null"]}, ["", None], [0, False]),
    ({"minimum": 2, "maximum": 9, "type": "number"}, [2, 9, 3.5], [1, 9.5, 10]),
    ({"exclusiveMinimum": 2, "exclusiveMaximum": 9, "type": "integer"}, [3, 8], [2, 9]),
    ({"multipleOf": 0.01, "type": "number"}, [0.5, 1.75, 3], [0.305]),
    ({"multipleOf": 7, "type": "integer"}, [0, 14], [8]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^a+$", "maxLength": 3}, ["a", "aaa"], ["aaaa", "b"]),
    ({"type": "string", "pattern": r"^\d\w$"}, ["1_"], ["٣a", "1é", "11a"]),
    ({"type": "string", "pattern": r"[^]\/\-"}, ["x/-"], ["/-"]),
    ({"type": "string", "pattern": r"^\s\S$"}, [" a", "\ufeffa", "\u2003\x85"], ["a ", "\x85a", " \ufeff"]),
    ({"type": "string", "pattern": r"^[\D]$"}, ["a", "٣"], ["1"]),
    ({"const": {"a": [1, None]}}, [{"a": [1, None]}], [{"a": [1]}]),
    ({"enum": [1, "1", None, [2]]}, [1, "1", None, [2]], [2, "2", []]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "x"]),
    ({"type": "string", "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"type": "string", "format": "house-number"}, ["12a", ""], [12]),
    ({"format": "json-pointer"}, ["", "/a/b~1c", 5], ["a", "/~2"]),
    ({"type": "string", "format": "relative-json-pointer"}, ["0", "1/a", "0#"], ["/a", "01"]),
    (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        [[1], [1, 2]],
        [[], [1, 2, 3], ["a"]],
    ),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, [[], [1]], [["a"], [1, 2]]),
    ({"items": [{"type": "integer"}], "additionalItems": {"type": "null"}, "type": "array"}, [[1, None]], [[1, 2]]),
    ({"type": "array", "uniqueItems": False}, [[1, 1]], [{}]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[1], []], [[1, 1]]),
    ({"type": "array", "contains": {"type": "integer"}, "minContains": 0}, [[], ["a"]], [{}]),
    (AB, [{}, {"a": 1, "b": "x"}, {"a": 1, "c": 3}], [{"a": "x"}, {"b": 1}, []]),
    ({**AB, "required": ["b"], "additionalProperties": False}, [{"b": ""}, {"a": 1, "b": ""}], [{}, {"b": "", "c": 1}]),
    ({**OBJECT, "additionalProperties": {"type": "integer"}}, [{"x": 1}], [{"x": "1"}]),
    (
        {**OBJECT, "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False},
        [{"x1": 1}],
        [{"y": 1}],
    ),
    (
        {**OBJECT, "patternProperties": {".*": {"type": "integer"}}, "properties": {"a": {"maximum": 3}}},
        [{"a": 3, "b": 9}],
        [{"a": 4}, {"c": "x"}],
    ),
    ({**OBJECT, "minProperties": 1, "maxProperties": 2}, [{"a": 1}], [{}, {"a": 1, "b": 1, "c": 1}]),
    (
        {**AB, "minProperties": 1, "additionalProperties": False},
        [{"a": 1}, {"b": "x"}, {"a": 1, "b": ""}],
        [{}, {"c": 1}],
    ),
    ({**OBJECT, "propertyNames": {"pattern": "^[ab]+$"}}, [{"ab": 1}], [{"c": 1}]),
    ({**OBJECT, "propertyNames": {"enum": ["a", "b"]}}, [{"b": 1}, {}], [{"c": 1}]),
    ({**OBJECT, "propertyNames": {"minLength": 2, "maxLength": 3}}, [{"ab": 1}], [{"a": 1}, {"abcd": 1}]),
    ({**AB, "dependencies": {"a": ["b"]}}, [{}, {"b": ""}, {"a": 1, "b": ""}], [{"a": 1}]),
    ({**AB, "dependencies": {"a": {"required": ["b"]}}}, [{"b": ""}, {"a": 1, "b": ""}], [{"a": 1}]),
    ({"dependentRequired": {"a": ["b", "c"]}}, [{"b": 1}, 5, {"a": 1, "b": 1, "c": 1}], [{"a": 1, "b": 1}]),
    (
        {"dependentSchemas": {"a": {"properties": {"b": {"type": "null"}}}}},
        [{"b": 1}, {"a": 1, "b": None}],
        [{"a": 1, "b": 1}],
    ),
    ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, ["ab"], ["abc", 1]),
    ({"allOf": [AB], "title": "one"}, [{"a": 1}], [{"a": ""}]),
    ({"anyOf": [{"type": "integer"}, {"minLength": 2, "type": "string"}]}, [3, "ab"], ["a", None]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    ({"oneOf": [{"type": "number", "maximum": 1}, {"type": "number", "exclusiveMinimum": 1}]}, [1, 2], ["x"]),
    ({**OBJECT, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1}, {"b": 1}], [{}, {"a": 1, "b": 1}]),
    (
        {
            "oneOf": [
                {**OBJECT, "properties": {"k": {"const": k}, "v": {"type": t}}, "required": ["k"]}
                for k, t in (("i", "integer"), ("s", "string"))
            ]
        },
        [{"k": "i", "v": 1}, {"k": "s", "v": "x"}],
        [{"k": "i", "v": "x"}, {"k": "z"}],
    ),
    ({"oneOf": [{"type": "integer", "minimum": 2}, {"type": "integer", "maximum": 5}]}, [1, 6], [3]),
    ({"not": {"type": "string"}}, [1, None, {}], ["x"]),
    ({"not": {"enum": ["ab", 3, True, None]}}, ["a", "abc", "b", 2, 4, False, [], 3.5], ["ab", 3, True, None]),
    ({"type": "string", "not": {"const": ""}}, ["a"], [""]),
    ({"not": {"required": ["a"]}, **OBJECT}, [{}, {"b": 1}], [{"a": 1}]),
    ({"not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, **OBJECT}, [{"c": 1}], [{"a": 1}, {"b": 1}]),
    ({"not": {"not": {"type": "null"}}}, [None], [1]),
    (
        {
            **OBJECT,
            "properties": {"k": {"enum": ["x", "y"]}, "n": {}},
            "if": {"properties": {"k": {"const": "x"}}, "required": ["k"]},
            "then": {"required": ["n"]},
            "else": {"properties": {"n": False}},
        },
        [{"k": "x", "n": 1}, {"k": "y"}, {}],
        [{"k": "x"}, {"k": "y", "n": 1}, {"n": 1}],
    ),
    ({"then": {"type": "null"}}, [1], []),
    ({"unevaluatedProperties": False, **AB}, [{"a": 1}], [{"c": 1}]),
    ({"$defs": {"n": {"type": "integer"}}, "items": {"$ref": "#/$defs/n"}, "type": "array"}, [[1]], [["a"]]),
    ({"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n", "minimum": 3}, [3], [2, "x"]),
    (
        {
            **OBJECT,
            "properties": {
                "a": {"oneOf": [{"type": "null"}, {"type": "integer"}]},
                "b": {"$ref": "#/properties/a/oneOf/1"},
            },
        },
        [{"b": 1}],
        [{"b": None}],
    ),
    (
        {**OBJECT, "properties": {"n": {"$ref": "#"}}, "additionalProperties": False},
        [{"n": {"n": {}}}],
        [{"n": {"m": 1}}],
    ),
    (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "number",
            "minimum": 3,
            "exclusiveMinimum": True,
        },
        [4],
        [3],
    ),
    (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/s",
            "maxLength": 1,
            "definitions": {"s": {"type": "string"}},
        },
        ["long"],
        [1],
    ),
    (
        {**OBJECT, "properties": {"$ref": {"type": "string"}, "enum": {"type": "array"}}},
        [{"$ref": "x", "enum": []}],
        [{"$ref": 1}],
    ),
    ({"description": "d", "default": {"not": 1}, "examples": [{"oneOf": 1}], "type": "null"}, [None], [1]),
]

# schema, accepted, refused: wider than asked for, so strict mode refuses them at this pointer
WIDENED: list[tuple[Any, str, list[Any], list[Any]]] = [
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems", [[1, 2], []], [[1, 1]]),
    ({"type": "array", "contains": {"const": 1}}, "#/contains", [[1, 2]], [[2]]),
    ({"type": "string", "not": {"pattern": "^a"}}, "#/not", ["b"], ["ab"]),
    (
        {**OBJECT, "oneOf": [{"patternProperties": {"^a": True}}, {"required": ["b"]}]},
        "#/oneOf",
        [{"a": 1}],
        [{"b": 1}],
    ),
    ({**OBJECT, "propertyNames": {"not": {"pattern": "^x"}}}, "#/propertyNames", [{"a": 1}], [{"x": 1}]),
    ({"if": {"pattern": "^a"}, "then": {"maxLength": 1}, "type": "string"}, "#/if", ["a", "bb"], ["ab"]),
    ({"allOf": [AB], "unevaluatedProperties": False}, "#/unevaluatedProperties", [{"a": 1}], [{"c": 1}]),
    ({"type": "string", "pattern": "^(?!x)"}, "", ["a"], ["x"]),
    ({**AB, "minProperties": 2}, "", [{"a": 1, "b": ""}], [{"a": 1}]),
    (
        {**OBJECT, "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 3}}},
        "",
        [{"ab": 3}],
        [{"ab": 2}, {"a": ""}],
    ),
]


def accepts(schema: Any, value: Any, *, strict: bool) -> bool:
    grammar = compiled("json_schema", json.dumps(schema), strict=strict)
    text = compact(in_schema_order(value, grammar.schema, grammar.schema, subschema_check(grammar.schema)))
    return fits(grammar.new_state(), text, aspen()) and grammar.violation(text) is None


@pytest.mark.parametrize(("schema", "good", "bad"), EXACT, ids=lambda each: str(each)[:60])
def test_keywords_that_are_enforced(schema: Any, good: list[Any], bad: list[Any]) -> None:
    assert compiled("json_schema", json.dumps(schema), strict=True).relaxed == ()
    assert [value for value in good if not accepts(schema, value, strict=True)] == []
    assert [value for value in bad if accepts(schema, value, strict=True)] == []


@pytest.mark.parametrize(("schema", "pointer", "good", "bad"), WIDENED, ids=lambda each: str(each)[:60])
def test_keywords_that_are_checked_afterwards(schema: Any, pointer: str, good: list[Any], bad: list[Any]) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        compiled("json_schema", json.dumps(schema), strict=True)
    assert pointer in caught.value.message
    grammar = compiled("json_schema", json.dumps(schema), strict=False)
    assert grammar.relaxed and all(not issue.fatal for issue in grammar.relaxed)
    assert [value for value in good if not accepts(schema, value, strict=False)] == []
    assert [value for value in bad if accepts(schema, value, strict=False)] == []
    text = compact(bad[0])
    assert "#/" in (grammar.violation(text) or "") and grammar.violation(compact(good[0])) is None
    assert "not JSON" in (grammar.violation(text[:-1] + "{") or "")


@pytest.mark.parametrize("seed", range(6))
def test_random_schemas_agree_with_a_validator(seed: int) -> None:
    """Strict: what is accepted is valid, what is valid is accepted (in the schema's order). Default: both, checked."""
    rng = random.Random(seed)
    exact = flagged = agreed = 0
    for _ in range(60):
        schema = random_schema(rng)
        verifier = Verifier(schema)
        values = [random_value(rng) for _ in range(12)]
        for strict in (True, False):
            spec = GrammarSpec("json_schema", json.dumps(schema), GrammarOptions(strict=strict))
            try:
                grammar = backend().compile(spec)
            except InvalidGrammar as error:
                if "nsatisfiable" in error.message:
                    assert not any(verifier.is_valid(value) for value in values), schema
                continue
            assert not (strict and grammar.relaxed)
            exact, flagged = exact + strict, flagged + bool(grammar.relaxed)
            check = subschema_check(grammar.schema)
            for value in values:
                ordered = compact(in_schema_order(value, grammar.schema, grammar.schema, check))
                taken = any(
                    fits(grammar.new_state(), text, aspen()) and grammar.violation(text) is None
                    for text in (ordered, compact(value))
                )
                assert not taken or verifier.is_valid(value), (schema, value)
                agreed += taken == verifier.is_valid(value)
                assert taken or not verifier.is_valid(value) or isinstance(value, dict), (schema, value)
    assert exact > 25 and agreed > 0.98 * 12 * (exact + flagged)


def test_refusals_name_all_there_is() -> None:
    schema = {"properties": {"a": {"type": "array", "uniqueItems": True}, "b": {"contains": {}}}}
    with pytest.raises(InvalidGrammar, match=r"#/properties/a/uniqueItems: .* \(and 1 more places\)"):
        compiled("json_schema", json.dumps(schema), strict=True)


def test_references_out_of_the_document_are_never_fetched() -> None:
    schema = json.dumps({"properties": {"a": {"$ref": "http://127.0.0.1:9/x.json"}}})
    for strict in (True, False):
        with pytest.raises(InvalidGrammar, match="leaves the document"):
            compiled("json_schema", schema, strict=strict)


def test_order_follows_the_schema() -> None:
    schema = {
        "properties": {"b": {"type": "object", "properties": {"y": {}, "x": {}}}, "a": {}},
        "anyOf": [{"required": ["d", "c"]}, {"required": ["z"]}],
    }
    value = {"extra": 1, "c": 1, "d": 1, "a": 1, "b": {"x": 1, "w": 2, "y": 1}}
    ordered = in_schema_order(value, schema, schema, subschema_check(schema))
    assert compact(ordered) == '{"b":{"y":1,"x":1,"w":2},"a":1,"d":1,"c":1,"extra":1}'


def test_references_inside_other_resources_are_not_followed() -> None:
    """`#/$defs/a` inside a part with an id of its own is that part's, not the root's."""
    inner = {
        "$id": "http://example.com/inner.json",
        "$defs": {"a": {"type": "string"}},
        "oneOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}],
    }
    schema = {"$defs": {"a": {"type": "null"}}, "type": "object", "properties": {"x": inner}}
    try:
        strict = accepts(schema, {"x": None}, strict=True)
    except InvalidGrammar:
        strict = False
    assert not strict


def test_neighbours_of_a_reference_that_depend_on_each_other_stay() -> None:
    schema = {
        "$defs": {"a": {"type": "object", "properties": {"k": {"const": 1}}}},
        "properties": {"x": {"$ref": "#/$defs/a", "properties": {"k": {"const": 1}}, "additionalProperties": False}},
        "type": "object",
    }
    assert accepts(schema, {"x": {"k": 1}}, strict=True) and not accepts(schema, {"x": {"z": 1}}, strict=True)
    booleans = {
        "$defs": {"a": {"const": True}},
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/a", "const": 1}},
    }
    with pytest.raises(InvalidGrammar):
        assert not accepts({**booleans, "required": ["x"]}, {"x": True}, strict=True)
