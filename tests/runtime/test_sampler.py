"""The sampler's tokens against a distribution computed in plain Python, row by row."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pando.core.batch import TokenMask
from pando.core.sampling import LogprobSpec, SamplingParams
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE, uniform
from pando.kernels.select import op_table
from pando.runtime.sampler import Sampler
from pando.runtime.table import RequestTable
from tests.runtime.toy_model import CPU, VOCAB, batch_of, new_slot

TABLES = [REFERENCE, op_table("cpu", "auto")]


def kept(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Probability of each token that temperature, top_k, top_p and min_p leave, in that order."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weights = {token: math.exp((logits[token] - max(logits)) / params.temperature) for token in order}
    left = order[: params.top_k] if params.top_k > 0 else order
    total, mass, nucleus = sum(weights[token] for token in left), 0.0, []
    for token in left:
        if mass >= params.top_p * total and params.top_p < 1.0 and nucleus:
            break
        nucleus.append(token)
        mass += weights[token]
    left = [token for token in nucleus if weights[token] >= params.min_p * weights[nucleus[0]]]
    total = sum(weights[token] for token in left)
    return {token: weights[token] / total for token in left}


def drawn(distribution: dict[int, float], number: float) -> int:
    """Inverse of the cumulative distribution, in the order of token ids."""
    mass = 0.0
    for token in sorted(distribution):
        mass += distribution[token]
        if number < mass:
            return token
    return max(distribution)


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 2.5]),
        top_k=rng.choice([-1, 1, 2, 9, 1000]),
        top_p=rng.choice([1.0, 0.9, 0.35, 1e-4]),
        min_p=rng.choice([0.0, 0.05, 0.6, 1.0]),
    )


def sample_rows(ops: OpTable, logits: torch.Tensor, params: list[SamplingParams], seed: int) -> list[int]:
    """One token per row; rows sit in shuffled slots with histories of different lengths."""
    num = len(params)
    table = RequestTable(num + 2, 32, 1, CPU, ops)
    slots = random.Random(seed).sample(range(num + 2), num)
    entries = [new_slot(slot, [1] * (row + 1), params[row], seed=seed + row) for row, slot in enumerate(slots)]
    table.apply(batch_of([], entries))
    positions = torch.arange(1, num + 1)
    tokens, finite = Sampler(ops, table)(logits.clone(), entries, torch.tensor(slots), positions)
    assert tokens.dtype == torch.int64 and finite.all()
    assert tokens.tolist() == table.tokens_NC[slots, positions].tolist(), "tokens are in the history"
    return tokens.tolist()


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
def test_tokens_equal_the_inverse_of_the_kept_distribution(ops: OpTable) -> None:
    rng = random.Random(3)
    for trial in range(60):
        params = [random_params(rng) for _ in range(7)]
        logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(trial)) * 3
        numbers = uniform(torch.arange(7) + trial, torch.arange(1, 8)).tolist()
        for row, token in enumerate(sample_rows(ops, logits, params, trial)):
            values = logits[row].tolist()
            if params[row].is_greedy:
                assert token == values.index(max(values))
            else:
                assert token == drawn(kept(values, params[row]), numbers[row]), params[row]


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
def test_a_row_does_not_depend_on_its_neighbours(ops: OpTable) -> None:
    """Greedy alone takes another way through the sampler than greedy beside sampled rows."""
    rng = random.Random(4)
    params = [random_params(rng) for _ in range(12)]
    logits = torch.randn(12, VOCAB)
    together = sample_rows(ops, logits, params, 5)
    for row in range(12):
        table = RequestTable(1, 32, 1, CPU, ops)
        entry = new_slot(0, [1] * (row + 1), params[row], seed=5 + row)
        table.apply(batch_of([], [entry]))
        alone, _ = Sampler(ops, table)(
            logits[row : row + 1].clone(), [entry], torch.tensor([0]), torch.tensor([row + 1])
        )
        assert alone.tolist() == [together[row]]


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
def test_frequencies_follow_the_probabilities(ops: OpTable) -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).repeat(4000, 1)
    params = SamplingParams(temperature=0.8, top_k=3)
    expected = kept(logits[0].tolist(), params)
    table = RequestTable(1, 4000, 1, CPU, ops)
    entry = new_slot(0, [1], params, seed=11)
    table.apply(batch_of([], [entry]))
    tokens, _ = Sampler(ops, table)(logits, [entry] * 4000, torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    for token in range(4):
        share = float((tokens == token).float().mean())
        assert share == pytest.approx(expected.get(token, 0.0), abs=0.03)


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(ops: OpTable, bad: float, temperature: float) -> None:
    logits = torch.randn(3, VOCAB)
    table = RequestTable(3, 8, 1, CPU, ops)
    entries = [new_slot(slot, [1], SamplingParams(temperature=temperature), seed=slot) for slot in range(3)]
    table.apply(batch_of([], entries))
    where = (torch.arange(3), torch.ones(3, dtype=torch.int64))
    clean, _ = Sampler(ops, table)(logits.clone(), entries, *where)
    broken = logits.clone()
    broken[1, 17] = bad
    tokens, finite = Sampler(ops, table)(broken, entries, *where)
    assert finite.tolist() == [True, False, True]
    assert tokens[0] == clean[0] and tokens[2] == clean[2]
    assert 0 <= int(tokens[1]) < VOCAB, "it is written into the history before the host knows"


def test_forbidden_tokens_are_never_sampled_and_leave_the_row_finite() -> None:
    table = RequestTable(1, 8, 1, CPU, TABLES[1])
    params = SamplingParams(min_new_tokens=4, logit_bias={3: -100.0}, temperature=5.0)
    entry = new_slot(0, [1, 2], params, prompt_len=2, ends=list(range(4, VOCAB)))
    table.apply(batch_of([], [entry]))
    slots, positions = torch.zeros(200, dtype=torch.int64), torch.full((200,), 2)
    table.sampling.seed[0] = 1
    tokens, finite = Sampler(TABLES[1], table)(torch.randn(200, VOCAB), [entry] * 200, slots, positions)
    assert finite.all() and set(tokens.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("ops", TABLES, ids=lambda ops: ops.name)
def test_masks_hold_beside_processors_and_logprobs(ops: OpTable) -> None:
    """Whatever way a mask takes, tokens are the same; who reads log-probabilities finds the forbidden ones gone."""
    allowed = [3, 5, VOCAB - 1]
    bits = np.zeros((2, -(-VOCAB // 32)), np.uint32)
    for token in allowed:
        bits[:, token // 32] |= np.uint32(1 << token % 32)
    mask = TokenMask([0, 2], bits.view(np.int32))
    slots, positions = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])
    found = []
    for logprobs, extra in ((None, {}), (LogprobSpec(), {}), (None, {"logit_bias": {1: 0.0}}), (LogprobSpec(), {})):
        table = RequestTable(3, 8, 1, CPU, ops)
        params = SamplingParams(temperature=2.0, **extra)
        entries = [replace(new_slot(slot, [1], params, seed=slot), logprobs=logprobs) for slot in range(3)]
        table.apply(batch_of([], entries))
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
        tokens, finite = Sampler(ops, table)(logits, entries, slots, positions, mask)
        assert finite.all() and tokens[0] in allowed and tokens[2] in allowed
        if logprobs is not None:
            assert torch.isfinite(logits[0]).nonzero()[:, 0].tolist() == allowed
            assert torch.isfinite(logits[1]).all()
        found.append(tokens.tolist())
    assert found == [found[0]] * 4
