"""Opposites and proofs of disjointness against a validator: exact or silent."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pando.grammar.negation import disjoint, negated
from pando.grammar.verify import Verifier
from tests.grammar.random_schemas import random_schema, random_value

VALUES: list[Any] = [None, True, False, 0, 1, 2, 2.5, -7, "", "x", "y", "xy", "ab", [], [1], {}, {"a": 1}, {"a": "x"}]


@pytest.mark.parametrize("seed", range(5))
def test_opposites_of_random_schemas(seed: int) -> None:
    rng, written = random.Random(seed), 0
    for _ in range(200):
        schema = random_schema(rng)
        opposite = negated(schema, schema)
        if opposite is not None:
            written += 1
            one, other = Verifier(schema), Verifier(opposite)
            for value in [*VALUES, *(random_value(rng) for _ in range(10))]:
                assert one.is_valid(value) != other.is_valid(value), (schema, opposite, value)
    assert written > 8


@pytest.mark.parametrize("seed", range(5))
def test_disjoint_schemas_share_no_value(seed: int) -> None:
    rng, proved = random.Random(seed), 0
    for _ in range(400):
        one, other = random_schema(rng), random_schema(rng)
        if disjoint(one, other, True):
            proved += 1
            first, second = Verifier(one), Verifier(other)
            for value in [*VALUES, *(random_value(rng) for _ in range(10))]:
                assert not (first.is_valid(value) and second.is_valid(value)), (one, other, value)
    assert proved > 4


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({"const": 1}, {"const": 1.0}, False),
        ({"enum": [{"a": 1, "b": 2}]}, {"const": {"b": 2, "a": 1}}, False),
        ({"enum": [1, 2]}, {"enum": [3, "1"]}, True),
        ({"type": "integer"}, {"type": "number"}, False),
        ({"type": "integer", "maximum": 3}, {"type": "number", "exclusiveMinimum": 3}, True),
        ({"type": "string", "maxLength": 2}, {"type": "string", "minLength": 3}, True),
        ({"type": "array", "maxItems": 0}, {"type": "array", "minItems": 1}, True),
        ({"$ref": "#/$defs/a"}, {"allOf": [{"$ref": "#/$defs/b"}], "title": "b"}, True),
        ({"$ref": "#/$defs/loop"}, {"type": "null"}, False),
    ],
)
def test_known_pairs(one: Any, other: Any, apart: bool) -> None:
    def kind(name: str) -> Any:
        return {"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]}

    root = {"$defs": {"a": kind("a"), "b": kind("b"), "loop": {"$ref": "#/$defs/loop"}}}
    assert disjoint(one, other, root) == apart == disjoint(other, one, root)


def test_what_can_not_be_said() -> None:
    for schema in ({"pattern": "a"}, {"type": "integer"}, {"uniqueItems": True}, {"$ref": "#/nowhere"}):
        assert negated(schema, schema) is None
    loop = {"$ref": "#"}
    assert negated(loop, loop) is None
