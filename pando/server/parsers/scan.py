"""Reading text whose end is not there yet: patterns that may match in part, and JSON letter by letter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pando.server.parsers import partial_tag


class Step(Enum):
    """Parts of a pattern that are not fixed texts."""

    SPACE = "any white space, or none"
    NAME = "the name of a tool"
    NUMBER = "digits"
    WORD = "letters and digits, passed over"


Pattern = tuple[str | Step, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A pattern matched up to `end`, with the texts of its NAME and NUMBER."""

    end: int
    name: str = ""
    number: str = ""


PARTIAL = Found(-1)
"""The text ends before the pattern is decided."""

_STEPS = {
    Step.SPACE: re.compile(r"\s*"),
    Step.NAME: re.compile(r"[A-Za-z0-9_.\-]{1,128}"),
    Step.NUMBER: re.compile(r"[0-9]{1,9}"),
    Step.WORD: re.compile(r"[A-Za-z0-9]{1,64}"),
}


def match(pattern: Pattern, text: str, at: int = 0) -> Found | None:
    """Where the pattern ends if it stands at `at`; PARTIAL if more text must decide; None if it does not match."""
    name = number = ""
    for part in pattern:
        if isinstance(part, str):
            if text.startswith(part, at):
                at += len(part)
                continue
            return PARTIAL if part.startswith(text[at:]) else None
        found = _STEPS[part].match(text, at)
        at = at if found is None else found.end()
        if at == len(text):
            return PARTIAL
        if found is None:
            return None
        if part is Step.NAME:
            name = found[0]
        elif part is Step.NUMBER:
            number = found[0]
    return Found(at, name, number)


def first_of(text: str, tags: Sequence[str], at: int = 0) -> tuple[int, str]:
    """The earliest of the tags in text[at:], as (place, tag), the longest at that place.

    Without one: (where a beginning of one may stand at the end of the text, "").
    """
    best, found = len(text), ""
    for tag in tags:
        place = text.find(tag, at)
        if 0 <= place and (place < best or place == best and len(tag) > len(found)):
            best, found = place, tag
    if found:
        return best, found
    rest = text[at:]
    return len(text) - max((partial_tag(rest, tag) for tag in tags), default=0), ""


_RUN = re.compile(r'[^"\\]+')
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_START = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WHITE = re.compile(r"[ \t\r\n]*")
_ATOM = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_CONTROL = {code: json for code, json in zip((9, 10, 13), ("\\t", "\\n", "\\r"), strict=True)}
_CONTROL |= {code: f"\\u{code:04x}" for code in range(32) if code not in _CONTROL}

MAX_DEPTH = 128
"""Nested objects and lists in arguments."""


class JsonScanner:
    """Follows one JSON object or list through its text, and says exactly where it stops being JSON.

    `stop_depth`: `feed` returns when so many brackets are open again, 0 = at the end of the value. Control characters
    inside strings, which models write though JSON has them escaped only, are escaped on the way.
    """

    def __init__(self) -> None:
        self.stop_depth = 0
        self.ended = False
        self.broken = False
        self._stack: list[str] = []
        self._expect = "value"
        self._in_string = False

    def feed(self, text: str) -> tuple[int, str]:
        """(letters used, JSON text to pass on). Stops at the end or the first fault; may leave a few letters unread."""
        at, out = 0, []
        while at < len(text) and not self.ended and not self.broken:
            step = self._string(text, at) if self._in_string else self._structure(text, at)
            if step == 0:
                break
            piece = text[at : at + step]
            out.append(piece.translate(_CONTROL) if self._in_string or piece == '"' else piece)
            at += step
        return at, "".join(out)

    def _string(self, text: str, at: int) -> int:
        """Letters read inside a string; 0 if an escape is not complete."""
        run = _RUN.match(text, at)
        if run is not None:
            return run.end() - at
        if text[at] == '"':
            self._in_string = False
            self._expect = ":" if self._expect == "key" else self._after_value()
            return 1
        escape = _ESCAPE.match(text, at)
        if escape is None:
            self.broken = _ESCAPE_START.match(text, at) is None
            return 0
        return escape.end() - at

    def _structure(self, text: str, at: int) -> int:
        """Letters read outside strings; 0 if there is a fault or a number is not complete."""
        white = _WHITE.match(text, at)
        if white is not None and white.end() > at:
            return white.end() - at
        letter = text[at]
        if letter in "}]":
            return self._close(letter)
        expect = self._expect
        if letter == '"' and expect in ("key", "key or end", "value", "value or end"):
            self._in_string = True
            self._expect = "key" if expect.startswith("key") else "value"
            return 1
        if letter in ",:" and letter in expect:
            self._expect = "value" if letter == ":" or self._stack[-1] == "]" else "key"
            return 1
        if expect in ("value", "value or end"):
            return self._open(letter) if letter in "{[" else self._scalar(text, at)
        self.broken = True
        return 0

    def _open(self, letter: str) -> int:
        self.broken = len(self._stack) >= MAX_DEPTH
        self._stack.append("}" if letter == "{" else "]")
        self._expect = "key or end" if letter == "{" else "value or end"
        return 0 if self.broken else 1

    def _close(self, letter: str) -> int:
        if not self._stack or self._stack[-1] != letter or "end" not in self._expect:
            self.broken = True
            return 0
        self._stack.pop()
        self._expect = self._after_value()
        return 1

    def _scalar(self, text: str, at: int) -> int:
        found = _ATOM.match(text, at)
        if found is None or not self._stack:
            self.broken = True
            return 0
        if found.end() == len(text):
            return 0  # more of it may follow
        if _SCALAR.fullmatch(found[0]) is None:
            self.broken = True
            return 0
        self._expect = self._after_value()
        return found.end() - at

    def _after_value(self) -> str:
        self.ended = len(self._stack) <= self.stop_depth
        return ", or end"

    def resume(self, stop_depth: int) -> None:
        """Go on after a stop, to a lower depth."""
        self.stop_depth = stop_depth
        self.ended = False


def json_text(value: Any) -> str:
    """A value as JSON. Half of a surrogate pair stays an escape: no UTF-8 holds it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(value) if _HALF.search(text) else text


_HALF = re.compile("[\ud800-\udfff]")
