"""Calls whose arguments are elements, one per parameter: values are bare text, typed by the tool's schema."""

from __future__ import annotations

import json
import re

from pando.server.parsers.scan import PARTIAL, Found, Step, match
from pando.server.parsers.shapes import ElementTags
from pando.server.parsers.sink import CallSink
from pando.server.parsers.typed import argument, parameter

_KEY = re.compile("[^<>\n\ud800-\udbff]{1,256}")


class ElementsReader:
    """Passes each argument on when its element is complete."""

    def __init__(self, sink: CallSink, name: str, tags: ElementTags) -> None:
        self.ended = False
        self.failed = not sink.knows(name)
        self._sink = sink
        self._name = name
        self._tags = tags
        self._num_arguments = 0
        self._looked = 0
        """Letters of the value under way that hold no end."""

    def read(self, text: str, *, final: bool) -> int:
        """See BodyReader."""
        at = 0
        while not self.failed and not self.ended:
            end = self._element(text, at, final)
            if end is None:
                break
            at = end
        return at

    def _element(self, text: str, at: int, final: bool) -> int | None:
        """The place behind the next element; None if there is none, or not yet."""
        key = self._key(text, at)
        if key is PARTIAL:
            return None
        if key is None:
            self._end(text, at)
            return None
        found = self._value(text, key.end, final)
        if found is None:
            return None
        value, end = found
        self._looked = 0
        self._pass_on(key.name, value)
        return end

    def _key(self, text: str, at: int) -> Found | None:
        """The name of the next element and where its value begins."""
        begin = match((Step.SPACE, self._tags.key_begin), text, at)
        if begin is None or begin is PARTIAL:
            return begin
        key = _KEY.match(text, begin.end)
        if key is None:
            return PARTIAL if begin.end == len(text) else None
        if key.end() == len(text):
            return PARTIAL
        after = match(self._tags.after_key, text, key.end())
        return after if after is None or after is PARTIAL else Found(after.end, key[0].strip())

    def _value(self, text: str, start: int, final: bool) -> tuple[str, int] | None:
        """The value and the place behind its element. An end that no element and no end of the call follows is text."""
        tags = self._tags
        at = text.find(tags.value_end, max(start, start + self._looked))
        while at >= 0:
            behind = at + len(tags.value_end)
            follows = [match((Step.SPACE, tag), text, behind) for tag in (tags.key_begin, *tags.ends)]
            if any(found is not None and found is not PARTIAL for found in follows):
                return text[start:at], behind
            if PARTIAL in follows and not final:
                self._looked = at - start
                return None
            at = text.find(tags.value_end, at + 1)
        self._looked = max(0, len(text) - start - len(tags.value_end))
        return None

    def _end(self, text: str, at: int) -> None:
        """No element follows: the call is over, or is none."""
        found = [match((Step.SPACE, tag), text, at) for tag in self._tags.ends]
        if any(each is not None and each is not PARTIAL for each in found):
            if not self._num_arguments:
                self._sink.begin(self._name)
            self._sink.arguments("}" if self._num_arguments else "{}")
            self._sink.end()
            self.ended = True
        elif PARTIAL not in found:
            self.failed = True

    def _pass_on(self, key: str, value: str) -> None:
        if self._tags.trim:
            value = value.removeprefix("\n").removesuffix("\n")
        if not self._num_arguments:
            self._sink.begin(self._name)
        root = self._sink.schema(self._name)
        lead = ", " if self._num_arguments else "{"
        written = argument(value, parameter(root, key), root)
        self._sink.arguments(f"{lead}{json.dumps(key, ensure_ascii=False)}: {written}")
        self._num_arguments += 1
