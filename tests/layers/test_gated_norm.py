"""RMS norm with a gate, in both orders, over groups and without a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pando.kernels import op_table
from pando.layers.gated_norm import GatedNorm
from pando.layers.shapes import GatedNormPlace

OPS = op_table("cpu", "reference")
EPS = 1e-3


def rms(x_TGD: Tensor) -> Tensor:
    return x_TGD / (x_TGD.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("place", ["after_gate", "before_gate"])
@pytest.mark.parametrize("groups", [1, 3])
def test_each_group_is_normalised_by_itself(place: GatedNormPlace, groups: int) -> None:
    y, z, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(groups, 12 // groups)
    gate = F.silu(z)
    if place == "after_gate":
        expected = rms((y * gate).view(5, groups, -1)) * weight
    else:
        expected = rms(y.view(5, groups, -1)) * weight * gate.view(5, groups, -1)
    torch.testing.assert_close(GatedNorm(weight, EPS, place, OPS)(y, z), expected.view(5, 12))


def test_one_weight_serves_all_heads() -> None:
    y, z, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(1, 4)
    expected = rms(y.view(5, 3, 4)) * weight * F.silu(z).view(5, 3, 4)
    torch.testing.assert_close(GatedNorm(weight, EPS, "before_gate", OPS)(y, z), expected.view(5, 12))


def test_without_a_weight_there_is_only_the_gate() -> None:
    y, z = torch.randn(5, 12, dtype=torch.bfloat16), torch.randn(5, 12, dtype=torch.bfloat16)
    out = GatedNorm(None, EPS, "after_gate", OPS)(y, z)
    assert torch.equal(out, (y.float() * F.silu(z.float())).bfloat16())
