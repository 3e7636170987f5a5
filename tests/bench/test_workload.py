"""Workloads: what is shared, what is not, and that a seed repeats."""

from __future__ import annotations

import pytest

from pando.bench.workload import Workload
from pando.errors import ConfigError

VOCAB = range(300, 8192)


def test_random_prompts_share_nothing() -> None:
    work = Workload(num_prompts=20, input_len=50, output_len=7)
    prompts = [c.turns[0] for c in work.conversations(VOCAB)]
    assert len(prompts) == work.num_requests == 20
    assert {len(p.new_ids) for p in prompts} == {50} and {p.output_len for p in prompts} == {7}
    assert len({tuple(p.new_ids[:3]) for p in prompts}) == 20
    assert all(token in VOCAB for p in prompts for token in p.new_ids)


def test_shared_prefixes_come_in_groups() -> None:
    work = Workload(dataset="shared-prefix", num_prompts=60, prefix_len=100, input_len=10, num_groups=3)
    prompts = [c.turns[0].new_ids for c in work.conversations(VOCAB)]
    assert {len(p) for p in prompts} == {110}
    assert len({tuple(p[:100]) for p in prompts}) == 3
    assert len({tuple(p) for p in prompts}) == 60


def test_conversations_start_alike_and_go_on_apart() -> None:
    work = Workload(dataset="multi-turn", num_prompts=4, num_turns=3, prefix_len=20, input_len=5)
    conversations = work.conversations(VOCAB)
    assert work.num_requests == 12
    assert [[len(t.new_ids) for t in c.turns] for c in conversations] == [[25, 5, 5]] * 4
    assert len({tuple(c.turns[0].new_ids[:20]) for c in conversations}) == 1
    assert len({tuple(c.turns[0].new_ids) for c in conversations}) == 4


def test_seeds_repeat_and_differ() -> None:
    def drawn(**seeds: int) -> list[list[int]]:
        workload = Workload(num_prompts=3, length_spread=0.5, **seeds)  # type: ignore[arg-type]
        return [c.turns[0].new_ids for c in workload.conversations(VOCAB)]

    def lengths(**seeds: int) -> list[int]:
        return [len(ids) for ids in drawn(**seeds)]

    assert drawn(workload_seed=1, content_seed=1) == drawn(workload_seed=1, content_seed=1)
    assert drawn(workload_seed=1, content_seed=1) != drawn(workload_seed=1, content_seed=2)
    assert drawn(workload_seed=1) != drawn(workload_seed=1), "contents are new each time unless their seed is given"
    assert lengths(workload_seed=1) == lengths(workload_seed=1)
    assert lengths(workload_seed=1) != lengths(workload_seed=2)


def test_spread_varies_lengths_within_bounds() -> None:
    work = Workload(num_prompts=200, input_len=40, output_len=10, length_spread=0.5)
    lengths = [len(c.turns[0].new_ids) for c in work.conversations(VOCAB)]
    assert min(lengths) >= 20 and max(lengths) <= 60 and len(set(lengths)) > 20
    assert 36 < sum(lengths) / len(lengths) < 44


@pytest.mark.parametrize(
    ("field", "value"), [("dataset", "novel"), ("num_prompts", 0), ("prefix_len", -1), ("length_spread", 1.5)]
)
def test_bad_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        Workload(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_from_args_takes_what_it_knows() -> None:
    assert Workload.from_args({"num_prompts": 3, "url": "x", "run": print}) == Workload(num_prompts=3)
