"""The admission gate: whatever must be ready before a request may wait for a batch.

Grammar compilation, adapter loading, image encoding, cache loads from outer tiers and KV arriving from a prefill peer
are all one thing to the scheduler: a gate that wants a request, and later says that it is ready or failed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from pando.errors import PandoError, StepFailed
from pando.scheduler.request import Request

_log = logging.getLogger(__name__)


class Gate(Protocol):
    """One kind of preparation. Never blocks; work happens elsewhere and is reported by `poll`."""

    def wants(self, request: Request) -> bool:
        """True if this request needs this preparation."""

    def submit(self, request: Request) -> None:
        """Start preparing."""

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        """Requests whose preparation ended since the last call, with the error if it failed.

        A request may be reported before that, once, with `held` set: its prompt is read meanwhile, but for its end.
        """

    def cancel(self, request: Request) -> None:
        """The request is gone; `poll` must not report it any more."""


class Gates:
    """Runs a request through all gates that want it, in any order; it is ready when none is left."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = list(gates)
        self._left: dict[str, tuple[Request, set[int]]] = {}

    def __len__(self) -> int:
        """Requests that are not ready yet."""
        return len(self._left)

    def enter(self, request: Request) -> bool:
        """Submit the request to the gates that want it; True if there are none and it is ready at once."""
        wanted = {i for i, gate in enumerate(self._gates) if gate.wants(request)}
        if not wanted:
            return True
        self._left[request.rid] = (request, wanted)
        for i in wanted:
            self._gates[i].submit(request)
        return False

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        """Requests that became ready (None) or failed since the last call.

        One that went ahead, held, is reported again when its gate has done with it.
        """
        ready: list[tuple[Request, PandoError | None]] = []
        if not self._left:
            return ready
        for i in range(len(self._gates)):
            for request, error in self._poll(i):
                if request.rid not in self._left:
                    continue
                left = self._left[request.rid][1]
                if error is not None or not request.held:
                    left.discard(i)
                if error is not None or not left:
                    self.leave(request)
                    ready.append((request, error))
                elif request.held and len(left) == 1:
                    ready.append((request, None))
        return ready

    def _poll(self, i: int) -> list[tuple[Request, PandoError | None]]:
        """What gate `i` reports; if it raises, those that wait for it have failed, and only those."""
        try:
            return self._gates[i].poll()
        except Exception as error:
            _log.exception("a gate failed; the requests that wait for it fail")
            held = [request for request, left in self._left.values() if i in left]
            return [(request, StepFailed(f"internal error while preparing the request: {error!r}")) for request in held]

    def leave(self, request: Request) -> None:
        """Forget a request: it is ready, failed or aborted."""
        for i in self._left.pop(request.rid, (request, set()))[1]:
            self._gates[i].cancel(request)
