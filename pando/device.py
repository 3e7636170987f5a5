"""The device a model runs on. The CPU is synchronous: its copies are finished when they return."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True, slots=True)
class Device:
    """A torch device and what the runner must know about it."""

    name: str

    @property
    def asynchronous(self) -> bool:
        """True if launched work runs behind the host, so that planning the next step can overlap with it."""
        return self.name != "cpu"

    def upload(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        """Host integers as a device tensor, without waiting for the device."""
        tensor = torch.tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.name, non_blocking=True) if self.asynchronous else tensor

    def to_host(self, tensor: Tensor) -> HostCopy:
        """Start copying a tensor to the host behind the work queued so far."""
        if not self.asynchronous:
            return _Ready(tensor)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return _Pending(host, event)

    def upload_array(self, values: NDArray[np.int32]) -> Tensor:
        """A host array on the device; on a CPU it is the same memory."""
        host = torch.from_numpy(values)
        return host.to(self.name, non_blocking=True) if self.asynchronous else host

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        if self.asynchronous:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that can still be allocated, in bytes."""
        if self.asynchronous:
            return int(torch.cuda.mem_get_info()[0])
        return available_host_bytes()


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
