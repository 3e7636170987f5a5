"""A chat reply taken apart as it is written: reasoning, then content and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pando.server.parsers import hermes, reasoning
from pando.server.parsers.hermes import CallArguments, CallStart, Text
from pando.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of reasoning."""

    text: str


Event = Reasoning | Text | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """What to look for in a reply.

    thinks: a `<think>` block may come first; starts_inside: the prompt ends in the opening tag. max_calls: tool calls
    passed on at most; 0 = text stays as it is.
    """

    thinks: bool = False
    starts_inside: bool = False
    max_calls: int = 0

    @property
    def is_plain(self) -> bool:
        """True if the text needs no parser."""
        return not self.thinks and not self.max_calls


class ReplyParser:
    """Parses one sequence. `reasoning_tokens` counts the tokens inside the think block, tags not included."""

    def __init__(self, shape: ReplyFormat, tokenizer: Tokenizer) -> None:
        self._splitter = reasoning.ReasoningSplitter(starts_inside=shape.starts_inside) if shape.thinks else None
        self._calls = hermes.ToolCallParser() if shape.max_calls else None
        self._max_calls = shape.max_calls
        self._counter = _ReasoningCounter(shape, tokenizer)

    @property
    def num_calls(self) -> int:
        """Tool calls passed on so far."""
        return min(self._calls.num_calls, self._max_calls) if self._calls is not None else 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far."""
        return self._counter.count

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """Events that this text makes certain."""
        self._counter.push(token_ids)
        thought, content = self._splitter.push(text) if self._splitter is not None else ("", text)
        return self._events(thought, content, last=False)

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        thought, content = self._splitter.finish() if self._splitter is not None else ("", "")
        return self._events(thought, content, last=True)

    def _events(self, thought: str, content: str, *, last: bool) -> list[Event]:
        events: list[Event] = [Reasoning(thought)] if thought else []
        if self._calls is None:
            return events + ([Text(content)] if content else [])
        found = self._calls.push(content) + (self._calls.finish() if last else [])
        return events + [each for each in found if isinstance(each, Text) or each.index < self._max_calls]


class _ReasoningCounter:
    """Counts tokens between the tags, if each tag is one token of the vocabulary; else it counts none."""

    def __init__(self, shape: ReplyFormat, tokenizer: Tokenizer) -> None:
        self.count = 0
        self._open = tokenizer.token_id(reasoning.OPEN)
        self._close = tokenizer.token_id(reasoning.CLOSE)
        self._inside = shape.thinks and shape.starts_inside and self._close is not None
        self._ended = not shape.thinks or self._close is None

    def push(self, token_ids: Sequence[int]) -> None:
        if self._ended:
            return
        for token in token_ids:
            if token == self._close:
                self._ended = True
                return
            if self._inside:
                self.count += 1
            elif token == self._open:
                self._inside = True
