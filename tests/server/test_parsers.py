"""Parsers of replies: any cut of the text gives the same events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pando.server.parsers.reasoning import ReasoningSplitter

THOUGHTS = st.sampled_from(["<think>", "</think>", "<thi", "</", "why ", "\n\n", " ", "answer", "é🙂"])


def cut(text: str, sizes: list[int]) -> list[str]:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return [*parts, text[at:]]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(THOUGHTS, max_size=8), sizes=st.lists(st.integers(1, 5), max_size=40), starts_inside=st.booleans()
)
def test_reasoning_does_not_depend_on_the_cut(pieces: list[str], sizes: list[int], starts_inside: bool) -> None:
    def split(parts: list[str]) -> tuple[str, str]:
        splitter = ReasoningSplitter(starts_inside=starts_inside)
        pairs = [splitter.push(part) for part in parts] + [splitter.finish()]
        return "".join(thought for thought, _ in pairs), "".join(content for _, content in pairs)

    text = "".join(pieces)
    assert split(cut(text, sizes)) == split([text])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nso", ("why", "so")),
        ("\n<think>why</think>so <think>x</think>", ("why", "so <think>x</think>")),
        ("plain text", ("", "plain text")),
        ("<think>never ends", ("never ends", "")),
        ("<thin air", ("", "<thin air")),
    ],
)
def test_reasoning_examples(text: str, expected: tuple[str, str]) -> None:
    splitter = ReasoningSplitter()
    first, last = splitter.push(text), splitter.finish()
    assert (first[0] + last[0], first[1] + last[1]) == expected


@pytest.mark.parametrize("text", ["<think>why</think>so", "\n<think>\nwhy\n</think>\nso", "why</think>so"])
def test_a_marker_that_the_prompt_wrote_may_come_again(text: str) -> None:
    for parts in ([text], list(text)):
        splitter = ReasoningSplitter(starts_inside=True)
        pairs = [splitter.push(part) for part in parts] + [splitter.finish()]
        assert ("".join(a for a, _ in pairs), "".join(b for _, b in pairs)) == ("why", "so")


def test_other_markers() -> None:
    splitter = ReasoningSplitter("[THINK]", "[/THINK]")
    assert splitter.push("[THINK]a </think> b[/THINK] c") == ("a </think> b", "c")
