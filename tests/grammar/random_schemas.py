"""Random JSON schemas over few names and values, dense in the keywords that need rewriting."""

from __future__ import annotations

import random
from typing import Any

NAMES = ["a", "b", "c"]

LEAVES: list[Any] = [
    True,
    {},
    False,
    {"type": "integer"},
    {"type": "string"},
    {"type": ["string", "null"]},
    {"const": "x"},
    {"const": 1},
    {"enum": ["x", "y", 2, None]},
    {"type": "number", "minimum": 2},
    {"type": "integer", "maximum": 1},
    {"minimum": 1},
    {"type": "string", "minLength": 2},
    {"type": "string", "pattern": "^x"},
    {"type": "string", "format": "made-up"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
    {"type": "array", "uniqueItems": True},
]

SMALL: list[Any] = [{"required": ["a"]}, {"required": ["b", "c"]}, {"properties": {"a": {"const": "x"}}}]

KEYWORDS = (
    "properties properties required additionalProperties dependentRequired dependentSchemas anyOf oneOf oneOf allOf "
    "not if minProperties propertyNames patternProperties unevaluatedProperties"
).split()


def random_schema(rng: random.Random, depth: int = 2) -> Any:
    """A schema of draft 2020-12."""
    if depth <= 0 or depth < 2 and rng.random() < 0.25:
        return rng.choice(LEAVES)
    made: dict[str, Any] = {"type": rng.choice(["object", ["object", "string"]])} if rng.random() < 0.6 else {}
    for _ in range(rng.randint(1, 3)):
        _add(made, rng.choice(KEYWORDS), rng, depth - 1)
    return made


def _add(made: dict[str, Any], key: str, rng: random.Random, depth: int) -> None:
    def some(low: int) -> list[str]:
        return rng.sample(NAMES, rng.randint(low, 2))

    if key in ("properties", "dependentSchemas"):
        made[key] = {name: random_schema(rng, depth) for name in some(1)}
    elif key == "required":
        made[key] = some(0)
    elif key in ("additionalProperties", "unevaluatedProperties"):
        made[key] = rng.choice([False, rng.choice(LEAVES)])
    elif key == "dependentRequired":
        made[key] = {rng.choice(NAMES): some(0)}
    elif key in ("anyOf", "oneOf", "allOf"):
        made[key] = [rng.choice([random_schema(rng, depth), *SMALL]) for _ in range(rng.randint(1, 3))]
    elif key == "not":
        made[key] = rng.choice([random_schema(rng, depth), *SMALL])
    elif key == "if":
        made[key] = rng.choice([rng.choice(LEAVES), *SMALL])
        made["then"] = random_schema(rng, depth)
        if rng.random() < 0.6:
            made["else"] = random_schema(rng, depth)
    elif key == "minProperties":
        made[key] = rng.randint(0, 2)
    elif key == "propertyNames":
        made[key] = rng.choice([{"pattern": "^[ab]"}, {"enum": ["a", "b"]}, {"maxLength": 1}])
    else:
        made[key] = {rng.choice(["^a", "b$", ".*", "^d"]): rng.choice(LEAVES)}


def random_value(rng: random.Random, depth: int = 2) -> Any:
    """A JSON value, an object more often than not."""
    if depth == 0 or rng.random() < 0.35:
        return rng.choice(["x", "y", "xy", "", 1, 2, 0, None, True, False, 2.5, [], [1], [1, 1]])
    names = rng.sample([*NAMES, "d", "ab"], rng.randint(0, 4))
    return {name: random_value(rng, depth - 1) for name in names}
