"""Where readers put the calls they find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pando.grammar.schema_tree import Schema
from pando.server.parsers.events import CallArguments, CallBroken, CallEnd, CallEvent, CallStart, Text
from pando.server.parsers.marks import Marks


class CallSink:
    """Collects the events of calls; numbers them. tools: schemas by name, None = any name is one."""

    def __init__(self, tools: Mapping[str, Schema] | None, marks: Marks) -> None:
        self.tools = tools
        self._marks = marks
        self.num_calls = 0
        self.announced = False
        """True while a call has been begun and not ended."""
        self.events: list[CallEvent] = []

    def knows(self, name: str) -> bool:
        """True if there is such a tool."""
        return self.tools is None or name in self.tools

    def schema(self, name: str) -> Schema:
        """The parameters of a tool; True (anything) if unknown."""
        return True if self.tools is None else self.tools.get(name, True)

    def begin(self, name: str, call_id: str = "") -> None:
        """A call begins."""
        self.events.append(CallStart(self.num_calls, name, call_id))
        self.num_calls += 1
        self.announced = True

    def arguments(self, text: str) -> None:
        """The next piece of its arguments."""
        if text:
            self.events.append(CallArguments(self.num_calls - 1, self._marks.spelled(text)))

    def end(self) -> None:
        """The call is complete."""
        self.events.append(CallEnd(self.num_calls - 1))
        self.announced = False

    def fail(self, raw: str) -> None:
        """The call is none after all."""
        self.events.append(CallBroken(self.num_calls - 1, self._marks.spelled(raw)))
        self.announced = False

    def text(self, text: str) -> None:
        """Content."""
        if text:
            self.events.append(Text(self._marks.spelled(text)))


class BodyReader(Protocol):
    """Reads one call, or a list of them, behind its opening. Tells the sink; `ended` and `failed` say how it went."""

    ended: bool
    failed: bool

    def read(self, text: str, *, final: bool) -> int:
        """Letters used of the text that is there; the rest is given again with more behind it, unless `final`."""
