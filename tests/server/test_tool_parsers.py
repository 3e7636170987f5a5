"""Calls in every format, however the text is cut, with markers as tokens and as text; what is no call stays text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pando.grammar.tool_formats import FORMATS, ToolFormat
from pando.server.parsers.calls import CallReader
from pando.server.parsers.events import CallArguments, CallBroken, CallEnd, CallStart, Event, Reasoning, Text
from pando.server.parsers.harmony import MARKERS, HarmonyReader
from pando.server.parsers.marks import Marks
from pando.server.parsers.shapes import marker_texts, shape_of

SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "zip": {"type": "string"},
            "days": {"type": "integer"},
            "flag": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
    "ping": {"type": "object", "properties": {}},
}
VALUES = {
    "city": 'Oslo "<b>" é🙂\n{ } [x]',
    "zip": "00120",
    "days": 12345678901234567890,
    "flag": True,
    "tags": ["a", "b"],
}
WRITTEN = {
    "json": json.dumps(VALUES, ensure_ascii=False),
    "xml": "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in VALUES.items()
    ),
    "pairs": "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value if isinstance(value, str) else json.dumps(value)}</arg_value>\n"
        for key, value in VALUES.items()
    ),
    "python": ", ".join(f"{key}={value!r}" for key, value in VALUES.items()),
}
EMPTY = {"json": "{}", "xml": "", "pairs": "", "python": ""}
READ = [name for name in FORMATS if name != "harmony"]
PLAIN, OPEN, BROKEN = "plain", "open", "broken"


def written(form: ToolFormat, name: str, arguments: str, number: int = 0) -> str:
    return form.call_begin.replace("{name}", name).replace("{index}", str(number)) + arguments + form.call_end


def reply(form: ToolFormat, *calls: str) -> str:
    return form.section_begin + form.separator.join(calls) + form.section_end


def marks_of(form: ToolFormat, special: bool) -> Marks:
    texts = [*MARKERS] if form.name == "harmony" else marker_texts(form)
    return Marks({text: index for index, text in enumerate(dict.fromkeys(texts))} if special else {}, texts)


def reader_of(form: ToolFormat, marks: Marks, tools: Any = SCHEMAS) -> CallReader | HarmonyReader:
    if form.name == "harmony":
        return HarmonyReader(marks, tools, thinks=True)
    return CallReader(shape_of(form, marks), marks, tools)


def pieces(text: str, sizes: list[int]) -> list[str]:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return [*parts, text[at:]]


def told(events: list[Event]) -> list[tuple[str, ...]]:
    """Events with neighbours joined: what does not depend on the cut."""
    found: list[tuple[str, ...]] = []
    for each in events:
        if isinstance(each, Text | Reasoning):
            item = (type(each).__name__, each.text)
        elif isinstance(each, CallArguments):
            item = (f"arguments {each.index}", each.text)
        elif isinstance(each, CallStart):
            item = (f"start {each.index}", each.name, each.call_id)
        else:
            item = (f"{type(each).__name__} {each.index}", getattr(each, "raw", ""))
        if found and len(item) == 2 and item[0] == found[-1][0] and not item[0].startswith("Call"):
            found[-1] = (item[0], found[-1][1] + item[1])
        else:
            found.append(item)
    return found


def read(form: ToolFormat, marks: Marks, parts: list[str], tools: Any = SCHEMAS) -> list[Event]:
    reader = reader_of(form, marks, tools)
    events: list[Event] = []
    for part in parts:
        events += reader.push(part)
    return events + list(reader.finish())


def calls_of(events: list[Event]) -> tuple[str, list[tuple[str, Any]]]:
    """(content, [(name, arguments)] of complete calls)."""
    names, arguments, done = {}, {}, []
    content = "".join(each.text for each in events if isinstance(each, Text))
    for each in events:
        if isinstance(each, CallStart):
            names[each.index], arguments[each.index] = each.name, ""
        elif isinstance(each, CallArguments):
            arguments[each.index] += each.text
        elif isinstance(each, CallEnd):
            done.append((names[each.index], json.loads(arguments[each.index])))
    return content, done


def two_calls(form: ToolFormat) -> str:
    first = written(form, "get_weather", WRITTEN[form.arguments])
    return reply(form, first, written(form, "ping", EMPTY[form.arguments], 1))


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", READ)
def test_every_split_gives_the_same_calls(name: str, special: bool) -> None:
    form = FORMATS[name]
    marks = marks_of(form, special)
    lead = "" if form.bare else "Let me see.\n\n"
    text = marks.symbols(lead + two_calls(form))
    whole = read(form, marks, [text])
    content, calls = calls_of(whole)
    assert content == lead.rstrip()
    assert calls == [("get_weather", VALUES), ("ping", {})]
    expected = told(whole)
    assert told(read(form, marks, list(text))) == expected
    for at in range(len(text)):
        assert told(read(form, marks, [text[:at], text[at:]])) == expected, text[at - 9 : at + 9]
    rng = random.Random(1)
    for _ in range(60):
        assert told(read(form, marks, pieces(text, [rng.randint(0, 9) for _ in range(len(text))]))) == expected


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", READ)
def test_a_cut_reply_is_no_call_and_nothing_is_lost(name: str, special: bool) -> None:
    """The text ends anywhere: complete calls are told, of the rest every letter is text."""
    form = FORMATS[name]
    marks = marks_of(form, special)
    text = marks.symbols(reply(form, written(form, "get_weather", WRITTEN[form.arguments])))
    for at in range(1, len(text)):
        events = read(form, marks, [text[:at]])
        content, calls = calls_of(events)
        broken = [each for each in events if isinstance(each, CallBroken)]
        if calls:
            assert calls == [("get_weather", VALUES)] and not broken
        else:
            shown = "".join(each.raw for each in broken) + content
            assert shown == marks.spelled(text[:at]), (at, events)
    assert told(read(form, marks, list(text[: len(text) // 2]))) == told(read(form, marks, [text[: len(text) // 2]]))


@pytest.mark.parametrize("name", READ)
def test_unknown_tools_and_plain_answers_are_text(name: str) -> None:
    form = FORMATS[name]
    marks = marks_of(form, False)
    for text in (
        reply(form, written(form, "nope", EMPTY[form.arguments])),
        "Just words, a < b and [1, 2] {x}.",
        '{"name": 5}',
        "[1, 2, 3]",
        "[f(",
        form.call_begin.partition("{name}")[0] + "???",
        "  indented\n",
        "",
    ):
        for parts in ([text], list(text)):
            content, calls = calls_of(read(form, marks, parts))
            assert (content, calls) == (text, []), text


@pytest.mark.parametrize("name", READ)
def test_a_spelled_marker_is_no_token(name: str) -> None:
    """Where a vocabulary has the marker, its spelling as text is only text."""
    form = FORMATS[name]
    marks = marks_of(form, True)
    if not marks.letters or form.bare or marks.symbols(form.trigger) == form.trigger:
        return
    text = reply(form, written(form, "get_weather", WRITTEN[form.arguments]))
    events = read(form, marks, [text])
    if name != "qwen3_coder":  # its calls are read without the marker, too
        assert calls_of(events) == (text, [])


VARIANTS = [
    ("hermes", '<tool_call>{"name": "ping", "arguments": {}}</tool_call>', [("ping", {})], ""),
    (
        "hermes",
        '<tool_call>{"arguments": {"city": "x", "days": 1e400}, "name": "get_weather"}</tool_call> ok',
        None,
        "ok",
    ),
    ("hermes", '<tool_call>{"name": "ping"}</tool_call>', [("ping", {})], ""),
    ("hermes", '<tool_call>{"name": "ping", "arguments": null}', [("ping", {})], ""),
    ("hermes", '<tool_call>{"name": "ping", "arguments": "{\\"a\\": 2}"}</tool_call>', [("ping", {"a": 2})], ""),
    (
        "hermes",
        '<tool_call>{"name": "ping", "parameters": {"q": [1]}, "id": 5}</tool_call>',
        [("ping", {"q": [1]})],
        "",
    ),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "ping", "arguments": {}}}', [("ping", {})], ""),
    (
        "hermes",
        '<tool_call>{"name": "ping", "arguments": {"a": "two\nlines"}\n</tool_call>',
        [("ping", {"a": "two\nlines"})],
        "",
    ),
    ("hermes", '<tool_call>no</tool_call> <tool_call>{"name": "ping"}', [("ping", {})], "<tool_call>no</tool_call>"),
    ("hermes", '<tool_call>["ping"]</tool_call>', [], '<tool_call>["ping"]</tool_call>'),
    (
        "llama3_json",
        '<|python_tag|>{"name": "ping", "parameters": {}}; {"name": "ping", "parameters": {}}',
        [("ping", {})] * 2,
        "",
    ),
    ("llama3_json", '\n {"name": "ping", "parameters": {"b": 1}}', [("ping", {"b": 1})], ""),
    ("llama3_json", '{"answer": 5}', [], '{"answer": 5}'),
    ("llama3_json", 'See {"name": "ping", "parameters": {}}', [], 'See {"name": "ping", "parameters": {}}'),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "ping", "arguments": {}} , {"name": "ping", "arguments": {}}]',
        [("ping", {})] * 2,
        "",
    ),
    ("mistral", '[TOOL_CALLS]ping[ARGS]{"a": 1}[TOOL_CALLS]ping{"a": 2}', [("ping", {"a": 1}), ("ping", {"a": 2})], ""),
    ("mistral_v11", "[TOOL_CALLS]ping[CALL_ID]a1B2c3D4e[ARGS]{}", [("ping", {})], ""),
    ("deepseek_v31", "ok<｜tool▁call▁begin｜>ping<｜tool▁sep｜>{}<｜tool▁call▁end｜>", [("ping", {})], "ok"),
    ("qwen3_coder", "<function=ping>\n</function>", [("ping", {})], ""),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=zip>12</parameter></function></tool_call>",
        [("get_weather", {"zip": "12"})],
        "",
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=city>a </parameter> b</parameter></function>",
        [("get_weather", {"city": "a </parameter> b"})],
        "",
    ),
    (
        "qwen3_coder",
        "<function=get_weather><parameter=note>null</parameter><parameter=days>many</parameter></function>",
        [("get_weather", {"note": None, "days": "many"})],
        "",
    ),
    (
        "glm45",
        "<tool_call>get_weather<arg_key>zip</arg_key><arg_value>007</arg_value></tool_call>",
        [("get_weather", {"zip": "007"})],
        "",
    ),
    (
        "pythonic",
        "[ping(), get_weather(city='it\\'s', days=-5, flag=true, note=None)]",
        [("ping", {}), ("get_weather", {"city": "it's", "days": -5, "flag": True, "note": None})],
        "",
    ),
    (
        "pythonic",
        "<|python_start|>[get_weather(city='two\nlines', tags={'a': [1.50]})]<|python_end|>",
        [("get_weather", {"city": "two\nlines", "tags": {"a": [1.5]}})],
        "",
    ),
    ("pythonic", r"[get_weather(city='\ud800é')]", [("get_weather", {"city": "\ud800é"})], ""),
    ("pythonic", "[ping(1)]", [], "[ping(1)]"),
    ("pythonic", "[ping(a=open('x'))]", [], "[ping(a=open('x'))]"),
]


@pytest.mark.parametrize(("name", "text", "calls", "content"), VARIANTS)
def test_what_models_write_on_their_own(name: str, text: str, calls: Any, content: str) -> None:
    for special in (True, False):
        marks = marks_of(FORMATS[name], special)
        marked = marks.symbols(text)
        for parts in ([marked], list(marked), pieces(marked, [7] * 40)):
            found = calls_of(read(FORMATS[name], marks, parts))
            assert found[0] == content
            assert calls is None or found[1] == calls


def test_numbers_and_order_stay_as_they_are_written() -> None:
    form, marks = FORMATS["hermes"], Marks({}, ())
    text = '<tool_call>{"arguments": {"b": 1.500, "a": 12345678901234567890.0}, "name": "ping"}</tool_call>'
    assert CallArguments(0, '{"b": 1.500, "a": 12345678901234567890.0}') in read(form, marks, [text])


def test_calls_come_as_they_are_written() -> None:
    reader = reader_of(FORMATS["hermes"], Marks({}, ()), None)
    assert reader.push('<tool_call>{"name": "write", "argu') == []
    assert reader.push('ments": {"text": "one ') == [CallStart(0, "write"), CallArguments(0, '{"text": "one ')]
    assert reader.push("two") == [CallArguments(0, "two")]
    assert reader.push('"}}\n</tool_call>') == [CallArguments(0, '"}'), CallEnd(0)]
    assert reader.finish() == []


def test_a_call_that_breaks_late_is_told_so() -> None:
    reader = reader_of(FORMATS["hermes"], Marks({}, ()), None)
    events = reader.push('Hm. <tool_call>{"name": "w", "arguments": {"a": 1, oops}}</tool_call>') + reader.finish()
    assert [each for each in events if isinstance(each, CallBroken)] == [
        CallBroken(0, ' <tool_call>{"name": "w", "arguments": {"a": 1, ')
    ]
    assert calls_of(events) == ("Hm.oops}}</tool_call>", [])


def test_ids_of_formats_that_write_them() -> None:
    form = FORMATS["kimi_k2"]
    events = read(form, Marks({}, ()), [two_calls(form)])
    starts = [each.call_id for each in events if isinstance(each, CallStart)]
    assert starts == ["functions.get_weather:0", "functions.ping:1"]


NOISE = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "\n",
        " ",
        '{"name": "ping", "arguments": {}}',
        '{"name": "ping", ',
        "{",
        "}",
        "[",
        "]",
        "<function=ping>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "x",
        "[TOOL_CALLS]",
        "[ARGS]",
        "ping",
        "ping()",
        ", ",
        "; ",
        "<|python_tag|>",
        '"',
        "\\",
        "5",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "function",
        "```json\n",
        "\n```",
        "<｜tool▁call▁end｜>",
        "<|tool_call_begin|>functions.ping:0",
        "<|tool_call_argument_begin|>",
        "<|channel|>",
        "analysis",
        "commentary to=functions.ping ",
        "<|message|>",
        "<|end|>",
        "<|start|>assistant",
        "final",
        "{}",
    ]
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=120, deadline=None)
@given(noise=st.lists(NOISE, max_size=14), sizes=st.lists(st.integers(1, 7), max_size=60), special=st.booleans())
def test_noise_does_not_depend_on_the_cut(name: str, noise: list[str], sizes: list[int], special: bool) -> None:
    form = FORMATS[name]
    marks = marks_of(form, special)
    text = marks.symbols("".join(noise))
    expected = told(read(form, marks, [text]))
    assert told(read(form, marks, pieces(text, sizes))) == expected
    assert told(read(form, marks, list(text))) == expected
    for each in read(form, marks, [text]):
        for value in (getattr(each, "text", ""), getattr(each, "raw", "")):
            value.encode()  # no marker's letter leaves the parsers


HARMONY = (
    "<|channel|>analysis<|message|>The user wants <b>.<|end|><|start|>assistant"
    "<|channel|>commentary<|message|>I look.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Oslo", "days": 2}<|call|>'
)


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_channels(special: bool) -> None:
    form = FORMATS["harmony"]
    marks = marks_of(form, special)
    text = marks.symbols(HARMONY)
    expected = [
        ("Reasoning", "The user wants <b>."),
        ("Text", "I look."),
        ("start 0", "get_weather", ""),
        ("arguments 0", '{"city": "Oslo", "days": 2}'),
        ("CallEnd 0", ""),
    ]
    for at in range(len(text)):
        assert told(read(form, marks, [text[:at], text[at:]])) == expected
    assert told(read(form, marks, list(text[:-1] if special else text.removesuffix("<|call|>")))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>final<|message|>Hi.<|return|>", [("Text", "Hi.")]),
        ("Hi.", [("Text", "Hi.")]),
        (
            " to=functions.ping<|channel|>commentary json<|message|>{}",
            [("start 0", "ping", ""), ("arguments 0", "{}"), ("CallEnd 0", "")],
        ),
        (
            "<|channel|>commentary to=functions.nope<|message|>{}",
            [("Text", "<|channel|>commentary to=functions.nope<|message|>{}")],
        ),
        (
            "<|channel|>commentary to=functions.ping<|message|>x",
            [("Text", "<|channel|>commentary to=functions.ping<|message|>x")],
        ),
        ("<|channel|>anal", [("Text", "<|channel|>anal")]),
        ("<|channel|>analysis<|message|>cut", [("Reasoning", "cut")]),
        (
            '<|channel|>commentary to=functions.ping<|message|>{"a',
            [
                ("start 0", "ping", ""),
                ("arguments 0", '{"a'),
                ("CallBroken 0", '<|channel|>commentary to=functions.ping<|message|>{"a'),
            ],
        ),
    ],
)
def test_channel_examples(text: str, expected: list[tuple[str, ...]]) -> None:
    for special in (True, False):
        marks = marks_of(FORMATS["harmony"], special)
        marked = marks.symbols(text)
        for parts in ([marked], list(marked)):
            assert told(read(FORMATS["harmony"], marks, parts)) == expected
