"""Each change to the logits against a loop in plain Python, on a few rows beside rows that ask for nothing."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from pando.core.batch import NewSlot
from pando.core.sampling import SamplingParams
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from pando.kernels.select import op_table
from pando.runtime.logits_processors import PROCESSORS, LogitBias, LogitsProcessor, MinNewTokens, Penalties
from pando.runtime.table import RequestTable
from tests.runtime.toy_model import CPU, VOCAB, batch_of, new_slot

TABLES = [REFERENCE, op_table("cpu", "auto")]


def run(processor: LogitsProcessor, entries: list[NewSlot], table: RequestTable, logits: torch.Tensor) -> torch.Tensor:
    table.apply(batch_of([], entries))
    out = logits.clone()
    rows = [row for row, entry in enumerate(entries) if processor.wants(entry)]
    slots = torch.tensor([entry.slot for entry in entries])
    ends = torch.tensor([len(entry.tokens) for entry in entries])
    if rows:
        processor.apply(out, rows, entries, slots, ends)
    return out


def penalised(logits: list[float], tokens: list[int], prompt_len: int, sampling: SamplingParams) -> list[float]:
    out = list(logits)
    for token in set(tokens):
        factor = sampling.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in Counter(tokens[prompt_len:]).items():
        out[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return out


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
def test_penalties_equal_a_loop_over_the_history(ops: OpTable) -> None:
    rng = random.Random(1)
    for _ in range(20):
        table = RequestTable(6, 40, 1, CPU, REFERENCE)
        entries = []
        for slot in rng.sample(range(6), 5):
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 41))]
            sampling = SamplingParams(
                repetition_penalty=rng.choice([1.0, 0.7, 1.9]),
                frequency_penalty=rng.choice([0.0, -0.5, 1.5]),
                presence_penalty=rng.choice([0.0, -1.0, 0.75]),
            )
            entries.append(new_slot(slot, tokens, sampling, prompt_len=rng.randrange(1, len(tokens) + 1)))
        # What an earlier owner of a slot left behind its end must not count.
        table.tokens_NC.fill_(5)
        logits = torch.randn(5, VOCAB)
        found = run(Penalties(ops, table), entries, table, logits)
        for row, entry in enumerate(entries):
            expected = penalised(logits[row].tolist(), entry.tokens, entry.prompt_len, entry.sampling)
            assert found[row].tolist() == pytest.approx(expected, abs=1e-5)


def test_penalties_are_wanted_only_if_one_is_on() -> None:
    processor = Penalties(REFERENCE, RequestTable(1, 4, 1, CPU, REFERENCE))
    assert not processor.wants(new_slot(0, [1]))
    for change in ({"frequency_penalty": 0.1}, {"presence_penalty": -0.1}, {"repetition_penalty": 1.1}):
        assert processor.wants(new_slot(0, [1], SamplingParams(**change)))


def test_logit_bias_touches_only_its_tokens_and_rows() -> None:
    table = RequestTable(3, 8, 1, CPU, REFERENCE)
    bias = {0: -100.0, 31: 2.5}
    entries = [new_slot(0, [1]), new_slot(1, [2], SamplingParams(logit_bias=bias)), new_slot(2, [3])]
    logits = torch.randn(3, VOCAB)
    found = run(LogitBias(REFERENCE, table), entries, table, logits)
    change = (found - logits).tolist()
    assert change[0] == change[2] == [0.0] * VOCAB
    assert {token: value for token, value in enumerate(change[1]) if value} == pytest.approx(bias, abs=1e-5)


@pytest.mark.parametrize(("num_output", "forbidden"), [(0, True), (2, True), (3, False), (9, False)])
def test_no_end_token_before_the_minimum(num_output: int, forbidden: bool) -> None:
    """The tokens that end a sequence are its model's and its own stop ids; the token to come is number num_output."""
    table = RequestTable(2, 20, 1, CPU, REFERENCE)
    params = SamplingParams(min_new_tokens=3)
    entry = new_slot(0, [1] * (4 + num_output), params, prompt_len=4, ends=[2, 30])
    free = new_slot(1, [1], SamplingParams(min_new_tokens=3))  # nothing can end it
    logits = torch.randn(2, VOCAB)
    found = run(MinNewTokens(REFERENCE, table), [entry, free], table, logits)
    banned = [token for token, value in enumerate(found[0].tolist()) if value == -math.inf]
    assert banned == ([2, 30] if forbidden else [])
    assert torch.equal(found[1], logits[1])


def test_the_minimum_is_applied_after_the_bias() -> None:
    """A bias must not bring back a token that may not come yet."""
    names = [make.__name__ for make in PROCESSORS]
    assert names.index("MinNewTokens") > max(names.index("LogitBias"), names.index("Penalties"))
