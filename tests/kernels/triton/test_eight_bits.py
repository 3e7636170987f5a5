"""A whole model with keys, values and weights in 8 bits: Triton's logits are about the reference's."""

from __future__ import annotations

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton.table import table
from pando.models.load import load_model
from tests.models.paged_loop import full_logits
from tests.tiny_models import prompt_ids, tiny_checkpoint

IDS = prompt_ids(20, seed=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop's tensors are on the CPU")
@pytest.mark.parametrize("kept", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_keys_and_values(kept: str) -> None:
    logits = []
    for ops in (table(), REFERENCE):
        assert kept in ops.kv_dtypes
        model = load_model(tiny_checkpoint("llama"), dtype="float32", ops=ops)
        model.cache_plan = model.cache_plan.kept_in(kept)
        logits.append(full_logits(model, ops, IDS))
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[1].abs().max()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the loop's tensors are on the CPU")
def test_weights_in_float8() -> None:
    """20 tokens are many rows: activations are rounded to float8, which the reference leaves as they are."""
    logits = []
    for ops in (table(), REFERENCE):
        model = load_model(tiny_checkpoint("llama"), dtype="float32", ops=ops, quantization="fp8")
        logits.append(full_logits(model, ops, IDS))
    error = (logits[0] - logits[1]).square().mean().sqrt() / logits[1].std()
    assert 0.001 < error < 0.12
