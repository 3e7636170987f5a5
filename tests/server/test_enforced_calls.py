"""What the grammar of a format lets a model write, its reader reads: random walks through the masks, no model."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pando.grammar.guidance import GuidanceBackend
from pando.grammar.masks import allowed
from pando.grammar.protocols import GrammarState
from pando.grammar.tool_formats import FORMATS, ToolFormat
from pando.grammar.tools import Tool, ToolCompiler
from pando.grammar.verify import Verifier
from pando.grammar.vocabulary import Vocabulary
from pando.server.parsers.events import CallArguments, CallBroken, CallEnd, CallStart, Text
from pando.server.parsers.reply import ReplyFormat, ReplyParser, ReplyStyle
from pando.server.parsers.shapes import marker_texts
from pando.tokenizer.detokenizer import make_detokenizer
from pando.tokenizer.tokenizer import Tokenizer
from tests.server.test_chat_formats import with_markers
from tests.server.test_tool_parsers import MARKERS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "minLength": 1, "maxLength": 6},
        "count": {"type": "integer", "minimum": -5, "maximum": 99},
        "kind": {"enum": ["a b", 7, None, "<x>"]},
        "open": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}},
        "maybe": {"type": ["string", "null"]},
    },
    "required": ["code", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    Tool("look_up", SCHEMA, True),
    Tool("ping", {"type": "object", "properties": {}, "additionalProperties": False}, True),
]
VERIFIERS = {tool.name: Verifier(tool.parameters) for tool in TOOLS}


def setup(form: ToolFormat, special: bool) -> tuple[Tokenizer, GuidanceBackend]:
    names = [*MARKERS] if form.name == "harmony" else marker_texts(form)
    tokenizer = with_markers(names if special else [], special=special)
    end = tokenizer.eos_token_id
    assert end is not None
    return tokenizer, GuidanceBackend(Vocabulary.of(tokenizer, [end]))


def walk(backend: GuidanceBackend, state: GrammarState, rng: random.Random, likely: list[int]) -> list[int] | None:
    """Tokens that the masks allow, chosen at random, those of markup rather often; None if it does not end."""
    masks = backend.allocate_masks(1)
    tokens: list[int] = []
    while not state.is_finished() and len(tokens) < 250:
        state.fill(masks, 0)
        may = allowed(masks[0]).tolist()
        often = [token for token in likely if token in may]
        token = rng.choice(often) if often and rng.random() < 0.5 else rng.choice(may)
        if token in backend.vocabulary.eos_ids:
            return tokens
        assert state.accept([token]) == 1
        tokens.append(token)
    return tokens if state.is_accepting() else None


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", FORMATS)
def test_enforced_calls_are_read(name: str, special: bool) -> None:
    form = FORMATS[name]
    if name == "harmony" and not special:
        return  # a family whose markers are always tokens
    tokenizer, backend = setup(form, special)
    grammar = ToolCompiler(form, backend.vocabulary.markers).compile(TOOLS, "required")
    assert grammar.spec is not None
    style = ReplyStyle(form, None, tokenizer)
    shape = ReplyFormat(style, max_calls=1 << 30, tools={t.name: t.parameters for t in TOOLS}, enforced=True)
    rng = random.Random(7)
    markup = [
        token for text in ('"', "}", "]", ",", "\n", "<", "</", ">", ")", ":", "'") for token in tokenizer.encode(text)
    ]
    seen = 0
    compiled = backend.compile(grammar.spec)
    for _ in range(30):
        tokens = walk(backend, compiled.new_state(), rng, markup)
        if tokens is None:
            continue
        detokenizer = make_detokenizer(tokenizer, continues=True, letters=shape.letters)
        text = detokenizer.push(tokens) + detokenizer.finish()
        parser = ReplyParser(shape)
        events = parser.push(text, tokens) + parser.finish()
        assert not [each for each in events if isinstance(each, CallBroken)], (text, events)
        if name != "harmony":  # which may have said something in another channel
            assert not [each for each in events if isinstance(each, Text)], (text, events)
        arguments: dict[int, str] = {}
        names = {each.index: each.name for each in events if isinstance(each, CallStart)}
        for each in events:
            if isinstance(each, CallArguments):
                arguments[each.index] = arguments.get(each.index, "") + each.text
        assert names and len([each for each in events if isinstance(each, CallEnd)]) == len(names)
        for index, tool in names.items():
            assert VERIFIERS[tool].violation(arguments[index]) is None, (text, arguments[index])
            seen += bool(json.loads(arguments[index]))
    assert seen >= 5
