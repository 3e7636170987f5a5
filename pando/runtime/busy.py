"""How long a device works on steps, by marks in its queue that are read once it has passed them: nobody waits."""

from __future__ import annotations

from collections import deque

from pando.device import Device, Mark


class BusyTime:
    """Adds up spans of queued work.

        begin = busy.begin()      the device comes here when it has done what was queued before
        ...                       work is queued
        busy.end(begin)

    A span lasts from its first piece of work to its last. What a host that queues too slowly leaves between pieces of
    one span counts as work; between two spans it does not.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: deque[tuple[Mark, Mark]] = deque()

    def begin(self) -> Mark:
        """The begin of a span."""
        return self._device.mark()

    def end(self, begin: Mark) -> None:
        """The end of the span that began there."""
        self._spans.append((begin, self._device.mark()))

    def take(self) -> float:
        """Seconds of the spans that the device has come through since this was last asked."""
        seconds = 0.0
        while self._spans and self._spans[0][1].passed():
            begin, end = self._spans.popleft()
            seconds += end.seconds_since(begin)
        return seconds
