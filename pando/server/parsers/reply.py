"""A chat reply taken apart as it is written: reasoning, then content and tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pando.grammar.reasoning_formats import ReasoningFormat
from pando.grammar.schema_tree import Schema
from pando.grammar.tool_formats import ToolFormat
from pando.grammar.vocabulary import TextTokenizer
from pando.server.parsers import harmony
from pando.server.parsers.calls import CallReader
from pando.server.parsers.events import CallBroken, CallEnd, Event, Reasoning, Text
from pando.server.parsers.marks import Marks
from pando.server.parsers.reasoning import ReasoningSplitter
from pando.server.parsers.shapes import Shape, marker_texts, shape_of


class ReplyStyle:
    """How one model writes: its formats, and their markers in its vocabulary. tokenizer: None = markers are text."""

    def __init__(
        self, tools: ToolFormat, reasoning: ReasoningFormat | None, tokenizer: TextTokenizer | None = None
    ) -> None:
        self.tools = tools
        self.reasoning = reasoning
        self.uses_channels = tools.name == "harmony" or reasoning is not None and reasoning.is_channels
        texts = list(harmony.MARKERS) if self.uses_channels else marker_texts(tools)
        if reasoning is not None:
            texts += [reasoning.begin, reasoning.end]
        self.marks = Marks({}, ()) if tokenizer is None else Marks.of(tokenizer, texts)
        thought = (
            set() if reasoning is None else {self.marks.symbols(reasoning.begin), self.marks.symbols(reasoning.end)}
        )
        self.thought_letters = {token: letter for token, letter in self.marks.letters.items() if letter in thought}
        self.shape: Shape | None = None if self.uses_channels else shape_of(tools, self.marks)
        self.exact: Shape | None = None if self.uses_channels else shape_of(tools, self.marks, exact=True)
        self.reasoning_tokens = _ReasoningTokens.of(self, tokenizer)


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """What to look for in one reply.

    thinks: reasoning is told apart; starts_inside: it is under way when the reply begins. tools: schemas of arguments
    by name; max_calls: tool calls passed on at most; 0 = text stays as it is. enforced: a grammar holds the calls.
    """

    style: ReplyStyle
    thinks: bool = False
    starts_inside: bool = False
    max_calls: int = 0
    tools: Mapping[str, Schema] = field(default_factory=dict)
    enforced: bool = False

    @property
    def is_plain(self) -> bool:
        """True if the text needs no parser."""
        return not self.thinks and not self.max_calls and not self.style.uses_channels

    @property
    def letters(self) -> Mapping[int, str]:
        """What marker tokens look like in the text that the parser reads; none if it reads nothing."""
        if self.is_plain:
            return {}
        # Where no calls are looked for, their markers are what other special tokens are: left out of the text.
        return self.style.marks.letters if self.max_calls or self.style.uses_channels else self.style.thought_letters


class ReplyParser:
    """Parses one sequence, whose text holds marker tokens as letters (`ReplyFormat.letters`).

    num_calls: complete calls so far. broken: a call was begun and cut short. reasoning_tokens: tokens of reasoning,
    markers not included.
    """

    def __init__(self, shape: ReplyFormat) -> None:
        self.num_calls = 0
        self.broken = False
        self._max_calls = shape.max_calls
        self._counter = _ReasoningCounter(shape)
        self._reader = _Channels(shape) if shape.style.uses_channels else _Blocks(shape)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far."""
        return self._counter.count

    def push(self, text: str, token_ids: Sequence[int]) -> list[Event]:
        """Events that this text makes certain."""
        self._counter.push(token_ids)
        return self._noted(self._reader.push(text))

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text."""
        return self._noted(self._reader.finish())

    def _noted(self, events: list[Event]) -> list[Event]:
        """The events within the number of calls; complete and broken ones are counted."""
        kept = [each for each in events if isinstance(each, Text | Reasoning) or each.index < self._max_calls]
        self.num_calls += sum(isinstance(each, CallEnd) for each in kept)
        self.broken = self.broken or any(isinstance(each, CallBroken) for each in kept)
        return kept


class _Blocks:
    """A block of reasoning, then text and calls."""

    def __init__(self, shape: ReplyFormat) -> None:
        style, self._marks = shape.style, shape.style.marks
        self._splitter: ReasoningSplitter | None = None
        if shape.thinks and style.reasoning is not None:
            begin, end = self._marks.symbols(style.reasoning.begin), self._marks.symbols(style.reasoning.end)
            self._splitter = ReasoningSplitter(begin, end, starts_inside=shape.starts_inside)
        self._calls: CallReader | None = None
        calls = style.exact if shape.enforced else style.shape
        if shape.max_calls and calls is not None:
            self._calls = CallReader(calls, self._marks, shape.tools)

    def push(self, text: str) -> list[Event]:
        thought, content = self._splitter.push(text) if self._splitter is not None else ("", text)
        return self._events(thought, content, final=False)

    def finish(self) -> list[Event]:
        thought, content = self._splitter.finish() if self._splitter is not None else ("", "")
        return self._events(thought, content, final=True)

    def _events(self, thought: str, content: str, *, final: bool) -> list[Event]:
        events: list[Event] = [Reasoning(self._marks.spelled(thought))] if thought else []
        if self._calls is not None:
            return events + list(self._calls.push(content, final=final))
        return events + ([Text(self._marks.spelled(content))] if content else [])


class _Channels:
    """Messages in channels."""

    def __init__(self, shape: ReplyFormat) -> None:
        tools = shape.tools if shape.max_calls else {}
        self._reader = harmony.HarmonyReader(shape.style.marks, tools, thinks=shape.thinks)

    def push(self, text: str) -> list[Event]:
        return self._reader.push(text)

    def finish(self) -> list[Event]:
        return self._reader.finish()


@dataclass(frozen=True, slots=True)
class _ReasoningTokens:
    """Token ids that begin reasoning, and those that end it; empty where markers are no tokens."""

    begin: tuple[int, ...] = ()
    ends: frozenset[int] = frozenset()

    @classmethod
    def of(cls, style: ReplyStyle, tokenizer: TextTokenizer | None) -> _ReasoningTokens:
        """The tokens of a style."""
        if style.reasoning is None or tokenizer is None:
            return cls()
        begin = tuple(tokenizer.encode(style.reasoning.begin, add_special_tokens=False))
        if style.uses_channels:
            ends = [tokenizer.added_tokens.get(text) for text in harmony.MARKERS if text != "<|message|>"]
            return cls(begin, frozenset(token for token in ends if token is not None))
        end = tokenizer.encode(style.reasoning.end, add_special_tokens=False)
        return cls(begin, frozenset(end)) if len(begin) == 1 and len(end) == 1 else cls()


class _ReasoningCounter:
    """Counts tokens between the markers, if those are tokens of the vocabulary; else it counts none."""

    def __init__(self, shape: ReplyFormat) -> None:
        self.count = 0
        self._tokens = shape.style.reasoning_tokens
        self._inside = shape.starts_inside and not shape.style.uses_channels
        self._ended = not shape.thinks or not self._tokens.ends
        self._repeats = shape.style.uses_channels
        self._last: tuple[int, ...] = ()

    def push(self, token_ids: Sequence[int]) -> None:
        """Count these tokens."""
        for token in () if self._ended else token_ids:
            if self._inside and token in self._tokens.ends:
                self._inside, self._ended = False, not self._repeats
            elif self._inside:
                self.count += 1
            self._last = (*self._last, token)[-len(self._tokens.begin) :]
            self._inside = self._inside or self._last == self._tokens.begin
            if self._ended:
                return
