"""Chooses among eviction policies by what each would have saved: every candidate runs as a shadow, always warm.

A shadow is a cache like the real one, with another policy and nothing behind its slots. It sees the same requests, each
when it ends. So what is compared is what each policy finds in the long run, not what a switch costs at first.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING

from pando.cache.key import TOKEN_BYTES, TokenKey
from pando.cache.value import Policy

if TYPE_CHECKING:
    from pando.cache.manager import CacheManager

TUNED = "tuned"
CANDIDATES = ("reuse", "gdsf:0.25", "lru")
"""The first is used until another one has shown that it is better."""
BATCH = 16
"""Requests that make one observation: hits of a conversation come in runs, so single requests prove little."""
MEMORY = 0.98
"""Weight that an observation loses with each one after it: the last 50 count, 800 requests."""
FEWEST = 16
"""Observations before the first switch, and between two."""
GAIN = 1.02
"""A challenger must have saved this much more than the policy in use."""
EVIDENCE = 3.0
"""And its lead must be this many times what chance would make of it."""


class Tuner:
    """Compares what the candidates saved, request by request. Chance rarely switches, a lasting difference does.

    For each pair the differences of all observations are added, older ones counting less and less. Were they chance,
    their sum would be about the root of the sum of their squares; a challenger must lead by a multiple of that.
    """

    def __init__(self, candidates: tuple[str, ...] = CANDIDATES) -> None:
        self.candidates = candidates
        self.choice = candidates[0]
        self._batch = dict.fromkeys(candidates, 0.0)
        self._in_batch = 0
        self._since = 0
        self._saved = dict.fromkeys(candidates, 0.0)
        self._squares = {(one, other): 0.0 for one in candidates for other in candidates}

    def observe(self, saved: Mapping[str, float]) -> bool:
        """One request: what each candidate saved of it. True if `choice` changed."""
        for name, amount in saved.items():
            self._batch[name] += amount
        self._in_batch += 1
        if self._in_batch < BATCH:
            return False
        for name, amount in self._batch.items():
            self._saved[name] = MEMORY * self._saved[name] + amount
            for other, its in self._batch.items():
                self._squares[name, other] = MEMORY**2 * self._squares[name, other] + (amount - its) ** 2
        self._batch = dict.fromkeys(self.candidates, 0.0)
        self._in_batch = 0
        self._since += 1
        best = max(self.candidates, key=self._saved.__getitem__)
        if self._since < FEWEST or best == self.choice or not self._leads(best):
            return False
        self.choice, self._since = best, 0
        return True

    def _leads(self, best: str) -> bool:
        lead = self._saved[best] - self._saved[self.choice]
        chance = self._squares[best, self.choice] ** 0.5
        return self._saved[best] >= GAIN * self._saved[self.choice] and lead >= EVIDENCE * chance


class Tuning:
    """The shadows of one cache, and the tuner that watches them."""

    def __init__(self, shadows: Mapping[str, CacheManager]) -> None:
        self.tuner = Tuner(tuple(shadows))
        self._shadows = dict(shadows)
        self._step = -1

    def observe(self, tokens: bytes, prompt_len: int, namespace: str) -> Policy | None:
        """A request ended: `tokens` were computed for it, the first `prompt_len` of them its prompt.

        Returns the policy to go on with, which knows what its shadow has learned; None = as before.
        """
        self._step += 1
        found = {name: self._serve(cache, tokens, prompt_len, namespace) for name, cache in self._shadows.items()}
        if not self.tuner.observe(found):
            return None
        return copy(self._shadows[self.tuner.choice].order.policy)

    def _serve(self, cache: CacheManager, tokens: bytes, prompt_len: int, namespace: str) -> int:
        """The request as one step of a shadow; the tokens that were there already."""
        key, total = TokenKey(), len(tokens) // TOKEN_BYTES
        key.data += tokens[: prompt_len * TOKEN_BYTES]
        handle = cache.admit(key, namespace, prompt_len)
        if handle.denied:
            return 0
        cache.plan_saves(handle, handle.num_cached, prompt_len)
        cache.publish(handle, prompt_len)
        cache.launched(self._step)
        cache.collected(self._step)
        if cache.grow(handle, total).denied:
            total = prompt_len
        key.data += tokens[prompt_len * TOKEN_BYTES : total * TOKEN_BYTES]
        cache.release(handle, total, publish=True, state_at=None if cache.states is None else total)
        return handle.num_cached
