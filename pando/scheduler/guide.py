"""What steers a request's tokens beside the model: a grammar state, as the scheduler uses it.

A guide says which tokens may come (a mask), which must come (they are appended without running the model for each),
and which may be guessed. It follows the request's tokens exactly: it has accepted all of `known`, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pando.cache.key import TokenKey
from pando.errors import GrammarFailed
from pando.grammar.protocols import GrammarState

MAX_FORCED = 64
"""Forced tokens taken at once; a longer run continues after the next step."""
MAX_FORCED_DRAFTS = 8
"""Forced tokens behind a guess that ride with it, and are lost if it is wrong."""


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def propose(self, key: TokenKey, limit: int, price: float) -> list[int]:
        """At most `limit` tokens that may follow `key`, which only ever grows between two calls.

        price: of a guess in terms of a token won; one less likely to be right than that does not pay.
        """

    def learn(self, num_judged: int, num_right: int) -> None:
        """Of the last proposal, `num_judged` tokens were tried, and the first `num_right` were right."""


_LEARN = 0.1
_FORGET = 0.005
"""Weights of a new outcome in a mean, and of the first assumption where there was no outcome."""


class Patience:
    """Whether a request should know its last token before it is planned again, where steps may overlap.

    If it does not wait, the token that is under way when a forced run turns up is void, and nothing can be guessed. If
    it does, it takes part in every other step, or nothing overlaps. Means over its tokens tell which gives more.
    """

    __slots__ = ("_drafts", "_first_drafts", "_forced", "_runs")

    def __init__(self, *, drafts: bool) -> None:
        self._runs, self._forced = 0.3, 1.0
        """Of a sampled token: how often a forced run follows, and how many forced tokens."""
        self._first_drafts = self._drafts = 1.5 if drafts else 0.0
        """Drafts that come true per sampled token."""

    def forced(self, num: int) -> None:
        """A sampled token came, and `num` forced ones behind it."""
        self._runs += _LEARN * ((num > 0) - self._runs)
        self._forced += _LEARN * (num - self._forced)
        self._drafts += _FORGET * (self._first_drafts - self._drafts)

    def drafted(self, num_right: int) -> None:
        """Guesses were possible, and `num_right` came true."""
        self._drafts += _LEARN * (num_right - self._drafts)

    def pays(self, price: float) -> bool:
        """Whether waiting gives more tokens a step; price: steps that waiting takes beside the one it waits for."""
        plain = 1.0 + self._forced
        return (plain + self._drafts) * (1.0 + self._runs) > plain * (1.0 + price)


class Guide:
    """One request's grammar state.

    jump: take forced tokens without running the model for each. relaxed: see `Finish`.
    """

    __slots__ = ("_num_guessed", "_problem", "drafter", "jump", "patience", "relaxed", "state")

    def __init__(
        self,
        state: GrammarState,
        *,
        jump: bool = True,
        drafter: Drafter | None = None,
        relaxed: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.state = state
        self.jump = jump
        self.drafter = drafter
        self.relaxed = relaxed
        self.patience = Patience(drafts=drafter is not None)
        self._problem: str | None = None
        self._num_guessed = 0
        """Drafts of the last call that were guessed; what the grammar forces behind them follows."""

    def accept(self, token: int) -> None:
        """Follow a sampled token. Raises GrammarFailed if the grammar does not allow it."""
        reason = self._problem
        if reason is None and self.state.accept([token]) != 1:
            reason = self.state.error() or f"it does not allow the sampled token {token}"
        if reason is not None:
            raise GrammarFailed(f"the grammar can not go on; make it simpler: {reason}")

    def take_forced(self, limit: int) -> list[int]:
        """The tokens that must come next, at most `limit`; the state has accepted them on return."""
        if not self.jump or limit <= 0:
            return []
        tokens = self.state.forced_tokens(min(limit, MAX_FORCED))
        return tokens[: self.state.accept(tokens)] if tokens else []

    def draft(self, key: TokenKey, limit: int, price: float = 0.0) -> list[int]:
        """Guesses for the tokens after `key` that the grammar allows, and what it forces behind them.

        price: see `Drafter.propose`. None without a drafter.
        """
        if self.drafter is None or limit <= 0:
            return []
        guesses = self.drafter.propose(key, limit, price)
        if not guesses:
            self.patience.drafted(0)
            return []
        self._num_guessed = num = self.state.accept(guesses)
        forced = self.state.forced_tokens(min(limit - num, MAX_FORCED_DRAFTS)) if num and self.jump else []
        self.state.rollback(num)
        return guesses[:num] + forced

    def judge(self, num_right: int) -> None:
        """Of the last drafts, the first `num_right` came true."""
        self.patience.drafted(num_right)
        if self.drafter is not None:
            self.drafter.learn(self._num_guessed, min(num_right, self._num_guessed))

    def fill(self, bits: NDArray[np.int32], row: int, drafts: Sequence[int]) -> None:
        """Fill row `row` and one more row after each draft. Never raises: what fails ends the request at `accept`."""
        try:
            self._fill(bits, row, drafts)
        except Exception as error:  # of native code, in another thread
            self._problem = repr(error)

    def _fill(self, bits: NDArray[np.int32], row: int, drafts: Sequence[int]) -> None:
        self.state.fill(bits, row)
        accepted = 0
        for draft in drafts:
            if self.state.accept([draft]) != 1:
                break  # what follows a wrong guess is dropped, whatever its mask
            accepted += 1
            self.state.fill(bits, row + accepted)
        if accepted:
            self.state.rollback(accepted)
        self._problem = self.state.error()
