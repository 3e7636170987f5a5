"""Cost of the scheduler alone: microseconds per step with a null executor, by running and waiting requests.

    python benchmarks/scheduler.py [--steps 300]

The bound of the project: 100 us per step + 2 us per running request, with 10,000 requests waiting.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.core.batch import Batch, StepResult
from pando.core.messages import Command, Generate, Reply
from pando.core.sampling import SamplingParams
from pando.scheduler.admission import Admission, Limits
from pando.scheduler.gates import Gates
from pando.scheduler.policy import waiting_queue
from pando.scheduler.rules import Rules
from pando.scheduler.scheduler import Scheduler
from pando.scheduler.stats import Stats


class NullExecutor:
    """Answers every step with the same token."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def launch(self, batch: Batch) -> Batch:
        return batch

    def sample(self, step: Batch, mask: None) -> None:
        pass

    def collect(self, step: Batch) -> StepResult:
        return StepResult(step.step, [[17]] * sum(step.emit))

    def reset(self) -> None:
        pass


class NullInbox:
    """Feeds a list of commands once and drops replies."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.closed = False

    def drain(self, timeout: float | None) -> list[Command]:
        commands, self.commands = self.commands, []
        return commands

    def send(self, replies: list[Reply]) -> None:
        pass


def build(running: int, page_size: int, policy: str, depth: int) -> tuple[Scheduler, NullInbox]:
    """A scheduler with room for `running` sequences."""
    num_tokens = 1 << 20
    cache = CacheManager(CacheLayout(page_size, 1), num_tokens)
    stats = Stats()
    admission = Admission(cache, waiting_queue(policy, cache), Limits(8192, running, 8192, page_size), stats)
    rules = Rules(8192, 1000, 1 << 20, frozenset([2]), lambda sampling: None, {})  # type: ignore[arg-type,return-value]
    inbox = NullInbox()
    return Scheduler(NullExecutor(depth), admission, inbox, Gates([]), stats, rules), inbox


def measure(running: int, waiting: int, page_size: int, policy: str, depth: int, stream: bool, steps: int) -> float:
    """Median microseconds of a decode step."""
    scheduler, inbox = build(running, page_size, policy, depth)
    rng = random.Random(0)
    shared = [rng.randrange(10, 1000) for _ in range(200)]
    sampling = SamplingParams(max_new_tokens=4000, temperature=0)
    for i in range(running + waiting):
        prompt = shared + [rng.randrange(10, 1000) for _ in range(50)]
        inbox.commands.append(Generate(rid=f"r{i}", input_ids=prompt, sampling=sampling, stream=stream))
    scheduler.step()
    while len(scheduler.admission.running) < running or any(r.to_run > 1 for r in scheduler.admission.running):
        scheduler.step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        scheduler.step()
        scheduler._send()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    print("running waiting page policy depth stream   us/step   bound  us/running")
    for running, waiting, page, policy, depth, stream in (
        (1, 0, 1, "lpm", 0, True),
        (64, 0, 1, "lpm", 1, True),
        (256, 0, 1, "lpm", 1, True),
        (256, 10_000, 1, "lpm", 1, True),
        (256, 10_000, 1, "lpm", 0, True),
        (256, 10_000, 16, "lpm", 1, True),
        (256, 10_000, 16, "lpm", 1, False),
        (256, 10_000, 1, "fcfs", 1, True),
    ):
        us = measure(running, waiting, page, policy, depth, stream, steps)
        bound = 100 + 2 * running
        print(
            f"{running:7} {waiting:7} {page:4} {policy:>6} {depth:5} {stream!s:>6} {us:9.0f} {bound:7} "
            f"{us / running:11.2f}"
        )


if __name__ == "__main__":
    main()
