"""Random traffic over every mix of components, page size and policy; see `random_engine.py` for what is checked.

`python -m tests.cache.million` runs the same for as long as you like.
"""

from __future__ import annotations

import pytest

from tests.cache.random_engine import MIXES, PAGE_SIZES, POLICIES, Setup, Traffic, setup_of

NUM_SETUPS = len(MIXES) * len(PAGE_SIZES) * len(POLICIES)


@pytest.mark.parametrize("mix", MIXES)
def test_random_traffic(mix: str) -> None:
    hits = denied = evicted = victims = 0
    seeds = [seed for seed in range(NUM_SETUPS) if setup_of(seed).mix == mix]
    for seed in seeds:
        traffic = Traffic(seed, setup_of(seed))
        traffic.run(200)
        traffic.drain()
        hits, denied = hits + traffic.num_hits, denied + traffic.num_denied
        evicted, victims = evicted + sum(traffic.cache.eviction.evicted), victims + traffic.num_victims
    assert len(seeds) == len(PAGE_SIZES) * len(POLICIES)
    assert hits and denied and evicted and victims, "the traffic never met pressure"


def test_a_guest_that_becomes_a_state_lowers_what_is_below() -> None:
    """A request that resumes from a guest makes it a state: those below save less from then on, and go sooner."""
    setup = Setup("full+window+state", 4, "gdsf:0.25", "branch+last+room", num_tokens=240, num_states=20)
    traffic = Traffic(113, setup)
    traffic.run(2000)
    assert traffic.num_victims


@pytest.mark.parametrize("mix", MIXES)
def test_the_same_calls_give_the_same_actions(mix: str) -> None:
    def actions() -> list[object]:
        traffic = Traffic(4, Setup(mix, 4, "reuse"))
        listener = traffic.cache.events.listen()
        traffic.run(300)
        tables = [(s.handle.pages.tolist(), s.handle.window_pages.tolist(), s.handle.state) for s in traffic.running]
        return [listener.drain(), tables, traffic.contents()]

    assert actions() == actions()


@pytest.mark.parametrize("mix", MIXES)
def test_policies_change_while_it_runs(mix: str) -> None:
    traffic = Traffic(8, Setup(mix, 1, "lru", num_tokens=60))
    for policy in POLICIES:
        traffic.cache.store.use(policy)
        traffic.run(150)
    traffic.drain()
    assert traffic.cache.order.policy.name == POLICIES[-1]


def test_a_larger_window_never_helps() -> None:
    """The same requests, one after the other, in an endless cache."""
    hits = []
    for window in (2, 6, 30):
        traffic = Traffic(3, Setup("full+window", 1, "lru", num_tokens=60, window=window))
        cache = Setup("full+window", 1, "lru", num_tokens=9_000, window=window).cache()
        traffic.cache = cache
        total = 0
        for _ in range(150):
            total += traffic.serve(traffic.prompt())
        hits.append(total)
    assert hits == sorted(hits, reverse=True) and hits[-1] > 0
