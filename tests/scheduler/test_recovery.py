"""After a failed step: nobody but the culprit pays, whatever comes in between."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pando.core.batch import Batch
from pando.core.messages import Abort, Failure
from pando.core.sampling import LogprobSpec
from pando.scheduler.gates import Gate
from pando.scheduler.request import Request
from tests.scheduler.fake_executor import FakeExecutor, expected_output
from tests.scheduler.harness import VOCAB, Bench, bench


def prompt(seed: int, num: int = 20) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, VOCAB) for _ in range(num)]


class FailingSteps:
    """Makes the steps of the given numbers fail, once each."""

    def __init__(self, *numbers: int) -> None:
        self.left = set(numbers)

    def __call__(self, batch: Batch, executor: FakeExecutor) -> None:
        if batch.step in self.left:
            self.left.remove(batch.step)
            raise RuntimeError(f"step {batch.step} fails")


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("when", range(6))
@pytest.mark.parametrize("policy", ["lpm", "fcfs", "priority"])
def test_a_passing_failure_costs_nobody_anything(depth: int, when: int, policy: str) -> None:
    b = bench(depth=depth, fail=FailingSteps(when), policy=policy, token_budget=32, max_running=4)
    for i in range(7):
        b.add(f"r{i}", prompt(i), 10, ignore_eos=True)
    b.run()
    assert b.scheduler.stats.failed_steps == 1
    if len(b.executor.batches[when].slot) > 1:
        for i in range(7):
            assert b.tokens[f"r{i}"] == expected_output(prompt(i), 10, VOCAB)
    b.cache.check()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["lpm", "fcfs", "priority"])
def test_suspects_aborted_before_their_trial_do_not_cost_the_next_in_line(depth: int, policy: str) -> None:
    b = bench(depth=depth, fail=FailingSteps(0), policy=policy, max_running=2)
    for i in range(3):
        b.add(f"r{i}", prompt(i), 5, ignore_eos=True)
    for _ in range(1 + depth):
        b.step()
    assert b.scheduler.stats.failed_steps == 1 and len(b.scheduler.admission.trials) == 2
    b.inbox.commands += [Abort("r0"), Abort("r1")]
    b.run()
    assert b.finish("r0").kind == b.finish("r1").kind == "abort"
    assert b.tokens["r2"] == expected_output(prompt(2), 5, VOCAB)


class BrokenGate:
    """Wants requests named g*, and raises once when it is asked for them."""

    def __init__(self) -> None:
        self.held: list[Request] = []
        self.broken = True

    def wants(self, request: Request) -> bool:
        return request.rid.startswith("g")

    def submit(self, request: Request) -> None:
        self.held.append(request)

    def poll(self) -> list[tuple[Request, None]]:
        if self.broken:
            self.broken = False
            raise RuntimeError("the gate broke")
        ready, self.held = self.held, []
        return [(request, None) for request in ready]

    def cancel(self, request: Request) -> None:
        if request in self.held:
            self.held.remove(request)


def test_a_gate_that_raises_leaves_nothing_behind() -> None:
    gate: Gate = BrokenGate()
    b = bench(gates=[gate])
    b.add("g1", prompt(1), 5, ignore_eos=True)
    b.step()
    assert isinstance(b.ended["g1"], Failure)
    assert b.scheduler.num_gated == 0, "it would be let in after its end"
    for rid in ("g2", "free"):
        b.add(rid, prompt(2), 5, ignore_eos=True)
    b.run()
    assert b.scheduler.stats.failed_steps == 0
    assert b.tokens["g2"] == b.tokens["free"] == expected_output(prompt(2), 5, VOCAB)


@pytest.mark.parametrize(
    "spec", [LogprobSpec(top=-1), LogprobSpec(token_ids=[VOCAB]), LogprobSpec(token_ids=[3, -1]), LogprobSpec(start=20)]
)
def test_logprobs_that_no_step_can_give_are_refused_at_the_door(spec: LogprobSpec) -> None:
    """On a GPU an index outside of the vocabulary ends the process, not the request."""
    b: Bench = bench()
    b.add("bad", prompt(1), 5, logprobs=spec)
    b.add("good", prompt(1), 5, logprobs=LogprobSpec(19, 1000, [0, VOCAB - 1]), ignore_eos=True)
    b.run()
    end = b.ended["bad"]
    assert isinstance(end, Failure) and end.code == "invalid_value"
    assert b.finish("good").kind == "length"


class Stumbles:
    """A cache method that raises once, at its `when`-th call."""

    def __init__(self, method: Any, when: int) -> None:
        self.method, self.left = method, when

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("planning fails")
        return self.method(*args, **options)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", ["lpm", "fcfs", "priority"])
def test_requests_that_wait_for_a_prefix_are_not_lost_when_planning_fails(policy: str, depth: int) -> None:
    """The first prompt is read in chunks, those like it wait, and another is being admitted beside the second chunk."""
    b = bench(depth=depth, policy=policy, token_budget=50, page_size=16)
    long = prompt(1, 120)
    b.add("first", long, 5, ignore_eos=True)
    b.step()
    b.cache.admit = Stumbles(b.cache.admit, 1)  # type: ignore[method-assign]
    for rid in ("like it", "like it too"):
        b.add(rid, long, 5, ignore_eos=True)
    b.add("other", prompt(2, 30), 5, ignore_eos=True)
    b.run(1000)
    want = expected_output(long, 5, VOCAB)
    assert all(b.tokens[rid] == want for rid in ("first", "like it", "like it too"))
    end = b.ended["other"]
    assert isinstance(end, Failure) and "planning fails" in end.message
    b.cache.check()


@pytest.mark.parametrize("when", range(1, 7))
def test_slots_of_a_plan_that_failed_are_not_entered_later(when: int) -> None:
    b = bench(token_budget=200)
    b.cache.publish = Stumbles(b.cache.publish, when)  # type: ignore[method-assign]
    for i in range(6):
        b.add(f"r{i}", prompt(i), 5, ignore_eos=True)
    b.run(1000)
    assert b.scheduler.stats.failed_steps == 1
    for batch in b.executor.batches:
        entered = [entry.slot for entry in batch.new_slots]
        assert len(set(entered)) == len(entered) and set(entered) <= set(batch.slot)
    assert sum(isinstance(end, Failure) for end in b.ended.values()) == 1
    b.cache.check()
