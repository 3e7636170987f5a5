"""Executors: the runner called in place, or behind a thread so that planning overlaps with execution on a CPU."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import torch

from pando.core.batch import Batch, StepResult, TokenMask
from pando.runtime.runner import Runner, Step


class ThreadedStep:
    """A step under way in the worker thread."""

    __slots__ = ("launched", "mask", "sampled")

    def __init__(self) -> None:
        self.launched: Future[Step] = Future()
        self.sampled: Future[StepResult] = Future()
        self.mask: TokenMask | None = None


class ThreadedExecutor:
    """Runs a Runner in one worker thread, in order; the scheduler plans the next step meanwhile."""

    depth = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._work: queue.SimpleQueue[tuple[Batch | None, ThreadedStep] | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="pando-executor", daemon=True)
        self._thread.start()

    def launch(self, batch: Batch) -> ThreadedStep:
        """Queue the forward pass."""
        step = ThreadedStep()
        self._work.put((batch, step))
        return step

    def sample(self, step: ThreadedStep, mask: TokenMask | None) -> None:
        """Queue the sampling of a launched step."""
        step.mask = mask
        self._work.put((None, step))

    def collect(self, step: ThreadedStep) -> StepResult:
        """Wait for a sampled step; raises what it raised."""
        return step.sampled.result()

    def reset(self) -> None:
        """Wait until the queued work is done, then forget all slots."""
        reached = threading.Event()
        self._work.put(reached)
        reached.wait()
        self._runner.reset()

    def close(self) -> None:
        """End the worker."""
        self._work.put(None)
        self._thread.join()

    @torch.inference_mode()
    def _loop(self) -> None:
        while (item := self._work.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            batch, step = item
            target: Future[Step] | Future[StepResult] = step.sampled if batch is None else step.launched
            try:
                if batch is None:
                    launched = step.launched.result()
                    self._runner.sample(launched, step.mask)
                    step.sampled.set_result(self._runner.collect(launched))
                else:
                    step.launched.set_result(self._runner.launch(batch))
            except Exception as error:
                target.set_exception(error)
