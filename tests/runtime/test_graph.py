"""Recorded steps: which shapes there are, which step goes into which, how it is filled up, what a failure leaves."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan
from pando.forward import AttentionBackend, ForwardBatch
from pando.runtime.graph import GraphShape, StepGraphs, fill_up, graph_shapes
from pando.runtime.runner import Runner
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.runtime.no_sync import WouldWait, no_sync, queue_device
from tests.runtime.recorded import TapeRecorder
from tests.runtime.static_ops import STATIC
from tests.runtime.toy_model import NoAttention, batch_of, new_slot

VOCAB = 40


class CountingModel:
    """Hidden state: token, position, place in the cache, the row's length. Waits for nothing; counts real passes."""

    vocab_size = VOCAB
    hidden_size = 4
    max_position = 1024
    dtype = torch.float32
    cache_plan = CachePlan.of([])

    def __init__(self) -> None:
        self.passes = 0
        self.looks = False

    def forward(self, batch: ForwardBatch, attention: AttentionBackend) -> Tensor:
        self.passes += 1
        if self.looks:
            int(batch.kv_lens.max())
        row = torch.searchsorted(batch.cu_q_lens[1:].contiguous(), torch.arange(len(batch.input_ids)), right=True)
        return torch.stack((batch.input_ids, batch.positions, batch.out_loc[0], batch.kv_lens[row]), dim=1).float()

    def logits(self, hidden_EM: Tensor) -> Tensor:
        token = (hidden_EM @ torch.tensor([3.0, 7.0, 0.0, 1.0])).long() % VOCAB
        return torch.nn.functional.one_hot(token, VOCAB).float()


class PoolOnly(NoAttention):
    """An attention backend of which only the pool is looked at."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool


def recorded_runner(
    shapes: list[GraphShape], recorder: TapeRecorder, page_size: int = 1
) -> tuple[Runner, CountingModel, StepGraphs]:
    device = queue_device()
    table = RequestTable(7, 64, page_size, device, STATIC)
    model = CountingModel()
    attention = PoolOnly(KVPool(CachePlan(()), 200, page_size, "cpu", torch.float32))
    graphs = StepGraphs(model, attention, table, recorder, shapes)
    return Runner(model, attention, table, Sampler(STATIC, table), device, graphs), model, graphs


def test_shapes_cover_every_decoding_batch_and_come_largest_first() -> None:
    shapes = graph_shapes(100, 10_000, 16)
    assert {shape.pages for shape in shapes} == {512, 625}
    decode = [shape for shape in shapes if shape.is_decode]
    for rows in range(1, 101):
        fitting = [shape for shape in decode if shape.holds(rows, rows, 300)]
        assert fitting and min(shape.rows for shape in fitting) <= max(2 * rows, 1)
    assert max(shape.rows for shape in decode) == 100
    sizes = [(shape.tokens, shape.pages) for shape in shapes]
    assert sizes == sorted(sizes, reverse=True) and len(set(shapes)) == len(shapes)
    assert all(shape.tokens <= 20 for shape in graph_shapes(4, 20, 1))
    assert graph_shapes(1, 4096, 1) == [GraphShape(1, 1, 4096)]


def test_left_over_tokens_need_a_row() -> None:
    shape = GraphShape(4, 16, 10)
    assert shape.holds(3, 9, 10) and shape.holds(4, 16, 1) and shape.holds(1, 16, 1)
    assert not shape.holds(4, 15, 1) and not shape.holds(5, 16, 1) and not shape.holds(2, 17, 1)
    assert not shape.holds(2, 4, 11)


def test_steps_are_filled_up_with_the_scratch_slot() -> None:
    batch = batch_of([(2, 5, 3, 1), (0, 9, 1, 0)])
    filled = fill_up(batch, GraphShape(5, 11, 9), scratch=6)
    assert filled.slot == [2, 0, 6, 6, 6] and filled.start == [5, 9, 0, 0, 0]
    assert filled.num_tokens == [3, 1, 3, 2, 2] and filled.emit == [1, 0, 0, 0, 0]
    assert filled.num_yield == [1, 0, 0, 0, 0] and not filled.new_slots
    assert fill_up(batch, GraphShape(2, 4, 9), scratch=6).slot == batch.slot


@pytest.mark.parametrize("page_size", [1, 4])
def test_random_steps_equal_those_that_are_not_recorded(page_size: int) -> None:
    """Ragged and decoding steps, some too large for any shape."""
    rng = random.Random(page_size)
    wide = -(-64 // page_size)
    shapes = [GraphShape(1, 1, wide), GraphShape(4, 4, wide), GraphShape(3, 8, 16), GraphShape(5, 20, wide)]
    recorder = TapeRecorder()
    runner, model, graphs = recorded_runner(shapes, recorder, page_size)
    graphs.record_all()
    assert graphs.num_recorded == 4
    plain, _, nothing = recorded_runner(shapes, TapeRecorder(), page_size)
    assert nothing.num_recorded == 0
    pages = list(range(6 * wide))
    rng.shuffle(pages)
    history = {slot: [rng.randrange(VOCAB) for _ in range(60)] for slot in range(6)}
    writes = [(slot, i, pages[slot * wide + i] % 190) for slot in range(6) for i in range(wide)]
    first = batch_of([(0, 0, 1, 1)], [new_slot(slot, history[slot]) for slot in history], pages=writes)
    kinds = {"recorded": 0, "plain": 0}
    for number in range(40):
        rows = []
        for slot in rng.sample(range(6), rng.randrange(1, 7)):
            num = 1 if number % 2 else rng.randrange(1, 9)
            rows.append((slot, rng.randrange(50), num, rng.randrange(2)))
        batch = batch_of(rows) if number else first
        before = model.passes
        results = []
        for either in (runner, plain):
            step = either.launch(batch)
            either.sample(step, None)
            results.append(either.collect(step).tokens)
        kinds["plain" if model.passes > before else "recorded"] += 1
        assert results[0] == results[1]
    assert min(kinds.values()) > 5 and recorder.num_replays == kinds["recorded"]


def test_a_step_that_looks_at_values_can_not_be_recorded() -> None:
    runner, model, graphs = recorded_runner([GraphShape(2, 2, 64)], TapeRecorder())
    model.looks = True
    with pytest.raises(WouldWait):
        graphs.record_all()
    assert graphs.num_recorded == 0 and graphs.find(batch_of([(0, 0, 1, 1)])) is None


def test_what_was_recorded_before_a_failure_is_used() -> None:
    runner, model, graphs = recorded_runner([GraphShape(1, 1, 64), GraphShape(2, 2, 64)], TapeRecorder(fail_at=1))
    seen: list[tuple[int, int]] = []
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record_all(lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2)] and graphs.num_recorded == 1
    assert graphs.find(batch_of([(0, 0, 1, 1)])) == GraphShape(2, 2, 64), "the larger one holds it, too"


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x.tolist(),
        lambda x: x.view(1)[x.view(1) > 0],
        lambda x: x.view(1).nonzero(),
        lambda x: x.view(1)[[0]],
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: torch.repeat_interleave(x.view(1), torch.ones(1, dtype=torch.int64)),
    ],
)
def test_what_would_wait_is_found(look: object) -> None:
    x = torch.ones(())
    with pytest.raises(WouldWait), no_sync():
        look(x)  # type: ignore[operator]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_reads_its_inputs_anew() -> None:
    from pando.runtime.cuda_graph import CudaRecorder

    x = torch.arange(5, device="cuda", dtype=torch.float32)
    recording = CudaRecorder().record(lambda: x * 2 + 1)
    x.fill_(3.0)
    recording.replay()
    assert recording.output.tolist() == [7.0] * 5
