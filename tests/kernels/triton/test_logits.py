"""Ops on logits against the reference, with small pieces, so that rows have several."""

from __future__ import annotations

import math

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton import logits as ops
from tests.kernels.cases import close


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few hundred logits take several programs."""
    monkeypatch.setattr(ops, "PIECE", 64)


@pytest.mark.parametrize("vocab", [1, 5, 31, 32, 33, 257, 700])
def test_argmax_finite_and_token_mask(vocab: int, device: str) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-5, 6, (7, vocab), generator=generator).float()  # many ties
    logits[1, vocab // 2] = math.inf
    logits[2] = -math.inf
    logits[3, -1] = math.nan
    logits[5] = -0.0
    logits[5, -1] = 0.0
    logits = logits.to(device)
    assert torch.equal(ops.argmax(logits), REFERENCE.argmax(logits))
    assert ops.finite(logits).tolist() == REFERENCE.finite(logits).tolist() == [True, False, False, False] + [True] * 3
    words = torch.randint(-(2**31), 2**31, (7, (vocab + 31) // 32 + 1), generator=generator).int().to(device)
    words[0], words[4] = -1, 0
    expected = logits.clone()
    REFERENCE.apply_token_mask_(expected, words)
    ops.apply_token_mask_(logits, words)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


def test_no_rows(device: str) -> None:
    nothing = torch.empty(0, 9, device=device)
    assert ops.argmax(nothing).shape == ops.finite(nothing).shape == (0,)
    assert ops.logprobs(nothing, torch.empty(0, dtype=torch.int64, device=device)).shape == (0,)


def test_logprobs(device: str) -> None:
    for rows, vocab in ((1, 1), (3, 7), (4, 300)):
        logits, tokens = torch.randn(rows, vocab, device=device) * 5, torch.randint(0, vocab, (rows,), device=device)
        logits[0, : vocab // 2] = -math.inf  # whole pieces of it
        close(ops.logprobs(logits, tokens), REFERENCE.logprobs(logits, tokens))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 97, 60), (2, 300, 1100), (4, 30, 0)], ids=str)
def test_penalties(shape: tuple[int, int, int], device: str) -> None:
    rows, vocab, width = shape
    lens = torch.randint(0, width + 1, (rows,), dtype=torch.int32)
    others = (
        torch.randint(0, vocab, (rows, width + 7), dtype=torch.int32)[:, :width],
        (lens * torch.rand(rows)).int(),
        lens,
        torch.rand(rows) + 0.5,
        torch.randn(rows),
        torch.randn(rows),
    )
    logits, others = torch.randn(rows, vocab, device=device), tuple(x.to(device) for x in others)
    expected = logits.clone()
    REFERENCE.apply_penalties_(expected, *others)
    ops.apply_penalties_(logits, *others)
    close(logits, expected)
