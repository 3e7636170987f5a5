"""The contract between a grammar backend and whoever samples tokens.

Masks are int32 arrays `[rows, ceil(V / 32)]`, where bit `t % 32` (least significant first) of word `t // 32` says
whether token `t` may come next; V is the width of the model's logits, and bits of ids without a token are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pando.core.sampling import GrammarSpec
from pando.grammar.masks import Masks


@dataclass(frozen=True, slots=True)
class Issue:
    """A fault or a remark about a source: where (a JSON pointer, or empty), what, and whether it forbids the use."""

    pointer: str
    message: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"at {self.pointer}: {self.message}" if self.pointer else self.message


class GrammarState(Protocol):
    """Where one sequence stands in its grammar. Owned by one thread at a time."""

    def accept(self, tokens: Sequence[int]) -> int:
        """Advance over tokens until one does not fit; returns how many were taken. A refused token changes nothing."""

    def validate(self, tokens: Sequence[int]) -> int:
        """How many of the tokens `accept` would take; the state stays where it is."""

    def rollback(self, n: int) -> None:
        """Undo the last `n` accepted tokens."""

    def forced_tokens(self, limit: int) -> list[int]:
        """Tokens that must come next, as the tokenizer itself would write them; at most `limit`, often none."""

    def fill(self, masks: Masks, row: int) -> bool:
        """Write the mask of the next token into a row; False if every token is allowed and the mask may be skipped."""

    def fork(self) -> GrammarState:
        """An independent copy at the same place."""

    def is_accepting(self) -> bool:
        """True if the text may end here."""

    def is_finished(self) -> bool:
        """True if nothing but the end may follow, or the end was accepted."""

    def error(self) -> str | None:
        """Why this state can not go on (a resource limit, a fault inside the backend), or None."""


class BatchFill(Protocol):
    """The two halves of `fill`, so that a backend computes the middle for many states in parallel."""

    def begin_fill(self, masks: Masks, row: int) -> object | None:
        """What the backend must compute into the row; None if the row is complete already."""

    def end_fill(self, masks: Masks, row: int) -> bool:
        """Finish the row; as `fill` returns."""


class BatchState(GrammarState, BatchFill, Protocol):
    """A state whose masks can be filled in a batch: all of ours are."""

    def fork(self) -> BatchState:
        """See GrammarState."""


class CompiledGrammar(Protocol):
    """A compiled source; states are cheap copies of its start."""

    @property
    def key(self) -> str:
        """Identity of backend, tokenizer, source and options."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory it is thought to hold."""

    @property
    def compile_ms(self) -> float:
        """CPU milliseconds that compiling took."""

    @property
    def relaxed(self) -> tuple[Issue, ...]:
        """What the grammar does not enforce although the source asks for it; empty if it is exact."""

    def new_state(self) -> BatchState:
        """A state at the beginning."""

    def violation(self, text: str) -> str | None:
        """Why a finished text breaks the source, where the grammar was relaxed; None if it does not."""


class GrammarBackend(Protocol):
    """One per tokenizer, width of logits and set of end ids. All methods may be called from any thread."""

    name: str

    def key(self, spec: GrammarSpec) -> str:
        """Identity of a compiled source, for caches."""

    def validate(self, spec: GrammarSpec) -> list[Issue]:
        """Faults and remarks without compiling for the tokenizer: what a front end checks."""

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile. Raises InvalidGrammar with a JSON pointer."""

    def allocate_masks(self, rows: int) -> Masks:
        """Masks that allow every token."""

    def fill_batch(self, items: Sequence[tuple[BatchState, int]], masks: Masks) -> list[bool]:
        """`fill` of many (state, row) in parallel; no state and no row twice."""
