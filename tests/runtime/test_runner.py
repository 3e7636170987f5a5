"""The flattened step against a plain computation, and what comes back of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pando.core.batch import TokenMask
from pando.core.sampling import LogprobSpec, SamplingParams
from tests.runtime.toy_model import batch_of, new_slot, toy_logits, toy_runner


def expected_inputs(
    rows: list[tuple[int, int, int, int]], tokens: dict[int, list[int]], pages: dict[int, list[int]], page: int
) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {name: [] for name in ("input_ids", "positions", "out_loc", "logits_index", "kv_lens")}
    out["cu_q_lens"] = [0]
    for slot, start, num, emit in rows:
        for position in range(start, start + num):
            out["input_ids"].append(tokens[slot][position])
            out["positions"].append(position)
            out["out_loc"].append(pages[slot][position // page] * page + position % page)
        out["cu_q_lens"].append(len(out["input_ids"]))
        out["kv_lens"].append(start + num)
        if emit:
            out["logits_index"].append(len(out["input_ids"]) - 1)
    return out


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_flattening_of_random_mixed_batches(page_size: int) -> None:
    rng = random.Random(page_size)
    for trial in range(40):
        runner, model, _ = toy_runner(slots=8, context=50, page_size=page_size)
        per_row = -(-50 // page_size)
        ids = list(range(8 * per_row))
        rng.shuffle(ids)
        pages = {slot: ids[slot * per_row : (slot + 1) * per_row] for slot in range(8)}
        rows, tokens = [], {}
        for slot in rng.sample(range(8), rng.randrange(1, 9)):
            length = rng.randrange(1, 51)
            tokens[slot] = [rng.randrange(32) for _ in range(length)]
            num = 1 if trial % 4 == 0 else rng.randrange(1, length + 1)
            start = rng.randrange(length - num + 1)
            rows.append((slot, start, num, rng.randrange(2) if trial % 5 else 1))
        writes = [(slot, i, page) for slot in tokens for i, page in enumerate(pages[slot])]
        step = batch_of(rows, [new_slot(slot, tokens[slot]) for slot in tokens], pages=writes)
        launched = runner.launch(step)
        seen = model.seen[-1]
        for name, values in expected_inputs(rows, tokens, pages, page_size).items():
            tensor = seen.out_loc[0] if name == "out_loc" else getattr(seen, name)
            assert tensor.tolist() == values, name
        (table,) = seen.page_table
        assert seen.cu_q_lens.dtype == seen.kv_lens.dtype == table.dtype == torch.int32
        assert seen.input_ids.dtype == seen.positions.dtype == seen.out_loc[0].dtype == torch.int64
        longest = max(start + num for _, start, num, _ in rows)
        assert (seen.page_size, seen.max_q_len, seen.max_kv_len) == (page_size, max(r[2] for r in rows), longest)
        assert -(-longest // page_size) <= table.shape[1] <= per_row
        for found, (slot, start, num, _) in zip(table.tolist(), rows, strict=True):
            held = -(-(start + num) // page_size)
            assert found[:held] == pages[slot][:held]
        runner.sample(launched, None)
        result = runner.collect(launched)
        expected = [
            [int(toy_logits(tokens[slot][start + num - 1], start + num - 1).argmax())]
            for slot, start, num, emit in rows
            if emit
        ]
        assert result.tokens == expected and not result.failed


def test_a_step_of_the_same_shape_reads_its_own_inputs_and_a_larger_one_follows() -> None:
    runner, model, table = toy_runner(slots=4, context=300, page_size=1)
    tokens = {slot: [(7 * slot + i) % 32 for i in range(200)] for slot in range(4)}
    writes = [(slot, i, 300 * slot + i) for slot in range(4) for i in range(300)]
    runner.launch(batch_of([(s, 0, 1, 0) for s in range(4)], [new_slot(s, tokens[s]) for s in tokens], pages=writes))
    memory = model.seen[-1].input_ids.data_ptr()
    for slots, start, num in [((2, 0), 5, 1), ((1, 3), 63, 1), ((1, 3), 64, 1), ((3, 2), 10, 150), ((0, 1), 199, 1)]:
        runner.launch(batch_of([(slot, start, num, 1) for slot in slots]))
        seen = model.seen[-1]
        assert seen.input_ids.tolist() == [token for slot in slots for token in tokens[slot][start : start + num]]
        end = start + num
        assert seen.page_table[0][:, :end].tolist() == [list(range(300 * slot, 300 * slot + end)) for slot in slots]
        assert seen.logits_index.tolist() == [num - 1, 2 * num - 1] and seen.kv_lens.tolist() == [end, end]
    assert seen.input_ids.data_ptr() == memory, "the memory of the steps is kept"


def test_a_step_without_tokens_to_emit() -> None:
    runner, _, table = toy_runner()
    launched = runner.launch(batch_of([(0, 0, 2, 0)], [new_slot(0, [3, 4, 5])], step=7))
    runner.sample(launched, None)
    result = runner.collect(launched)
    assert (result.step, result.tokens, result.failed) == (7, [], {})
    assert table.tokens_NC[0, :4].tolist() == [3, 4, 5, 0]


def test_a_row_that_is_not_finite_is_reported_and_its_neighbours_go_on() -> None:
    runner, model, _ = toy_runner()
    model.nan_after = 9
    rows = [(0, 0, 2, 1), (1, 0, 2, 0), (2, 0, 3, 1), (3, 0, 1, 1)]
    tokens = {0: [1, 2], 1: [9, 9], 2: [4, 5, 9], 3: [6]}
    launched = runner.launch(batch_of(rows, [new_slot(slot, tokens[slot]) for slot in tokens]))
    runner.sample(launched, None)
    result = runner.collect(launched)
    assert list(result.failed) == [2], "by row of the batch, not by emitting row"
    assert "not finite" in result.failed[2]
    assert len(result.tokens) == 3
    assert result.tokens[0] == [int(toy_logits(2, 1).argmax())]
    assert result.tokens[2] == [int(toy_logits(6, 0).argmax())]


def test_rows_of_prompt_logprobs_do_not_shift_the_emitted_ones() -> None:
    runner, model, _ = toy_runner()
    spec = LogprobSpec(start=0)
    rows = [(0, 0, 3, 1), (1, 0, 2, 0), (2, 0, 2, 1)]
    tokens = {0: [1, 2, 3], 1: [4, 5, 6], 2: [7, 8]}
    new = [new_slot(slot, tokens[slot], logprobs=spec if slot < 2 else None) for slot in tokens]
    launched = runner.launch(batch_of(rows, new))
    assert model.seen[-1].logits_index.tolist() == [2, 6, 0, 1, 3, 4]
    runner.sample(launched, None)
    result = runner.collect(launched)
    assert result.tokens == [[int(toy_logits(3, 2).argmax())], [int(toy_logits(8, 1).argmax())]]
    assert [entry.token_id for entry in result.prompt_logprobs[0]] == [1, 2, 3]
    assert [entry.token_id for entry in result.prompt_logprobs[1]] == [4, 5, 6]
    assert list(result.logprobs) == [0]
    after_second = torch.log_softmax(toy_logits(5, 1), dim=-1)[6]
    assert result.prompt_logprobs[1][2].logprob == pytest.approx(float(after_second), abs=1e-6)


def greedy_after(token: int, position: int, allowed: list[int] | None = None) -> int:
    """The toy model's most likely token, of those allowed."""
    logits = toy_logits(token, position)
    ids = range(len(logits)) if allowed is None else allowed
    return max(ids, key=lambda id: float(logits[id]))


@pytest.mark.parametrize("num_right", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafts_up_to_the_first_wrong_one_are_kept(num_right: int, temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    history = [3, 1, 4]
    runner, _, _ = toy_runner()
    runner.launch(batch_of([(0, 0, 2, 0)], [new_slot(0, history, params, seed=5)]))
    wanted = []  # what comes without drafts, one step each
    for i in range(4):
        step = runner.launch(batch_of([(0, 2 + i, 1, 1)]))
        runner.sample(step, None)
        wanted += runner.collect(step).tokens[0]
    drafts = [token if i < num_right else (token + 1) % 32 for i, token in enumerate(wanted[:3])]

    runner, _, table = toy_runner()
    batch = batch_of([(1, 0, 1, 1), (0, 0, 3 + 3, 1), (2, 0, 2, 0)],
                     [new_slot(1, [9]), new_slot(0, history, params, seed=5), new_slot(2, [8, 7])])  # fmt: skip
    batch.num_draft = [0, 3, 0]
    batch.token_slot, batch.token_position, batch.token_id = [0] * 3, [3, 4, 5], drafts
    step = runner.launch(batch)
    runner.sample(step, None)
    kept = wanted[: num_right + 1]
    assert runner.collect(step).tokens == [[greedy_after(9, 0)], kept]
    assert table.tokens_NC[0, : 3 + len(kept)].tolist() == history + kept


def test_logprobs_of_a_row_behind_drafts_are_its_own() -> None:
    """Guesses of one request beside log-probabilities of others, before and behind it, and of its own tokens."""
    runner, _, _ = toy_runner()
    first = greedy_after(4, 2)
    drafts = [first, (greedy_after(first, 3) + 1) % 32]
    for asking in ({0, 2}, {0, 1, 2}):
        rows = [(0, 0, 1, 1), (1, 0, 3 + 2, 1), (2, 0, 2, 1)]
        tokens = {0: [9], 1: [3, 1, 4], 2: [8, 7]}
        new = [new_slot(slot, tokens[slot], logprobs=LogprobSpec() if slot in asking else None) for slot in tokens]
        batch = batch_of(rows, new)
        batch.num_draft = [0, 2, 0]
        batch.token_slot, batch.token_position, batch.token_id = [1, 1], [3, 4], drafts
        step = runner.launch(batch)
        runner.sample(step, None)
        result = runner.collect(step)
        assert result.tokens == [[greedy_after(9, 0)], [first, greedy_after(first, 3)], [greedy_after(7, 1)]]
        assert set(result.logprobs) == asking
        for index, entries in result.logprobs.items():
            assert [entry.token_id for entry in entries] == result.tokens[index]
            before = [*tokens[index], *result.tokens[index]][-len(entries) - 1 :]
            for offset, (entry, last) in enumerate(zip(entries, before, strict=False)):
                logits = toy_logits(last, len(tokens[index]) - 1 + offset)
                assert entry.logprob == pytest.approx(float(logits.log_softmax(-1)[entry.token_id]), abs=1e-6)


def test_masked_rows_choose_among_allowed_tokens_and_others_are_free() -> None:
    runner, _, _ = toy_runner()
    step = runner.launch(batch_of([(0, 0, 1, 1), (1, 0, 1, 1), (2, 0, 1, 1)], [new_slot(i, [i + 5]) for i in range(3)]))
    allowed = {0: [2, 31], 2: [17]}
    bits = np.array([[sum(1 << t for t in allowed[row])] for row in allowed], dtype=np.uint32).view(np.int32)
    runner.sample(step, TokenMask([0, 2], bits))
    assert runner.collect(step).tokens == [[greedy_after(5, 0, [2, 31])], [greedy_after(6, 0)], [17]]


def test_tokens_the_host_chose_are_in_the_history() -> None:
    runner, model, _ = toy_runner()
    runner.launch(batch_of([(0, 0, 3, 0)], [new_slot(0, [1, 2, 3])]))
    batch = batch_of([(0, 3, 2, 1)])
    batch.token_slot, batch.token_position, batch.token_id = [0, 0], [3, 4], [11, 12]
    step = runner.launch(batch)
    assert model.seen[-1].input_ids.tolist() == [11, 12]
    runner.sample(step, None)
    assert runner.collect(step).tokens == [[greedy_after(12, 4)]]
