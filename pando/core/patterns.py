"""What a regular expression may cost: Python's matcher backtracks, and one pattern must not stall a shared loop."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from pando.core.pattern_ways import backtracking_ways

LONG_REPEAT = 32
"""A repeat of more than this many rounds counts as unbounded."""

MAX_WAYS = 5_000
"""Ways to match one text from one place at most: one unbounded repeat that takes letters of what follows it, and a
little more. A search then takes milliseconds at worst, and there is one after every token."""


def parse(source: str) -> Any:
    """The parsed pattern (`re`'s own parser; its place differs between versions). Raises re.error."""
    return importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse").parse(source)


def may_explode(source: str) -> bool:
    """True if matching may take very long: a repeat inside another one, as in `(a+)+`, or more ways to fail than
    MAX_WAYS, as in `(a|a)*b` and `a*a*a*a*b`."""
    pattern = parse(source)
    return _nested(pattern, inside=False) or backtracking_ways(pattern) > MAX_WAYS


def _nested(pattern: Iterable[tuple[Any, Any]], inside: bool) -> bool:
    for op, value in pattern:
        name = str(op)
        repeats = name in ("MAX_REPEAT", "MIN_REPEAT") and int(value[1]) > LONG_REPEAT
        if repeats and inside:
            return True
        if any(_nested(part, inside or repeats) for part in _parts(name, value)):
            return True
    return False


def _parts(name: str, value: Any) -> list[Any]:
    """The patterns inside one parsed element."""
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return [value[2]]
    if name == "SUBPATTERN":
        return [value[-1]]
    if name == "BRANCH":
        return list(value[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    if name == "GROUPREF_EXISTS":
        return [part for part in value[1:] if part is not None]
    return [value] if name == "ATOMIC_GROUP" else []
