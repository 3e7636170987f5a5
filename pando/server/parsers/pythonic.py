"""Calls written as a Python list: `[f(a=1, b="x"), g()]`."""

from __future__ import annotations

import ast
import json
import re

from pando.server.parsers.scan import PARTIAL, Step, json_text, match
from pando.server.parsers.sink import CallSink

_HEAD = (Step.SPACE, "[", Step.SPACE, Step.NAME, Step.SPACE, "(")
_SIGNIFICANT = re.compile(r"""["'\\()\[\]{}]""")
_STRING_PARTS = re.compile(r"""(\\.|["'\n\r])""", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None}
_MAX_LETTERS = 1 << 20


class ListReader:
    """Finds the end of the list, then reads it whole: nothing is certain before."""

    def __init__(self, sink: CallSink) -> None:
        self.ended = False
        self.failed = False
        self._sink = sink
        self._at = 0
        self._open = 0
        self._quote = ""

    def read(self, text: str, *, final: bool) -> int:
        """See BodyReader."""
        head = match(_HEAD, text)
        if head is PARTIAL:
            return 0
        if head is None or len(text) > _MAX_LETTERS:
            self.failed = True
            return 0
        end = self._end(text)
        if end is None:
            return 0
        calls = read_calls(text[:end].strip())
        if calls is None or not all(self._sink.knows(name) for name, _ in calls):
            self.failed = True
            return 0
        for name, arguments in calls:
            self._sink.begin(name)
            self._sink.arguments(arguments)
            self._sink.end()
        self.ended = True
        return end

    def _end(self, text: str) -> int | None:
        """The place behind the bracket that closes the list. Goes on where it stopped."""
        while True:
            found = _SIGNIFICANT.search(text, self._at)
            if found is None:
                self._at = len(text)
                return None
            letter, self._at = found[0], found.end()
            if letter == "\\":
                if self._at == len(text):
                    self._at -= 1
                    return None
                self._at += 1
            elif letter in "\"'":
                self._quote = "" if self._quote == letter else self._quote or letter
            elif not self._quote:
                self._open += 1 if letter in "([{" else -1
                if self._open <= 0:
                    return self._at


def read_calls(text: str) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call of a Python list; None if it is not one of calls with keywords only."""
    source = _whole_lines(text)
    try:
        tree = ast.parse(source, mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_call(node, source) for node in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _whole_lines(text: str) -> str:
    """The source with line ends inside strings escaped: models write them there, Python does not."""
    parts, quote = [], ""
    for part in _STRING_PARTS.split(text):
        if part in ("'", '"'):
            quote = "" if quote == part else quote or part
        elif quote and part in ("\n", "\r"):
            part = "\\n" if part == "\n" else "\\r"
        parts.append(part)
    return "".join(parts)


def _call(node: ast.expr, source: str) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keywords only")
    pairs = []
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("not a keyword")
        pairs.append(f"{json.dumps(keyword.arg, ensure_ascii=False)}: {_json(keyword.value, source)}")
    return _dotted(node.func), "{" + ", ".join(pairs) + "}"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("not a name")


def _json(node: ast.expr, source: str) -> str:
    """A literal as JSON; numbers as they are written."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bool | None):
        return json_text(node.value)
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return json.dumps(_WORDS[node.id])
    if isinstance(node, ast.List | ast.Tuple):
        return "[" + ", ".join(_json(each, source) for each in node.elts) + "]"
    if isinstance(node, ast.Dict):
        return (
            "{" + ", ".join(_pair(key, value, source) for key, value in zip(node.keys, node.values, strict=True)) + "}"
        )
    number = (ast.get_source_segment(source, node) or "").strip()
    if isinstance(node, ast.Constant | ast.UnaryOp) and _NUMBER.fullmatch(number):
        return number
    return json.dumps(ast.literal_eval(node), allow_nan=False)


def _pair(key: ast.expr | None, value: ast.expr, source: str) -> str:
    if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
        raise ValueError("the keys of an object are text")
    return f"{json_text(key.value)}: {_json(value, source)}"
