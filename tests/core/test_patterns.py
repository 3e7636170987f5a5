"""Patterns that may take exponential time are refused; ordinary ones are not."""

from __future__ import annotations

import re

import pytest

from pando.core.pattern_ways import backtracking_ways
from pando.core.patterns import may_explode, parse
from pando.core.sampling import SamplingParams
from pando.errors import InvalidRequest


@pytest.mark.parametrize(
    "source",
    [
        "(a|a)*b", "(a|aa)+b", "(a|b|ab)*c", "(.*a){25}b", "a*a*a*a*b", "(a?){32}a{32}b", "(?s)(.|\\n)*x",
        "foo.*bar.*baz", "(a{1,8}){30,}", "(?:aa?){40}b", "(?:a|a){300}b", "(?i)(?:a|A)*b*B*b*c",
    ],
)  # fmt: skip
def test_many_ways_to_fail_are_found(source: str) -> None:
    assert may_explode(source)
    with pytest.raises(InvalidRequest, match="may take for ever"):
        SamplingParams(stop_regex=[source])


@pytest.mark.parametrize(
    "source",
    [
        '"[^"]*"', r"\bEND\b", "(?:\\r?\\n){2,}", "(foo|bar)+!", "(and|any)+x", "(.|\\n)*END", ".{0,100}end",
        r"\s+\S+\s+$",
        r"(?P<q>['\"]).*(?P=q)", "a|ab|abc", r"(?<=x)y+", r"(\+|-)?\d+(\.\d+)?", r"```\w*\n", "foo.{0,15}bar.*baz",
    ],
)  # fmt: skip
def test_patterns_that_can_not_go_back_far_pass(source: str) -> None:
    assert not may_explode(source)


def test_the_worst_pattern_that_passes_is_quick_to_fail() -> None:
    assert backtracking_ways(parse("(a|a){4}a*ab")) == 16 * 257
    assert re.search("(a|a){4}a*ab", "a" * 256) is None


@pytest.mark.parametrize("source", ["(" * 101 + ")" * 101, "a{99999999999999999999}", "a" * 1025])
def test_patterns_that_can_not_be_compiled_are_refused(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(stop_regex=[source])
    assert caught.value.param == "stop_regex"


def test_there_are_only_so_many_patterns() -> None:
    with pytest.raises(InvalidRequest, match="at most 16"):
        SamplingParams(stop_regex=["a"] * 17)


@pytest.mark.parametrize("source", ["(a+)+b", "(a*)*", r"(\w+\s?)+$", "(?:x|y+){2,}", "((ab)*c?)*", "(?=(a+)+)"])
def test_nested_repeats_are_found(source: str) -> None:
    assert may_explode(source)
    with pytest.raises(InvalidRequest, match="bound one of them"):
        SamplingParams(stop_regex=[source])


@pytest.mark.parametrize(
    "source", [r"\d+\s*=\s*\d+", "(ab)+", "a{1,8}", r"(\d{1,3}\.){3}", "(?:x|y)+", r"[A-Z]\w*\.", "(a{1,8})+", "^$"]
)
def test_ordinary_patterns_pass(source: str) -> None:
    assert not may_explode(source)
    assert SamplingParams(stop_regex=[source]).stop_regex == [source]
