"""Paged attention against the reference: the shape table, tree masks, plans, and sharing that changes no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton import attention
from pando.kernels.triton.table import table
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, attention_inputs, close

OPS = replace(table(), paged_attention=attention.paged_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=AttentionCase.id)
def test_shape_table(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    inputs = attention_inputs(case, dtype)
    close(inputs.run(OPS), inputs.run(REFERENCE))
