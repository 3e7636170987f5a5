"""Copies to a device through memory that is used over and over, without a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pando.device import Device, HostMark, PinnedRing


class Queue:
    """Marks in order; remembers which were waited for."""

    def __init__(self) -> None:
        self.marks = 0
        self.waited: list[int] = []
        self.allocated: list[int] = []

    def mark(self) -> Mark:
        self.marks += 1
        return Mark(self, self.marks)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)


class Mark:
    def __init__(self, queue: Queue, number: int) -> None:
        self.queue, self.number = queue, number

    def synchronize(self) -> None:
        self.queue.waited.append(self.number)


def ring_of(queue: Queue, num_bytes: int = 1024, parts: int = 4) -> PinnedRing:
    return PinnedRing(num_bytes, parts, queue.allocate, queue.mark)


def test_pieces_do_not_overlap_until_their_part_was_waited_for() -> None:
    queue = Queue()
    ring = ring_of(queue)
    pieces = [ring.take(100) for _ in range(8)]  # two to a part of 256 bytes
    places = [piece.data_ptr() for piece in pieces]
    assert len(set(places)) == 8 and all(b - a >= 100 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
    assert queue.allocated == [1024] and queue.marks == 3 and queue.waited == []
    assert ring.take(100).data_ptr() == places[0], "the first part again"
    assert queue.marks == 4 and queue.waited == [1], "after what was copied from it has passed"
    for _ in range(7):
        ring.take(100)
    assert queue.waited == [1, 2, 3, 4]


def test_a_piece_larger_than_a_part_gets_memory_of_its_own() -> None:
    queue = Queue()
    ring = ring_of(queue)
    assert ring.take(257).shape == (257,) and queue.allocated == [257]
    assert ring.take(256).shape == (256,) and queue.allocated == [257, 1024] and queue.marks == 0


def test_pieces_begin_where_every_dtype_may() -> None:
    ring = ring_of(Queue())
    base = ring.take(1).data_ptr()
    assert [(ring.take(n).data_ptr() - base) % 64 for n in (3, 64, 1)] == [0, 0, 0]


def test_no_memory_is_locked_before_it_is_needed() -> None:
    queue = Queue()
    ring_of(queue)
    assert queue.allocated == []


@pytest.mark.parametrize(
    ("dtype", "values"),
    [(torch.int64, [1, -(2**62)]), (torch.int32, [7]), (torch.float32, [0.5, -1.0]), (torch.int64, [])],
)
def test_uploads_on_a_cpu(dtype: torch.dtype, values: list[float]) -> None:
    found = Device("cpu").upload(values, dtype)
    assert found.dtype is dtype and found.tolist() == values


def test_an_array_is_not_copied_on_a_cpu() -> None:
    values = np.arange(4, dtype=np.int32)
    assert Device("cpu").upload_array(values).data_ptr() == values.ctypes.data


def test_a_cpu_looks_and_a_device_takes_the_bound() -> None:
    from tests.runtime.no_sync import queue_device

    lens = torch.tensor([3, 9, 4])
    assert Device("cpu").largest(lens, 100) == 9
    assert queue_device().largest(lens, 100) == 100


def test_uploads_through_the_ring_keep_their_values_as_it_turns() -> None:
    from tests.runtime.no_sync import queue_device

    device = queue_device(ring_bytes=4 * 256)
    sent = [[i, i * i, -i] for i in range(40)]
    found = [device.upload(values) for values in sent]
    masks = device.upload_array(np.arange(600, dtype=np.int32).reshape(20, 30))
    assert [tensor.tolist() for tensor in found] == sent
    assert masks.shape == (20, 30) and int(masks[19, 29]) == 599
    assert device.counts["up"] == 41


def test_devices_are_equal_by_name() -> None:
    assert Device("cpu") == Device("cpu") and Device("cpu") != Device("cuda")


def test_a_cpus_marks_have_passed_and_tell_the_time() -> None:
    device = Device("cpu")
    first, second = device.mark(), device.mark()
    assert first.passed() and second.passed()
    assert second.seconds_since(first) >= 0.0
    assert HostMark(7.5).seconds_since(HostMark(5.0)) == 2.5
