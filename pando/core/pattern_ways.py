"""In how many ways a backtracking matcher may try one text before it gives up: an upper bound from the pattern alone.

A repeat may end at many places only if what follows it can begin with a letter that it would also take, and choices are
tried one after the other only if they can begin alike. Where the rest can not fail nothing is tried again. The count is
a bound: some harmless patterns count high, none that is harmful counts low.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LONG = 256
"""Rounds of a repeat that count: the text that is looked at is not longer."""

_MANY = 1e12
_COMMON = frozenset(map(chr, range(256))) | frozenset("\u03a9\u03c9\u0663\u2028\u6f22\U0001f600")

_DOT_ALL = re.compile(r"\(\?[a-zA-Z]*s")
"""A flag by which the dot takes line ends, too."""

Letters = frozenset[str]
Element = tuple[Any, Any]

_CATEGORIES = {"DIGIT": re.compile(r"\d"), "SPACE": re.compile(r"\s"), "WORD": re.compile(r"\w")}


def backtracking_ways(pattern: Any) -> float:
    """The bound for a pattern that `re` has parsed; 1 for one that never goes back."""
    return _Count(pattern).ways(list(pattern), None)


class _Count:
    """`after`: letters with which the rest of the pattern may begin; None where the rest can not fail."""

    def __init__(self, pattern: Any) -> None:
        self._all = _COMMON | frozenset(_named_letters(pattern))
        self._dot = self._all if _DOT_ALL.search(pattern.state.str) else self._all - {"\n"}

    def ways(self, sequence: Sequence[Element], after: Letters | None) -> float:
        """Ways to match a sequence."""
        total = 1.0
        for op, value in reversed(sequence):
            total = min(total * self._ways_of(str(op), value, after), _MANY)
            letters, may_be_empty = self._begin(str(op), value)
            if not may_be_empty:
                after = letters
            elif after is not None:
                after |= letters
        return total

    def _ways_of(self, name: str, value: Any, after: Letters | None) -> float:
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._ways_of_repeat(int(value[0]), int(value[1]), list(value[2]), after)
        if name == "SUBPATTERN":
            return self.ways(list(value[-1]), after)
        if name == "BRANCH":
            return self._ways_of_choices([list(branch) for branch in value[1]], after)
        if name == "GROUPREF_EXISTS":
            return sum(self.ways(list(part), after) for part in value[1:] if part is not None)
        if name in ("ASSERT", "ASSERT_NOT"):
            return self.ways(list(value[1]), None)
        if name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP"):
            return self.ways(list(value[2] if name == "POSSESSIVE_REPEAT" else value), self._all)
        return 1.0

    def _ways_of_repeat(self, low: int, high: int, body: list[Element], after: Letters | None) -> float:
        if after is None and low <= 1:  # the first round is the match: what comes after it may fail freely
            return self.ways(body, None)
        letters, may_be_empty = self._begin_all(body)
        rest = after or frozenset()
        rounds = min(high, LONG)
        inner = self.ways(body, letters | rest)
        ends = max(rounds - low + 1, 1) if may_be_empty or letters & rest else 1
        return _MANY if inner > 1 and rounds > 64 else min(ends * inner**rounds, _MANY)

    def _ways_of_choices(self, branches: list[list[Element]], after: Letters | None) -> float:
        ways = [self.ways(branch, after) for branch in branches]
        seen: Letters = frozenset()
        for branch in branches:
            letters, may_be_empty = self._begin_all(branch)
            if may_be_empty or letters & seen:
                return sum(ways)
            seen |= letters
        return max(ways)

    def _begin_all(self, sequence: Iterable[Element]) -> tuple[Letters, bool]:
        """Letters with which a sequence may begin, and whether it may be empty."""
        found: Letters = frozenset()
        for op, value in sequence:
            letters, may_be_empty = self._begin(str(op), value)
            found |= letters
            if not may_be_empty:
                return found, False
        return found, True

    def _begin(self, name: str, value: Any) -> tuple[Letters, bool]:
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            letters, may_be_empty = self._begin_all(value[2])
            return letters, may_be_empty or int(value[0]) == 0
        if name in ("SUBPATTERN", "ATOMIC_GROUP"):
            return self._begin_all(value[-1] if name == "SUBPATTERN" else value)
        if name == "BRANCH":
            parts = [self._begin_all(branch) for branch in value[1]]
            return frozenset().union(*(letters for letters, _ in parts)), any(empty for _, empty in parts)
        if name in ("LITERAL", "NOT_LITERAL", "IN"):
            return self._letters(name, value), False
        if name == "ANY":
            return self._dot, False
        return self._all, False  # places and backward references, which may fail on any

    def _letters(self, name: str, value: Any) -> Letters:
        """Letters of one element, both cases of each: the pattern may ignore case."""
        if name != "IN":
            found = frozenset({chr(value)})
            return _both_cases(found) if name == "LITERAL" else self._all - found
        found = frozenset()
        negated = False
        for op, part in value:
            kind = str(op)
            negated = negated or kind == "NEGATE"
            if kind == "LITERAL":
                found |= {chr(part)}
            elif kind == "RANGE":
                found |= {letter for letter in self._all if part[0] <= ord(letter) <= part[1]}
            elif kind == "CATEGORY":
                found |= self._category(str(part))
        return self._all - found if negated else _both_cases(found)

    def _category(self, name: str) -> Letters:
        one = _CATEGORIES.get(name.rsplit("_", 1)[-1])
        if one is None:
            return self._all
        found = frozenset(letter for letter in self._all if one.match(letter))
        return self._all - found if "_NOT_" in name else found


def _both_cases(letters: Letters) -> Letters:
    return letters | {letter.lower() for letter in letters} | {letter.upper() for letter in letters}


def _named_letters(value: Any) -> Iterable[str]:
    """Letters that a pattern names, wherever they stand in it; numbers that mean something else do no harm."""
    if isinstance(value, int):
        yield from (chr(code) for code in (value - 1, value, value + 1) if 0 <= code < 0x110000)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            yield from _named_letters(part)
