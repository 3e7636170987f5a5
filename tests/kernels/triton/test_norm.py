"""Norms against the reference."""

from __future__ import annotations

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton.table import table
from tests.kernels.cases import DTYPES, close

SHAPES = ((1, 8), (3, 128), (5, 131), (2, 3, 96), (0, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device)
    close(table().rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, weight = torch.randn(shape, device=device).to(dtype), torch.randn(shape[-1], device=device)
    stream = torch.randn(shape, device=device).to(dtype)
    expected_stream = stream.clone()
    out = table().add_rms_norm(x, stream, weight, 1e-5)
    close(out, REFERENCE.add_rms_norm(x, expected_stream, weight, 1e-5))
    assert torch.equal(stream, expected_stream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x, (weight, bias) = (torch.randn(shape, device=device) + 3).to(dtype), torch.randn(2, shape[-1], device=device)
    for options in ((weight, bias), (weight, None), (None, None)):
        close(table().layer_norm(x, *options, 1e-5), REFERENCE.layer_norm(x, *options, 1e-5))


def test_layer_norm_with_a_weight_per_head(device: str) -> None:
    wide, weight, bias = (torch.randn(*shape, device=device) for shape in ((4, 7 * 24), (3, 24), (3, 24)))
    for x in (wide[:, 24:96].unflatten(1, (3, 24)), wide[:, :72].contiguous().unflatten(1, (3, 24))):
        for other in (bias, None):
            close(table().layer_norm(x, weight, other, 1e-5), REFERENCE.layer_norm(x, weight, other, 1e-5))


def test_a_small_spread_around_a_large_mean(device: str) -> None:
    x = 1000 + torch.randn(3, 300, device=device)
    torch.testing.assert_close(
        table().layer_norm(x, None, None, 1e-5), REFERENCE.layer_norm(x, None, None, 1e-5), rtol=1e-3, atol=1e-3
    )


def test_rms_norm_of_views(device: str) -> None:
    """Heads cut out of a wider projection: strided rows, and rows that no single stride describes."""
    wide, weight = torch.randn(4, 7, 24, device=device), torch.randn(16, device=device)
    for x in (wide[:, 2, :16], wide[:, 1:5, :16], wide[..., ::2][..., :12]):
        close(table().rms_norm(x, weight[: x.shape[-1]], 1e-6), REFERENCE.rms_norm(x, weight[: x.shape[-1]], 1e-6))


def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    x, weight = torch.randn(9, 200, device=device), torch.randn(200, device=device)
    assert torch.equal(table().rms_norm(x, weight, 1e-6)[4:5], table().rms_norm(x[4:5], weight, 1e-6))
