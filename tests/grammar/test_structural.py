"""Structural tags in both spellings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.verify import check_text
from tests.grammar.vocabularies import aspen, compiled, fits

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}

OLDER = {
    "structures": [
        {"begin": "<function=a>", "schema": NUMBER, "end": "</function>"},
        {"begin": "<function=b>", "schema": {"type": "array"}, "end": "</function>"},
    ],
    "triggers": ["<function="],
}


def tags(**changes: Any) -> dict[str, Any]:
    form: dict[str, Any] = {
        "type": "triggered_tags",
        "triggers": ["<a", "<b"],
        "tags": [
            {"begin": "<a>", "content": {"type": "json_schema", "json_schema": NUMBER}, "end": "</a>"},
            {"begin": "<b>", "content": {"type": "regex", "pattern": "[0-9]/[a-z]+"}, "end": ["</b>"]},
            {"begin": "<b2>", "content": {"type": "const_string", "value": "x"}, "end": ""},
            {"begin": "<a-text>", "content": {"type": "any_text"}, "end": "</a>"},
        ],
    }
    return {"type": "structural_tag", "format": {**form, **changes}}


def takes(source: dict[str, Any], text: str) -> bool:
    return fits(compiled("structural_tag", json.dumps(source)).new_state(), text, aspen())


def test_older_spelling() -> None:
    assert takes(OLDER, "plain") and takes(OLDER, 'x <function=a>{"n":1}</function> y <function=b>[]</function>')
    assert not takes(OLDER, 'x <function=a>{"n":"1"}</function>') and not takes(OLDER, "x <function=c>")


def test_triggered_tags() -> None:
    assert takes(tags(), 'so <a>{"n":1}</a><b>4/xyz</b> and <b2>x. <a-text>any < thing</a>')
    assert not takes(tags(), "<b>4/</b>") and not takes(tags(), "<b2>y")
    once = tags(stop_after_first=True)
    assert takes(once, "so <b>4/x</b>") and not takes(once, "so <b>4/x</b> and")
    must = tags(at_least_one=True)
    assert takes(must, "<b>4/x</b><b>5/y</b>") and not takes(must, "so <b>4/x</b>") and not takes(must, "")


def test_one_tag() -> None:
    tag = {"type": "tag", "begin": "<j>", "content": {"type": "json_schema", "json_schema": NUMBER}, "end": "</j>"}
    assert takes({"type": "structural_tag", "format": tag}, '<j>{"n":1}</j>')
    assert not takes({"type": "structural_tag", "format": tag}, '<j>{"n":1}</j><j>')


def test_schemas_inside_are_prepared() -> None:
    schema = {"type": "array", "uniqueItems": True}
    source = json.dumps({"structures": [{"begin": "<a>", "schema": schema, "end": ""}], "triggers": ["<a>"]})
    with pytest.raises(InvalidGrammar, match="#/structures/0/content"):
        compiled("structural_tag", source)
    assert [issue.pointer for issue in compiled("structural_tag", source, strict=False).relaxed] == [
        "#/structures/0/schema/uniqueItems"
    ]


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ({"structures": [{"begin": "<x>", "schema": {}}], "triggers": ["<a"]}, "#/structures/0/begin"),
        ({"structures": [{"begin": "<x>", "schema": {}}], "triggers": []}, "#/triggers"),
        ({"format": {"type": "poem"}}, "#/format/type"),
        ({"format": {"type": "sequence"}}, "#/format/elements"),
        ({"format": {"type": "sequence", "elements": [{"type": "any_text"}] * 2}}, "#/format/elements/1"),
        ({"format": {"type": "token", "token": "nope"}}, "#/format"),
        ({"format": {"type": "tag", "begin": {"type": "token", "token": 10**9}, "content": {}}}, "#/format/begin"),
        (tags(type="token_triggered_tags", trigger_tokens=["<a"]), "#/format/trigger_tokens"),
        (tags(tags=[{"begin": "<a>", "content": {"type": "nope"}, "end": ""}]), "#/format/tags/0/content/type"),
        (tags(tags=[{"begin": "", "content": {}, "end": ""}]), "#/format/tags/0/begin"),
        (tags(tags=[{"begin": "<a>", "end": ""}]), "#/format/tags/0/content"),
        (tags(tags=[{"begin": "<a>", "content": {}, "end": 5}]), "#/format/tags/0/end"),
    ],
)
def test_faults_are_named(source: dict[str, Any], pointer: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        compiled("structural_tag", json.dumps(source))
    assert f"at {pointer}:" in caught.value.message


def form(**value: Any) -> dict[str, Any]:
    return {"type": "structural_tag", "format": value}


SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": NUMBER}
TAG: dict[str, Any] = {"type": "tag", "begin": "<j>", "content": SCHEMA, "end": "</j>"}
WORD: dict[str, Any] = {"type": "const_string", "value": "so: "}
TEXT: dict[str, Any] = {"type": "any_text"}


@pytest.mark.parametrize(
    ("value", "good", "bad"),
    [
        (SCHEMA, ['{"n":1}'], ["", '{"n":"1"}']),
        ({"type": "regex", "pattern": "[0-9]/x"}, ["4/x"], ["x"]),
        (TEXT, ["", "any <j> thing"], []),
        ({"type": "or", "elements": [SCHEMA, WORD]}, ['{"n":1}', "so: "], ["so"]),
        ({"type": "sequence", "elements": [WORD, TAG]}, ['so: <j>{"n":1}</j>'], ["so: ", '<j>{"n":1}</j>']),
        ({"type": "sequence", "elements": [TEXT, TAG]}, ['Well. <j>{"n":1}</j>', '<j>{"n":2}</j>'], ["x", "<j>1</j>"]),
        ({"type": "sequence", "elements": [TEXT, WORD, TEXT]}, ["I say so: this"], ["I say so"]),
        ({"type": "tags_with_separator", "tags": [TAG], "separator": ", "},
         ["", '<j>{"n":1}</j>', '<j>{"n":1}</j>, <j>{"n":2}</j>'], ['<j>{"n":1}</j><j>{"n":2}</j>', "x"]),
        ({"type": "tags_with_separator", "tags": [TAG], "separator": ",", "at_least_one": True,
          "stop_after_first": True},
         ['<j>{"n":1}</j>'], ["", '<j>{"n":1}</j>,<j>{"n":2}</j>']),
        ({"type": "tag", "begin": "<o>", "content": {"type": "sequence", "elements": [WORD, TEXT]}, "end": "</o>"},
         ["<o>so: any < text</o>"], ["<o>so: any", "<o>any</o>"]),
    ],
)  # fmt: skip
def test_formats_inside_each_other(value: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert all(takes(form(**value), text) for text in good)
    assert not any(takes(form(**value), text) for text in bad)


@pytest.mark.parametrize("spelled", [True, False])
def test_triggers_that_are_tokens(spelled: bool) -> None:
    """A token begins the tag; the same letters written as other tokens are text."""
    vocabulary, name = aspen(), "<tool_call>"
    token: Any = name if spelled else vocabulary.markers[name]
    begin = {"type": "token", "token": token}
    content = {"type": "json_schema", "json_schema": NUMBER}
    tag = {"begin": begin, "content": content, "end": {"type": "token", "token": "</tool_call>"}}
    for source in (
        form(type="token_triggered_tags", trigger_tokens=[token], tags=[tag]),
        form(type="triggered_tags", triggers=[begin], tags=[tag]),
        form(type="triggered_tags", triggers=["<tool"], tags=[{**tag, "begin": name}]),
    ):
        grammar = compiled("structural_tag", json.dumps(source))
        assert fits(grammar.new_state(), 'so <tool_call>{"n":1}</tool_call> and', vocabulary)
        assert not fits(grammar.new_state(), "so <tool_call>{}</tool_call>", vocabulary)
        letters = [token for letter in name for token in vocabulary.encode(letter)]
        state = grammar.new_state()
        assert vocabulary.markers[name] not in letters and state.accept(letters) == len(letters)
        assert state.is_accepting()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('x <a>{"n": 1}</a> y <a>{"n": 2}</a>', True),
        ('x <a>{"n": 1}</a> y <a>{"n": 1.5}</a>', False),
        ("no tag", None),
    ],
)
def test_finished_texts_are_checked(text: str, expected: bool | None) -> None:
    spec = GrammarSpec("structural_tag", json.dumps(tags()))
    assert check_text(spec, text)[0] is expected
    older = {"structures": [{"begin": "<a>", "schema": NUMBER, "end": "</a>"}], "triggers": ["<a>"]}
    assert check_text(GrammarSpec("structural_tag", json.dumps(older)), text)[0] is expected
