"""Runs the model before it serves: first passes are slow everywhere; a second is timed where a budget depends on it."""

from __future__ import annotations

import time

from pando.cache.pool import KVPool
from pando.core.batch import Batch, NewSlot
from pando.core.sampling import SamplingParams
from pando.device import Device
from pando.runtime.runner import Runner

FIRST_TOKENS = 16
RATE_TOKENS = 64


def first_pass(runner: Runner, pool: KVPool, device: Device) -> None:
    """Run a few tokens, so that no request pays for what happens only once. Uses slot 0 and the pool's first pages."""
    _prefill(runner, pool, _fitting(FIRST_TOKENS, runner, pool), device)


def prefill_rate(runner: Runner, pool: KVPool, device: Device) -> float:
    """Prompt tokens per second, measured on one pass after an unmeasured one."""
    first_pass(runner, pool, device)
    num = _fitting(RATE_TOKENS, runner, pool)
    return num / max(1e-6, _prefill(runner, pool, num, device))


def _fitting(num_tokens: int, runner: Runner, pool: KVPool) -> int:
    return max(1, min(num_tokens, pool.num_slots - 1, runner.context_length))


def _prefill(runner: Runner, pool: KVPool, num: int, device: Device) -> float:
    pages = list(range(-(-num // pool.page_size)))
    groups = [group for group in range(pool.num_groups) for _ in pages]
    entry = NewSlot(0, [1] * num, num, SamplingParams(temperature=0), 0, None, [], state=0)
    everywhere = pages * pool.num_groups
    writes = [0] * len(everywhere), list(everywhere), everywhere
    batch = Batch(-1, [0], [0], [num], [1], [0], [entry], [], *writes, page_group=groups)
    device.synchronize()
    started = time.perf_counter()
    step = runner.launch(batch)
    runner.sample(step, None)
    runner.collect(step)
    return time.perf_counter() - started
