"""Guesses from the text itself: what followed the last few tokens when they stood there before.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): structured outputs repeat field names and values of the prompt.
"""

from __future__ import annotations

from pando.cache.key import TokenKey

SIZES = (4, 3, 2)
"""Lengths of the endings looked up, longest first: the longer one fits, the likelier the guess."""
MAX_DRAFT = 6
"""Guesses at once. On a CPU a row more costs little while weights are read anyway, and no more than that."""


class NgramDrafter:
    """Implements `pando.scheduler.guide.Drafter` for one sequence; follows its growth."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Ending -> the position after its latest occurrence but the one at the very end."""

    def propose(self, key: TokenKey, limit: int) -> list[int]:
        """The tokens after the latest earlier occurrence of the longest ending that has one."""
        tokens = self._tokens
        for token in key.tokens(len(tokens)):
            for size in SIZES:
                if len(tokens) >= size:
                    self._ends[tuple(tokens[-size:])] = len(tokens)
            tokens.append(token)
        for size in SIZES:
            at = self._ends.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if at is not None:
                return tokens[at : at + min(limit, MAX_DRAFT)]
        return []
