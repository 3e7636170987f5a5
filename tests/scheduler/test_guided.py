"""Guided requests: masks, forced tokens and drafts change how many steps are run, never which tokens come out."""

from __future__ import annotations

import random

import pytest

from pando.core.messages import Abort, Failure
from pando.errors import PandoError
from pando.scheduler.guide import Guide
from pando.scheduler.overlap import Overlap
from pando.scheduler.request import Request
from tests.scheduler.fake_executor import expected_output
from tests.scheduler.harness import EOS, VOCAB, Bench, bench
from tests.scheduler.toy_grammar import ToyGate, ToyState, expected

ENDS = frozenset([EOS])


@pytest.fixture(autouse=True)
def quick_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests wait must not depend on how long anything takes."""
    monkeypatch.setattr(Overlap, "price", 0.2)


def guided(depth: int, *, jump: bool, wrong: int = 0, **options: object) -> Bench:
    return bench(depth=depth, gates=[ToyGate(VOCAB, ENDS, jump=jump, wrong=wrong)], **options)  # type: ignore[arg-type]


def traffic(b: Bench, seed: int, num: int = 24) -> dict[str, list[int]]:
    """Guided and free requests, arriving over some steps; returns what each must generate."""
    rng = random.Random(seed)
    want: dict[str, list[int]] = {}
    for i in range(num):
        prompt = [rng.randrange(20) + 100 for _ in range(rng.randrange(1, 40))]
        length = rng.randrange(1, 60)
        free = rng.random() < 0.3
        rid = f"{'f' if free else 'g'}{i}"
        want[rid] = (expected_output if free else expected)(prompt, length, VOCAB, ENDS)
        b.add(rid, prompt, length)
        for _ in range(rng.randrange(3)):
            b.step()
    return want


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("wrong", [0, 2, 4])
@pytest.mark.parametrize("page_size", [1, 4])
def test_same_tokens_with_and_without_jumps_and_drafts(depth: int, jump: bool, wrong: int, page_size: int) -> None:
    for seed in range(3):
        b = guided(depth, jump=jump, wrong=wrong, page_size=page_size, num_pages=2048 // page_size)
        want = traffic(b, seed)
        b.run()
        assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
        b.cache.check()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("wrong", [0, 3])
def test_retraction_in_a_tight_pool(depth: int, wrong: int) -> None:
    b = guided(depth, jump=True, wrong=wrong, num_pages=160, max_running=8)
    want = traffic(b, 5)
    b.run()
    assert b.scheduler.admission.num_retracted > 0
    assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
    b.cache.check()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("sharing", [True, False])
def test_forced_tokens_and_drafts_see_their_whole_window(depth: int, page_size: int, sharing: bool) -> None:
    """The next step may start several tokens before the last one that has pages, also after wrong drafts."""
    for seed in range(3):
        b = guided(
            depth,
            jump=True,
            wrong=3,
            page_size=page_size,
            num_pages=600 // page_size,
            window=6,
            num_window_pages=48 // page_size,
            token_budget=16,
            sharing=sharing,
        )
        want = traffic(b, seed)
        b.run()
        assert not b.executor.mistakes and not b.scheduler.stats.failed_steps
        assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
        b.cache.check()


def steps(jump: bool, wrong: int, depth: int = 0) -> int:
    b = guided(depth, jump=jump, wrong=wrong)
    b.add("g", [5, 6, 7], 200)
    b.run()
    return b.scheduler.stats.steps


def test_forced_tokens_and_drafts_save_steps() -> None:
    num = len(expected([5, 6, 7], 200, VOCAB, ENDS))
    plain, jumps, drafts = steps(False, 0), steps(True, 0), steps(True, 7)
    assert plain == num > 20
    assert jumps < num * 0.8
    assert drafts < jumps * 0.6
    assert steps(True, 0, depth=1) == jumps
    assert steps(True, 7, depth=1) == drafts


def test_counters() -> None:
    b = guided(0, jump=True, wrong=3)
    b.add("g", [5, 6, 7], 200)
    b.run()
    stats = b.scheduler.stats
    assert stats.generation_tokens == len(b.tokens["g"])
    assert 0 < stats.forced_tokens < stats.generation_tokens
    assert 0 < stats.accepted_draft_tokens < stats.draft_tokens
    assert stats.hit_tokens + stats.miss_tokens == 3


def test_finish_when_the_grammar_is_complete() -> None:
    prompt = next([n, 6, 7] for n in range(100) if len(expected([n, 6, 7], 300, VOCAB, ENDS)) < 100)
    b = guided(0, jump=True)
    b.add("g", prompt, 300)
    b.run()
    assert b.tokens["g"][-1] % 41 == 0
    assert b.finish("g").kind == "stop"


@pytest.mark.parametrize("depth", [0, 1])
def test_aborts_at_any_moment_leak_nothing(depth: int) -> None:
    rng = random.Random(depth)
    b = guided(depth, jump=True, wrong=3, num_pages=256)
    want = traffic(b, 9)
    for _ in range(60):
        b.step()
        if rng.random() < 0.3:
            b.inbox.commands.append(Abort(rng.choice(list(want))))
    b.run()
    for rid, tokens in b.tokens.items():
        assert tokens == want[rid][: len(tokens)]
    b.cache.check()
    assert b.cache.stats().num_handles == 0


def test_a_failed_step_runs_again() -> None:
    failures = [7]

    def fail(batch: object, executor: object) -> None:
        failures[0] -= 1
        if failures[0] == 0:
            raise RuntimeError("boom")

    b = guided(0, jump=True, wrong=3, fail=fail)
    want = traffic(b, 2, num=6)
    b.run()
    assert {rid: t for rid, t in b.tokens.items() if rid in b.ended} == {r: t for r, t in want.items() if t}


class Unwilling(ToyState):
    """Can not say what must come next."""

    def forced_tokens(self, limit: int) -> list[int]:
        raise RuntimeError("no idea")


class UnwillingGate(ToyGate):
    """Gives such a guide to the request "g bad"."""

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        ready = super().poll()
        for request, _ in ready:
            if request.rid == "g bad":
                request.guide = Guide(Unwilling(VOCAB))
        return ready


def test_a_guide_that_fails_before_the_first_step_costs_only_its_request() -> None:
    b = bench(gates=[UnwillingGate(VOCAB, ENDS, jump=True)])
    prompt = [101, 102, 103]
    for rid in ("f", "g bad", "g good"):
        b.add(rid, prompt, 20)
    b.run()
    end = b.ended["g bad"]
    assert isinstance(end, Failure) and "no idea" in end.message
    assert b.tokens["g good"] == expected(prompt, 20, VOCAB, ENDS)
    assert b.tokens["f"] == expected_output(prompt, 20, VOCAB, ENDS)
    assert b.scheduler.stats.failed_steps == 0


@pytest.mark.parametrize("page_size", [1, 4])
def test_guesses_made_before_a_retraction_are_not_tried_after_it(page_size: int) -> None:
    """With a step in flight a retracted request hears of its last token while it waits."""
    for seed in range(6):
        b = guided(1, jump=True, wrong=2, num_pages=160 // page_size, page_size=page_size, max_running=8)
        want = traffic(b, seed)
        b.run()
        assert b.scheduler.admission.num_retracted > 0
        assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
        assert b.scheduler.stats.failed_steps == 0
