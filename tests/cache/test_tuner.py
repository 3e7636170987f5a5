"""When the tuner switches and when it does not, and a cache that it chooses for."""

from __future__ import annotations

import random
from copy import copy

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.key import TokenKey
from pando.cache.manager import CacheManager
from pando.cache.simulator.generate import generate
from pando.cache.simulator.models import preset
from pando.cache.simulator.replay import Replay, Setup
from pando.cache.tuner import BATCH, CANDIDATES, FEWEST, Tuner
from pando.cache.value_policies import Lru
from pando.cache.value_reuse import Reuse


def feed(tuner: Tuner, count: int, **saved: float) -> bool:
    return any([tuner.observe(saved) for _ in range(count)])


def test_it_never_switches_on_a_cold_start() -> None:
    tuner = Tuner(("a", "b"))
    assert not feed(tuner, BATCH * FEWEST - 1, a=1, b=9) and tuner.choice == "a"
    assert tuner.observe({"a": 1, "b": 9}) and tuner.choice == "b"


def test_a_lasting_gain_switches_and_a_small_one_does_not() -> None:
    tuner = Tuner(("a", "b"))
    assert not feed(tuner, 2000, a=100, b=101.9)
    assert feed(tuner, 2000, a=100, b=103) and tuner.choice == "b"


def test_a_lead_by_a_few_lucky_requests_is_chance() -> None:
    tuner = Tuner(("a", "b"))
    feed(tuner, BATCH * FEWEST, a=1, b=1)
    assert not tuner.observe({"a": 0, "b": 500}) and not feed(tuner, 5000, a=1, b=1)
    assert tuner.choice == "a"


def test_equal_policies_are_not_told_apart() -> None:
    switches = 0
    for seed in range(20):
        dice, tuner = random.Random(seed), Tuner(("a", "b"))
        switches += sum(tuner.observe({"a": dice.random(), "b": dice.random()}) for _ in range(2000))
    assert switches <= 2


def test_it_follows_a_load_that_changes() -> None:
    tuner = Tuner(("a", "b"))
    assert feed(tuner, 1000, a=1, b=2) and tuner.choice == "b"
    assert feed(tuner, 2000, a=2, b=1) and tuner.choice == "a"


def test_what_was_learned_moves_on_with_a_switch() -> None:
    cache = CacheManager(CacheLayout(1, 1, state_bytes=10), 300, policy="reuse")
    for number in range(60):
        tokens = list(range(number % 3 * 50, number % 3 * 50 + 30 + number // 3))
        handle = cache.admit(TokenKey(tokens), "", len(tokens))
        assert not handle.denied
        cache.release(handle, len(tokens), publish=True, state_at=len(tokens))
    policy = cache.order.policy
    assert isinstance(policy, Reuse)
    twin = copy(policy)
    kinds = list(policy._seen)
    assert kinds and [twin.bias(kind) for kind in kinds] == [policy.bias(kind) for kind in kinds]
    twin._learn(kinds[0], 1.0)
    assert twin.bias(kinds[0]) != policy.bias(kinds[0]), "they learn apart"


def test_a_tuned_cache_switches_and_keeps_its_books(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its tuner has chosen another policy the cache evicts by it, and goes on with what it holds."""
    trace = generate("swebench", 13, sessions=4)
    run = Replay(Setup(preset("hybrid-7b"), "tuned", "branch+last", 2e9, 1), trace)
    cache = run.cache
    assert cache.tuning is not None
    for request in trace[:20]:
        run.serve(request)
    assert isinstance(cache.order.policy, Reuse)
    held = cache.budget.used_bytes
    tuner = cache.tuning.tuner
    tuner.choice = "lru"
    monkeypatch.setattr(tuner, "observe", lambda saved: set(saved) == set(CANDIDATES))
    run.serve(trace[20])
    monkeypatch.undo()
    assert isinstance(cache.order.policy, Lru) and cache.budget.used_bytes > held / 2
    cache.check()
    assert sum(run.serve(request) for request in trace[21:40]) > 0
    cache.check()


def test_a_tuned_cache_finds_what_the_first_candidate_finds_until_it_switches() -> None:
    trace = generate("swebench", 13, sessions=4)
    rates = []
    for policy in ("tuned", CANDIDATES[0]):
        run = Replay(Setup(preset("hybrid-7b"), policy, "branch+last+room", 2e9, 1), trace)
        rates.append(run.run().token_hit_rate)
        run.cache.check()
    assert rates[0] == rates[1]
