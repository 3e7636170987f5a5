"""The sampler against the reference, token for token, with small pieces and few tokens held: every path runs."""

from __future__ import annotations

import math

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton import sampling
from pando.kernels.triton.table import table
from tests.kernels.cases import SampleInputs, sample_inputs

SAMPLERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"top_k": 4000, "top_p": 0.999},
    {"temperature": 50.0, "top_p": 0.5},
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of some hundred logits has several pieces, and not all tokens above a bound can be held."""
    monkeypatch.setattr(sampling, "PIECE", 128)
    monkeypatch.setattr(sampling, "GROUP", 16)
    monkeypatch.setattr(sampling, "HELD", 64)


def rows_of(vocab: int, rows: int) -> torch.Tensor:
    """Rows with ties, masked tokens and both zeros among them."""
    logits = torch.randn(rows, vocab) * 3
    quarter = rows // 4
    logits[:quarter] = logits[:quarter].round()
    logits[quarter : 2 * quarter, ::3] = -math.inf
    logits[2 * quarter : 3 * quarter, -1] = 0.0
    logits[2 * quarter : 3 * quarter, 0] = -0.0
    return logits


def on(inputs: SampleInputs, device: str) -> SampleInputs:
    """The same on a device."""
    return SampleInputs(*(getattr(inputs, name).to(device) for name in inputs.__dataclass_fields__))


@pytest.mark.parametrize("sampler", range(len(SAMPLERS)), ids=lambda index: str(SAMPLERS[index]))
@pytest.mark.parametrize("vocab", [1, 200])
def test_sample_chooses_the_tokens_of_the_reference(vocab: int, sampler: int, device: str) -> None:
    torch.manual_seed(vocab)
    inputs = on(sample_inputs(rows_of(vocab, 4), **SAMPLERS[sampler]), device)  # type: ignore[arg-type]
    assert torch.equal(inputs.run(table()), inputs.run(REFERENCE))


def test_rows_of_one_call_have_parameters_of_their_own(device: str) -> None:
    inputs = sample_inputs(rows_of(200, 6), first_seed=-9)
    inputs.temperature = torch.rand(6) * (torch.arange(6) % 5 > 0)
    inputs.top_k = torch.randint(0, 60, (6,), dtype=torch.int32)
    inputs.top_p, inputs.min_p = torch.rand(6), torch.rand(6) * 0.1
    inputs = on(inputs, device)
    tokens = inputs.run(table())
    assert torch.equal(tokens, inputs.run(REFERENCE))
    order = torch.tensor([4, 1], device=device)
    assert torch.equal(inputs.rows(order).run(table()), tokens[order])


def test_uniform_numbers_at_both_ends(device: str) -> None:
    """Equal weights: a token's interval is the uniform number's, up to the last."""
    inputs = on(sample_inputs(torch.zeros(9, 200), first_seed=5), device)
    assert torch.equal(inputs.run(table()), inputs.run(REFERENCE))
    half = on(sample_inputs(torch.zeros(12, 4), top_p=0.5), device)
    assert set(half.run(table()).tolist()) <= {0, 1}


def test_sample_of_hopeless_logits_stays_in_the_vocabulary(device: str) -> None:
    logits = torch.stack([torch.full((300,), value) for value in (math.nan, -math.inf, math.inf)])
    logits = torch.cat((logits, torch.where(torch.arange(300) == 7, math.nan, 1.0).unsqueeze(0)))
    for options in ({}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}):
        tokens = on(sample_inputs(logits, **options), device).run(table())  # type: ignore[arg-type]
        assert bool(((tokens >= 0) & (tokens < 300)).all())


def test_no_rows(device: str) -> None:
    assert on(sample_inputs(torch.empty(0, 9)), device).run(table()).shape == (0,)
