"""Tests of `pando.cache.admission`."""

from __future__ import annotations

import pytest

from pando.cache.admission import checkpoints_of
from pando.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "expected", "keeps_last"),
    [
        ("every:4", [8, 12], False),
        ("last", [], True),
        ("branch", [10], False),
        ("branch+last", [10], True),
        ("prompt", [13], False),
        ("every:4+last+branch", [8, 12, 10], True),
    ],
)
def test_positions_by_name(name: str, expected: list[int], keeps_last: bool) -> None:
    """A prompt of 14 tokens that resumes after 5; the tree knows 10."""
    policy = checkpoints_of(name)
    assert policy.positions(5, 10, 14) == expected
    assert policy.keeps_last == keeps_last


def test_no_branch_where_a_state_is() -> None:
    assert checkpoints_of("branch").positions(10, 10, 14) == []


def test_an_object_is_taken_as_it_is() -> None:
    policy = checkpoints_of("last")
    assert checkpoints_of(policy) is policy


@pytest.mark.parametrize("name", ["", "every", "every:0", "every:x", "first", "branch+", "last:3"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="choose one of every:K, last, branch, prompt, room, branch"):
        checkpoints_of(name)
