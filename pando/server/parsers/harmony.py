"""Replies in messages, as gpt-oss writes them: reasoning, calls and the answer each in a channel of their own.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>        or        <|channel|>final<|message|>...<|return|>

A head reaches to `<|message|>`, a body to the next marker. The prompt ends in `<|start|>assistant`, so the first head
may begin in its middle; a reply that begins with plain text is an answer without a head. Source: the format's
published description ("OpenAI harmony response format").
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pando.grammar.schema_tree import Schema
from pando.server.parsers.events import Event, Reasoning
from pando.server.parsers.marks import Marks
from pando.server.parsers.scan import JsonScanner, first_of
from pando.server.parsers.sink import CallSink

MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_TO = re.compile(r"to=functions\.([A-Za-z0-9_.\-]{1,128})(?=\s|$)")
_CHANNEL = re.compile(r"\s*(\w+)")


class HarmonyReader:
    """Reads marked text. thinks: analysis is reasoning, else it is content."""

    def __init__(self, marks: Marks, tools: Mapping[str, Schema] | None, *, thinks: bool) -> None:
        symbols = [marks.symbols(text) for text in MARKERS]
        self._start, self._channel, self._constrain, self._message, self._end, self._call, self._return = symbols
        self._marks = marks
        self._sink = CallSink(tools, marks)
        self._thinks = thinks
        self._buffer = ""
        self._state = "open"
        self._raw = ""
        """The message under way, while it may yet be a call."""
        self._name = ""
        self._scanner = JsonScanner()

    @property
    def num_calls(self) -> int:
        """Calls announced so far."""
        return self._sink.num_calls

    @property
    def inside(self) -> bool:
        """True while the text is reasoning."""
        return self._state == "analysis"

    def push(self, text: str, *, final: bool = False) -> list[Event]:
        """Events that this text makes certain. final: there is no more."""
        self._buffer += text
        events: list[Event] = []
        while self._step(events, final):
            pass
        if final:
            self._finish()
        return events + self._taken()

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        return self.push("", final=True)

    def _taken(self) -> list[Event]:
        events, self._sink.events = self._sink.events, []
        return list(events)

    def _step(self, events: list[Event], final: bool) -> bool:
        if self._state == "open":
            return self._open(final)
        if self._state == "head":
            return self._head(final)
        if self._state == "call":
            return self._read_call()
        return self._body(events)

    def _open(self, final: bool) -> bool:
        """At the beginning: a head, the rest of a head that the prompt began, or an answer."""
        plain = self._buffer.lstrip()
        starts = (self._start, self._channel, "to=")
        if not final and any(start.startswith(plain) for start in starts):
            return False
        self._state = "head" if any(plain.startswith(start) for start in starts) else "text"
        return True

    def _head(self, final: bool) -> bool:
        """Read up to the body, and see what kind of message it is."""
        at = self._buffer.find(self._message)
        if at < 0:
            return False
        head = self._buffer[:at]
        self._raw = self._buffer[: at + len(self._message)]
        self._buffer = self._buffer[at + len(self._message) :]
        to = _TO.search(head.replace(self._constrain, " ").replace(self._channel, " "))
        channel = _CHANNEL.match(head.partition(self._channel)[2])
        name = channel[1] if channel is not None else ""
        if to is not None and self._sink.knows(to[1]):
            self._state, self._name, self._scanner = "call", to[1], JsonScanner()
        elif "to=" in head:
            self._sink.text(self._raw)
            self._state = "text"
        else:
            self._state = "analysis" if name == "analysis" and self._thinks else "text"
        return True

    def _body(self, events: list[Event]) -> bool:
        """Pass on text up to the next marker."""
        ends = (self._end, self._start, self._channel, self._call, self._return)
        at, tag = first_of(self._buffer, ends)
        shown, self._buffer = self._buffer[:at], self._buffer[at:]
        if shown and self._state == "analysis":
            events += [*self._taken(), Reasoning(self._marks.spelled(shown))]
        else:
            self._sink.text(shown)
        if tag:
            self._leave(tag)
        return bool(tag)

    def _leave(self, tag: str) -> None:
        """A marker ends the body. Those that begin a head stay."""
        if tag not in (self._start, self._channel):
            self._buffer = self._buffer[len(tag) :]
        self._state = "open"

    def _read_call(self) -> bool:
        """Pass on arguments; a body that is no JSON object makes the message text."""
        if not self._sink.announced:
            start = len(self._buffer) - len(self._buffer.lstrip())
            if start == len(self._buffer):
                return False
            self._raw += self._buffer[:start]
            self._buffer = self._buffer[start:]
            if self._buffer[0] != "{":
                self._sink.text(self._raw)
                self._state = "text"
                return True
            self._sink.begin(self._name)
        used, piece = self._scanner.feed(self._buffer)
        self._raw += self._buffer[:used]
        self._buffer = self._buffer[used:]
        self._sink.arguments(piece)
        if self._scanner.broken:
            self._sink.fail(self._raw)
            self._state = "text"
        elif self._scanner.ended:
            self._sink.end()
            self._state = "behind"
        return self._state != "call"

    def _finish(self) -> None:
        """The text is over: an open call is broken, a head without a body is text."""
        if self._sink.announced:
            self._sink.fail(self._raw)
        elif self._state == "call":
            self._sink.text(self._raw)
        self._sink.text(self._buffer)
        self._buffer = ""
