"""What happens around the model in a step: the reference against plain Python, native levels against the reference."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch
from torch import Tensor

from pando.kernels import cpu
from pando.kernels.ops import OpTable, SamplingColumns, StepInputs, StepTable
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import LEVELS

TABLES = [REFERENCE, *(cpu.table(level) for level in LEVELS)]
SLOTS, CONTEXT = 9, 70

every_table = pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
native_tables = pytest.mark.parametrize("ops", TABLES[1:], ids=lambda ops: ops.name)


@dataclass(frozen=True, slots=True)
class Request:
    """A request table with everything in it, and the ops bound to it. pages: [groups, slots, pages]."""

    tokens: Tensor
    pages: Tensor
    sampling: SamplingColumns
    step: StepTable


def request_table(ops: OpTable, page_size: int, seed: int = 0, groups: int = 2, device: str = "cpu") -> Request:
    generator = torch.Generator().manual_seed(seed)

    def numbers(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator).to(device)

    num_pages = -(-CONTEXT // page_size)
    tokens = numbers(5000, SLOTS, CONTEXT + 1).int()
    pages = torch.randperm(groups * SLOTS * num_pages, generator=generator).view(groups, SLOTS, num_pages)
    pages = pages.int().to(device)
    sampling = SamplingColumns(
        temperature=numbers(3, SLOTS) / 2.0,
        top_k=numbers(20, SLOTS).int() - 1,
        top_p=1.0 - numbers(3, SLOTS) / 5.0,
        min_p=numbers(3, SLOTS) / 20.0,
        seed=numbers(2**62, SLOTS),
    )
    to_device = partial(torch.tensor, dtype=torch.int64, device=device)
    return Request(tokens, pages, sampling, ops.step_table(tokens, pages, sampling, page_size, to_device))


Row = tuple[int, int, int, int]
"""Slot, start, number of tokens, how many of the last ones yield a token."""

BATCHES: list[list[Row]] = [
    [(3, 0, 1, 1)],
    [(slot, 5 * slot, 1, 1) for slot in (8, 0, 4, 2)],
    [(0, 69, 1, 1), (1, 0, 70, 1), (2, 16, 16, 0), (7, 15, 2, 1)],
    [(5, 3, 0, 0), (6, 31, 33, 0), (1, 8, 0, 0)],
    [(2, 0, 5, 0)],
    [(4, 10, 5, 3), (0, 3, 1, 1), (1, 0, 4, 4), (7, 2, 6, 0)],
    [],
]


def flatten(step: StepTable, rows: list[Row], extra: int = 0, pages: int = 3) -> StepInputs:
    columns = [[row[i] for row in rows] for i in range(4)]
    return step.flatten(*columns, num_extra=extra, num_pages=pages)


def tensors(inputs: StepInputs, name: str) -> tuple[Tensor, ...]:
    found = getattr(inputs, name)
    return found if isinstance(found, tuple) else (found,)


@every_table
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rows", BATCHES, ids=lambda rows: f"{len(rows)} rows {sum(row[2] for row in rows)} tokens")
def test_flatten_against_plain_python(ops: OpTable, page_size: int, rows: list[Row], groups: int) -> None:
    table = request_table(ops, page_size, groups=groups)
    found = flatten(table.step, rows, extra=2)
    at = [(slot, position) for slot, start, num, _ in rows for position in range(start, start + num)]
    ends = [sum(row[2] for row in rows[: i + 1]) for i in range(len(rows))]
    assert found.input_ids.tolist() == [int(table.tokens[slot, position]) for slot, position in at]
    assert found.positions.tolist() == [position for _, position in at]
    assert len(found.out_loc) == len(found.page_table) == groups
    for pages, out_loc, page_table in zip(table.pages, found.out_loc, found.page_table, strict=True):
        assert out_loc.tolist() == [int(pages[slot, p // page_size]) * page_size + p % page_size for slot, p in at]
        assert page_table.tolist() == [pages[slot, :3].tolist() for slot, *_ in rows]
    assert found.cu_q_lens.tolist() == [0, *ends]
    assert found.kv_lens.tolist() == [start + num for _, start, num, _ in rows]
    yielding = [(i, before) for i, row in enumerate(rows) for before in reversed(range(row[3]))]
    assert found.logits_index[: len(yielding)].tolist() == [ends[i] - 1 - before for i, before in yielding]
    assert len(found.logits_index) == len(yielding) + 2
    assert found.emit_slots.tolist() == [rows[i][0] for i, _ in yielding]
    assert found.emit_ends.tolist() == [rows[i][1] + rows[i][2] - before for i, before in yielding]
    integers = {"cu_q_lens", "kv_lens", "page_table"}
    for field in fields(found):
        wanted = torch.int32 if field.name in integers else torch.int64
        for tensor in tensors(found, field.name):
            assert tensor.dtype is wanted, field.name


@native_tables
@pytest.mark.parametrize("page_size", [1, 16])
def test_random_steps_one_after_the_other_equal_the_reference(ops: OpTable, page_size: int) -> None:
    rng = random.Random(page_size)
    native, torch_ = request_table(ops, page_size), request_table(REFERENCE, page_size)
    width = native.pages.shape[2]
    for _ in range(60):
        rows = []
        for slot in rng.sample(range(SLOTS), rng.randrange(SLOTS + 1)):
            num = rng.choice([1, 1, 1, 0, rng.randrange(CONTEXT)])
            rows.append((slot, rng.randrange(CONTEXT - num + 1), num, rng.randrange(min(num, 4) + 1)))
        writes = [
            (rng.randrange(SLOTS), rng.randrange(width), rng.randrange(999), rng.randrange(2))
            for _ in range(rng.randrange(5))
        ]
        pages, extra, columns = rng.randrange(1, width + 1), rng.randrange(2), rng.choice([3, 4])
        seen = []
        for table in (native, torch_):
            table.step.write_pages(*([write[i] for write in writes] for i in range(columns)))
            found = flatten(table.step, rows, extra, pages)
            found.logits_index[len(found.emit_slots) :] = 7
            seen.append(found)
        assert torch.equal(native.pages, torch_.pages)
        for field in fields(StepInputs):
            pairs = zip(tensors(seen[0], field.name), tensors(seen[1], field.name), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), field.name


@every_table
def test_the_later_of_two_writes_to_a_page_holds(ops: OpTable) -> None:
    table = request_table(ops, 1)
    table.step.write_pages([3, 3, 0, 3], [5, 6, 5, 5], [71, 72, 73, 74])
    assert (int(table.pages[0, 3, 5]), int(table.pages[0, 3, 6]), int(table.pages[0, 0, 5])) == (74, 72, 73)


@every_table
def test_a_write_goes_to_the_table_of_its_group(ops: OpTable) -> None:
    table = request_table(ops, 1)
    before = table.pages.clone()
    table.step.write_pages([3, 3, 3], [5, 5, 6], [71, 72, 73], [1, 0, 1])
    before[1, 3, 5], before[0, 3, 5], before[1, 3, 6] = 71, 72, 73
    assert torch.equal(table.pages, before)


@every_table
@pytest.mark.parametrize("vocab", [1, 100, 8192, 8193, 40000])
def test_choose_takes_the_tokens_of_argmax_and_sample(ops: OpTable, vocab: int) -> None:
    table = request_table(ops, 1)
    slots, ends = torch.tensor([4, 0, 7, 2, 8]), torch.tensor([70, 3, 0, 9, 69])
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[3] = 0.5  # ties, also of pieces that threads look at
    chosen = table.step.choose(logits, slots, ends, greedy=True)
    assert chosen.tolist() == [ops.argmax(logits).tolist(), [1] * 5] and int(chosen[0, 3]) == 0
    assert table.tokens[slots, ends].tolist() == chosen[0].tolist()
    of = table.sampling
    columns = (of.temperature, of.top_k, of.top_p, of.min_p, of.seed)
    expected = ops.sample(logits, *(column[slots] for column in columns), ends)
    chosen = table.step.choose(logits, slots, ends, greedy=False)
    assert chosen.tolist() == [expected.tolist(), [1] * 5]
    assert table.tokens[slots, ends].tolist() == expected.tolist()


@every_table
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_choose_names_rows_that_are_not_finite(ops: OpTable, greedy: bool, bad: float) -> None:
    table = request_table(ops, 1)
    logits = torch.randn(4, 20000, generator=torch.Generator().manual_seed(1))
    where = torch.arange(4), torch.full((4,), 3)
    clean = table.step.choose(logits, *where, greedy=greedy).clone()
    logits[0, 19999], logits[2] = bad, bad
    chosen = table.step.choose(logits, *where, greedy=greedy)
    assert chosen[1].tolist() == [0, 1, 0, 1]
    assert chosen[0, 1] == clean[0, 1] and chosen[0, 3] == clean[0, 3]
    assert 0 <= int(chosen[0].min()) and int(chosen[0].max()) < 20000


@every_table
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("vocab", [5, 31, 100, 8192, 40001])
def test_choose_with_masks_is_choose_of_forbidden_logits(ops: OpTable, vocab: int, greedy: bool) -> None:
    rng = random.Random(vocab)
    table, plain = request_table(ops, 1), request_table(ops, 1)
    slots, ends = torch.tensor([4, 0, 7, 2, 8, 1]), torch.tensor([70, 3, 0, 9, 69, 5])
    words = -(-vocab // 32)
    for masked in ([0, 1, 2, 3, 4, 5], [1, 4], [5]):
        logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(len(masked)))
        allowed = [rng.choice([{rng.randrange(vocab)}, set(range(vocab)), set(range(0, vocab, 3))]) for _ in masked]
        bits = torch.zeros(len(masked), words * 32, dtype=torch.int64)
        for i, tokens in enumerate(allowed):
            bits[i, sorted(tokens)] = 1
        packed = (bits.view(len(masked), words, 32) << torch.arange(32)).sum(-1)
        masks = torch.where(packed >= 2**31, packed - 2**32, packed).int()
        forbidden = logits.clone()
        for row, tokens in zip(masked, allowed, strict=True):
            forbidden[row, [token for token in range(vocab) if token not in tokens]] = -math.inf
        before = logits.clone()
        chosen = table.step.choose(logits, slots, ends, greedy=greedy, masks_MW=masks, masked=masked)
        expected = plain.step.choose(forbidden, slots, ends, greedy=greedy)
        assert chosen[0].tolist() == expected[0].tolist() and chosen[1].tolist() == [1] * 6
        assert torch.equal(logits, before) and torch.equal(table.tokens, plain.tokens)


@every_table
def test_choose_where_nothing_may_come_or_no_number_is(ops: OpTable) -> None:
    table = request_table(ops, 1)
    slots, ends = torch.tensor([4, 0, 7]), torch.tensor([70, 3, 0])
    logits = torch.randn(3, 70)
    logits[1, 3], logits[2] = math.nan, math.inf
    masks = torch.tensor([[0, 0, 0], [6, 0, 0], [0, 1, 0]], dtype=torch.int32)
    chosen = table.step.choose(logits, slots, ends, greedy=False, masks_MW=masks, masked=[0, 1, 2])
    assert chosen[1].tolist() == [1, 0, 0]
    assert chosen[0, 0] == 0 and 0 <= int(chosen[0].min()) and int(chosen[0].max()) < 70


@every_table
def test_tokens_of_the_host_are_in_the_history(ops: OpTable) -> None:
    table = request_table(ops, 1)
    expected = table.tokens.clone()
    expected[3, 5], expected[0, 70], expected[3, 6] = 11, 12, 13
    table.step.write_tokens([3, 0, 3], [5, 70, 6], [11, 12, 13])
    assert torch.equal(table.tokens, expected)


@native_tables
def test_what_leaves_the_table_is_refused_and_nothing_is_written(ops: OpTable) -> None:
    table = request_table(ops, 16)
    before = table.tokens.clone(), table.pages.clone()
    for row in ((SLOTS, 0, 1, 1), (-1, 0, 1, 1), (0, CONTEXT + 1, 1, 1), (0, -1, 2, 1), (0, 60, 40, 1), (0, 0, -1, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            flatten(table.step, [row])
    for write in ((SLOTS, 0, 1), (-1, 0, 1), (0, 5, 1), (0, -1, 1)):
        with pytest.raises(ValueError, match="out of range"):
            table.step.write_pages([0, write[0]], [1, write[1]], [9, write[2]])
    for group in (2, -1):
        with pytest.raises(ValueError, match="group out of range"):
            table.step.write_pages([0, 1], [1, 1], [9, 9], [0, group])
        with pytest.raises(ValueError, match="out of range"):
            table.step.write_tokens([0, write[0]], [1, write[1] if write[1] < 5 else CONTEXT + 1], [9, write[2]])
    for masked in ([0, 2], [-1, 0]):
        bits = torch.ones(2, 1, dtype=torch.int32)
        places = torch.tensor([1, 0]), torch.tensor([1, 1])
        with pytest.raises(ValueError, match="out of range"):
            table.step.choose(torch.zeros(2, 9), *places, greedy=True, masks_MW=bits, masked=masked)
    for slot, end in ((SLOTS, 0), (-1, 0), (0, CONTEXT + 1), (0, -1)):
        with pytest.raises(ValueError, match="out of range"):
            table.step.choose(torch.zeros(2, 9), torch.tensor([1, slot]), torch.tensor([1, end]), greedy=True)
    with pytest.raises(ValueError, match="fit"):
        table.step.flatten([0, 1], [0], [1, 1], [1, 1], num_extra=0, num_pages=1)
    with pytest.raises(ValueError, match="fit"):
        flatten(table.step, [(0, 0, 1, 1)], pages=99)
    assert torch.equal(table.tokens, before[0]) and torch.equal(table.pages, before[1])
    assert flatten(table.step, [(0, 60, 4, 1)]).positions.tolist() == [60, 61, 62, 63]
