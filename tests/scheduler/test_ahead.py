"""Prompts are read while their grammars compile, but for their last token; outputs are those of waiting at the gate."""

from __future__ import annotations

import random

import pytest

from pando.core.messages import Abort, Failure
from pando.core.sampling import GrammarSpec
from pando.errors import InvalidGrammar, PandoError
from pando.grammar.manager import CacheBounds, GrammarManager
from pando.scheduler.grammar_gate import MAX_AHEAD, MIN_AHEAD_TOKENS, GrammarGate
from pando.scheduler.overlap import Overlap
from pando.scheduler.request import Request, State
from tests.scheduler.fake_executor import expected_output
from tests.scheduler.harness import EOS, VOCAB, Bench, bench
from tests.scheduler.toy_grammar import ToyGate, expected

ENDS = frozenset([EOS])


@pytest.fixture(autouse=True)
def quick_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests wait must not depend on how long anything takes."""
    monkeypatch.setattr(Overlap, "price", 0.2)


class AheadGate(ToyGate):
    """Sends every request with a prompt of two tokens or more ahead at the first poll; some then fail."""

    bad: frozenset[str] = frozenset()

    def poll(self) -> list[tuple[Request, PandoError | None]]:
        ready: list[tuple[Request, PandoError | None]] = []
        for request, error in super().poll():
            request.held = 0
            ready.append((request, InvalidGrammar("no grammar") if request.rid in self.bad else error))
        for request, _ in self.held.values():
            if not request.held and request.prompt_len > 1:
                request.held = 1
                ready.append((request, None))
        return ready


def ahead(depth: int, polls: int, *, jump: bool = True, wrong: int = 0, **options: object) -> Bench:
    gate = AheadGate(VOCAB, ENDS, jump=jump, wrong=wrong, polls=polls)
    return bench(depth=depth, gates=[gate], **options)  # type: ignore[arg-type]


def traffic(b: Bench, seed: int, num: int = 20) -> dict[str, list[int]]:
    """Requests with prompts of several chunks, half of them alike; returns what each must generate."""
    rng, want = random.Random(seed), {}
    common = [rng.randrange(20) + 100 for _ in range(70)]
    for i in range(num):
        prompt = common[: rng.choice([0, 40, 70])] + [rng.randrange(20) + 100 for _ in range(rng.randrange(1, 90))]
        length, rid = rng.randrange(1, 40), f"{'f' if rng.random() < 0.3 else 'g'}{i}"
        want[rid] = (expected_output if rid[0] == "f" else expected)(prompt, length, VOCAB, ENDS)
        b.add(rid, prompt, length)
        for _ in range(rng.randrange(3)):
            b.step()
    return want


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("polls", [1, 3, 40])
@pytest.mark.parametrize("num_pages", [4096, 420])
def test_same_tokens_whenever_the_guide_comes(depth: int, page_size: int, polls: int, num_pages: int) -> None:
    for seed in range(2):
        b = ahead(depth, polls, wrong=3, page_size=page_size, num_pages=num_pages // page_size, token_budget=32)
        want = traffic(b, seed)
        b.run()
        assert not b.executor.mistakes and not b.scheduler.stats.failed_steps
        assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
        b.cache.check()


@pytest.mark.parametrize("depth", [0, 1])
def test_same_tokens_with_windows(depth: int) -> None:
    b = ahead(depth, 4, wrong=3, num_pages=2000, window=6, num_window_pages=200, token_budget=16)
    want = traffic(b, 3)
    b.run()
    assert not b.executor.mistakes and not b.scheduler.stats.failed_steps
    assert b.tokens == {rid: tokens for rid, tokens in want.items() if tokens}
    b.cache.check()


@pytest.mark.parametrize("depth", [0, 1])
def test_the_prompt_is_read_but_for_its_last_token(depth: int) -> None:
    b = ahead(depth, 50)
    prompt = list(range(100, 300))
    b.add("g", prompt, 5)
    for _ in range(40):
        b.step()
    assert b.executor.computed == len(prompt) - 1 and "g" not in b.tokens and not b.ended
    b.run()
    assert b.tokens["g"] == expected(prompt, 5, VOCAB, ENDS)
    assert b.scheduler.stats.forced_tokens + b.executor.computed >= len(prompt)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_compile_ends_its_request_alone(depth: int) -> None:
    for polls in (2, 5, 30):
        b = ahead(depth, polls, token_budget=16)
        b.scheduler._gates._gates[0].bad = frozenset(["g0"])  # type: ignore[attr-defined]
        prompt = list(range(100, 190))
        for rid in ("g0", "g1", "f"):
            b.add(rid, [*prompt, ord(rid[-1])], 9)
        b.run()
        failure = b.ended["g0"]
        assert isinstance(failure, Failure) and "no grammar" in failure.message and "g0" not in b.tokens
        assert b.tokens["g1"] == expected([*prompt, ord("1")], 9, VOCAB, ENDS)
        assert b.tokens["f"] == expected_output([*prompt, ord("f")], 9, VOCAB, ENDS)
        b.cache.check()
        assert b.cache.stats().num_handles == 0


@pytest.mark.parametrize("depth", [0, 1])
def test_aborts_while_the_guide_is_not_ready(depth: int) -> None:
    b = ahead(depth, 30, num_pages=600)
    want = traffic(b, 1)
    for rid in list(want)[::2]:
        b.inbox.commands.append(Abort(rid))
        b.step()
    b.run()
    for rid, tokens in b.tokens.items():
        assert tokens == want[rid][: len(tokens)]
    assert b.cache.stats().num_handles == 0 and b.scheduler.num_gated == 0
    b.cache.check()


def test_the_grammar_gate_sends_a_few_long_prompts_ahead() -> None:
    class Never:
        """A compiler whose one thread is taken."""

        def key(self, spec: GrammarSpec) -> str:
            return spec.source

        def compile(self, spec: GrammarSpec) -> None:
            raise InvalidGrammar("too late")

    now = [0.0]
    manager = GrammarManager(Never(), bounds=CacheBounds(deadline_s=5), clock=lambda: now[0])  # type: ignore[arg-type]
    manager._pool.submit = lambda *args: __import__("concurrent.futures").futures.Future()  # type: ignore[method-assign, assignment]
    b = bench(gates=[GrammarGate(manager)])
    spec = GrammarSpec("regex", "a+")
    long = [100 + i % 50 for i in range(MIN_AHEAD_TOKENS)]
    b.add("short", long[:-1], 4, grammar=spec)
    for i in range(MAX_AHEAD + 2):
        b.add(f"long {i}", [*long, i + 300], 4, grammar=spec)
    for _ in range(30):
        b.step()
    running = b.scheduler.admission.running
    assert [request.rid for request in running] == [f"long {i}" for i in range(MAX_AHEAD)]
    assert all(request.to_run == 0 and request.state is State.RUNNING for request in running)
    b.add("free", long, 4, ignore_eos=True)
    for _ in range(10):
        b.step()
    assert len(b.tokens["free"]) == 4, "those that wait delay nobody else"
    now[0] = 6.0
    b.run()
    assert all(isinstance(b.ended[rid], Failure) for rid in b.ended if rid != "free") and len(b.ended) == MAX_AHEAD + 4
    manager.close()
