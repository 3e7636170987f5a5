"""Tool calls in the Hermes form, as Qwen and many others write them:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

A call's name is told as soon as it is complete and its arguments as they are written, letter for letter. A block that
is no call is text. Whitespace around blocks is dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from pando.server.parsers import partial_tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments, JSON text."""

    index: int
    text: str


Event = Text | CallStart | CallArguments


class ToolCallParser:
    """Cuts a reply into text and tool calls.

    text --OPEN--> head --name and arguments seen--> arguments --value ends--> tail --CLOSE--> text
                     \\--CLOSE: whole block parsed at once, or shown as text--------------------/
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self._state = "text"
        self._buffer = ""
        self._gap = ""
        self._after_call = False
        self._value = _JsonValue()
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """Events that this text makes certain."""
        self._buffer += text
        steps = {"text": self._text, "head": self._head, "arguments": self._arguments, "tail": self._tail}
        while steps[self._state]():
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        rest, self._buffer = self._buffer, ""
        if self._state == "head":
            rest = self._gap + OPEN + rest
        elif self._state != "text" or (self._after_call and not rest.strip()):
            rest = ""
        return [Text(rest)] if rest else []

    def _text(self) -> bool:
        """Take text up to the next block; True if one begins."""
        at = self._buffer.find(OPEN)
        end = at if at >= 0 else len(self._buffer) - partial_tag(self._buffer, OPEN)
        shown = self._buffer[:end].rstrip()
        self._gap = self._buffer[len(shown) : end]
        if self._after_call and shown:
            shown = shown.lstrip()
            self._after_call = False
        if shown:
            self._events.append(Text(shown))
        if at < 0:
            self._buffer = self._gap + self._buffer[end:]
            return False
        self._buffer = self._buffer[at + len(OPEN) :]
        self._state = "head"
        return True

    def _head(self) -> bool:
        match = _HEAD.match(self._buffer)
        if match is not None:
            self._start_call(json.loads(match.group(1), strict=False))
            self._buffer = self._buffer[match.end() :]
            self._value = _JsonValue()
            self._state = "arguments"
            return True
        at = self._buffer.find(CLOSE)
        if at < 0:
            return False
        self._whole_block(self._buffer[:at])
        self._buffer = self._buffer[at + len(CLOSE) :]
        self._state = "text"
        return True

    def _whole_block(self, block: str) -> None:
        """A block whose head has another form: fields in another order, or no arguments, or no call at all."""
        try:
            call = json.loads(block)
            name = call["name"]
            arguments = call.get("arguments", call.get("parameters"))
        except (ValueError, KeyError, TypeError, AttributeError):
            name, arguments = None, None
        if not isinstance(name, str):
            self._events.append(Text(self._gap + OPEN + block + CLOSE))
            self._after_call = False
            return
        self._start_call(name)
        self._emit_arguments(arguments if isinstance(arguments, str) else json.dumps(arguments or {}))

    def _arguments(self) -> bool:
        used, piece = self._value.feed(self._buffer)
        self._buffer = self._buffer[used:]
        self._emit_arguments(piece)
        if self._value.ended:
            self._state = "tail"
        return self._value.ended

    def _tail(self) -> bool:
        """Skip to the end of the block. A block that was never closed ends where the next one begins."""
        ends = [(at, len(tag)) for tag in (CLOSE, OPEN) if (at := self._buffer.find(tag)) >= 0]
        if not ends:
            return False
        at, size = min(ends)
        is_open = size == len(OPEN)
        self._buffer = self._buffer[at + size :]
        self._state = "head" if is_open else "text"
        return True

    def _start_call(self, name: str) -> None:
        self._events.append(CallStart(self.num_calls, name))
        self.num_calls += 1
        self._after_call = True

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self.num_calls - 1, text))


class _JsonValue:
    """Follows one JSON value through its text. Objects and arrays pass as they come; others wait for their end."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> tuple[int, str]:
        """(characters used, text to pass on)."""
        if self._depth or text[:1] in ("{", "["):
            return self._feed_nested(text)
        match = re.match(r'("(?:[^"\\]|\\.)*")|([^"{\[}<\s]+)(?=[\s}<])|(?=[}<])', text, re.DOTALL)
        if match is None:
            return 0, ""
        self.ended = True
        if match.group(1) is not None:  # arguments written as a string that holds JSON
            return match.end(), str(json.loads(match.group(1), strict=False))
        return match.end(), "{}" if match.group(2) in (None, "null") else match.group(2)

    def _feed_nested(self, text: str) -> tuple[int, str]:
        for at, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return at + 1, text[: at + 1]
            elif letter == "<":  # no JSON: the block ends with its value cut short
                self.ended = True
                return at, text[:at]
        return len(text), text
