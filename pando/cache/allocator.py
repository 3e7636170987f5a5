"""Who owns which slot of an id space, in host integers. A freed slot rests while a launched step may still write it."""

from __future__ import annotations

from array import array


class SlotAllocator:
    """Free list over slots 0..num_slots-1 (pages, or recurrent states), lowest first on a fresh pool.

       take / take_one            retire, nothing in flight
    free ------------> owned ---------------------------------> free
                         | retire, step s in flight                ^
                         +---------> quarantine(s) ----------------+  collected(s)
    """

    __slots__ = ("_free", "_quarantine", "newest_collected", "newest_launched", "num_quarantined", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_quarantined = 0
        self._free = array("i", range(num_slots - 1, -1, -1))
        self._quarantine: list[tuple[int, array[int]]] = []
        self.newest_launched = -1
        self.newest_collected = -1

    @property
    def num_free(self) -> int:
        """Slots that can be taken now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that are owned or rest."""
        return self.num_slots - len(self._free)

    def take_one(self) -> int:
        """One free slot. The caller has checked that there is one."""
        return self._free.pop()

    def take(self, count: int) -> array[int]:
        """`count` free slots, ascending on a fresh pool. The caller has checked that they exist."""
        free = self._free
        cut = len(free) - count
        assert cut >= 0, f"{count} slots taken of {len(free)} free"
        slots = free[cut:]
        del free[cut:]
        slots.reverse()
        return slots

    def put(self, slots: array[int]) -> None:
        """Give slots back at once; only for those that no launched step writes."""
        self._free.extend(slots[::-1])

    def retire(self, slots: array[int], *, planned: bool = False) -> None:
        """Give slots back when every step launched so far, and with `planned` the next one too, has been collected."""
        if not slots:
            return
        last = self.newest_launched + planned
        if last <= self.newest_collected:
            self.put(slots)
            return
        self.num_quarantined += len(slots)
        self._quarantine.append((last, slots))

    def launched(self, step: int) -> None:
        """Step `step` was launched; steps are numbered upwards."""
        assert step > self.newest_launched, f"step {step} launched after {self.newest_launched}"
        self.newest_launched = step

    def collected(self, step: int) -> None:
        """Step `step`, and with it every earlier one, has ended on the device."""
        self.newest_collected = max(self.newest_collected, step)
        if self._quarantine:
            due = [slots for tag, slots in self._quarantine if tag <= step]
            self._quarantine = [(tag, slots) for tag, slots in self._quarantine if tag > step]
            for slots in due:
                self.num_quarantined -= len(slots)
                self.put(slots)

    def idle_slots(self) -> list[int]:
        """Every slot in the free list or in quarantine, for `check()`."""
        return [*self._free, *(slot for _, slots in self._quarantine for slot in slots)]
