"""The device a model runs on. The CPU is synchronous: its copies are finished when they return.

On a GPU the host runs ahead: work and copies are queued, and only `HostCopy.wait` waits for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostCopy(Protocol):
    """A copy to host memory that may still be under way."""

    def wait(self) -> Tensor:
        """The host tensor, once the copy is complete."""


@dataclass(frozen=True, slots=True)
class _Ready:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True, slots=True)
class _Pending:
    tensor: Tensor
    event: torch.cuda.Event

    def wait(self) -> Tensor:
        self.event.synchronize()
        return self.tensor


class Mark(Protocol):
    """A point in the device's queue, and when the device came to it."""

    def passed(self) -> bool:
        """Whether the device has come to it; nobody waits."""

    def seconds_since(self, earlier: Any) -> float:
        """Time on the device since an earlier mark of the same kind. Both have passed."""


@dataclass(frozen=True, slots=True)
class HostMark:
    """A mark of a device that is done with everything when it is asked."""

    at: float = field(default_factory=time.perf_counter)

    def passed(self) -> bool:
        """Always."""
        return True

    def seconds_since(self, earlier: HostMark) -> float:
        """By the host's clock."""
        return self.at - earlier.at


@dataclass(frozen=True, slots=True)
class _EventMark:
    event: torch.cuda.Event

    def passed(self) -> bool:
        return bool(self.event.query())

    def seconds_since(self, earlier: _EventMark) -> float:
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class Reached(Protocol):
    """A point in the device's queue."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


def _locked_memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _here() -> Reached:
    event = torch.cuda.Event()
    event.record()
    return event


class PinnedRing:
    """Page-locked host memory for copies to the device, used over and over: locking pages costs more than a copy.

    It is cut into parts. A part is handed out piece by piece; when it is full, the point that the queue has reached is
    noted, and before the part is used again that point must have passed: with some steps' copies to a part it long has.

        | part 0: passed | part 1: in use .... | part 2 | part 3 |
    """

    def __init__(
        self,
        num_bytes: int = 32 << 20,
        num_parts: int = 4,
        allocate: Callable[[int], Tensor] = _locked_memory,
        mark: Callable[[], Reached] = _here,
    ) -> None:
        self._part_bytes = num_bytes // num_parts
        self._num_parts = num_parts
        self._allocate = allocate
        self._mark = mark
        self._memory: Tensor | None = None
        self._marks: list[Reached | None] = [None] * num_parts
        self._part = 0
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, free to be written and then copied from in the current stream. Larger than a part: new."""
        if num_bytes > self._part_bytes:
            return self._allocate(num_bytes)
        if self._memory is None:
            self._memory = self._allocate(self._part_bytes * self._num_parts)
        if self._used + num_bytes > self._part_bytes:
            self._turn()
        first = self._part * self._part_bytes + self._used
        self._used += -(-num_bytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT
        return self._memory[first : first + num_bytes]

    def _turn(self) -> None:
        self._marks[self._part] = self._mark()
        self._part = (self._part + 1) % self._num_parts
        self._used = 0
        if (mark := self._marks[self._part]) is not None:
            mark.synchronize()


PIECE_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device and what the runner must know about it."""

    name: str
    ring: PinnedRing = field(default_factory=PinnedRing, compare=False, repr=False)

    @property
    def asynchronous(self) -> bool:
        """True if launched work runs behind the host, so that planning the next step can overlap with it."""
        return self.name != "cpu"

    def upload(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Host numbers as a device tensor [len(values)], without waiting for the device."""
        if not self.asynchronous:
            return torch.tensor(values, dtype=dtype)
        return self.upload_array(np.asarray(values, dtype=_NUMPY_TYPES[dtype]))

    def upload_array(self, values: NDArray[Any]) -> Tensor:
        """A host array on the device, without waiting for it; on a CPU it is the same memory."""
        host = torch.from_numpy(values)
        if not self.asynchronous:
            return host
        staged = self.ring.take(values.nbytes).view(host.dtype).view(host.shape)
        staged.copy_(host)
        return self.transfer(staged)

    def transfer(self, staged: Tensor) -> Tensor:
        """Start the copy of page-locked memory to the device."""
        return torch.empty_like(staged, device=self.name).copy_(staged, non_blocking=True)

    def to_host(self, tensor: Tensor) -> HostCopy:
        """Start copying a tensor to the host behind the work queued so far."""
        if not self.asynchronous:
            return _Ready(tensor)
        # Torch keeps page-locked memory that was freed, so after some steps this locks none anew.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Pending(host, event)

    def mark(self) -> Mark:
        """This point of the queue; costs a microsecond or two."""
        if not self.asynchronous:
            return HostMark()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return _EventMark(event)

    def largest(self, values: Tensor, at_most: int) -> int:
        """The largest of some integers where looking costs nothing; else `at_most`, which none of them exceeds."""
        return at_most if self.asynchronous else int(values.max())

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        if self.asynchronous:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that can still be allocated, in bytes."""
        if self.asynchronous:
            # What torch keeps for itself counts as free: it is given back, or used again.
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info()[0])
        return available_host_bytes()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Bytes that `run` takes at its worst beyond what is allocated before; 0 on a CPU, where none counts them."""
        if not self.asynchronous:
            run()
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


_NUMPY_TYPES = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32}


def resolve_device(name: str) -> Device:
    """`auto` takes a CUDA device when torch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return Device(name)


def available_host_bytes() -> int:
    """Host memory available to this process: the kernel's estimate, bounded by the control group's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo") as file:
            rows = dict(line.split(":", 1) for line in file)
        available = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    for limit_file, used_file in _CGROUP_FILES:
        try:
            with open(limit_file) as limit, open(used_file) as used:
                available = min(available, max(0, int(limit.read()) - int(used.read())))
        except (OSError, ValueError):
            continue
    return available


_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
