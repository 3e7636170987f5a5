"""Runs the model once before it serves: the first pass is slow everywhere, and the second one is measured."""

from __future__ import annotations

import time

import torch

from pando.cache.pool import KVPool
from pando.core.batch import Batch, NewSlot
from pando.core.sampling import SamplingParams
from pando.device import Device
from pando.runtime.runner import Runner

PREFILL_TOKENS = 256


def warm_up(runner: Runner, pool: KVPool, device: Device) -> float:
    """Prefill rate in tokens per second, after one unmeasured pass. Uses slot 0 and the pool's first pages."""
    num = max(1, min(PREFILL_TOKENS, pool.num_slots - 1, runner.context_length))
    seconds = [_prefill(runner, pool, num, device) for _ in range(2)]
    return num / max(1e-6, seconds[-1])


def _prefill(runner: Runner, pool: KVPool, num: int, device: Device) -> float:
    pages = list(range(-(-num // pool.page_size)))
    entry = NewSlot(0, [1] * num, num, SamplingParams(temperature=0), 0, None, [])
    batch = Batch(-1, [0], [0], [num], [1], [0], [entry], [], [0] * len(pages), list(pages), pages)
    device.synchronize()
    started = time.perf_counter()
    with torch.inference_mode():
        step = runner.launch(batch)
        runner.sample(step, None)
        runner.collect(step)
    return time.perf_counter() - started
