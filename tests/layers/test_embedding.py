"""Embedding rows and the head's float32 logits."""

from __future__ import annotations

import torch

from pando.kernels import op_table
from pando.layers.embedding import Embedding, Head
from pando.layers.linear import Linear

OPS = op_table("cpu", "reference")
WEIGHT = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


def test_rows_are_copies() -> None:
    rows = Embedding(WEIGHT)(torch.tensor([3, 3, 0]))
    assert torch.equal(rows, WEIGHT[[3, 3, 0]])
    before = WEIGHT.clone()
    rows.zero_()
    assert torch.equal(WEIGHT, before)


def test_multiplier_is_rounded_to_the_models_dtype() -> None:
    half = WEIGHT.bfloat16()
    factor = 50.0**0.5
    rows = Embedding(half, factor)(torch.tensor([1]))
    assert torch.equal(rows, half[[1]] * torch.tensor(factor, dtype=torch.bfloat16))


def test_head_scales_then_caps_in_float32() -> None:
    hidden = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    head = Head(Linear(WEIGHT.bfloat16(), None, OPS), multiplier=4.0, softcap=3.0)
    raw = (hidden @ WEIGHT.bfloat16().T).float()
    logits = head(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, 3.0 * (raw * 4.0 / 3.0).tanh())
    assert float(logits.abs().max()) <= 3.0
