"""The first pass stays inside of the pool and of the context, however small they are."""

from __future__ import annotations

import pytest
import torch

from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan
from pando.kernels.reference import REFERENCE
from pando.runtime.logits_processors import PROCESSORS
from pando.runtime.warmup import FIRST_TOKENS, RATE_TOKENS, first_choices, first_pass, prefill_rate
from tests.runtime.toy_model import CPU, toy_runner


@pytest.mark.parametrize(
    ("context", "num_pages", "page_size", "expected"),
    [
        (1000, 1000, 1, RATE_TOKENS),
        (50, 1000, 1, 50),
        (1, 1000, 1, 1),
        (1000, 40, 1, 39),
        (1000, 3, 16, 47),
        (7, 2, 3, 5),
        (100, 1, 1, 1),
    ],
)
def test_warm_up_fits(context: int, num_pages: int, page_size: int, expected: int) -> None:
    runner, model, _ = toy_runner(context=context, page_size=page_size)
    pool = KVPool(CachePlan(()), num_pages, page_size, "cpu", torch.float32)
    assert prefill_rate(runner, pool, CPU) > 0
    first_pass(runner, pool, CPU)
    few = min(FIRST_TOKENS, expected)
    assert [len(batch.input_ids) for batch in model.seen] == [few, expected, few]
    assert max(int(batch.out_loc[0].max()) for batch in model.seen) < pool.num_slots


def test_a_token_is_chosen_in_every_way() -> None:
    runner, model, table = toy_runner()
    first_choices(runner, KVPool(CachePlan(()), 16, 1, "cpu", torch.float32), model.vocab_size, CPU)
    entry = table.entries[0]
    assert entry is not None and all(make(REFERENCE, table).wants(entry) for make in PROCESSORS)
    assert not entry.sampling.is_greedy and entry.logprobs is not None and table.prompt_scored == {0}
