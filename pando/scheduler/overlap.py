"""What it is worth that a step is planned while the one before it runs: measured from the loop's own times."""

from __future__ import annotations

FIRST_PRICE = 0.2
_DECAY = 0.95
"""Weight of the past at each step."""


class Overlap:
    """Sums over the latest steps, in seconds: the host's own work, and its waiting for results."""

    __slots__ = ("_host", "_overlapped", "_waited")

    def __init__(self) -> None:
        self._host = self._waited = 0.0
        self._overlapped = 0.0
        """Of the host's own work, what it did while a step ran."""

    def stepped(self, seconds: float, waited: float, *, overlapped: bool) -> None:
        """An iteration of the loop took so long, `waited` of it for a result; overlapped: a step ran all the time."""
        host = max(0.0, seconds - waited)
        self._host = self._host * _DECAY + host
        self._waited = self._waited * _DECAY + waited
        self._overlapped = self._overlapped * _DECAY + host * overlapped

    @property
    def price(self) -> float:
        """How much longer a step takes if the host works only between steps, as a share of a step: 0 to 1."""
        if not self._host:
            return FIRST_PRICE
        step = self._waited + self._overlapped
        return self._host / max(self._host, step)
