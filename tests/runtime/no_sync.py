"""Finds host code that would wait for a GPU, on a CPU: operations whose result the host looks at, and hidden copies.

`NoSync` raises on every such operation of torch while it is entered. What a GPU would not wait for (uploads through
page-locked memory, copies to the host that are waited for later) goes through a `QueueDevice`, which counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pando.device import Device, HostMark, Mark, PinnedRing

WAITING = frozenset(
    {
        "_local_scalar_dense",  # int(x), bool(x), x.item()
        "nonzero",  # and x[mask]
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "lift_fresh",  # torch.tensor(values): on a GPU a copy from memory that is not page-locked
        "equal",
        "allclose",
    }
)


class WouldWait(AssertionError):
    """The host would stand still until the device is done."""


class NoSync(TorchDispatchMode):
    """While entered, an operation that would wait raises WouldWait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise WouldWait(f"{func} waits for the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise WouldWait(f"{func} without output_size waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(isinstance(at, Tensor) and at.dtype is torch.bool for at in args[1]):
                raise WouldWait(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync() -> Iterator[None]:
    """`NoSync`, and also nothing that looks at the memory of a tensor directly."""

    def refuse(*args: object, **options: object) -> None:
        raise WouldWait("the host reads a tensor")

    with pytest.MonkeyPatch.context() as patch, NoSync():
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@dataclass
class LateCopy:
    """A copy to the host; `wait` may be called when no step is being queued."""

    tensor: Tensor
    device: QueueDevice

    def wait(self) -> Tensor:
        assert not self.device.queueing, "the host waits while it queues a step"
        return self.tensor


@dataclass
class Passed:
    """A point in the queue of a device that is always done."""

    def synchronize(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class QueueDevice(Device):
    """A CPU that plays a GPU: copies are counted, their results are read later."""

    counts: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0, "queueing": 0}, compare=False)

    @property
    def asynchronous(self) -> bool:
        return True

    @property
    def queueing(self) -> bool:
        """Whether a step is being queued."""
        return bool(self.counts["queueing"])

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Everything in here must not wait."""
        self.counts["queueing"] += 1
        try:
            with no_sync():
                yield
        finally:
            self.counts["queueing"] -= 1

    def upload_array(self, values: NDArray[Any]) -> Tensor:
        with _disable_current_modes():
            return super().upload_array(values)

    def transfer(self, staged: Tensor) -> Tensor:
        self.counts["up"] += 1
        return staged.clone()

    def to_host(self, tensor: Tensor) -> LateCopy:
        self.counts["down"] += 1
        return LateCopy(tensor.clone(), self)

    def mark(self) -> Mark:
        return HostMark()

    def synchronize(self) -> None:
        assert not self.queueing, "the host waits while it queues a step"

    def free_bytes(self) -> int:
        return FREE_BYTES

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return PEAK_BYTES


FREE_BYTES, PEAK_BYTES = 1 << 30, 5 << 20
"""What a `QueueDevice` says that it has, and that any step takes."""


def queue_device(ring_bytes: int = 1 << 20) -> QueueDevice:
    """A `QueueDevice` whose ring is ordinary memory."""
    ring = PinnedRing(ring_bytes, 4, lambda size: torch.empty(size, dtype=torch.uint8), Passed)
    return QueueDevice("cpu", ring)
