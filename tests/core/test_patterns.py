"""Patterns that may take exponential time are refused; ordinary ones are not."""

from __future__ import annotations

import pytest

from pando.core.patterns import may_explode
from pando.core.sampling import SamplingParams
from pando.errors import InvalidRequest


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
