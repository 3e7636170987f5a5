"""Norms and what `add` does to the residual stream."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pando.kernels import op_table
from pando.layers.norm import LayerNorm, NoNorm, RMSNorm, Scale

OPS = op_table("cpu", "reference")


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, generator=generator) for n in ((3, 8), (3, 8), (8,)))  # type: ignore[return-value]


def test_rms_norm_matches_its_formula() -> None:
    x, _, weight = rows()
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(RMSNorm(weight, 1e-5, OPS)(x), expected)


def test_layer_norm_matches_torch_with_and_without_parameters() -> None:
    x, other, weight = rows()
    bias = other[0]
    torch.testing.assert_close(LayerNorm(weight, bias, 1e-5, OPS)(x), F.layer_norm(x, (8,), weight, bias, 1e-5))
    torch.testing.assert_close(LayerNorm(None, None, 1e-5, OPS)(x), F.layer_norm(x, (8,), eps=1e-5))


def test_layer_norm_takes_a_weight_per_head() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 2, 8, generator=generator), torch.randn(2, 8, generator=generator)
    heads = [F.layer_norm(x[:, head], (8,), weight[head], None, 1e-5) for head in range(2)]
    torch.testing.assert_close(LayerNorm(weight, None, 1e-5, OPS)(x), torch.stack(heads, dim=1))


def test_half_precision_norms_compute_in_float32() -> None:
    x, _, weight = rows()
    half = (x * 300).half()
    for norm in (RMSNorm(weight, 1e-5, OPS), LayerNorm(weight, None, 1e-5, OPS)):
        out = norm(half)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out, norm(half.float()).half())


def test_add_updates_the_residual_and_returns_its_norm() -> None:
    x, residual, weight = rows()
    for norm in (RMSNorm(weight, 1e-5, OPS), LayerNorm(weight, None, 1e-5, OPS), NoNorm()):
        stream = residual.clone()
        out = norm.add(x, stream)
        torch.testing.assert_close(stream, x + residual)
        torch.testing.assert_close(out, norm(x + residual))


def test_scale_multiplies_in_place() -> None:
    x, _, _ = rows()
    expected = x * 0.25
    assert Scale(0.25)(x) is x
    assert torch.equal(x, expected)
