"""Recurrent states that requests may go back to: lent for as long as guesses of their tokens are being checked."""

from __future__ import annotations

from array import array

from pando.cache.handle import CacheHandle
from pando.cache.manager_eviction import Eviction
from pando.cache.manager_store import Store


class Scratch:
    """Lends state slots of a cache. At most one a request; `release` of its handle takes it back, too."""

    def __init__(self, store: Store, eviction: Eviction) -> None:
        self._store = store
        self._eviction = eviction

    def lend(self, handle: CacheHandle) -> bool:
        """Give the handle a slot, if it has none and one can be had; what nobody holds is evicted for it."""
        states, budget = self._store.states, self._store.budget
        if handle.scratch < 0 and states is not None:
            need = [0] * (len(self._store.components) - 1) + [1]
            if not budget.has_free(need):
                if budget.shortfall(need, [0] * len(need)) > 0:
                    return False
                self._eviction.make_room(need)
            handle.scratch = states.allocator.take_one()
        return handle.scratch >= 0

    def take_back(self, handle: CacheHandle, *, planned: bool = False) -> None:
        """The handle needs its slot no more; planned: but for the step that is being planned."""
        states = self._store.states
        if handle.scratch >= 0 and states is not None:
            states.allocator.retire(array("i", [handle.scratch]), planned=planned)
            handle.scratch = -1
