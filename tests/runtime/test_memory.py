"""The memory plan is a pure function: each option, each branch, and errors that carry numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pando.core.config import Config
from pando.errors import ConfigError
from pando.runtime.memory import CPU_POOL_BYTES, GIB, GRAPH_BYTES, MemoryPlan, ModelFacts, plan_memory

KIB = 1 << 10
FACTS = ModelFacts(
    weight_bytes=2 * GIB,
    kv_bytes_per_token=64 * KIB,
    hidden_size=1024,
    intermediate_size=4096,
    vocab_size=32_000,
    max_position=8192,
    dtype_bytes=2,
)


def plan(
    free: int = 4 * GIB, *, facts: ModelFacts = FACTS, gpu: bool = False, rate: Any = None, **options: Any
) -> MemoryPlan:
    return plan_memory(Config(**options), facts, free, on_cpu=not gpu, tokens_per_second=rate)


def workspace(budget: int) -> int:
    return budget * (4 * 1024 + 3 * 4096) * 2 + 3 * 256 * 32_000 * 4


def test_a_cpu_takes_half_of_what_the_step_leaves() -> None:
    found = plan()
    assert found.token_budget == 2048 and found.workspace_bytes == workspace(2048)
    assert found.total_tokens == (4 * GIB - workspace(2048)) // 2 // (64 * KIB)
    assert found.kv_bytes == found.total_tokens * 64 * KIB
    assert found.free_bytes == 4 * GIB


def test_a_cpu_pool_has_a_ceiling() -> None:
    found = plan(100 * GIB)
    assert found.total_tokens == CPU_POOL_BYTES // (64 * KIB)
    assert any("at most 4.00 GiB" in reason for reason in found.reasons)


def test_a_device_takes_nine_tenths() -> None:
    found = plan(100 * GIB, gpu=True)
    assert found.token_budget == 8192
    assert found.total_tokens == int((100 * GIB - workspace(8192)) * 0.9) // (64 * KIB)


@pytest.mark.parametrize("gpu", [False, True])
def test_mem_fraction_static_counts_the_weights_in(gpu: bool) -> None:
    found = plan(10 * GIB, gpu=gpu, mem_fraction_static=0.5, chunked_prefill_size=1024)
    pool = int((12 * GIB - workspace(1024)) * 0.5) - 2 * GIB
    assert found.total_tokens == pool // (64 * KIB)


def test_a_fraction_below_the_weights_leaves_no_room() -> None:
    with pytest.raises(ConfigError, match=r"no room for a KV pool.*10\.00 GiB free.*65536 bytes"):
        plan(10 * GIB, mem_fraction_static=0.01)


@pytest.mark.parametrize(("page", "total"), [(1, 1000), (16, 1008), (300, 1200)])
def test_max_total_tokens_is_rounded_up_to_pages(page: int, total: int) -> None:
    assert plan(max_total_tokens=1000, page_size=page).total_tokens == total


def test_max_total_tokens_beyond_the_free_memory_names_both_and_the_most() -> None:
    with pytest.raises(
        ConfigError, match=r"100000 needs 6\.10 GiB, but 4\.00 GiB are free; ask for at most 65536"
    ) as e:
        plan(max_total_tokens=100_000)
    assert e.value.param == "max_total_tokens"
    assert plan(max_total_tokens=65_536).total_tokens == 65_536


def test_a_pool_smaller_than_two_pages_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConfigError, match="max_total_tokens") as e:
        plan(max_total_tokens=16, page_size=16)
    assert e.value.param == "max_total_tokens"


@pytest.mark.parametrize("free", [0, 10_000, workspace(2048), workspace(2048) + 2 * 64 * KIB])
def test_no_memory_is_an_error_with_numbers(free: int) -> None:
    with pytest.raises(ConfigError, match="one token takes 65536 bytes"):
        plan(free)


def test_the_pool_is_whole_pages() -> None:
    for page in (1, 3, 16, 64):
        found = plan(page_size=page)
        assert found.total_tokens % page == 0
        assert found.total_tokens + page > plan().total_tokens


def test_context_is_the_models_unless_the_pool_is_smaller() -> None:
    assert plan().context_length == 8192
    cut = plan(max_total_tokens=5000)
    assert cut.context_length == 5000
    (reason,) = [reason for reason in cut.reasons if "context cut" in reason]
    assert "from 8192 to the pool's 5000" in reason
    assert "--max-total-tokens 8192 (0.50 GiB)" in reason and "--mem-fraction-static" in reason


def test_context_length_asked_for() -> None:
    assert plan(context_length=100).context_length == 100
    longer = plan(context_length=10_000)
    assert longer.context_length == 10_000
    assert any("10000 is beyond the model's 8192" in reason for reason in longer.reasons)
    assert plan(context_length=10_000, max_total_tokens=900).context_length == 900


def test_running_requests_follow_option_and_pool() -> None:
    assert plan().max_running == 256
    assert plan(max_running_requests=7).max_running == 7
    assert plan(max_total_tokens=100).max_running == 100
    assert plan(max_total_tokens=96, page_size=16).max_running == 6, "each running request holds a page at least"


@pytest.mark.parametrize(("rate", "budget"), [(10.0, 256), (2047.0, 256), (2048.0, 512), (10_000.0, 2048), (1e9, 8192)])
def test_the_token_budget_follows_the_measured_rate_on_a_cpu(rate: float, budget: int) -> None:
    assert plan(rate=rate).token_budget == budget
    assert plan(rate=rate, chunked_prefill_size=77).token_budget == 77
    assert plan(100 * GIB, gpu=True, rate=rate).token_budget == 8192


def test_table_bytes_and_concurrency() -> None:
    found = plan(max_running_requests=10, context_length=100, page_size=16, max_total_tokens=1600)
    assert found.table_bytes == 10 * 101 * 4 + 10 * 7 * 4
    assert found.concurrency(100) == 10 and found.concurrency(800) == 2 and found.concurrency(5000) == 0
    assert found.concurrency(0) == 10


def test_reasons_explain_what_was_measured() -> None:
    assert any("mem_fraction_static 0.9" in reason for reason in plan(mem_fraction_static=0.9).reasons)
    assert any("500 tokens/s measured" in reason for reason in plan(rate=500.0).reasons)
    assert any("as asked (max_total_tokens)" in reason for reason in plan(max_total_tokens=64).reasons)
    assert plan() == plan(), "pure"
    assert plan(facts=replace(FACTS, max_position=64)).context_length == 64


WINDOWS = replace(FACTS, window=512, window_bytes_per_token=48 * KIB, max_position=65_536)
"""Three quarters of the KV belong to layers with a window."""


def test_a_cpu_gives_short_sequences_what_they_had_and_long_ones_more() -> None:
    before, found = plan(facts=replace(WINDOWS, window=0), rate=1000.0), plan(facts=WINDOWS, rate=1000.0)
    windows = found.windows
    assert windows is not None and before.windows is None
    assert windows.tokens == before.total_tokens and found.kv_bytes == before.kv_bytes == found.cache_bytes
    assert (windows.bytes_per_token, windows.full_bytes_per_token) == (48 * KIB, 16 * KIB)
    step = 2 * found.token_budget
    assert found.total_tokens == (found.kv_bytes - (windows.held + step) * 48 * KIB) // (16 * KIB)
    assert found.concurrency(256) == before.concurrency(256)
    for length in (2048, 8192, 30_000):
        assert found.concurrency(length) > 1.8 * before.concurrency(length), length
    assert (found.context_length, before.context_length) == (65_536, before.total_tokens)


def test_the_reason_names_bytes_and_sequences() -> None:
    found, before = plan(facts=WINDOWS, rate=1000.0), plan(facts=replace(WINDOWS, window=0), rate=1000.0)
    (reason,) = [reason for reason in found.reasons if "sliding windows" in reason]
    each = 8192 * 16 * KIB + (512 + 128 + 2) * 48 * KIB
    assert "49,152 of 65,536 bytes per token" in reason
    assert f"takes {each:,} bytes instead of {8192 * 64 * KIB:,}" in reason
    assert f"and {found.concurrency(8192)} of them fit instead of {before.concurrency(8192)}" in reason


@pytest.mark.parametrize("options", [{"gpu": True}, {"mem_fraction_static": 0.9, "chunked_prefill_size": 512}])
def test_pools_that_take_their_memory_at_once_fit_it_together(options: dict[str, Any]) -> None:
    found = plan(40 * GIB, facts=WINDOWS, page_size=16, **options)
    windows = found.windows
    assert windows is not None and windows.tokens % 16 == found.total_tokens % 16 == 0
    taken = found.total_tokens * 16 * KIB + windows.tokens * 48 * KIB
    assert 0.999 * found.kv_bytes < taken <= found.kv_bytes
    assert windows.tokens >= windows.held + 2 * found.token_budget


def test_layers_with_windows_keep_all_where_that_costs_nothing() -> None:
    assert plan(facts=WINDOWS, context_length=512).windows is None, "the window covers the context"
    assert plan(facts=WINDOWS, max_total_tokens=1100, chunked_prefill_size=256).windows is None, "a step and a window"
    assert plan(facts=WINDOWS, max_total_tokens=1200, chunked_prefill_size=256).windows is not None
    assert plan(facts=FACTS).windows is None


def test_a_model_of_windows_alone_has_no_other_pool() -> None:
    found = plan(facts=replace(WINDOWS, window_bytes_per_token=64 * KIB), rate=1000.0)
    windows = found.windows
    assert windows is not None and windows.full_bytes_per_token == 0
    assert found.context_length == 65_536, "the pool does not bound the context"
    assert found.concurrency(65_536) == found.concurrency(700) == windows.tokens // windows.held


def test_without_keys_and_values_states_take_the_pool() -> None:
    facts = replace(FACTS, kv_bytes_per_token=0, state_bytes=4 << 20)
    found = plan(facts=facts)
    pool = (4 * GIB - workspace(2048)) // 2
    assert found.num_states == pool // (4 << 20) and found.cache_bytes == pool and found.kv_bytes == 0
    assert found.context_length == 8192 and found.max_running == min(256, found.num_states // 2)


def test_what_was_measured_takes_the_place_of_the_estimate() -> None:
    config, logits = Config(chunked_prefill_size=1024), 3 * 256 * 32_000 * 4
    found = plan_memory(config, FACTS, 20 * GIB, on_cpu=False, activation_bytes=GIB)
    assert found.workspace_bytes == GIB + logits
    assert any("a step of 1024 tokens takes 1.00 GiB beside its logits (measured)" in line for line in found.reasons)
    assert plan_memory(config, FACTS, 20 * GIB, on_cpu=False).workspace_bytes == workspace(1024)


def test_recorded_steps_are_accounted_for() -> None:
    config = Config(chunked_prefill_size=1024)
    found = plan_memory(config, FACTS, 20 * GIB, on_cpu=False, num_graphs=10)
    assert found.graph_bytes == 10 * GRAPH_BYTES and found.workspace_bytes == workspace(1024) + found.graph_bytes
    assert any("kept for 10 recorded steps" in line for line in found.reasons)


def test_states_and_kv_of_a_device_fit_the_pool_together() -> None:
    """A CPU's memory is taken when it is first written; a device's at once."""
    facts = replace(FACTS, state_bytes=50 << 20)
    found = plan(40 * GIB, facts=facts, gpu=True)
    pool = int((40 * GIB - workspace(8192)) * 0.9)
    assert found.cache_bytes == pool and found.num_states > 100
    taken = found.num_states * facts.state_bytes + found.kv_bytes
    assert 0.999 * pool < taken <= pool
