"""Who owns which page, in host integers. A freed page rests in quarantine while a launched step may still write it."""

from __future__ import annotations

from array import array
from collections import deque


class PageAllocator:
    """Free list over pages 0..num_pages-1, lowest page first on a fresh pool.

       take / take_one            retire, nothing in flight
    free ------------> owned ---------------------------------> free
                         | retire, step s in flight                ^
                         +---------> quarantine(s) ----------------+  collected(s)
    """

    __slots__ = ("_free", "_quarantine", "_newest_collected", "_newest_launched", "num_pages", "num_quarantined")

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_quarantined = 0
        self._free = array("i", range(num_pages - 1, -1, -1))
        self._quarantine: deque[tuple[int, array[int]]] = deque()
        self._newest_launched = -1
        self._newest_collected = -1

    @property
    def num_free(self) -> int:
        """Pages that can be taken now."""
        return len(self._free)

    def take_one(self) -> int:
        """One free page. The caller has checked that there is one."""
        return self._free.pop()

    def take(self, count: int) -> array[int]:
        """`count` free pages, ascending on a fresh pool. The caller has checked that they exist."""
        free = self._free
        cut = len(free) - count
        assert cut >= 0, f"{count} pages taken of {len(free)} free"
        pages = free[cut:]
        del free[cut:]
        pages.reverse()
        return pages

    def put(self, pages: array[int]) -> None:
        """Give pages back at once; only for pages that no launched step writes."""
        self._free.extend(pages[::-1])

    def retire(self, pages: array[int]) -> None:
        """Give pages back as soon as every step launched so far has been collected."""
        if not pages:
            return
        if self._newest_launched <= self._newest_collected:
            self.put(pages)
            return
        self.num_quarantined += len(pages)
        self._quarantine.append((self._newest_launched, pages))

    def launched(self, step: int) -> None:
        """Step `step` was launched; steps are numbered upwards."""
        assert step > self._newest_launched, f"step {step} launched after {self._newest_launched}"
        self._newest_launched = step

    def collected(self, step: int) -> None:
        """Step `step`, and with it every earlier one, has ended on the device."""
        self._newest_collected = max(self._newest_collected, step)
        while self._quarantine and self._quarantine[0][0] <= step:
            pages = self._quarantine.popleft()[1]
            self.num_quarantined -= len(pages)
            self.put(pages)

    def idle_pages(self) -> list[int]:
        """Every page in the free list or in quarantine, for `check()`."""
        return [*self._free, *(page for _, pages in self._quarantine for page in pages)]
