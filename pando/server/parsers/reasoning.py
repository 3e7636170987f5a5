"""Splits `<think> ... </think>` off the beginning of a reply.

    start --"<think>"--> inside --"</think>"--> after
      \\------------- any other text ------------/

Whitespace just inside and just after the block belongs to neither side.
"""

from __future__ import annotations

from pando.server.parsers import partial_tag

OPEN, CLOSE = "<think>", "</think>"


class ReasoningSplitter:
    """Tells reasoning and content apart. starts_inside: the prompt has opened the block already."""

    def __init__(self, *, starts_inside: bool = False) -> None:
        self._state = "inside" if starts_inside else "start"
        self._buffer = ""
        self._trim = starts_inside

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
        return (rest, "") if self._state == "inside" else ("", rest)

    def _begin(self) -> None:
        stripped = self._buffer.lstrip()
        if stripped.startswith(OPEN):
            self._state, self._trim, self._buffer = "inside", True, stripped[len(OPEN) :]
        elif not OPEN.startswith(stripped):
            self._state = "after"

    def _take_reasoning(self) -> str:
        self._trim_start()
        end = self._buffer.find(CLOSE)
        if end >= 0:
            reasoning = self._buffer[:end].rstrip()
            self._buffer = self._buffer[end + len(CLOSE) :]
            self._state, self._trim = "after", True
            return reasoning
        held = partial_tag(self._buffer, CLOSE)
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
