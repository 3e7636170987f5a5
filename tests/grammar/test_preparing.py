"""Large sources are read in another process: the same grammars and errors, and a process that hangs can be ended."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pando.core.sampling import GrammarOptions, GrammarSpec
from pando.errors import InvalidGrammar, StepFailed
from pando.grammar import guidance, preparing
from pando.grammar.guidance import GuidanceBackend, Source
from pando.grammar.limits import Limits
from pando.grammar.preparing import LARGE, Preparer
from tests.grammar.vocabularies import byte_level


def properties(number: int) -> dict[str, object]:
    return {f"field_{i}": {"type": "string", "maxLength": i + 1} for i in range(number)}


def spec(number: int = 200, *, strict: bool = True, **more: object) -> GrammarSpec:
    """A schema of some KB."""
    schema = {"type": "object", "properties": properties(number), "required": ["field_3"], **more}
    return GrammarSpec("json_schema", json.dumps(schema), GrammarOptions(strict=strict))


@pytest.fixture
def preparer() -> Iterator[Preparer]:
    made = Preparer(Limits(), {}, deadline_s=60.0)
    yield made
    made.close()


def test_the_answer_is_what_reading_here_gives(preparer: Preparer) -> None:
    relaxed = spec(strict=False, propertyNames={"not": {"enum": ["a", "b"]}}, minProperties=3)
    choices = GrammarSpec("choice", json.dumps([f"choice {i}" for i in range(500)]))
    for each in (spec(), relaxed, choices, GrammarSpec("ebnf", 'root ::= "a" | "b"')):
        here = Source(each, Limits(), {}, None)
        found = preparer.prepare(each)
        assert found.grammar == here.grammar and tuple(found.relaxed) == here.relaxed
    assert Source(relaxed, Limits(), {}, None).relaxed, "the case has something to report"
    assert preparer.num_idle == 1, "one process serves all that ask in turn"


def test_errors_are_those_of_reading_here(preparer: Preparer) -> None:
    for each in (
        spec(items=3),
        spec(oneOf=[{"type": "object"}, {"type": "object"}]),
        GrammarSpec("json_schema", "{" * 5000),
    ):
        with pytest.raises(InvalidGrammar) as here:
            Source(each, Limits(), {}, None)
        with pytest.raises(InvalidGrammar) as apart:
            preparer.prepare(each)
        assert (apart.value.message, apart.value.param) == (here.value.message, here.value.param)


def test_a_process_that_does_not_answer_in_time_is_ended_and_the_next_request_has_a_new_one() -> None:
    preparer = Preparer(Limits(), {}, deadline_s=0.0)
    with pytest.raises(InvalidGrammar, match="could not be read in 0 s"):
        preparer.prepare(spec(400))
    assert preparer.num_idle == 0
    preparer._deadline_s = 60.0
    assert preparer.prepare(spec()).grammar
    preparer._idle[0].kill()  # as the system does when memory is short
    with pytest.raises(InvalidGrammar):
        preparer.prepare(spec())
    assert preparer.prepare(spec()).grammar
    preparer.close()
    assert preparer.num_idle == 0


def test_a_process_that_does_not_start_is_an_internal_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(StepFailed, match="does not start"):
        Preparer(Limits(), {}).prepare(spec())


def test_large_sources_are_not_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mechanism behind short gaps: what holds the interpreter for long happens elsewhere."""
    backend = GuidanceBackend(byte_level(), apart=True)
    read: list[int] = []
    original = guidance.check_text

    def noted(text: str, kind: str, limits: Limits) -> None:
        read.append(len(text))
        original(text, kind, limits)

    monkeypatch.setattr(guidance, "check_text", noted)
    small, large = spec(3), spec()
    assert len(small.source) < LARGE <= len(large.source)
    states = [backend.compile(each).new_state() for each in (small, large)]
    assert read == [len(small.source)]
    text = backend.vocabulary.encode('{"field_0":"x","field_3":"abc"}')
    assert states[1].accept(text) == len(text) and states[1].is_accepting()
    backend.close()


def test_a_large_schema_that_is_widened_is_still_checked_at_the_end() -> None:
    backend = GuidanceBackend(byte_level(), apart=True)
    grammar = backend.compile(spec(strict=False, minProperties=2, propertyNames={"not": {"enum": ["a", "b"]}}))
    assert grammar.relaxed
    assert grammar.violation('{"field_3":"abc"}') is not None
    assert grammar.violation('{"field_3":"abc","field_4":"x"}') is None
    backend.close()


def test_frames_of_any_size_pass_a_pipe(preparer: Preparer) -> None:
    """Larger than a pipe holds, in both directions."""
    large = spec(3000)
    assert len(large.source) > 1 << 16
    assert len(preparer.prepare(large).grammar) > 1 << 16
    assert preparing.LARGE < 1 << 16
