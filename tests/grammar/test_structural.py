"""Structural tags in both spellings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pando.errors import InvalidGrammar
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
    assert [issue.pointer for issue in compiled("structural_tag", source, strict=False).relaxed] == ["#/uniqueItems"]


@pytest.mark.parametrize(
    ("source", "pointer"),
    [
        ({"structures": [{"begin": "<x>", "schema": {}}], "triggers": ["<a"]}, "#/structures/0/begin"),
        ({"structures": [{"begin": "<x>", "schema": {}}], "triggers": []}, "#/triggers"),
        ({"format": {"type": "sequence"}}, "#/format/type"),
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
