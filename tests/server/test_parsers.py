"""Parsers of replies: any cut of the text gives the same events."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pando.server.parsers.hermes import CallArguments, CallStart, Text, ToolCallParser
from pando.server.parsers.reasoning import ReasoningSplitter

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "a</b> \\" } {", "y": [1, {"z": null}]}}\n</tool_call>'
PIECES = st.sampled_from(
    [
        CALL,
        '<tool_call>{"arguments": {"a": 1}, "name": "late"}</tool_call>',
        '<tool_call>{"name": "bare"}</tool_call>',
        '<tool_call>{"name": "text", "arguments": "{\\"a\\": 2}"}</tool_call>',
        '<tool_call>{"name": "nothing", "arguments": null}</tool_call>',
        '<tool_call>{"name": "p", "parameters": {"q": 1}}</tool_call>',
        "<tool_call>no call</tool_call>",
        '<tool_call>{"name": "cut", "arguments": {"a": [1, 2</tool_call>',
        "<tool_call>",
        "</tool_call>",
        "<tool",
        " \n ",
        "Some text. ",
        "a < b",
    ]
)
THOUGHTS = st.sampled_from(["<think>", "</think>", "<thi", "</", "why ", "\n\n", " ", "answer", "é🙂"])


def cut(text: str, sizes: list[int]) -> list[str]:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return [*parts, text[at:]]


def calls_of(parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)])"""
    parser = ToolCallParser()
    events = [event for part in parts for event in parser.push(part)] + parser.finish()
    content, calls = "", []
    for event in events:
        if isinstance(event, Text):
            content += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        else:
            assert isinstance(event, CallArguments)
            name, arguments = calls[event.index]
            calls[event.index] = (name, arguments + event.text)
    return content, calls


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=5), sizes=st.lists(st.integers(1, 9), max_size=60))
def test_tool_calls_do_not_depend_on_the_cut(pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    assert calls_of(cut(text, sizes)) == calls_of([text])


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


def test_tool_call_examples() -> None:
    content, calls = calls_of([f"Let me see.\n{CALL}\n{CALL}\n"])
    assert content == "Let me see."
    assert [name for name, _ in calls] == ["f", "f"]
    assert json.loads(calls[0][1]) == {"x": 'a</b> " } {', "y": [1, {"z": None}]}
    assert calls_of(['<tool_call>{"name": "text", "arguments": "{\\"a\\": 2}"}</tool_call>']) == (
        "",
        [("text", '{"a": 2}')],
    )
    assert calls_of(["x <tool_call>no call</tool_call> y"]) == ("x <tool_call>no call</tool_call> y", [])
    assert calls_of(['x <tool_call>{"na']) == ('x <tool_call>{"na', [])


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser()
    assert parser.push('<tool_call>{"name": "write", "argu') == []
    assert parser.push('ments": {"text": "one ') == [CallStart(0, "write"), CallArguments(0, '{"text": "one ')]
    assert parser.push("two") == [CallArguments(0, "two")]
    assert parser.push('"}}\n</tool_call>') == [CallArguments(0, '"}')]
    assert parser.finish() == []
