"""Calls whose arguments are JSON: an object that holds the name, too, or the arguments alone."""

from __future__ import annotations

import json
import re

from pando.server.parsers.scan import JsonScanner
from pando.server.parsers.sink import CallSink

_STRING = r'"((?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){0,128})"'
_HEAD = re.compile(
    r'[ \t\r\n]{0,9}\{[ \t\r\n]{0,9}"name"[ \t\r\n]{0,9}:[ \t\r\n]{0,9}'
    + _STRING
    + r'[ \t\r\n]{0,9},[ \t\r\n]{0,9}"(?:arguments|parameters)"[ \t\r\n]{0,9}:[ \t\r\n]{0,9}(?=\{)'
)
"""Name first, arguments second: what nearly all calls look like, and what can be passed on letter by letter."""
_HEAD_LETTERS = 1024
"""More than the longest text that `_HEAD` matches."""
_ARGUMENTS = ("arguments", "parameters")
_DECODER = json.JSONDecoder(strict=False)


class JsonReader:
    """Arguments alone; the name stood before them."""

    def __init__(self, sink: CallSink, name: str, call_id: str) -> None:
        self.ended = False
        self.failed = not sink.knows(name)
        self._sink = sink
        self._name = name
        self._call_id = call_id
        self._scanner = JsonScanner()
        self._begun = False

    def read(self, text: str, *, final: bool) -> int:
        """See BodyReader."""
        if self.failed:
            return 0
        start = 0
        if not self._begun:
            start = len(text) - len(text.lstrip())
            if start == len(text):
                return 0
            if text[start] != "{":
                self.failed = True
                return 0
            self._begun = True
            self._sink.begin(self._name, self._call_id)
        used, piece = self._scanner.feed(text[start:])
        self._sink.arguments(piece)
        self.failed = self._scanner.broken
        self.ended = self._scanner.ended
        if self.ended:
            self._sink.end()
        return start + used


class ObjectReader:
    """An object with name and arguments.

    In the usual order arguments are passed on as they come; else the object is read to its end first.
    """

    def __init__(self, sink: CallSink) -> None:
        self.ended = False
        self.failed = False
        self._sink = sink
        self._scanner = JsonScanner()
        self._held = ""
        self._phase = "head"

    def read(self, text: str, *, final: bool) -> int:
        """See BodyReader."""
        if self._phase == "head":
            return self._head(text)
        used, piece = self._scanner.feed(text)
        if self._phase == "arguments":
            self._sink.arguments(piece)
            self.failed = self._scanner.broken
            if self._scanner.ended:
                self._phase = "tail"
                self._sink.end()
                self._scanner.resume(0)
                return used + self.read(text[used:], final=final)
        else:
            # The arguments are complete; a brace too few behind them changes nothing.
            self.ended = self._scanner.ended or self._scanner.broken or final
        return used

    def _head(self, text: str) -> int:
        if len(self._held) <= _HEAD_LETTERS:
            found = _HEAD.match(self._held + text)
            if found is not None:
                return self._begin(found, found.end() - len(self._held))
        if (self._held + text[:_HEAD_LETTERS]).lstrip()[:1] not in ("", "{"):
            self.failed = True
            return 0
        used, piece = self._scanner.feed(text)
        self._held += text[:used]
        self.failed = self._scanner.broken
        if self._scanner.ended:
            self._whole()
        return used

    def _begin(self, found: re.Match[str], used: int) -> int:
        name = str(json.loads(f'"{found[1]}"'))
        if not self._sink.knows(name):
            self.failed = True
            return 0
        self._scanner = JsonScanner()
        self._scanner.feed(found[0])
        self._scanner.resume(1)
        self._sink.begin(name)
        self._phase = "arguments"
        return used

    def _whole(self) -> None:
        """The object in any other order, or with arguments written as a string, or without any."""
        parts = members(self._held)
        if "name" not in parts and parts.get("function", "").startswith("{"):
            parts = members(parts["function"])
        name, arguments = _value(parts.get("name", "null")), "{}"
        for key in _ARGUMENTS:
            if key in parts:
                arguments = _inner(parts[key])
        if not isinstance(name, str) or not self._sink.knows(name) or not arguments.startswith("{"):
            self.failed = True
            return
        self._sink.begin(name)
        self._sink.arguments(arguments)
        self._sink.end()
        self.ended = True


def _inner(raw: str) -> str:
    """Arguments that are null, or a string that holds JSON; "" if they are neither that nor an object."""
    if raw.startswith("{"):
        return _written(raw)
    value = _value(raw)
    if value is None:
        return "{}"
    if not isinstance(value, str):
        return ""
    scanner = JsonScanner()
    used, text = scanner.feed(value.strip())
    return text if scanner.ended and used == len(value.strip()) and text.startswith("{") else ""


def _written(raw: str) -> str:
    """An object as the scanner passes it on."""
    return JsonScanner().feed(raw)[1]


def _value(raw: str) -> object:
    return _DECODER.decode(raw)


def members(text: str) -> dict[str, str]:
    """The members of a JSON object, values as they are written."""
    at = _skip(text, text.index("{") + 1)
    found: dict[str, str] = {}
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        _, at = _DECODER.raw_decode(text, start)
        found[str(key)] = text[start:at]
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _skip(text: str, at: int) -> int:
    """The place of the next letter that is no white space."""
    while text[at] in " \t\r\n":
        at += 1
    return at
