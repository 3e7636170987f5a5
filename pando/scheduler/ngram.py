"""Guesses from the text itself: what followed the last few tokens when they stood there before.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): structured outputs repeat field names and values of the prompt.
How far a guess goes follows from how often such guesses came true in this very text: the longer the ending that was
found again, the likelier, but by how much differs from text to text.
"""

from __future__ import annotations

from pando.cache.key import TokenKey

SIZES = (4, 3, 2, 1)
"""Lengths of the endings looked up, longest first: the longer one fits, the likelier the guess."""
MAX_DRAFT = 8
"""Guesses at once."""
FIRST_RATES = {4: 0.8, 3: 0.7, 2: 0.6, 1: 0.4}
"""How likely a guess is right if those before it are, by the size of the ending, before anything is known."""
_LEARN = 0.15
"""Weight of a new outcome in a rate."""
_FORGET = 0.03
"""How far a rate goes back to the first one when a guess is not made because of it: texts change."""


class NgramDrafter:
    """Implements `pando.scheduler.guide.Drafter` for one sequence; follows its growth."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """Ending -> the position after its latest occurrence but the one at the very end."""
        self._rates = dict(FIRST_RATES)
        self._proposed = (0, 0)
        """Size of the ending of the last proposal, and how many tokens it had."""

    def propose(self, key: TokenKey, limit: int, price: float = 0.0) -> list[int]:
        """The tokens after the latest earlier occurrence of the longest ending that has one, as far as it pays."""
        tokens = self._follow(key)
        self._proposed = (0, 0)
        for size in SIZES:
            at = self._ends.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if at is None:
                continue
            num = self._worth(size, min(limit, MAX_DRAFT, len(tokens) - at), price)
            if num:
                self._proposed = (size, num)
                return tokens[at : at + num]
        return []

    def learn(self, num_judged: int, num_right: int) -> None:
        """Of the last proposal, `num_judged` tokens were tried, and the first `num_right` were right."""
        size, num = self._proposed
        self._proposed = (0, 0)
        if not size:
            return
        rate = self._rates[size]
        for _ in range(min(num_right, num)):
            rate += _LEARN * (1.0 - rate)
        if num_right < min(num_judged, num):
            rate -= _LEARN * rate
        self._rates[size] = rate

    def _follow(self, key: TokenKey) -> list[int]:
        tokens = self._tokens
        for token in key.tokens(len(tokens)):
            for size in SIZES:
                if len(tokens) >= size:
                    self._ends[tuple(tokens[-size:])] = len(tokens)
            tokens.append(token)
        return tokens

    def _worth(self, size: int, most: int, price: float) -> int:
        """How many guesses are likelier than `price` to be right, at most `most`."""
        rate = chance = self._rates[size]
        num = 0
        while num < most and chance >= price:
            num += 1
            chance *= rate
        if not num:
            self._rates[size] += _FORGET * (FIRST_RATES[size] - rate)
        return num
