"""Splits the reasoning off the beginning of a reply.

    start --begin marker--> inside --end marker--> after
      \\------------- any other text ------------/

White space just inside and just after the block belongs to neither side.
"""

from __future__ import annotations

from pando.server.parsers import partial_tag


class ReasoningSplitter:
    """Tells reasoning and content apart, between the texts `begin` and `end`.

    starts_inside: the block is open already when the reply begins; a begin marker that comes again is passed over.
    """

    def __init__(self, begin: str = "<think>", end: str = "</think>", *, starts_inside: bool = False) -> None:
        self._begin_mark = begin
        self._end_mark = end
        self._starts_inside = starts_inside
        self._state = "start"
        self._buffer = ""
        self._trim = False

    @property
    def inside(self) -> bool:
        """True while the text is reasoning."""
        return self._state == "inside"

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that this text makes certain."""
        self._buffer += text
        if self._state == "start":
            self._begin()
        reasoning = self._take_reasoning() if self._state == "inside" else ""
        content = self._take_content() if self._state == "after" else ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the text."""
        rest, self._buffer = self._buffer, ""
        is_reasoning = self._state == "inside" or self._state == "start" and self._starts_inside
        return (rest, "") if is_reasoning else ("", rest)

    def _begin(self) -> None:
        stripped = self._buffer.lstrip()
        if stripped.startswith(self._begin_mark):
            self._state, self._trim, self._buffer = "inside", True, stripped[len(self._begin_mark) :]
        elif not self._begin_mark.startswith(stripped):
            self._state = "inside" if self._starts_inside else "after"
            self._trim = self._starts_inside

    def _take_reasoning(self) -> str:
        self._trim_start()
        end = self._buffer.find(self._end_mark)
        if end >= 0:
            reasoning = self._buffer[:end].rstrip()
            self._buffer = self._buffer[end + len(self._end_mark) :]
            self._state, self._trim = "after", True
            return reasoning
        held = partial_tag(self._buffer, self._end_mark)
        reasoning = self._buffer[: len(self._buffer) - held].rstrip()
        self._buffer = self._buffer[len(reasoning) :]
        return reasoning

    def _take_content(self) -> str:
        self._trim_start()
        content, self._buffer = self._buffer, ""
        return content

    def _trim_start(self) -> None:
        if self._trim:
            self._buffer = self._buffer.lstrip()
            self._trim = not self._buffer
