"""KV memory backed ahead: which slots, when, and that what is in them stays. The oracle is the system's own count."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan, FullAttention, SlidingWindow
from pando.core.batch import Batch, StepResult
from pando.kernels.cpu import populate
from pando.runtime import prefault
from pando.runtime.prefault import Prefault, PrefaultingExecutor
from tests.runtime.toy_model import batch_of

PAGE = 4096
ROW = 2 * 64 * 4
"""Bytes of a slot in one tensor: 2 heads of 64 float32."""
LAYERS = 3
can_populate = sys.platform == "linux" and populate(torch.empty(1 << 20, dtype=torch.uint8))
needs_populate = pytest.mark.skipif(not can_populate, reason="the system backs no memory on request")


def pool_of(num_slots: int, num_window: int = 0) -> KVPool:
    layers = [FullAttention(2, 64, 64, "float32")] * LAYERS
    if num_window:
        layers += [SlidingWindow(2, 64, 64, "float32", 16)] * 2
    return KVPool(CachePlan.of(layers), num_slots // 4, 4, "cpu", torch.float32, num_window_pages=num_window // 4)


def resident(rows: Tensor) -> int:
    """How many of the small pages wholly inside these rows have memory."""
    begin = -(-rows.data_ptr() // PAGE) * PAGE
    num = (rows.data_ptr() + rows.nbytes) // PAGE - begin // PAGE
    if num <= 0:
        return 0
    out = (ctypes.c_ubyte * num)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(begin), ctypes.c_size_t(num * PAGE), out) == 0, ctypes.get_errno()
    return sum(byte & 1 for byte in out)


def assigns(pages: list[int], groups: list[int] | None = None) -> Batch:
    batch = batch_of([])
    batch.page_slot = [0] * len(pages)
    batch.page_index = list(range(len(pages)))
    batch.page_id = pages
    batch.page_group = groups or []
    return batch


class Steps:
    """An executor that only counts."""

    depth = 0

    def __init__(self) -> None:
        self.fails = False
        self.closed = False

    def launch(self, batch: Batch) -> int:
        return batch.step

    def sample(self, step: int, mask: None) -> None:
        return

    def collect(self, step: int) -> StepResult:
        if self.fails:
            raise ValueError("this step fails")
        return StepResult(step, [])

    def reset(self) -> None:
        return

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Steps, PrefaultingExecutor]]]:
    monkeypatch.setattr(prefault, "START_SECONDS", 0.0)
    monkeypatch.setattr(prefault, "IDLE_SECONDS", 0.001)
    begun: list[PrefaultingExecutor] = []

    def make(pool: KVPool, num_bytes: int, free: int = 1 << 60) -> tuple[Steps, PrefaultingExecutor]:
        steps = Steps()
        executor = PrefaultingExecutor(steps, pool, num_bytes, lambda: free)
        begun.append(executor)
        return steps, executor

    yield make
    for executor in begun:
        executor.close()


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end, "not reached"
        time.sleep(0.002)


def test_a_small_model_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "AHEAD_SLOTS", 100)
    assert Prefault(pool_of(8000), 1 << 40).ahead == 100


@pytest.mark.parametrize("seed", range(5))
def test_pieces_cover_the_stretch_ahead_once(seed: int) -> None:
    rng = random.Random(seed)
    pool = pool_of(8000, 2000)
    ahead = Prefault(pool, rng.choice([100_000, 1_000_000, 1 << 40]))
    assert ahead.ahead * ROW * 2 * (LAYERS + 2) <= pool.num_bytes // 2 and ahead.ahead <= prefault.AHEAD_SLOTS
    handed_out, backed = [0, 0], [0, 0]
    sizes = [len(pool.k[0]), len(pool.k[LAYERS])]
    assert sizes == [8000, 2000]
    for _ in range(30):
        num = rng.randrange(1, 5)
        groups = [rng.randrange(2) for _ in range(num)]
        pages = [rng.randrange(sizes[group] // 4) for group in groups]
        for group, page in zip(groups, pages, strict=True):
            handed_out[group] = max(handed_out[group], 4 * (page + 1))
        reached = list(ahead.reached)
        assert ahead.note(assigns(pages, groups)) == (handed_out != reached)
        assert ahead.reached == handed_out
        while (piece := ahead.next_piece()) is not None:
            begin = max(backed[piece.group], handed_out[piece.group])
            assert begin < piece.end <= min(sizes[piece.group], handed_out[piece.group] + ahead.ahead)
            layers = range(LAYERS) if piece.group == 0 else range(LAYERS, LAYERS + 2)
            expected = [tensor[begin : piece.end] for layer in layers for tensor in (pool.k[layer], pool.v[layer])]
            assert [(t.data_ptr(), t.shape) for t in piece.rows] == [(t.data_ptr(), t.shape) for t in expected]
            assert all(t.nbytes <= prefault.PIECE_BYTES for t in piece.rows)
            ahead.backed[piece.group] = backed[piece.group] = piece.end
        for group in range(2):
            assert max(backed[group], handed_out[group]) >= min(sizes[group], handed_out[group] + ahead.ahead)


def test_pages_without_groups_are_in_the_first() -> None:
    ahead = Prefault(pool_of(800), 1 << 20)
    assert not ahead.note(batch_of([]))
    assert ahead.note(assigns([3, 9, 5])) and ahead.reached == [40]
    assert not ahead.note(assigns([9, 2]))


@needs_populate
def test_memory_is_there_before_it_is_written(start: Callable[..., tuple[Steps, PrefaultingExecutor]]) -> None:
    pool = pool_of(4000)
    pool.k[1][:8] = 7.0
    _, executor = start(pool, 200 * ROW * 2 * LAYERS)
    tensors = [*pool.k, *pool.v]
    until(lambda: all(resident(t[:200]) >= 200 * ROW // PAGE - 1 for t in tensors))
    assert all(resident(t[210:]) == 0 for t in tensors if t.nbytes < prefault.PIECE_BYTES)
    assert executor.collect(executor.launch(assigns([499]))) == StepResult(0, [])
    until(lambda: all(resident(t[2000:2200]) >= 200 * ROW // PAGE - 1 for t in tensors))
    assert bool((pool.k[1][:8] == 7.0).all()) and not pool.k[1][8:].any()


@needs_populate
def test_waits_while_a_step_runs(start: Callable[..., tuple[Steps, PrefaultingExecutor]]) -> None:
    pool = pool_of(4000)
    steps, executor = start(pool, 400 * ROW * 2 * LAYERS)
    until(lambda: executor.prefault.next_piece() is None)
    step = executor.launch(assigns([499]))
    time.sleep(0.05)
    assert resident(pool.k[0][2000:]) == 0
    steps.fails = True
    with pytest.raises(ValueError, match="this step fails"):
        executor.collect(step)
    until(lambda: resident(pool.k[0][2000:2400]) > 0)


@needs_populate
def test_goes_on_after_a_step_that_was_never_collected(
    start: Callable[..., tuple[Steps, PrefaultingExecutor]],
) -> None:
    pool = pool_of(4000)
    _, executor = start(pool, 400 * ROW * 2 * LAYERS)
    executor.launch(assigns([499]))
    executor.reset()
    until(lambda: resident(pool.v[2][2000:2400]) > 0)


def test_leaves_memory_to_others(start: Callable[..., tuple[Steps, PrefaultingExecutor]]) -> None:
    pool = pool_of(4000)
    steps, executor = start(pool, 1 << 20, free=1 << 20)
    executor.collect(executor.launch(assigns([0])))
    time.sleep(0.02)
    assert executor.prefault.backed == [0]
    executor.close()
    assert steps.closed and not executor._thread.is_alive()
