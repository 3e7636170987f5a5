"""The real scheduler over the real runner with a tiny checkpoint, driven step by step.

PANDO_TEST_DEVICE=cuda runs it on a GPU: steps are recorded there, and "overlap" is the device's own.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from pando.attention.paged import PagedAttentionBackend
from pando.cache.manager import DEFAULT_ADMISSION, DEFAULT_POLICY, CacheManager
from pando.cache.pool import KVPool
from pando.device import Device
from pando.engine import cache_layout
from pando.kernels import op_table
from pando.models.decoder import DecoderModel
from pando.models.load import load_model
from pando.runtime.cuda_graph import CudaRecorder
from pando.runtime.executor import ThreadedExecutor
from pando.runtime.graph import StepGraphs, graph_shapes
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.scheduler.harness import Bench, bench
from tests.tiny_models import tiny_checkpoint

DEVICE = Device(os.environ.get("PANDO_TEST_DEVICE", "cpu"))
CONTEXT = 160
POISON = 1e4
"""What a pool with windows holds at first: read by mistake, it changes any output."""


@functools.lru_cache(maxsize=2)
def tiny_model(family: str, kernels: str, dtype: str = "float32") -> DecoderModel:
    """The family's model; the last two are kept, tests go family by family."""
    ops = op_table(DEVICE.name, kernels)
    return load_model(tiny_checkpoint(family), dtype=dtype, device=DEVICE.name, ops=ops)


def tiny_runner(
    family: str,
    kernels: str,
    *,
    num_tokens: int,
    page_size: int,
    max_running: int,
    context: int = CONTEXT,
    num_window_tokens: int = 0,
    num_states: int = 0,
    int8: bool = False,
) -> Runner:
    """A runner with a pool of `num_tokens` tokens, and one of `num_window_tokens` of layers with a window."""
    model, ops = tiny_model(family, kernels), op_table(DEVICE.name, kernels)
    spare = int(DEVICE.asynchronous and ops.capturable)  # what fills recorded steps up
    pool = KVPool(
        model.cache_plan.in_int8() if int8 else model.cache_plan,
        num_tokens // page_size + spare,
        page_size,
        DEVICE.name,
        model.dtype,
        num_window_pages=num_window_tokens // page_size + spare if num_window_tokens else 0,
        num_states=num_states + spare if num_states else 0,
    )
    for tensor in (*pool.k, *pool.v) if num_window_tokens else ():
        tensor.fill_(min(POISON, torch.iinfo(tensor.dtype).max) if tensor.dtype is torch.int8 else POISON)
    table = RequestTable(max_running + spare, context, page_size, DEVICE, ops, pool.num_groups)
    attention, graphs = PagedAttentionBackend(pool, ops), None
    if spare:
        model.reserve_positions(context)
        graphs = StepGraphs(model, attention, table, CudaRecorder(), graph_shapes(max_running, context, page_size))
        graphs.record_all()
    return Runner(model, attention, table, Sampler(ops, table), DEVICE, graphs)


def tiny_engine(
    family: str,
    kernels: str = "auto",
    *,
    num_tokens: int = 640,
    page_size: int = 1,
    max_running: int = 8,
    overlap: bool = False,
    context: int = CONTEXT,
    num_window_tokens: int = 0,
    num_states: int = 0,
    int8: bool = False,
    **options: Any,
) -> Bench:
    """A scheduler over a tiny model; `options` go to the scheduler's harness. num_states: of a recurrent model.

    num_window_tokens: of layers with a sliding window; 0 = they keep all tokens. int8: keys and values in 8 bits.
    admission, eviction: the cache's policies, with states or windows.
    """
    policies = {name: options.pop(name) for name in ("admission", "eviction") if name in options}
    runner: Any = tiny_runner(
        family,
        kernels,
        num_tokens=num_tokens,
        page_size=page_size,
        max_running=max_running,
        context=context,
        num_window_tokens=num_window_tokens,
        num_states=num_states,
        int8=int8,
    )
    if num_states or num_window_tokens or policies:
        spaces = [num_tokens // page_size, num_window_tokens // page_size, num_states]
        sharing = options.get("sharing", True)
        options.setdefault("cache", _cache(runner._model, page_size, spaces, sharing, **policies))
    executor = ThreadedExecutor(runner) if overlap and not DEVICE.asynchronous else runner
    if DEVICE.asynchronous:
        runner.depth = int(overlap)
    return bench(
        num_pages=num_tokens // page_size,
        page_size=page_size,
        max_running=max_running,
        context_length=context,
        executor=executor,
        vocab=runner._model.vocab_size,
        **options,
    )


def _cache(
    model: DecoderModel,
    page_size: int,
    spaces: list[int],
    sharing: bool,
    *,
    admission: str = DEFAULT_ADMISSION,
    eviction: str = DEFAULT_POLICY,
) -> CacheManager:
    """A cache whose budget is that of its id spaces together: pages, window pages, states."""
    layout = cache_layout(model.cache_plan, page_size, windows=spaces[1] > 0)
    if not layout.kv_bytes_per_token:
        spaces = [0, *spaces[1:]]
    spaces = [space for i, space in enumerate(spaces) if i == 0 or space]
    size = sum(count * bytes_ for count, bytes_ in zip(spaces, layout.slot_bytes, strict=True))
    return CacheManager(layout, size, num_slots=spaces, sharing=sharing, admission=admission, policy=eviction)
