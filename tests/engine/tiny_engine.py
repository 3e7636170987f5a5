"""The real scheduler over the real runner with a tiny checkpoint, driven step by step."""

from __future__ import annotations

import functools
from typing import Any

from pando.attention.paged import PagedAttentionBackend
from pando.cache.budget import CacheLayout
from pando.cache.manager import CacheManager
from pando.cache.pool import KVPool
from pando.device import Device
from pando.kernels import op_table
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from pando.runtime.executor import ThreadedExecutor
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.scheduler.harness import Bench, bench
from tests.tiny_models import tiny_checkpoint

CPU = Device("cpu")
CONTEXT = 160


@functools.lru_cache(maxsize=2)
def tiny_model(family: str, kernels: str, dtype: str = "float32") -> DecoderModel:
    """The family's model; the last two are kept, tests go family by family."""
    return load_model(tiny_checkpoint(family), dtype=dtype, ops=op_table("cpu", kernels))


def tiny_runner(
    family: str,
    kernels: str,
    *,
    num_tokens: int,
    page_size: int,
    max_running: int,
    context: int = CONTEXT,
    num_states: int = 0,
) -> Runner:
    """A runner with a pool of `num_tokens` tokens."""
    model, ops = tiny_model(family, kernels), op_table("cpu", kernels)
    pool = KVPool(model.cache_plan, num_tokens // page_size, page_size, "cpu", model.dtype, num_states=num_states)
    table = RequestTable(max_running, context, page_size, CPU, ops)
    return Runner(model, PagedAttentionBackend(pool, ops), table, Sampler(ops, table), CPU)


def tiny_engine(
    family: str,
    kernels: str = "auto",
    *,
    num_tokens: int = 640,
    page_size: int = 1,
    max_running: int = 8,
    overlap: bool = False,
    context: int = CONTEXT,
    num_states: int = 0,
    **options: Any,
) -> Bench:
    """A scheduler over a tiny model; `options` go to the scheduler's harness. num_states: of a recurrent model."""
    runner: Any = tiny_runner(
        family,
        kernels,
        num_tokens=num_tokens,
        page_size=page_size,
        max_running=max_running,
        context=context,
        num_states=num_states,
    )
    if num_states:
        options.setdefault("cache", _state_cache(runner._model, num_tokens, page_size, num_states))
    executor = ThreadedExecutor(runner) if overlap else runner
    return bench(
        num_pages=num_tokens // page_size,
        page_size=page_size,
        max_running=max_running,
        context_length=context,
        executor=executor,
        vocab=runner._model.vocab_size,
        **options,
    )


def _state_cache(model: DecoderModel, num_tokens: int, page_size: int, num_states: int) -> CacheManager:
    plan = model.cache_plan
    layout = CacheLayout(page_size, plan.bytes_per_token, state_bytes=plan.bytes_per_state)
    size = num_tokens * plan.bytes_per_token + num_states * plan.bytes_per_state
    return CacheManager(layout, size, num_slots=[num_tokens // page_size, num_states])
