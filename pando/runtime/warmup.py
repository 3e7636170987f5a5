"""Runs the model before it serves: first passes are slow everywhere; a second is timed where a budget depends on it."""

from __future__ import annotations

import time

import numpy as np
import torch

from pando.cache.pool import KVPool
from pando.core.batch import Batch, NewSlot, TokenMask
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.device import Device
from pando.forward import LanguageModel
from pando.runtime.runner import Runner

FIRST_TOKENS = 17
"""The width of nothing in a model: torch's compiler takes sizes that are equal when it first sees them for one number,
and compiles again when they part, which may be while a request waits."""
RATE_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0)


def first_pass(runner: Runner, pool: KVPool, device: Device) -> None:
    """Run a few tokens, so that no request pays for what happens only once. Uses slot 0 and the pool's first pages."""
    _prefill(runner, pool, _fitting(FIRST_TOKENS, runner, pool), device)


def first_sizes(runner: Runner, pool: KVPool, model: LanguageModel, device: Device) -> None:
    """Run what `first_pass` did not: one token, and the logits of several. A compiler makes other code of those."""
    _prefill(runner, pool, 1, device)
    for rows in (1, 2):
        model.logits(torch.zeros(rows, model.hidden_size, dtype=model.dtype, device=device.name))


def prefill_rate(runner: Runner, pool: KVPool, device: Device) -> float:
    """Prompt tokens per second, measured on one pass after an unmeasured one."""
    first_pass(runner, pool, device)
    num = _fitting(RATE_TOKENS, runner, pool)
    return num / max(1e-6, _prefill(runner, pool, num, device))


def first_choices(runner: Runner, pool: KVPool, vocab_size: int, device: Device) -> None:
    """Choose a token in each way there is: kernels of a device are compiled when they are first used."""
    everything = SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={0: 1.0},
        min_new_tokens=1,
    )
    allowed = np.full((1, -(-vocab_size // 32)), -1, dtype=np.int32)
    wanted = LogprobSpec(start=0, top=2, token_ids=[0])
    _prefill(runner, pool, _fitting(2, runner, pool), device, everything, TokenMask([0], allowed), wanted)


def step_bytes(runner: Runner, pool: KVPool, num_tokens: int, device: Device) -> int:
    """Device memory that a step of `num_tokens` prompt tokens takes, measured on one pass after an unmeasured one."""
    first_pass(runner, pool, device)
    num = _fitting(num_tokens, runner, pool)
    return device.peak_bytes(lambda: _prefill(runner, pool, num, device))


def _fitting(num_tokens: int, runner: Runner, pool: KVPool) -> int:
    return max(1, min(num_tokens, pool.num_slots - 1, runner.context_length))


def _prefill(
    runner: Runner,
    pool: KVPool,
    num: int,
    device: Device,
    sampling: SamplingParams = GREEDY,
    mask: TokenMask | None = None,
    logprobs: LogprobSpec | None = None,
) -> float:
    pages = list(range(-(-num // pool.page_size)))
    groups = [group for group in range(pool.num_groups) for _ in pages]
    entry = NewSlot(0, [1] * num, num, sampling, 0, logprobs, [0], state=0)
    everywhere = pages * pool.num_groups
    writes = [0] * len(everywhere), list(everywhere), everywhere
    batch = Batch(-1, [0], [0], [num], [1], [0], [entry], [], *writes, page_group=groups)
    device.synchronize()
    started = time.perf_counter()
    step = runner.launch(batch)
    runner.sample(step, mask)
    runner.collect(step)
    return time.perf_counter() - started
