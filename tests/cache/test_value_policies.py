"""Tests of the eviction policies, each by what it lets go first."""

from __future__ import annotations

import pytest

from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.cache.value_flops import LinearProfile, Worth
from pando.errors import ConfigError
from tests.cache.requests import cached, full_cache, hybrid_cache, run_hybrid, serve


class Quadratic:
    """Arithmetic that grows with the square of the length."""

    def flops(self, num_tokens: int) -> float:
        """The square."""
        return float(num_tokens**2)


@pytest.mark.parametrize("name", ["", "fifo", "lru:2", "gdsf:x", "marconi:", "reuse:1"])
def test_unknown_names_are_refused(name: str) -> None:
    if name == "marconi:":
        assert full_cache(4, 1, policy=name).order.policy.name == "marconi:1"
        return
    with pytest.raises(ConfigError, match="choose one of reuse"):
        full_cache(4, 1, policy=name)


def test_flops_saved_along_a_path_of_states_add_up() -> None:
    manager = hybrid_cache(profile=Quadratic())
    for length in (4, 10, 25):
        run_hybrid(manager, list(range(length)))
    worth, states = manager.store.worth, manager.states
    assert states is not None
    records = [node.records[states.index] for node in manager.tree.nodes()]
    saved = [worth.saved(record) for record in records if len(record.slots)]
    assert sorted(saved) == [16.0, 84.0, 525.0] and sum(saved) == 25.0**2


def test_kv_without_a_state_is_worth_nothing() -> None:
    manager = hybrid_cache(admission="branch")
    run_hybrid(manager, list(range(10)))
    leaf = list(manager.tree.nodes())[-1]
    assert manager.store.worth.saved(leaf.records[0]) == 0.0


def test_worth_without_states_is_the_edge_s_own() -> None:
    manager = full_cache(40, 1, profile=Quadratic())
    serve(manager, list(range(10)))
    serve(manager, [*range(5), 70])
    saved = sorted(manager.store.worth.saved(node.records[0]) for node in manager.tree.nodes() if node.parent)
    assert saved == [11.0, 25.0, 75.0]


def test_lru_lets_an_inner_state_go_and_lru_leaf_does_not() -> None:
    found = {}
    for policy in ("lru", "lru_leaf"):
        manager = hybrid_cache(num_states=3, policy=policy)
        run_hybrid(manager, list(range(5)))
        run_hybrid(manager, list(range(12)))
        run_hybrid(manager, [70, 71])
        run_hybrid(manager, [80, 81])
        found[policy] = cached(manager, list(range(5)))
    assert found == {"lru": 0, "lru_leaf": 5}


def test_whole_leaves_go_with_their_states_and_full_models_are_trimmed() -> None:
    layout = CacheLayout(1, 1, state_bytes=10)
    hybrid = CacheManager(layout, 60, policy="lru")
    run_hybrid(hybrid, list(range(20)))
    run_hybrid(hybrid, list(range(50, 75)))
    assert hybrid.stats().by_component["full"].num_evicted == 20, "5 bytes were lacking"
    full = full_cache(40, 1)
    serve(full, list(range(20)))
    serve(full, list(range(50, 75)))
    assert full.stats().evicted_tokens == 5


def test_gdsf_keeps_what_saves_more_per_byte() -> None:
    """Two states of equal size: the deeper one saves more, though it is older."""
    manager = hybrid_cache(num_states=3, policy="gdsf:0.25", profile=Quadratic())
    run_hybrid(manager, list(range(40)))
    run_hybrid(manager, [70, 71, 72])
    run_hybrid(manager, [80, 81, 82])
    run_hybrid(manager, [90, 91, 92])
    assert cached(manager, list(range(40))) == 40
    assert cached(manager, [70, 71, 72]) == 0


def test_gdsf_forgets_in_time_what_is_not_used() -> None:
    manager = hybrid_cache(num_states=3, policy="gdsf:0.25")
    run_hybrid(manager, list(range(40)))
    for first in range(100, 3000, 10):
        run_hybrid(manager, list(range(first, first + 8)))
    assert cached(manager, list(range(40))) == 0


def test_marconi_weighs_recency_against_flops() -> None:
    found = []
    for alpha in ("0", "10"):
        manager = hybrid_cache(num_states=3, policy=f"marconi:{alpha}", profile=Quadratic())
        run_hybrid(manager, list(range(40)))
        for first in (100, 200, 300):
            run_hybrid(manager, [first, first + 1])
        found.append(cached(manager, list(range(40))))
    assert found == [0, 40], "alpha 0 is LRU"


def test_a_policy_can_be_changed_while_it_runs() -> None:
    manager = full_cache(20, 1, policy="reuse")
    serve(manager, list(range(8)))
    serve(manager, list(range(50, 58)))
    manager.store.use("lru")
    manager.check()
    serve(manager, list(range(80, 88)))
    assert cached(manager, list(range(8))) == 4 and cached(manager, list(range(50, 58))) == 8


def test_a_linear_profile_counts_tokens() -> None:
    worth = Worth(LinearProfile(), (2, 30), 1, None, 1)
    assert worth.between(10, 4) == 6.0
