"""Sliding windows in the scheduler: every step finds its whole window, and holds no more than that."""

from __future__ import annotations

import random

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.core.messages import Abort
from tests.scheduler.fake_executor import FakeExecutor, expected_output
from tests.scheduler.harness import EOS, VOCAB, Bench, bench

WINDOW = 12


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(8, VOCAB) for _ in range(length)]


def windows(num_window_pages: int, **options: object) -> Bench:
    return bench(window=WINDOW, num_window_pages=num_window_pages, **options)  # type: ignore[arg-type]


def answer(of: list[int], num: int) -> list[int]:
    return expected_output(of, num, VOCAB, frozenset([EOS]))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("sharing", [True, False])
def test_long_sequences_need_a_window_and_a_step(sharing: bool, page_size: int, depth: int) -> None:
    """Prompts of 150 and answers of 100 tokens through window pages for 60."""
    rng = random.Random(page_size)
    engine = windows(60 // page_size, num_pages=800 // page_size, page_size=page_size, token_budget=16, depth=depth,
                     sharing=sharing)  # fmt: skip
    prompts = {f"r{i}": prompt(rng, 150) for i in range(3)}
    for rid, tokens in prompts.items():
        engine.add(rid, tokens, 100)
    engine.run()
    assert not engine.executor.mistakes and not engine.scheduler.stats.failed_steps
    for rid, tokens in prompts.items():
        assert engine.tokens[rid] == answer(tokens, 100)
    engine.cache.check()


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_under_pressure(seed: int) -> None:
    """Shared prefixes, chunks, aborts and retractions; what is in a window must be the KV of the right prefix."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 8])
    engine = windows(
        rng.choice([64, 96, 160]) // page_size,
        num_pages=rng.choice([256, 400]) // page_size,
        page_size=page_size,
        token_budget=rng.choice([8, 16, 32]),
        max_running=rng.choice([3, 8]),
        context_length=140,
        depth=seed % 2,
        sharing=seed % 5 != 4,
        policy=rng.choice(["lpm", "fcfs"]),
    )
    roots = [prompt(rng, 100) for _ in range(3)]
    prompts: dict[str, list[int]] = {}
    aborted: set[str] = set()
    while len(prompts) < 40:
        for _ in range(rng.choice([0, 0, 1, 3])):
            rid = f"r{len(prompts)}"
            prompts[rid] = rng.choice(roots)[: rng.randrange(101)] + prompt(rng, rng.randrange(1, 10))
            engine.add(rid, prompts[rid], 24)
        if prompts and rng.random() < 0.1:
            aborted.add(rng.choice(list(prompts)))
            engine.inbox.commands.append(Abort(rng.choice(sorted(aborted))))
        engine.step()
        engine.cache.check()
    engine.run()
    assert not engine.executor.mistakes and not engine.scheduler.stats.failed_steps
    for rid, tokens in prompts.items():
        found, expected = engine.tokens.get(rid, []), answer(tokens, 24)
        assert found == (expected[: len(found)] if rid in aborted else expected), rid
    stats = engine.cache.stats().by_component["window"]
    assert stats.num_locked == stats.num_quarantined == 0


def test_a_warm_prompt_resumes_and_a_lost_window_is_computed_again() -> None:
    engine = windows(140, num_pages=1000, token_budget=32)
    rng = random.Random(0)
    first, others = prompt(rng, 100), [prompt(rng, 100) for _ in range(3)]
    engine.add("cold", first, 4)
    engine.run()
    engine.add("warm", first, 4)
    engine.run()
    assert engine.ended["warm"].cached_tokens == 99  # type: ignore[union-attr]
    for i, tokens in enumerate(others):
        engine.add(f"other {i}", tokens, 4)
        engine.run()
    assert engine.cache.stats().by_component["full"].num_evicted == 0
    engine.add("again", [*first[:40], *others[0][:40]], 4)
    engine.run()
    assert engine.tokens["again"] == answer([*first[:40], *others[0][:40]], 4)
    assert engine.ended["again"].cached_tokens == 0, "the tree knows 40 tokens, but not their windows"  # type: ignore[union-attr]


def most_at_once(engine: Bench, num: int) -> int:
    """Sequences that run at once when `num` of 60 + 60 tokens want to; all of them must end right."""
    rng, most = random.Random(1), 0
    prompts = {f"r{i}": prompt(rng, 60) for i in range(num)}
    for rid, tokens in prompts.items():
        engine.add(rid, tokens, 60, ignore_eos=True)
    while engine.step() or engine.scheduler.num_unfinished:
        most = max(most, len(engine.scheduler.admission.running))
    assert not engine.executor.mistakes and not engine.scheduler.stats.failed_steps
    assert engine.tokens == {rid: expected_output(tokens, 60, VOCAB) for rid, tokens in prompts.items()}
    return most


def test_the_same_budget_holds_more_sequences() -> None:
    """Five layers with a window of 12 to one without, as in Gemma 3: 6 bytes per token, of which windows need 5."""
    budget, everything = 6 * 600, {"max_running": 64, "token_budget": 32, "num_pages": 600}
    before = bench(cache=CacheManager(CacheLayout(1, 6), budget), **everything)  # type: ignore[arg-type]
    layout = CacheLayout(1, 1, window=WINDOW, window_bytes_per_token=5)
    spaces = [budget - 5 * 2 * (WINDOW + 32), 600]
    windows = bench(
        cache=CacheManager(layout, budget, num_slots=spaces),
        executor=FakeExecutor(spaces[0], 1, VOCAB, window=WINDOW, num_window_pages=600),
        **everything,  # type: ignore[arg-type]
    )
    few, many = most_at_once(before, 40), most_at_once(windows, 40)
    assert few <= 10 and many >= 2 * few, (few, many)
    assert windows.scheduler.admission.num_retracted <= before.scheduler.admission.num_retracted
