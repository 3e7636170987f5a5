"""The request table: entering, page writes, reuse of a slot, a sequence that fills the context."""

from __future__ import annotations

from pando.core.sampling import SamplingParams
from pando.kernels.reference import REFERENCE
from pando.runtime.table import RequestTable
from tests.runtime.toy_model import CPU, batch_of, new_slot, toy_logits, toy_runner


def test_a_new_sequence_brings_tokens_and_parameters() -> None:
    table = RequestTable(3, 8, 1, CPU, REFERENCE)
    params = SamplingParams(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125)
    table.apply(batch_of([(1, 0, 4, 1)], [new_slot(1, [5, 6, 7, 8], params, prompt_len=3, seed=2**62)]))
    assert table.tokens_NC[1].tolist() == [5, 6, 7, 8, 0, 0, 0, 0, 0]
    assert table.tokens_NC[0].count_nonzero() == table.tokens_NC[2].count_nonzero() == 0
    columns = table.sampling
    values = (columns.temperature, columns.top_k, columns.top_p, columns.min_p, columns.seed, table.prompt_len)
    assert [column[1].item() for column in values] == [0.5, 7, 0.25, 0.125, 2**62, 3]


def test_page_writes_reach_their_rows_only() -> None:
    table = RequestTable(3, 9, 3, CPU, REFERENCE)
    assert table.pages_GNP.shape == (1, 3, 3)
    table.apply(batch_of([(0, 0, 1, 1)], pages=[(0, 0, 4), (0, 2, 9), (2, 1, 5)]))
    assert table.pages_GNP.tolist() == [[[4, 0, 9], [0, 0, 0], [0, 5, 0]]]
    table.apply(batch_of([(0, 1, 1, 1)], pages=[(0, 0, 7)]))
    assert table.pages_GNP[0, 0].tolist() == [7, 0, 9]


def test_a_slot_freed_and_given_away_in_one_step() -> None:
    table = RequestTable(2, 8, 1, CPU, REFERENCE)
    table.apply(batch_of([(0, 0, 6, 1)], [new_slot(0, [9] * 6, SamplingParams(temperature=0.9, top_k=3), seed=4)]))
    second = new_slot(0, [1, 2])
    table.apply(batch_of([(0, 0, 2, 1)], [second], freed=[0]))
    assert table.entries[0] is second
    assert table.tokens_NC[0, :2].tolist() == [1, 2]
    columns = (table.sampling.temperature, table.sampling.top_k, table.sampling.seed, table.prompt_len)
    values = [column[0].item() for column in columns]
    assert values == [0.0, -1, 0, 2]
    table.apply(batch_of([], freed=[0]))
    assert table.entries[0] is None


def test_a_huge_top_k_keeps_everything() -> None:
    table = RequestTable(1, 8, 1, CPU, REFERENCE)
    table.apply(batch_of([(0, 0, 1, 1)], [new_slot(0, [1], SamplingParams(top_k=2**31 - 1))]))
    assert table.sampling.top_k[0].item() == 2**31 - 1


def test_a_sequence_fills_its_context_to_the_last_token() -> None:
    for page_size in (1, 3):
        runner, model, table = toy_runner(slots=2, context=7, page_size=page_size)
        pages = [(0, index, 10 + index) for index in range(-(-7 // page_size))]
        tokens = [4, 5, 6]
        step = batch_of([(0, 0, 3, 1)], [new_slot(0, tokens)], pages=pages)
        while True:
            launched = runner.launch(step)
            runner.sample(launched, None)
            (found,) = runner.collect(launched).tokens
            expected = int(toy_logits(tokens[-1], len(tokens) - 1).argmax())
            assert found == [expected]
            tokens.append(expected)
            assert table.tokens_NC[0, : len(tokens)].tolist() == tokens
            if len(tokens) == 8:  # one more than the context: the last one has no KV
                break
            step = batch_of([(0, len(tokens) - 1, 1, 1)])
        assert table.tokens_NC[1].count_nonzero() == 0
        assert model.seen[-1].positions.tolist() == [6] and model.seen[-1].kv_lens.tolist() == [7]
