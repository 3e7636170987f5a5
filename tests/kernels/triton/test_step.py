"""The step table's kernels against the reference, over the shared batches and over random steps."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from pando.kernels.ops import StepInputs
from pando.kernels.reference import REFERENCE
from pando.kernels.triton.table import table
from tests.kernels.test_step import BATCHES, CONTEXT, SLOTS, Row, flatten, request_table


def assert_equal(found: StepInputs, expected: StepInputs) -> None:
    for field in fields(StepInputs):
        pairs = getattr(found, field.name), getattr(expected, field.name)
        for one, other in zip(*pairs, strict=True) if isinstance(pairs[0], tuple) else [pairs]:
            assert isinstance(one, Tensor) and one.dtype is other.dtype, field.name
            assert torch.equal(one, other), field.name


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("rows", BATCHES, ids=lambda rows: f"{len(rows)} rows {sum(row[2] for row in rows)} tokens")
def test_flatten(page_size: int, rows: list[Row], groups: int, device: str) -> None:
    seen = []
    for ops in (table(), REFERENCE):
        inputs = flatten(request_table(ops, page_size, groups=groups, device=device).step, rows, extra=2)
        inputs.logits_index[len(inputs.emit_slots) :] = 7
        seen.append(inputs)
    assert_equal(*seen)


def test_random_steps_one_after_the_other(device: str) -> None:
    """Page writes that hit the same place twice, empty rows, tables of all widths; memory is used over and over."""
    rng, page_size = random.Random(5), 3
    tables = [request_table(ops, page_size, device=device) for ops in (table(), REFERENCE)]
    width = tables[0].pages.shape[2]
    for _ in range(12):
        rows = []
        for slot in rng.sample(range(SLOTS), rng.randrange(1, SLOTS + 1)):
            num = rng.choice([1, 1, 1, 0, rng.randrange(CONTEXT)])
            rows.append((slot, rng.randrange(CONTEXT - num + 1), num, rng.randrange(min(num, 4) + 1)))
        writes = [[rng.randrange(most) for most in (SLOTS, width, 999, 2)] for _ in range(rng.randrange(5))]
        writes += writes[:1]
        pages = rng.randrange(1, width + 1)
        seen = []
        for request in tables:
            request.step.write_pages(*([write[i] for write in writes] for i in range(4)))
            seen.append(flatten(request.step, rows, 0, pages))
        assert torch.equal(tables[0].pages, tables[1].pages)
        assert_equal(*seen)


def test_more_than_one_block_of_everything(device: str) -> None:
    """600 tokens in one row, then 300 rows, and tables wider than a block."""
    for ops in (table(),):
        tokens = torch.randint(9, (300, 700), dtype=torch.int32, device=device)
        pages = torch.randint(999, (1, 300, 600), dtype=torch.int32, device=device)
        upload = lambda values: torch.tensor(values, device=device)  # noqa: E731
        columns = request_table(REFERENCE, 1, device=device).sampling
        for rows in ([(7, 50, 600, 3)], [(slot, slot, 1 + slot % 2, 1) for slot in range(300)]):
            step = ops.step_table(tokens, pages, columns, 1, upload)
            plain = REFERENCE.step_table(tokens, pages, columns, 1, upload)
            # Positions beyond the table's pages are none; only rows inside of it are run here.
            rows = [(slot, min(start, 600 - num), num, emit) for slot, start, num, emit in rows]
            assert_equal(flatten(step, rows, 0, 600), flatten(plain, rows, 0, 600))


def test_reserved_steps_stand_where_they_stood(device: str) -> None:
    request = request_table(table(), 3, device=device)
    request.step.reserve([(2, 2, 24), (4, 8, 24)])
    first = flatten(request.step, [(1, 4, 1, 1), (2, 5, 1, 1)], pages=24)
    places = [field.data_ptr() for field in (first.input_ids, first.cu_q_lens, *first.out_loc, *first.page_table)]
    flatten(request.step, [(1, 0, 60, 1), (3, 0, 70, 0)], pages=24)
    flatten(request.step, [(1, 0, 3, 1), (3, 0, 5, 0), (0, 0, 0, 0), (4, 2, 0, 0)], pages=24)
    again = flatten(request.step, [(3, 6, 1, 1), (0, 9, 1, 1)], pages=24)
    assert [f.data_ptr() for f in (again.input_ids, again.cu_q_lens, *again.out_loc, *again.page_table)] == places
    assert again.positions.tolist() == [6, 9] and again.emit_slots.tolist() == [3, 0]


def test_tokens_the_host_chose(device: str) -> None:
    request = request_table(table(), 1, device=device)
    before = request.tokens.clone()
    request.step.write_tokens([3, 0, 3], [7, 8, 9], [11, 12, 13])
    before[3, 7], before[0, 8], before[3, 9] = 11, 12, 13
    assert torch.equal(request.tokens, before)


def test_masked_rows_choose_among_what_is_allowed(device: str) -> None:
    """The mask is left out of what `finite` looks at, and the caller's logits stay as they are."""
    request = request_table(table(), 1, device=device)
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(4)).to(device)
    before, free = logits.clone(), int(logits[1].argmax())
    masks = torch.zeros(2, 3, dtype=torch.int32, device=device)
    masks[0, 1], masks[1, 2] = 1 << 5, 1 << 4 | 1 << 3
    slots, ends = (torch.tensor(values, device=device) for values in ([4, 0, 7], [7, 3, 0]))
    found = request.step.choose(logits, slots, ends, greedy=True, masks_MW=masks, masked=[0, 2])
    best = 67 if before[2, 67] > before[2, 68] else 68
    assert found.tolist() == [[37, free, best], [1, 1, 1]]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("greedy", [True, False])
def test_choose(greedy: bool, device: str) -> None:
    requests = [request_table(ops, 1, device=device) for ops in (table(), REFERENCE)]
    slots, ends = (torch.tensor(values, device=device) for values in ([4, 0, 7, 2, 8], [70, 3, 0, 9, 69]))
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3)).to(device)
    logits[3] = 0.5
    found, expected = (request.step.choose(logits.clone(), slots, ends, greedy=greedy) for request in requests)
    assert torch.equal(found, expected)
    assert torch.equal(requests[0].tokens, requests[1].tokens)
    logits[1, 299] = torch.inf
    bad = requests[0].step.choose(logits, slots, ends, greedy=greedy)
    assert bad[1].tolist() == [1, 0, 1, 1, 1]
