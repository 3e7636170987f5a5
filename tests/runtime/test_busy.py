"""Device time by marks in a queue: what has not passed is read later, nobody waits."""

from __future__ import annotations

from dataclasses import dataclass, field

from pando.core.batch import Batch
from pando.device import Device
from pando.runtime.busy import BusyTime
from tests.runtime.toy_model import batch_of, new_slot, toy_runner


@dataclass(frozen=True)
class QueueMark:
    """A mark that the device comes to at a time; `now` is how far it is."""

    at: float
    now: list[float]

    def passed(self) -> bool:
        return self.now[0] >= self.at

    def seconds_since(self, earlier: QueueMark) -> float:
        assert self.passed() and earlier.passed(), "the time of a mark that has not passed is an error on a GPU"
        return self.at - earlier.at


@dataclass(frozen=True)
class QueueDevice(Device):
    """Marks at the times given."""

    times: list[float] = field(default_factory=list, compare=False)
    now: list[float] = field(default_factory=lambda: [0.0], compare=False)

    def mark(self) -> QueueMark:
        return QueueMark(self.times.pop(0), self.now)


def test_time_is_counted_once_it_has_passed_without_the_gaps() -> None:
    device = QueueDevice("cpu", times=[1.0, 3.0, 4.0, 4.5, 6.0, 10.0])
    busy = BusyTime(device)
    for _ in range(3):
        busy.end(busy.begin())
    assert busy.take() == 0.0
    device.now[0] = 3.5
    assert busy.take() == 2.0
    device.now[0] = 9.0
    assert busy.take() == 0.5 and busy.take() == 0.0
    device.now[0] = 10.0
    assert busy.take() == 4.0


def test_results_carry_the_devices_time() -> None:
    runner, _, _ = toy_runner(slots=1, context=8, page_size=1)

    def step(batch: Batch) -> tuple[float, float]:
        launched = runner.launch(batch)
        runner.sample(launched, None)
        result = runner.collect(launched)
        return result.device_seconds, result.forward_seconds

    busy, whole = step(batch_of([(0, 0, 3, 1)], [new_slot(0, [1, 2, 3])], pages=[(0, i, i) for i in range(4)]))
    assert 0.0 < busy <= whole
