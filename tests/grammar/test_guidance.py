"""The default backend: masks, accept, rollback, forced tokens, ends."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.limits import Limits
from pando.grammar.masks import allowed, allows
from pando.grammar.protocols import GrammarState
from tests.grammar.vocabularies import VOCABULARIES, aspen, backend, byte_level, compiled, fits

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0},
        "mood": {"enum": ["glad", "glum", "grey"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "nested": {"$ref": "#"},
    },
    "required": ["name", "mood"],
    "additionalProperties": False,
}

SOURCES = {
    "object": ("json_schema", json.dumps(PERSON)),
    "any object": ("json_object", ""),
    "regex": ("regex", r"(\+[0-9]{2} )?[0-9]{3}-[0-9]{4}( ext [a-z]{1,5})?"),
    "choice": ("choice", '["yes", "yes, but", "no", "Grüße"]'),
    "ebnf": ("ebnf", 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'),
    "lark": ("lark", 'start: "a" start "b" | "c"'),
}


def random_token(state: GrammarState, masks: np.ndarray, rng: random.Random) -> int | None:
    """A token that the mask allows, ends less often than others; None if only an end is left and refused."""
    state.fill(masks, 0)
    choices = allowed(masks[0])
    return int(choices[rng.randrange(len(choices))]) if len(choices) else None


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("source", SOURCES)
def test_mask_is_what_accept_takes(name: str, source: str) -> None:
    """Every allowed token is accepted and every other one refused, at each place of random walks."""
    grammar, rng = compiled(*SOURCES[source], name=name), random.Random(7)
    vocabulary, masks = VOCABULARIES[name](), backend(name).allocate_masks(1)
    for _ in range(3):
        state = grammar.new_state()
        for _ in range(12):
            assert state.fill(masks, 0)
            bits = set(allowed(masks[0]).tolist())
            assert bits and max(bits) < vocabulary.num_tokens
            forced = state.forced_tokens(64)
            assert not forced or bits == {forced[0]}  # only the tokenizer's own way to write what must come
            sample = rng.sample(range(vocabulary.vocab_size), 60) + rng.sample(sorted(bits), min(40, len(bits)))
            for token in sample:
                taken = state.validate([token])
                assert taken == (token in bits) or taken and forced, token
                assert state.fork().accept([token]) == taken, token
            assert bool(bits & set(vocabulary.eos_ids)) == state.is_accepting()
            token = rng.choice(sorted(bits))
            assert state.accept([token]) == 1
            if token in vocabulary.eos_ids:
                assert state.is_finished() and state.is_accepting()
                break


@pytest.mark.parametrize("name", VOCABULARIES)
def test_random_walk_equals_a_fresh_replay(name: str) -> None:
    """10,000 accepts and rollbacks leave the state that a new one reaches with the same tokens."""
    grammar, rng, masks = compiled("json_schema", json.dumps(PERSON), name=name), random.Random(3), None
    masks = backend(name).allocate_masks(2)
    state, history = grammar.new_state(), []
    for operation in range(10_000):
        if history and rng.random() < 0.45:
            n = min(len(history), rng.choice((1, 1, 2, 5)))
            state.rollback(n)
            del history[-n:]
        else:
            forced = state.forced_tokens(8) if rng.random() < 0.3 else []
            token = random_token(state, masks, rng)
            assert token is not None or state.is_finished()
            taken = forced or ([] if token is None else [token])
            accepted = state.accept(taken)
            assert accepted == (0 if state.is_finished() and taken == [] else len(taken)) or state.is_finished()
            history += taken[:accepted]
        if operation % 250 == 0:
            fresh = grammar.new_state()
            assert fresh.accept(history) == len(history)
            fresh.fill(masks, 0)
            state.fill(masks, 1)
            assert np.array_equal(masks[0], masks[1])
            assert fresh.is_accepting() == state.is_accepting() and fresh.is_finished() == state.is_finished()
            assert fresh.forced_tokens(99) == state.forced_tokens(99)
    assert state.error() is None


@pytest.mark.parametrize("name", ["aspen", "byte_level"])
def test_forced_tokens_are_the_tokenizers_own(name: str) -> None:
    """Walking a text, forced tokens are always the next tokens of the tokenised text."""
    vocabulary = VOCABULARIES[name]()
    value = {
        "name": "Öst, Åse",
        "age": 31,
        "mood": "glum",
        "tags": ["a b", "ü"],
        "nested": {"name": "", "mood": "grey"},
    }
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    tokens, at, forced_total = vocabulary.encode(text), 0, 0
    state = compiled("json_schema", json.dumps(PERSON), name=name).new_state()
    while at < len(tokens):
        forced = state.forced_tokens(64)
        assert forced == tokens[at : at + len(forced)]
        taken = forced or [tokens[at]]
        assert state.accept(taken) == len(taken)
        forced_total += len(forced)
        at += len(taken)
    assert state.is_accepting() and forced_total >= 8


def test_forced_tokens_stop_where_the_right_edge_is_open() -> None:
    """After a forced `"` another token may hold more letters: it is not forced alone."""
    schema = {"type": "object", "properties": {"ab": {"type": "string"}}, "required": ["ab"]}
    state = compiled("json_schema", json.dumps(schema)).new_state()
    forced = state.forced_tokens(64)
    whole = aspen().encode('{"ab":"xyz"}')
    assert forced == whole[: len(forced)]
    assert state.forced_tokens(2) == forced[:2] and state.forced_tokens(0) == []


def test_a_refused_token_changes_nothing() -> None:
    state, masks = compiled("choice", '["left", "right"]').new_state(), backend().allocate_masks(2)
    state.fill(masks, 0)
    wrong = aspen().encode("up")
    assert state.accept(wrong) == 0 and state.validate(wrong) == 0
    state.fill(masks, 1)
    assert np.array_equal(masks[0], masks[1]) and state.error() is None
    assert fits(state, "left", aspen())


def test_end_is_accepted_undone_and_final() -> None:
    end = aspen().eos_ids[0]
    state, masks = compiled("regex", "a+").new_state(), backend().allocate_masks(1)
    letter = aspen().encode("a")
    assert state.accept([end]) == 0 and not state.is_accepting()
    assert state.accept([*letter, end, *letter]) == len(letter) + 1
    assert state.is_finished() and state.forced_tokens(5) == [] and state.validate(letter) == 0
    state.fill(masks, 0)
    assert allowed(masks[0]).tolist() == [end]
    state.rollback(1)
    assert not state.is_finished() and state.is_accepting()
    assert state.validate([*letter, end]) == len(letter) + 1
    state.rollback(len(letter))
    assert not state.is_accepting()


def test_several_end_ids() -> None:
    vocabulary, masks = byte_level(), backend("byte_level").allocate_masks(1)
    state = compiled("choice", '["a"]', name="byte_level").new_state()
    assert state.accept(vocabulary.encode("a")) == 1
    state.fill(masks, 0)
    assert set(allowed(masks[0]).tolist()) == set(vocabulary.eos_ids)
    assert state.is_finished()


def test_fork_is_independent() -> None:
    state = compiled("choice", '["abc", "abd"]').new_state()
    state.accept(state.forced_tokens(9) or aspen().encode("a"))
    copy = state.fork()
    taken = copy.accept(aspen().encode("bc"))
    assert taken > 0
    copy.rollback(taken)
    masks = backend().allocate_masks(2)
    state.fill(masks, 0)
    copy.fill(masks, 1)
    assert np.array_equal(masks[0], masks[1])


def test_batch_fill_is_fill_of_each() -> None:
    parallel = GuidanceBackend(aspen(), num_threads=2)
    grammars = [parallel.compile(GrammarSpec(kind, source)) for kind, source in SOURCES.values()]  # type: ignore[arg-type]
    states = [grammar.new_state() for grammar in grammars]
    done = parallel.compile(GrammarSpec("choice", '["a"]')).new_state()
    done.accept([*aspen().encode("a"), aspen().eos_ids[0]])
    states.append(done)
    rows = list(reversed(range(len(states))))
    masks, alone = parallel.allocate_masks(len(states)), parallel.allocate_masks(1)
    assert all(parallel.fill_batch(list(zip(states, rows, strict=True)), masks))
    for state, row in zip(states, rows, strict=True):
        state.fill(alone, 0)
        assert np.array_equal(masks[row], alone[0])


def test_fresh_masks_allow_all_tokens_but_the_padding() -> None:
    vocabulary, masks = aspen(), backend().allocate_masks(3)
    assert masks.dtype == np.int32 and masks.shape == (3, (vocabulary.vocab_size + 31) // 32)
    assert masks.flags["C_CONTIGUOUS"] and masks.flags["WRITEABLE"]
    assert allowed(masks[1]).tolist() == list(range(vocabulary.num_tokens))
    assert allows(masks[0], 0) and not allows(masks[0], vocabulary.num_tokens)


def test_work_of_a_step_is_bounded() -> None:
    """A state that exceeds its limits reports an error and offers the end; nothing is raised."""
    tight = GuidanceBackend(aspen(), Limits(step_items=40))
    rules = "a a a a a\na: b a | b | \nb: c | c c | \nc: /x?/ | /x/ | /xx?/"
    with pytest.raises(InvalidGrammar, match="limit 40"):  # the first mask is made while compiling
        tight.compile(GrammarSpec("lark", f"start: {rules}"))
    state = tight.compile(GrammarSpec("lark", f'start: "y" {rules}')).new_state()
    masks = tight.allocate_masks(1)
    assert state.accept(aspen().encode("y")) == 1
    for _ in range(30):
        state.fill(masks, 0)
        if state.error() is not None or state.accept(aspen().encode("x")) == 0:
            break
    state.fill(masks, 0)
    assert state.error() and state.is_finished()
    assert allowed(masks[0]).tolist() == list(aspen().eos_ids)


@pytest.mark.parametrize(
    ("kind", "source", "says"),
    [
        ("regex", "(a", "regex"),
        ("regex", "(?=a)b", "look"),
        ("lark", "start: missing", "missing"),
        ("ebnf", 'root ::= "a" missing', "missing"),
        ("choice", "[]", "at least one"),
        ("choice", '{"a": 1}', "at least one"),
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[]", "object or a boolean"),
        ("json_schema", "false", "nsatisfiable"),
        ("json_schema", '{"type": "strange"}', "#/type"),
        ("json_schema", '{"properties": {"a/b": {"items": {"required": 5}}}}', "#/properties/a~1b/items/required"),
        ("structural_tag", "{}", "#/structures"),
    ],
)
def test_broken_sources_are_refused_with_a_reason(kind: str, source: str, says: str) -> None:
    with pytest.raises(InvalidGrammar) as caught:
        compiled(kind, source)
    assert says in caught.value.message and caught.value.param == kind and caught.value.status == 400
    issues = backend().validate(GrammarSpec(kind, source))  # type: ignore[arg-type]
    assert issues and says in str(issues[0])


def test_validate_reports_what_is_widened() -> None:
    spec = GrammarSpec("json_schema", '{"type": "array", "uniqueItems": true}')
    issues = backend().validate(spec)
    assert [issue.pointer for issue in issues] == ["#/uniqueItems"] and not issues[0].fatal
    assert backend().validate(GrammarSpec("json_schema", '{"type": "array"}')) == []


@pytest.mark.parametrize(
    ("whitespace", "good", "bad"),
    [
        ("compact", '{"a":1,"b":[2]}', '{"a": 1,"b":[2]}'),
        ("spaced", '{"a": 1, "b": [2]}', '{"a":1,"b":[2]}'),
        ("bounded", '{ "a" : 1,\n"b":[ 2]}', '{"a":   1,"b":[2]}'),
        ("flexible", '{"a":     1,\n\n\n"b":[2]}', '{"a":1;"b":[2]}'),
    ],
)
def test_white_space(whitespace: str, good: str, bad: str) -> None:
    schema = json.dumps(
        {"properties": {"a": {"type": "integer"}, "b": {"items": {"type": "integer"}}}, "type": "object"}
    )
    grammar = backend().compile(GrammarSpec("json_schema", schema, GrammarOptions(whitespace=whitespace)))  # type: ignore[arg-type]
    assert fits(grammar.new_state(), good, aspen())
    assert not fits(grammar.new_state(), bad, aspen())


def test_a_schema_can_not_change_the_options() -> None:
    schema = '{"x-guidance": {"lenient": true, "whitespace_flexible": true}, "type": "array", "uniqueItems": true}'
    with pytest.raises(InvalidGrammar, match="uniqueItems"):
        compiled("json_schema", schema)


def test_keys_tell_sources_options_and_vocabularies_apart() -> None:
    base = GrammarSpec("json_schema", '{"a": 1, "b": 2}')
    others = [
        GrammarSpec("json_schema", '{"b": 2, "a": 1}'),
        GrammarSpec("regex", base.source),
        GrammarSpec("json_schema", base.source, GrammarOptions(strict=True)),
        GrammarSpec("json_schema", base.source, GrammarOptions(whitespace="spaced")),
    ]
    keys = {backend().key(spec) for spec in (base, *others)} | {backend("byte_level").key(base)}
    assert len(keys) == 6 and backend().key(base) == GuidanceBackend(aspen()).key(base)
