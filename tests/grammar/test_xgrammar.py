"""The second backend, where it is installed, against the default one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar, MissingExtra
from pando.grammar.masks import allowed
from pando.grammar.xgrammar_backend import CompilerProcess, XGrammarBackend, gaps
from tests.grammar.vocabularies import aspen, backend, fits

INSTALLED = importlib.util.find_spec("xgrammar") is not None
needs_xgrammar = pytest.mark.skipif(
    not INSTALLED, reason="xgrammar is not installed: pip install 'pando-llm[xgrammar]'"
)

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"enum": ["left", "right"]}, "n": {"type": "integer"}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "pointers"),
    [
        (SCHEMA, []),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, ["#/allOf"]),
        ({"items": {"$ref": "#/x", "minimum": 3}}, ["#/items/$ref"]),
        ({"type": "string", "pattern": "a", "maxLength": 3}, ["#/maxLength"]),
        ({"type": "number", "multipleOf": 0.5}, ["#/multipleOf"]),
    ],
)
def test_gaps(schema: Any, pointers: list[str]) -> None:
    found = [issue.pointer for issue in gaps(schema)]
    assert found == pointers


@pytest.mark.skipif(INSTALLED, reason="xgrammar is installed")
def test_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"pando-llm\[xgrammar\]"):
        XGrammarBackend(aspen())


@pytest.fixture(scope="module")
def second() -> Iterator[XGrammarBackend]:
    made = XGrammarBackend(aspen())
    yield made
    made.close()


def spec(source: Any, kind: str = "json_schema", *, strict: bool = True) -> GrammarSpec:
    text = source if isinstance(source, str) else json.dumps(source)
    return GrammarSpec(kind, text, GrammarOptions(strict=strict))  # type: ignore[arg-type]


@needs_xgrammar
def test_walk(second: XGrammarBackend) -> None:
    grammar = second.compile(spec(SCHEMA))
    text = '{"name":"Ann","kind":"right","n":3}'
    state, masks, tokens = grammar.new_state(), second.allocate_masks(1), aspen().encode(text)
    at = forced_total = 0
    while at < len(tokens):
        forced = state.forced_tokens(32)
        assert forced == tokens[at : at + len(forced)]
        forced_total += len(forced)
        state.fill(masks, 0)
        assert tokens[at] in set(allowed(masks[0]).tolist())
        taken = forced or [tokens[at]]
        assert state.validate(taken) == len(taken) == state.accept(taken)
        at += len(taken)
    assert forced_total > 3 and state.is_accepting() and grammar.nbytes > 0
    end = aspen().eos_ids[0]
    assert state.accept([end]) == 1 and state.is_finished()
    state.fill(masks, 0)
    assert allowed(masks[0]).tolist() == [end]
    copy = state.fork()
    copy.rollback(len(tokens) + 1)
    assert fits(copy, text, aspen()) and not fits(grammar.new_state(), '{"name":"Ann","kind":"up"}', aspen())


@needs_xgrammar
def test_it_agrees_with_the_default(second: XGrammarBackend) -> None:
    pairs = [second.compile(spec(SCHEMA)), backend().compile(spec(SCHEMA))]
    for text in ('{"name":"","kind":"left"}', '{"kind":"left"}', '{"name":"x","kind":"left","z":1}', "[]"):
        first, other = (fits(grammar.new_state(), text, aspen()) for grammar in pairs)
        assert first == other


@needs_xgrammar
def test_what_it_ignores_is_refused_or_flagged(second: XGrammarBackend) -> None:
    schema = {"type": "array", "items": {"type": "integer", "multipleOf": 3}}
    with pytest.raises(InvalidGrammar, match="#/items/multipleOf"):
        second.compile(spec(schema))
    grammar = second.compile(spec(schema, strict=False))
    assert [issue.pointer for issue in grammar.relaxed] == ["#/items/multipleOf"]
    assert grammar.violation("[4]") and grammar.violation("[3]") is None


@needs_xgrammar
def test_the_deadline_kills_the_compiler(second: XGrammarBackend) -> None:
    names = {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,40}-[0-9]{2,8}$"} for i in range(400)}
    process = CompilerProcess(aspen(), deadline_s=0.05)
    job = {"kind": "json_schema", "source": json.dumps({"properties": names}), "separators": [",", ":"]}
    with pytest.raises(InvalidGrammar, match="0.05 s"):
        process.compile(job)
    process.close()
    with pytest.raises(InvalidGrammar):
        second.compile(spec("(a", "regex"))
    assert fits(second.compile(spec("a+", "regex")).new_state(), "aa", aspen()), "the other compiler goes on"
