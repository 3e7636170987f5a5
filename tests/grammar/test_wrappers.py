"""Grammars after a reasoning block, and without some tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pando.core.sampling import GrammarSpec, ReasoningSpec
from pando.grammar.guidance import GuidanceBackend
from pando.grammar.masks import allowed, allows
from pando.grammar.wrappers import ReasoningGate, ReasoningMarks, ReasoningWrap, Start, TokenFilter
from tests.grammar.vocabularies import aspen, aspen_tokenizer, backend, compiled

VOCABULARY = aspen()
OPEN, CLOSE = VOCABULARY.markers["<think>"], VOCABULARY.markers["</think>"]
END = VOCABULARY.eos_ids[0]
LONG_CLOSE = tuple(VOCABULARY.encode("\nDone thinking:\n"))
"""An end marker of several tokens, as families without a token for it have."""


def tokens(text: str) -> list[int]:
    return VOCABULARY.encode(text)


def gate(start: Start = "inside", *, end: tuple[int, ...] = (CLOSE,), budget: int | None = None) -> ReasoningGate:
    marks = ReasoningMarks(VOCABULARY, (OPEN,), end, budget)
    return ReasoningGate(compiled("choice", '["yes", "no"]').new_state(), marks, start)


def bits(state: ReasoningGate | TokenFilter) -> set[int]:
    masks = backend().allocate_masks(1)
    assert state.fill(masks, 0)
    return set(allowed(masks[0]).tolist())


def test_grammar_starts_after_the_block() -> None:
    state, thought = gate(), tokens("Hmm, 17? no")
    assert bits(state) == set(range(VOCABULARY.num_tokens)) - {END}
    assert state.accept(thought) == len(thought) and not state.is_accepting()
    assert state.accept([END]) == 0, "the text may not end before the grammar has begun"
    assert state.accept([CLOSE]) == 1
    assert bits(state) == {state.forced_tokens(1)[0]} if state.forced_tokens(1) else tokens("yes")[0] in bits(state)
    assert state.accept(tokens("maybe")) == 0
    assert state.accept([*tokens("yes"), END]) == len(tokens("yes")) + 1
    assert state.is_finished() and state.is_accepting()


@pytest.mark.parametrize("end", [(CLOSE,), LONG_CLOSE])
def test_border_inside_a_draft(end: tuple[int, ...]) -> None:
    """A draft may hold the end of the thinking and the beginning of the answer; each side has its own rules."""
    state = gate(end=end)
    draft = [*tokens("so no"), *end, *tokens("no"), END]
    assert state.validate(draft) == len(draft)
    assert state.validate([*draft[:-1], CLOSE]) == len(draft) - 1
    assert state.validate([*tokens("so no"), *end, *tokens("maybe")]) == len(tokens("so no")) + len(end)
    assert not state.is_accepting() and state.accept(draft) == len(draft) and state.is_finished()
    state.rollback(2)
    assert not state.is_finished()
    before = len(tokens("so no")) + len(end) + len(tokens("no")) + 1 - 2
    state.rollback(before - 1)
    assert state.validate(tokens("anything at all")) == len(tokens("anything at all"))


def test_random_walk_across_the_border_equals_a_replay() -> None:
    rng, masks = random.Random(5), backend().allocate_masks(2)
    text = [*tokens("a thought\nDone thinking"), *LONG_CLOSE, *tokens("yes"), END]
    state, at = gate(end=LONG_CLOSE), 0
    for _ in range(600):
        if rng.random() < 0.5 and at:
            n = rng.randint(1, at)
            state.rollback(n)
            at -= n
        else:
            n = rng.randint(0, len(text) - at)
            assert state.validate(text[at : at + n]) == n
            assert state.accept(text[at : at + n]) == n
            at += n
        fresh = gate(end=LONG_CLOSE)
        assert fresh.accept(text[:at]) == at
        fresh.fill(masks, 0)
        state.fork().fill(masks, 1)
        assert np.array_equal(masks[0], masks[1])
        assert fresh.forced_tokens(9) == state.forced_tokens(9)
        assert (fresh.is_accepting(), fresh.is_finished()) == (state.is_accepting(), state.is_finished())


def test_either_with_or_without_a_block() -> None:
    state = gate("optional")
    first = compiled("choice", '["yes", "no"]').new_state()
    masks = backend().allocate_masks(1)
    first.fill(masks, 0)
    assert bits(state) == set(allowed(masks[0]).tolist()) | {OPEN}
    assert state.forced_tokens(5) == []
    assert state.validate([OPEN, *tokens("x"), CLOSE, *tokens("yes"), END]) == 4 + len(tokens("yes"))
    assert state.validate([*tokens("no"), END]) == len(tokens("no")) + 1
    assert state.fork().accept([OPEN, *tokens("hm")]) == 1 + len(tokens("hm"))
    assert state.accept([*tokens("no"), END]) == len(tokens("no")) + 1 and state.is_finished()
    state.rollback(len(tokens("no")) + 1)
    assert state.accept([OPEN]) == 1 and END not in bits(state)


def test_budget_forces_the_end() -> None:
    state = gate(end=LONG_CLOSE, budget=4)
    assert state.accept(tokens("one two")[:2]) == 2 and state.forced_tokens(9) == []
    assert state.accept([*tokens("x"), *tokens("y")]) == 2
    inner = compiled("choice", '["yes", "no"]').new_state().forced_tokens(9)
    assert state.forced_tokens(9) == [*LONG_CLOSE, *inner][:9] and bits(state) == {LONG_CLOSE[0]}
    assert state.accept(tokens("more")) == 0 and state.validate(tokens("more")) == 0
    assert state.accept(LONG_CLOSE[:1]) == 1
    assert state.forced_tokens(1) == [LONG_CLOSE[1]]
    assert state.accept(LONG_CLOSE[1:]) == len(LONG_CLOSE) - 1
    assert state.validate(tokens("yes")) == len(tokens("yes"))


@pytest.mark.parametrize(
    ("prompt", "start"),
    [
        ("<|im_start|>assistant\n", "optional"),
        ("<|im_start|>assistant\n<think>\n", "inside"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "now"),
        ("<think>old</think>\n5<|im_end|>\n<|im_start|>user\nnext<|im_end|>\n<|im_start|>assistant\n", "optional"),
        ("<think>old</think>\n5<|im_end|>\n<|im_start|>assistant\n<think>", "inside"),
    ],
)
def test_the_prompt_says_where_the_answer_begins(prompt: str, start: Start) -> None:
    ids = aspen_tokenizer().encode(prompt)
    assert ReasoningMarks(VOCABULARY, (OPEN,), (CLOSE,)).start_of(ids) == start
    assert ReasoningMarks(VOCABULARY, (), (CLOSE,)).start_of(ids) == "now"


def test_marks_need_an_end() -> None:
    with pytest.raises(ValueError, match="end marker"):
        ReasoningMarks(VOCABULARY, (OPEN,), ())


def test_filter_bans_tokens_everywhere() -> None:
    banned = tokens("yes")[0]
    state = TokenFilter(compiled("choice", '["yes", "no"]').new_state(), [banned], VOCABULARY.vocab_size)
    assert banned not in bits(state) and tokens("no")[0] in bits(state)
    assert state.accept([banned]) == 0 and state.validate([*tokens("no"), banned]) == len(tokens("no"))
    copy = state.fork()
    assert copy.accept([*tokens("no"), END]) == len(tokens("no")) + 1 and copy.is_finished() and copy.is_accepting()
    copy.rollback(1)
    assert copy.is_accepting() and not state.is_accepting() and state.error() is None
    forced = compiled("choice", '["yes"]').new_state()
    assert forced.forced_tokens(5) and TokenFilter(forced, [banned], VOCABULARY.vocab_size).forced_tokens(5) == []


def test_wrapped_states_in_a_batch() -> None:
    parallel = GuidanceBackend(VOCABULARY, num_threads=2)
    grammar = parallel.compile(GrammarSpec("choice", '["yes", "no"]'))
    marks = ReasoningMarks(VOCABULARY, (OPEN,), (CLOSE,))
    thinking, answering = (ReasoningGate(grammar.new_state(), marks) for _ in range(2))
    answering.accept([CLOSE])
    maybe = ReasoningGate(grammar.new_state(), marks, "optional")
    banned = TokenFilter(grammar.new_state(), tokens("yes")[:1], VOCABULARY.vocab_size)
    states = [thinking, answering, maybe, TokenFilter(answering.fork(), tokens("no"), VOCABULARY.vocab_size), banned]
    masks = parallel.allocate_masks(5)
    assert parallel.fill_batch([(state, row) for row, state in enumerate(states)], masks) == [True] * 5
    for row, state in enumerate(states):
        assert set(allowed(masks[row]).tolist()) == bits(state)
    assert not allows(masks[0], END)


def test_border_inside_a_forced_run() -> None:
    """A marker that must be completed and a grammar that must begin in one way are one run of forced tokens."""
    marks = ReasoningMarks(VOCABULARY, (OPEN,), LONG_CLOSE, committed=1)
    only = compiled("choice", '["The answer is yes."]')
    state = ReasoningGate(only.new_state(), marks)
    assert state.accept(tokens("a thought")) == len(tokens("a thought"))
    assert state.forced_tokens(64) == []
    assert state.accept(LONG_CLOSE[:1]) == 1
    answer = only.new_state().forced_tokens(64)
    run = state.forced_tokens(64)
    assert run == [*LONG_CLOSE[1:], *answer] and len(answer) > 2
    for limit in range(1, len(run)):
        assert state.forced_tokens(limit) == run[:limit]
    assert state.accept(tokens("no")) == 0 and bits(state) == {LONG_CLOSE[1]}
    before = state.fork()
    assert state.validate(run) == len(run) and state.accept(run) == len(run)
    for back in range(1, len(run) + 1):
        state.rollback(1)
        assert state.forced_tokens(64)[:back] == run[len(run) - back :]
    assert bits(state) == bits(before) and not state.is_accepting()


def test_wrapping_by_what_a_request_says() -> None:
    wrap = ReasoningWrap(VOCABULARY.num_tokens, VOCABULARY.vocab_size, VOCABULARY.eos_ids)
    inner = compiled("choice", '["yes", "no"]').new_state()
    assert wrap(inner, ReasoningSpec("now", (OPEN,), (CLOSE,))) is inner
    for start in ("inside", "optional"):
        spec = ReasoningSpec(start, (OPEN,), (CLOSE,))  # type: ignore[arg-type]
        state = wrap(inner.fork(), spec)
        begun = [OPEN] if start == "optional" else []
        answer = [*begun, *tokens("hm"), CLOSE, *tokens("yes"), END]
        assert state.accept(answer) == len(answer) and state.is_finished()
