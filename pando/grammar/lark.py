"""Builds texts in the Lark dialect of the default backend: literals, markers, named rules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pando.grammar.sources import WHITESPACE

TEXT = "TEXT"
"""The terminal for any text without markers."""

_HEAD = "%llguidance {}\n"


def literal(text: str) -> str:
    """A text as a literal."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any, whitespace: str) -> str:
    """A JSON document of a schema as the right side of a rule."""
    body = dict(schema) if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**body, "x-guidance": WHITESPACE[whitespace]}, ensure_ascii=False)


class LarkBuilder:
    """Collects rules. `markers` are texts that are tokens of their own (see `Vocabulary`)."""

    def __init__(self, markers: Mapping[str, int]) -> None:
        self._markers = markers
        names = sorted(markers, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._rules: list[str] = []

    def rule(self, name: str, right: str, *, lazy: bool = False) -> str:
        """Add `name: right`; returns the name. A lazy rule ends as early as it can."""
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {right}")
        return name

    def fixed(self, text: str) -> str:
        """A sequence that is exactly this text, with its markers as tokens."""
        parts = self._split.split(text) if self._split is not None else [text]
        items = [f"<[{self._markers[part]}]>" if part in self._markers else literal(part) for part in parts if part]
        return " ".join(items) or '""'

    def until(self, name: str, text: str, inner: str = TEXT) -> str:
        """A sequence of any text followed by the first occurrence of `text`; may add a rule called `name`.

        inner: a regular expression between slashes that the text before matches.
        """
        parts = self._split.split(text) if self._split is not None else [text]
        parts = [part for part in parts if part]
        rest = " " + self.fixed("".join(parts[1:])) if len(parts) > 1 else ""
        if parts[0] in self._markers:
            return f"{inner} {self.fixed(parts[0])}{rest}"
        return self.rule(name, f"{inner} {literal(parts[0])}", lazy=True) + rest

    def source(self, start: str) -> str:
        """The whole grammar."""
        return "\n".join([_HEAD + f"start: {start}", *self._rules, f"{TEXT}: /(.|\\n)*/", ""])
