"""States made of states: a grammar that begins after the reasoning, and one that may not use some tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from pando.core.sampling import ReasoningSpec
from pando.grammar.masks import MaskRow, Masks, full_row, row_of
from pando.grammar.protocols import BatchState

Start = Literal["now", "inside", "optional"]
"""Where an answer begins: with the grammar, inside a reasoning block, or with either as the model likes."""


class Width(Protocol):
    """What masks outside a grammar depend on: tokens that exist, width of the logits, ids that end a text."""

    @property
    def num_tokens(self) -> int:
        """Ids that exist."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text."""


class ReasoningMarks:
    """Token sequences around reasoning, and the masks of the time inside it.

    begin, end: token ids of the markers. budget: most tokens of reasoning before the end marker is forced, or None.
    committed: after so many tokens of the end marker the rest of it is forced; 0 = never.
    Raises ValueError if the end marker is empty.
    """

    def __init__(
        self,
        vocabulary: Width,
        begin: Sequence[int],
        end: Sequence[int],
        budget: int | None = None,
        committed: int = 0,
    ) -> None:
        if not end:
            raise ValueError("reasoning needs an end marker of at least one token")
        self.begin = tuple(begin)
        self.end = tuple(end)
        self.budget = budget
        self.committed = committed or len(end)
        self.end_ids = frozenset(vocabulary.eos_ids)
        # Ending the whole text inside the reasoning would leave an answer that the grammar never saw.
        self.free: MaskRow = full_row(vocabulary.num_tokens, vocabulary.vocab_size) & ~row_of(
            vocabulary.eos_ids, vocabulary.vocab_size
        )
        self.only = {token: row_of([token], vocabulary.vocab_size) for token in {*self.begin, *self.end}}

    def start_of(self, prompt: Sequence[int]) -> Start:
        """Where the answer to this prompt begins: what its last marker says, else as the model likes."""
        if not self.begin:
            return "now"
        opened, closed = _last(prompt, self.begin), _last(prompt, self.end)
        if opened < 0 and closed < 0:
            return "optional"
        if opened > closed:
            return "inside"
        # A block that is closed at the very end of the prompt is how templates switch reasoning off; one further up
        # belongs to an earlier turn.
        return "now" if len(prompt) - closed <= len(self.end) + _AFTER_BLOCK else "optional"


_AFTER_BLOCK = 2
"""Tokens of white space that templates write behind an empty block."""


def _last(tokens: Sequence[int], part: tuple[int, ...]) -> int:
    """Where `part` stands last in `tokens`; -1 if nowhere."""
    width = len(part)
    for start in range(len(tokens) - width, -1, -1):
        if tuple(tokens[start : start + width]) == part:
            return start
    return -1


class ReasoningGate:
    """Free text until the end marker is complete, then `inner`. Rolls back across the border.

    start=inside            start=optional
    [free ... end][inner]   [begin][free ... end][inner]  or  [inner]
    """

    def __init__(self, inner: BatchState, marks: ReasoningMarks, start: Start = "inside") -> None:
        self._inner = inner
        self._marks = marks
        self._start: Start = "now" if start == "optional" and len(marks.begin) != 1 else start
        self._free: list[int] = []
        """Tokens before the grammar, its markers included."""
        self._taken = 0
        """Tokens inside the grammar."""

    def _phase(self) -> Literal["undecided", "free", "inner"]:
        free, end = self._free, self._marks.end
        if self._start == "now" or self._taken:
            return "inner"
        if self._start == "optional" and not free:
            return "undecided"
        return "inner" if tuple(free[-len(end) :]) == end else "free"

    def _step(self, token: int) -> bool:
        phase = self._phase()
        if phase == "free" or phase == "undecided" and token == self._marks.begin[0]:
            wanted = self._due()
            if token in self._marks.end_ids or wanted is not None and token != wanted:
                return False
            self._free.append(token)
            return True
        taken = self._inner.accept([token]) == 1
        self._taken += taken
        return taken

    def _due(self) -> int | None:
        """The token of the end marker that must come next: it is begun, or the budget is spent. Else None."""
        rest = self._rest()
        return rest[0] if rest else None

    def _rest(self) -> tuple[int, ...]:
        """Tokens of the end marker that must come now."""
        marks, free = self._marks, self._free
        end = marks.end
        spent = marks.budget is not None and len(free) >= marks.budget + (self._start == "optional")
        if not spent and marks.committed >= len(end):
            return ()
        overlap = max(n for n in range(len(end)) if n == 0 or tuple(free[-n:]) == end[:n])
        return end[overlap:] if spent or overlap >= marks.committed else ()

    def accept(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        for index, token in enumerate(tokens):
            if not self._step(token):
                return index
        return len(tokens)

    def validate(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        if self._phase() == "inner":
            return self._inner.validate(tokens)
        count = 0
        while count < len(tokens) and self._phase() == "free" and self._step(tokens[count]):
            count += 1
        if count < len(tokens) and self._phase() == "undecided":
            if tokens[0] != self._marks.begin[0]:
                return self._inner.validate(tokens)
            self._free.append(tokens[0])
            total = 1 + self.validate(tokens[1:])
            self._free.pop()
            return total
        rest = self._inner.validate(tokens[count:]) if count < len(tokens) and self._phase() == "inner" else 0
        self.rollback(count)
        return count + rest

    def rollback(self, n: int) -> None:
        """See GrammarState."""
        inside = min(n, self._taken)
        if inside:
            self._inner.rollback(inside)
            self._taken -= inside
        if n > inside:
            assert n - inside <= len(self._free), f"rollback of {n} tokens exceeds what was accepted"
            del self._free[len(self._free) - (n - inside) :]

    def forced_tokens(self, limit: int) -> list[int]:
        """See GrammarState."""
        if self._phase() == "inner":
            return self._inner.forced_tokens(limit)
        if self._phase() == "undecided":
            return []
        rest = list(self._rest())
        if not rest or len(rest) >= limit:
            return rest[:limit]
        # The run goes on across the border: behind the marker the grammar stands at its beginning.
        return rest + self._inner.forced_tokens(limit - len(rest))

    def fill(self, masks: Masks, row: int) -> bool:
        """See GrammarState."""
        if self._phase() == "free":
            self.begin_fill(masks, row)
        else:
            self._inner.fill(masks, row)
        return self._finish(masks, row)

    def begin_fill(self, masks: Masks, row: int) -> object | None:
        """See BatchFill."""
        if self._phase() != "free":
            return self._inner.begin_fill(masks, row)
        due = self._due()
        masks[row] = self._marks.free if due is None else self._marks.only[due]
        return None

    def end_fill(self, masks: Masks, row: int) -> bool:
        """See BatchFill."""
        if self._phase() != "free":
            self._inner.end_fill(masks, row)
        return self._finish(masks, row)

    def _finish(self, masks: Masks, row: int) -> bool:
        if self._phase() == "undecided":
            masks[row] |= self._marks.only[self._marks.begin[0]]
        return True

    def fork(self) -> ReasoningGate:
        """See GrammarState."""
        copy = ReasoningGate(self._inner.fork(), self._marks, self._start)
        copy._free = list(self._free)
        copy._taken = self._taken
        return copy

    def is_accepting(self) -> bool:
        """See GrammarState."""
        return self._phase() != "free" and self._inner.is_accepting()

    def is_finished(self) -> bool:
        """See GrammarState."""
        return self._phase() == "inner" and self._inner.is_finished()

    def error(self) -> str | None:
        """See GrammarState."""
        return self._inner.error()


class ReasoningWrap:
    """Puts gates in front of the grammars of one engine; the masks of a pair of markers are made once."""

    def __init__(self, num_tokens: int, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._width = _Width(num_tokens, vocab_size, tuple(eos_ids))
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...], int], ReasoningMarks] = {}

    def __call__(self, inner: BatchState, spec: ReasoningSpec) -> BatchState:
        """The state of `inner` after what `spec` lets come first."""
        if spec.start == "now" or not spec.end:
            return inner
        key = (spec.begin, spec.end, spec.committed)
        marks = self._known.get(key)
        if marks is None:
            if len(self._known) >= _KNOWN_MARKS:
                self._known.clear()
            marks = self._known[key] = ReasoningMarks(self._width, spec.begin, spec.end, committed=spec.committed)
        return ReasoningGate(inner, marks, spec.start)


_KNOWN_MARKS = 16
"""Pairs of markers kept: models have one or two, but a request may name its own."""


@dataclass(frozen=True, slots=True)
class _Width:
    """Implements `Width`."""

    num_tokens: int
    vocab_size: int
    eos_ids: tuple[int, ...]


class TokenFilter:
    """`inner` without some tokens: they are never allowed, forced or accepted."""

    def __init__(self, inner: BatchState, banned: Sequence[int], vocab_size: int) -> None:
        self._inner = inner
        self._banned = frozenset(banned)
        self._kept: MaskRow = ~row_of(self._banned, vocab_size)

    def _clean(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens before the first banned one."""
        return tokens[: next((index for index, token in enumerate(tokens) if token in self._banned), len(tokens))]

    def accept(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        return self._inner.accept(self._clean(tokens))

    def validate(self, tokens: Sequence[int]) -> int:
        """See GrammarState."""
        return self._inner.validate(self._clean(tokens))

    def rollback(self, n: int) -> None:
        """See GrammarState."""
        self._inner.rollback(n)

    def forced_tokens(self, limit: int) -> list[int]:
        """See GrammarState."""
        return list(self._clean(self._inner.forced_tokens(limit)))

    def fill(self, masks: Masks, row: int) -> bool:
        """See GrammarState."""
        self._inner.fill(masks, row)
        np.bitwise_and(masks[row], self._kept, out=masks[row])
        return True

    def begin_fill(self, masks: Masks, row: int) -> object | None:
        """See BatchFill."""
        return self._inner.begin_fill(masks, row)

    def end_fill(self, masks: Masks, row: int) -> bool:
        """See BatchFill."""
        self._inner.end_fill(masks, row)
        np.bitwise_and(masks[row], self._kept, out=masks[row])
        return True

    def fork(self) -> TokenFilter:
        """See GrammarState."""
        copy = TokenFilter.__new__(TokenFilter)
        copy._inner, copy._banned, copy._kept = self._inner.fork(), self._banned, self._kept
        return copy

    def is_accepting(self) -> bool:
        """See GrammarState."""
        return self._inner.is_accepting()

    def is_finished(self) -> bool:
        """See GrammarState."""
        return self._inner.is_finished()

    def error(self) -> str | None:
        """See GrammarState."""
        return self._inner.error()
