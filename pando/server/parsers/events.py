"""What a parsed reply is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary content."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls are numbered from 0. call_id: the id that stands in the text, "" where none does."""

    index: int
    name: str
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete: its arguments are one JSON object."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """A call that had begun turned out to be none. raw: its text so far; what follows comes as `Text`."""

    index: int
    raw: str


CallEvent = Text | CallStart | CallArguments | CallEnd | CallBroken
Event = CallEvent | Reasoning
