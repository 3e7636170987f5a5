"""Text and tool calls told apart, for every format whose calls stand between markers or begin the reply.

    text --opening matches--> body --complete--> closing markers --next one, or the end of the group--> body or text
                               \\--no call: its first letter is text, the rest is read again---------/

A call is announced as soon as its name is certain, and arguments come as they are written. What turns out to be no call
before that is text, whole. After that, what was told stays told: the call is reported broken and the rest is text.
White space around calls is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

from pando.grammar.schema_tree import Schema
from pando.server.parsers.bodies import JsonReader, ObjectReader
from pando.server.parsers.elements import ElementsReader
from pando.server.parsers.events import CallEvent
from pando.server.parsers.marks import Marks
from pando.server.parsers.pythonic import ListReader
from pando.server.parsers.scan import PARTIAL, Found, Step, first_of, match
from pando.server.parsers.shapes import Opening, Shape
from pando.server.parsers.sink import BodyReader, CallSink


class CallReader:
    """Cuts marked text (see `marks`) into content and calls of one format."""

    def __init__(self, shape: Shape, marks: Marks, tools: Mapping[str, Schema] | None = None) -> None:
        self._shape = shape
        self._sink = CallSink(tools, marks)
        self._tags = sorted({opening.tag for opening in shape.first if opening.tag})
        self._bare = next((opening for opening in shape.first if opening.bare), None)
        self._buffer = ""
        self._gap = ""
        """White space that is text only if text follows."""
        self._after_call = False
        self._body: BodyReader | None = None
        self._opening: Opening | None = None
        self._raw: list[str] = []
        """What the call under way has used so far."""
        self._closing: list[str] = []
        self._may_continue = False

    @property
    def num_calls(self) -> int:
        """Calls announced so far."""
        return self._sink.num_calls

    def push(self, text: str, *, final: bool = False) -> list[CallEvent]:
        """Events that this text makes certain. final: there is no more."""
        self._buffer += text
        while self._step(final):
            pass
        if final:
            self._finish()
        events, self._sink.events = self._sink.events, []
        return events

    def finish(self) -> list[CallEvent]:
        """What was held back, at the end of the text."""
        return self.push("", final=True)

    def _step(self, final: bool) -> bool:
        """One transition; False if more text is needed."""
        if self._body is not None:
            return self._read_body(self._body, final)
        if self._may_continue:
            return self._close(final)
        return self._read_text(final)

    # ---- text ------------------------------------------------------------------------------------------------------

    def _read_text(self, final: bool) -> bool:
        if self._bare is not None and not self._begin_bare(final):
            return self._body is not None
        at, tag = first_of(self._buffer, self._tags)
        self._show(self._buffer[:at])
        self._buffer = self._buffer[at:]
        if not tag:
            return False
        for opening in self._shape.first:
            found = match(opening.pattern, self._buffer) if opening.tag else None
            if found is PARTIAL and not final:
                return False
            if found is not None and found is not PARTIAL:
                self._begin(opening, found)
                return True
        self._show(self._buffer[0])
        self._buffer = self._buffer[1:]
        return True

    def _begin_bare(self, final: bool) -> bool:
        """Begin a call where the reply begins without a marker; True if it is text or has a marker."""
        assert self._bare is not None
        first = self._buffer.lstrip()[:1]
        if not first and not final:
            return False
        opening, self._bare = self._bare, None
        if first == self._shape.form.bare:
            self._begin(opening, Found(len(self._buffer) - len(self._buffer.lstrip())))
            return False
        return True

    def _show(self, text: str) -> None:
        """Pass text on, but for white space at its end."""
        full = self._gap + text
        shown = full.rstrip()
        self._gap = full[len(shown) :]
        if shown and self._after_call:
            shown = shown.lstrip()
            self._after_call = False
        self._sink.text(shown)

    def _finish(self) -> None:
        """The text is over: what is left of it is text."""
        self._show(self._buffer)
        self._buffer = ""
        if not self._after_call:
            self._sink.text(self._gap)
        self._gap = ""

    # ---- calls -----------------------------------------------------------------------------------------------------

    def _begin(self, opening: Opening, found: Found) -> None:
        self._opening = opening
        self._raw = [self._buffer[: found.end]]
        self._buffer = self._buffer[found.end :]
        self._body = make_reader(opening, found, self._shape, self._sink)

    def _read_body(self, body: BodyReader, final: bool) -> bool:
        before = self._sink.num_calls
        used = body.read(self._buffer, final=final)
        self._raw.append(self._buffer[:used])
        self._buffer = self._buffer[used:]
        if self._sink.num_calls > before:
            self._raw.insert(0, self._gap)
            self._gap, self._after_call = "", True
        if body.ended:
            self._body, self._closing, self._may_continue = None, list(self._shape.closing), True
            return True
        if used and not body.failed:
            return True
        if body.failed or final:
            self._fail()
            return True
        return False

    def _fail(self) -> None:
        raw, self._body = "".join(self._raw), None
        if self._sink.announced:
            self._sink.fail(raw)
            self._after_call = False
            return
        self._buffer = raw + self._buffer
        if self._opening is not None and self._opening.tag:
            self._show(self._buffer[0])
            self._buffer = self._buffer[1:]

    def _close(self, final: bool) -> bool:
        """Pass over closing markers; begin the next call of the group, or go back to text."""
        while self._closing:
            found = match((Step.SPACE, self._closing[0]), self._buffer)
            if found is PARTIAL and not final:
                return False
            self._take(found)
            self._closing.pop(0)
        for opening in self._shape.next:
            found = match(opening.pattern, self._buffer)
            if found is PARTIAL and not final:
                return False
            if found is not None and found is not PARTIAL:
                self._may_continue = False
                self._begin(opening, found)
                return True
        if self._shape.section_end:
            found = match((Step.SPACE, self._shape.section_end), self._buffer)
            if found is PARTIAL and not final:
                return False
            self._take(found)
        self._may_continue = False
        return True

    def _take(self, found: Found | None) -> None:
        """Drop what a pattern matched, if it did."""
        if found is not None and found is not PARTIAL:
            self._buffer = self._buffer[found.end :]


def make_reader(opening: Opening, found: Found, shape: Shape, sink: CallSink) -> BodyReader:
    """The reader of what follows an opening."""
    if opening.body == "object":
        return ObjectReader(sink)
    if opening.body == "list":
        return ListReader(sink)
    call_id = shape.call_id.replace("{name}", found.name).replace("{index}", found.number)
    if opening.body == "json":
        return JsonReader(sink, found.name, call_id)
    assert shape.elements is not None, shape.form.name
    return ElementsReader(sink, found.name, shape.elements)
