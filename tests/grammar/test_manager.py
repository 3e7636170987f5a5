"""The manager: one compile for equal requests, a bounded cache, refusals that are remembered, nothing that blocks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, StepFailed
from pando.grammar.manager import NICENESS, CacheBounds, GrammarManager, Outcome
from pando.grammar.masks import Masks
from pando.grammar.preparing import LARGE
from pando.grammar.protocols import BatchState, Issue
from tests.grammar.vocabularies import backend


class Clock:
    """Seconds that tests move."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeGrammar:
    key: str
    nbytes: int = 100
    compile_ms: float = 2.0
    relaxed: tuple[Issue, ...] = ()

    def new_state(self) -> BatchState:
        raise AssertionError("not needed here")

    def violation(self, text: str) -> str | None:
        return None


@dataclass
class FakeBackend:
    """Compiles when `gate` is open; sources say what happens."""

    name: str = "fake"
    gate: threading.Event = field(default_factory=threading.Event)
    compiled: list[str] = field(default_factory=list)

    def key(self, spec: GrammarSpec) -> str:
        return spec.source

    def validate(self, spec: GrammarSpec) -> list[Issue]:
        return []

    def compile(self, spec: GrammarSpec) -> FakeGrammar:
        self.compiled.append(spec.source)
        assert self.gate.wait(30)
        if spec.source.startswith("bad"):
            raise InvalidGrammar("bad one", param="regex")
        if spec.source.startswith("bug"):
            raise BaseException("a panic of native code")
        return FakeGrammar(spec.source, 400 if spec.source.startswith("big") else 100)

    def allocate_masks(self, rows: int) -> Masks:
        raise AssertionError("not needed here")

    def fill_batch(self, items: Sequence[tuple[BatchState, int]], masks: Masks) -> list[bool]:
        raise AssertionError("not needed here")


def spec(source: str) -> GrammarSpec:
    return GrammarSpec("regex", source)


def wait(manager: GrammarManager, number: int) -> dict[str, Outcome]:
    """Poll until so many requests are reported."""
    found: dict[str, Outcome] = {}
    until = time.monotonic() + 60
    while len(found) < number:
        assert time.monotonic() < until, f"only {found} were reported"
        found.update(manager.poll())
        time.sleep(0.001)
    return found


def test_equal_requests_share_one_compile() -> None:
    fake = FakeBackend()
    manager = GrammarManager(fake)
    for number in range(8):
        manager.submit(f"r{number}", spec("a"))
    manager.submit("other", spec("b"))
    assert manager.poll() == []
    fake.gate.set()
    found = wait(manager, 9)
    assert len({id(found[f"r{number}"]) for number in range(8)}) == 1
    assert sorted(fake.compiled) == ["a", "b"]
    manager.submit("late", spec("a"))
    assert dict(manager.poll())["late"] is found["r0"]
    stats = manager.stats()
    assert (stats.submitted, stats.hits, stats.joined, stats.compiled) == (10, 1, 7, 2)
    assert stats.num_cached == 2 and stats.num_bytes == 200 and stats.compile_ms == 4.0
    manager.close()


def test_cache_is_bounded_by_bytes_and_count() -> None:
    fake = FakeBackend()
    fake.gate.set()
    manager = GrammarManager(fake, bounds=CacheBounds(num_bytes=500, num_grammars=3))
    for source in ("a", "b", "c"):
        manager.submit(source, spec(source))
        wait(manager, 1)
    manager.submit("again", spec("a"))
    wait(manager, 1)
    manager.submit("d", spec("d"))
    wait(manager, 1)
    assert manager.stats().num_cached == 3 and manager.stats().evicted == 1
    manager.submit("big", spec("big"))
    wait(manager, 1)
    stats = manager.stats()
    assert stats.num_bytes == 500 and stats.num_cached == 2 and fake.compiled == ["a", "b", "c", "d", "big"]
    manager.submit("d2", spec("d"))
    wait(manager, 1)
    assert fake.compiled[-1] == "big", "the most recent small one was kept"
    manager.close()


def test_refusals_are_remembered_for_a_while() -> None:
    fake, clock = FakeBackend(), Clock()
    fake.gate.set()
    manager = GrammarManager(fake, bounds=CacheBounds(refusals_s=30), clock=clock)
    manager.submit("1", spec("bad"))
    first = wait(manager, 1)["1"]
    assert isinstance(first, InvalidGrammar) and first.param == "regex"
    manager.submit("2", spec("bad"))
    assert dict(manager.poll())["2"] is first and fake.compiled == ["bad"]
    clock.now += 31
    manager.submit("3", spec("bad"))
    wait(manager, 1)
    assert fake.compiled == ["bad", "bad"] and manager.stats().refused == 2
    manager.close()


def test_internal_errors_fail_their_request_and_are_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeBackend()
    fake.gate.set()
    manager = GrammarManager(fake)
    for number in range(2):
        manager.submit(str(number), spec("bug"))
        outcome = wait(manager, 1)[str(number)]
        assert isinstance(outcome, StepFailed) and "panic" in outcome.message
    assert fake.compiled == ["bug", "bug"] and "compiling a grammar failed" in caplog.text
    manager.close()


def test_deadline_frees_those_who_wait() -> None:
    fake, clock = FakeBackend(), Clock()
    manager = GrammarManager(fake, num_threads=1, bounds=CacheBounds(deadline_s=10), clock=clock)
    manager.submit("slow", spec("a"))
    clock.now += 9
    assert manager.poll() == []
    clock.now += 2
    outcome = dict(manager.poll())["slow"]
    assert isinstance(outcome, InvalidGrammar) and "10 s" in outcome.message
    assert manager.stats().timed_out == 1
    fake.gate.set()
    manager.close()


def test_cancelled_requests_are_not_reported() -> None:
    fake = FakeBackend()
    manager = GrammarManager(fake, num_threads=1)
    for rid, source in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        manager.submit(rid, spec(source))
    manager.cancel("a1")
    manager.cancel("b1")
    manager.cancel("never there")
    fake.gate.set()
    assert set(wait(manager, 1)) == {"a2"}
    manager.submit("ready", spec("a"))
    manager.cancel("ready")
    assert manager.poll() == []
    manager.close()
    assert fake.compiled == ["a"], "a compile that nobody waits for never starts"


def test_a_name_that_is_used_again_gets_its_own_grammar() -> None:
    fake = FakeBackend()
    fake.gate.set()
    manager = GrammarManager(fake, num_threads=1)
    manager.submit("first", spec("a"))
    wait(manager, 1)
    manager.submit("again", spec("a"))
    manager.cancel("again")
    manager.submit("again", spec("bad"))
    assert isinstance(wait(manager, 1)["again"], InvalidGrammar)
    manager.close()


def test_many_threads() -> None:
    """Submissions from several threads of few grammars: all are answered, each is compiled once."""
    manager = GrammarManager(backend(), num_threads=2)

    def run(worker: int) -> None:
        for number in range(40):
            manager.submit(f"{worker}-{number}", spec(f"[a-z]{{{number % 5 + 1}}}"))

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = wait(manager, 160)
    stats = manager.stats()
    assert len({id(grammar) for grammar in found.values()}) == 5
    assert stats.compiled == 5 and stats.hits + stats.joined == 155 and stats.num_bytes > 0
    manager.close()


def test_compiles_run_inside_what_the_owner_wants_around_them() -> None:
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append(f"in {threading.current_thread().name[:13]}")
        try:
            yield
        finally:
            seen.append("out")

    fake = FakeBackend()
    fake.gate.set()
    manager = GrammarManager(fake, around=around)
    for rid, source in (("a", "one"), ("b", "bad two"), ("c", "bug three")):
        manager.submit(rid, spec(source))
    wait(manager, 3)
    manager.submit("d", spec("one"))
    wait(manager, 1)
    assert seen == ["in pando-grammar", "out"] * 3, "what is cached is not compiled"
    manager.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_compiles_step_back_behind_the_threads_of_steps() -> None:
    seen: list[int] = []

    class Noting(FakeBackend):
        def compile(self, spec: GrammarSpec) -> FakeGrammar:
            seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return FakeGrammar(spec.source)

    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    manager = GrammarManager(Noting())
    manager.submit("a", spec("one"))
    wait(manager, 1)
    assert seen == [max(before, NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    manager.close()


def test_small_grammars_do_not_wait_for_large_ones() -> None:
    class Slow(FakeBackend):
        def compile(self, spec: GrammarSpec) -> FakeGrammar:
            assert len(spec.source) < LARGE or self.gate.wait(60)
            return FakeGrammar(spec.source)

    fake = Slow()
    manager = GrammarManager(fake, num_threads=1)
    for number in range(3):
        manager.submit(f"large {number}", spec(f"{number}" * LARGE))
    manager.submit("small", spec("s"))
    assert list(wait(manager, 1)) == ["small"]
    fake.gate.set()
    assert sorted(wait(manager, 3)) == ["large 0", "large 1", "large 2"]
    manager.close()
