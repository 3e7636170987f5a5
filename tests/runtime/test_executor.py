"""The executor's thread: order, errors that reach whoever collects, going on after a failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pando.core.batch import Batch, StepResult
from pando.runtime.executor import ThreadedExecutor
from tests.runtime.toy_model import batch_of, new_slot, toy_logits, toy_runner


class FakeRunner:
    """Notes what is called; may wait, and may fail at a given step."""

    depth = 0

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.threads: set[str] = set()
        self.fail: tuple[str, int] | None = None
        self.gate = threading.Event()
        self.gate.set()

    def _note(self, what: str, step: int) -> None:
        assert self.gate.wait(10)
        self.calls.append((what, step))
        self.threads.add(threading.current_thread().name)
        if self.fail == (what, step):
            raise ValueError(f"{what} {step}")

    def launch(self, batch: Batch) -> int:
        self._note("launch", batch.step)
        return batch.step

    def sample(self, step: int, mask: None) -> None:
        self._note("sample", step)

    def collect(self, step: int) -> StepResult:
        self._note("collect", step)
        return StepResult(step, [[step]])

    def reset(self) -> None:
        self.calls.append(("reset", -1))


@pytest.fixture
def parts() -> Iterator[tuple[FakeRunner, ThreadedExecutor]]:
    runner = FakeRunner()
    executor = ThreadedExecutor(runner)  # type: ignore[arg-type]
    yield runner, executor
    runner.gate.set()
    executor.close()


def within(seconds: float, function: object) -> None:
    """Fail instead of hanging for ever."""
    thread = threading.Thread(target=function, daemon=True)  # type: ignore[arg-type]
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"{function} does not come back"


def test_steps_run_in_order_in_one_other_thread(parts: tuple[FakeRunner, ThreadedExecutor]) -> None:
    runner, executor = parts
    steps = []
    for number in range(5):
        steps.append(executor.launch(batch_of([(0, 0, 1, 1)], step=number)))
        executor.sample(steps[-1], None)
    assert [executor.collect(step).tokens for step in steps] == [[[n]] for n in range(5)]
    assert runner.calls == [(what, n) for n in range(5) for what in ("launch", "sample", "collect")]
    assert runner.threads == {"pando-executor"}


def test_the_next_step_is_queued_while_one_runs(parts: tuple[FakeRunner, ThreadedExecutor]) -> None:
    runner, executor = parts
    assert executor.depth == 1
    runner.gate.clear()
    first = executor.launch(batch_of([(0, 0, 1, 1)], step=0))
    executor.sample(first, None)
    second = executor.launch(batch_of([(0, 1, 1, 1)], step=1))
    executor.sample(second, None)
    assert runner.calls == []
    runner.gate.set()
    assert executor.collect(first).step == 0 and executor.collect(second).step == 1


@pytest.mark.parametrize("where", ["launch", "sample", "collect"])
def test_an_error_reaches_collect_and_harms_no_other_step(
    parts: tuple[FakeRunner, ThreadedExecutor], where: str
) -> None:
    runner, executor = parts
    runner.fail = (where, 1)
    steps = [executor.launch(batch_of([(0, n, 1, 1)], step=n)) for n in range(3)]
    for step in steps:
        executor.sample(step, None)
    assert executor.collect(steps[0]).step == 0
    with pytest.raises(ValueError, match=f"{where} 1"):
        executor.collect(steps[1])
    assert executor.collect(steps[2]).step == 2


def test_reset_waits_for_queued_work_and_the_thread_goes_on(parts: tuple[FakeRunner, ThreadedExecutor]) -> None:
    runner, executor = parts
    runner.fail = ("launch", 0)
    failed = executor.launch(batch_of([(0, 0, 1, 1)], step=0))
    executor.sample(failed, None)
    executor.launch(batch_of([(0, 1, 1, 1)], step=1))  # its sampling is never asked for
    within(10, executor.reset)
    assert runner.calls == [("launch", 0), ("launch", 1), ("reset", -1)]
    later = executor.launch(batch_of([(0, 0, 1, 1)], step=2))
    executor.sample(later, None)
    assert executor.collect(later).tokens == [[2]]


def test_close_ends_the_thread_after_the_queued_work() -> None:
    runner = FakeRunner()
    executor = ThreadedExecutor(runner)  # type: ignore[arg-type]
    step = executor.launch(batch_of([(0, 0, 1, 1)], step=4))
    executor.sample(step, None)
    within(10, executor.close)
    assert runner.calls == [("launch", 4), ("sample", 4), ("collect", 4)]
    assert executor.collect(step).step == 4


def test_a_failing_step_of_a_real_runner_then_the_same_slots_again() -> None:
    runner, model, _ = toy_runner()
    executor = ThreadedExecutor(runner)
    model.fail_at = 30
    bad = executor.launch(batch_of([(0, 0, 2, 1)], [new_slot(0, [1, 30])]))
    executor.sample(bad, None)
    with pytest.raises(RuntimeError, match="token 30"):
        executor.collect(bad)
    within(10, executor.reset)
    good = executor.launch(batch_of([(0, 0, 2, 1)], [new_slot(0, [1, 2])], freed=[0]))
    executor.sample(good, None)
    assert executor.collect(good).tokens == [[int(toy_logits(2, 1).argmax())]]
    executor.close()
