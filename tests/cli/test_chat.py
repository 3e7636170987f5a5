"""The terminal chat: its commands, what it remembers, what it prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from pando.cli.chat import Session, read_turn
from pando.cli.endpoint import Message, Usage
from pando.errors import CapacityExceeded


class Scripted:
    """An endpoint that answers "one two" and remembers what it was asked."""

    model = "scripted"

    def __init__(self) -> None:
        self.asked: list[tuple[list[Message], dict[str, object]]] = []
        self.interrupt = False
        self.fail = False
        self.closed = 0

    def chat(self, messages: list[Message], options: Mapping[str, object]) -> Iterator[str | Usage]:
        self.asked.append((list(messages), dict(options)))
        try:
            if self.fail:
                raise CapacityExceeded("the pool is full")
            yield "one"
            if self.interrupt:
                raise KeyboardInterrupt
            yield " two"
            yield Usage(20, 15, 2, "length")
        finally:
            self.closed += 1

    def complete(self, prompt: str, options: Mapping[str, object]) -> Iterator[str | Usage]:
        raise AssertionError("a chat never completes plain text")

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def endpoint() -> Scripted:
    return Scripted()


@pytest.fixture
def written() -> list[str]:
    return []


@pytest.fixture
def session(endpoint: Scripted, written: list[str]) -> Session:
    return Session(endpoint, written.append)


def test_turn_writes_answer_and_figures(session: Session, written: list[str]) -> None:
    assert session.handle("hello")
    text = "".join(written)
    assert text.startswith("one two\n[")
    assert "prompt 20 tokens, 15 cached" in text and "cut at the length limit" in text and "tok/s" in text


def test_conversation_grows(session: Session, endpoint: Scripted) -> None:
    session.handle("a")
    session.handle("b")
    assert [m["content"] for m in endpoint.asked[1][0]] == ["a", "one two", "b"]
    assert [m["role"] for m in endpoint.asked[1][0]] == ["user", "assistant", "user"]


def test_reset_forgets(session: Session, endpoint: Scripted) -> None:
    session.handle("a")
    session.handle("/reset")
    session.handle("b")
    assert [m["content"] for m in endpoint.asked[1][0]] == ["b"]


def test_system_prompt_starts_afresh(session: Session, endpoint: Scripted) -> None:
    session.handle("a")
    session.handle("/system be brief")
    session.handle("b")
    assert endpoint.asked[1][0] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "b"}]
    session.handle("/system")
    session.handle("c")
    assert endpoint.asked[2][0] == [{"role": "user", "content": "c"}]


def test_set_and_unset(session: Session, endpoint: Scripted, written: list[str]) -> None:
    session.handle("/set temperature 0.5")
    session.handle("/set max-new-tokens 7")
    session.handle("a")
    assert endpoint.asked[0][1] == {"temperature": 0.5, "max_new_tokens": 7}
    session.handle("/set temperature")
    session.handle("a")
    assert endpoint.asked[1][1] == {"max_new_tokens": 7}
    written.clear()
    session.handle("/set warmth 3")
    session.handle("/set top_p x")
    assert "no parameter warmth" in written[0] and "not a number" in written[1]
    assert session.options == {"max_new_tokens": 7}
    written.clear()
    session.handle("/set")
    assert any("max_new_tokens" in line and "7" in line for line in written)


def test_interrupted_answer_stays_as_far_as_it_got(session: Session, endpoint: Scripted, written: list[str]) -> None:
    endpoint.interrupt = True
    session.handle("a")
    assert endpoint.closed == 1 and "stopped" in "".join(written)
    assert session.messages[-1] == {"role": "assistant", "content": "one"}
    assert session.totals.turns == 0


def test_failed_turn_is_forgotten(session: Session, endpoint: Scripted, written: list[str]) -> None:
    endpoint.fail = True
    session.handle("a")
    assert session.messages == [] and "the pool is full" in "".join(written)


def test_stats_add_up(session: Session, written: list[str]) -> None:
    session.handle("a")
    session.handle("b")
    written.clear()
    session.handle("/stats")
    assert "2 turns, 40 prompt tokens (75 % from the cache), 4 new tokens" in written[0]


@pytest.mark.parametrize(("line", "goes_on"), [("/quit", False), ("/exit", False), ("/help", True), ("  ", True)])
def test_commands_that_end(session: Session, endpoint: Scripted, line: str, goes_on: bool) -> None:
    assert session.handle(line) is goes_on
    assert endpoint.asked == []


def test_unknown_command(session: Session, endpoint: Scripted, written: list[str]) -> None:
    session.handle("/frobnicate now")
    assert "no command /frobnicate" in written[0] and endpoint.asked == []


def lines(*text: str) -> Callable[[str], str]:
    left = iter(text)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["hello"], "hello"),
        (["one\\", "two"], "one\ntwo"),
        (['"""one', "two", 'three"""'], "one\ntwo\nthree"),
        (['"""', "  kept", "", "end", '"""'], "  kept\n\nend"),
        (['"""all in one"""'], "all in one"),
    ],
)
def test_lines_are_joined(typed: list[str], expected: str) -> None:
    assert read_turn(lines(*typed)) == expected


def test_end_of_input() -> None:
    with pytest.raises(EOFError):
        read_turn(lines())
