"""Rounding to 8 and 4 bits: bounds, optimality, odd shapes and extreme values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.quant import rounding
from pando.quant.rounding import four_bits, per_output, per_output_float8


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, weight: Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (64, 200), (130, 33)])
def test_eight_bits_are_within_half_a_step(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = gaussian(rows, columns).to(dtype)
    found = per_output([weight], 16)
    assert (found.bits, found.group_size, found.offset, found.activation_bits) == (8, columns, None, 16)
    largest = weight.float().abs().amax(1, keepdim=True)
    assert torch.equal(found.scale, largest / 127)
    assert (found.values.abs().amax(1) == 127).all()
    assert ((found.dequantize() - weight.float()).abs() <= found.scale * 0.5001).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (130, 33)])
def test_float8_is_within_half_a_unit_of_its_three_bits(rows: int, columns: int) -> None:
    weight = gaussian(rows, columns).bfloat16()
    weight[0] *= 1e-3
    found = per_output_float8([weight[:1], weight[1:]] if rows > 1 else [weight], 8)
    assert found.is_float and (found.bits, found.group_size, found.activation_bits) == (8, columns, 8)
    assert torch.equal(found.values.float().abs().amax(1), torch.full((rows,), 448.0))
    error, size = (found.dequantize() - weight.float()).abs(), weight.float().abs()
    assert (error <= torch.maximum(size / 16, found.scale * 2.0**-10) * 1.001).all()
    assert not per_output_float8([torch.zeros(2, 5)], 16).dequantize().any()


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(1, 1, 32), (5, 64, 64), (7, 100, 32), (3, 31, 64), (9, 192, 128)]
)
def test_four_bits_beat_the_line_through_the_extremes(rows: int, columns: int, group: int) -> None:
    weight = gaussian(rows, columns)
    found = four_bits([weight], group, 8)
    assert found.bits == 4 and found.values.max() <= 15 and found.offset is not None
    assert found.scale.shape == (rows, -(-columns // group))
    for start in range(0, columns, group):
        part = weight[:, start : start + group]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / 15
        plain = ((part - low) / step.clamp(min=1e-30)).round() * step + low
        mine = found.dequantize()[:, start : start + group]
        assert (mine - part).norm() <= (plain - part).norm() * 1.0001 + 1e-6


def test_four_bits_on_gaussian_weights() -> None:
    weight = gaussian(256, 1024)
    errors = {group: relative_error(four_bits([weight], group, 8).dequantize(), weight) for group in (32, 64, 128)}
    assert errors[32] < 0.074 and errors[64] < 0.087 and errors[128] < 0.098


def test_weights_on_a_line_of_sixteen_steps_are_exact() -> None:
    codes = torch.arange(16.0).repeat(4, 4)
    weight = codes * torch.tensor([[0.5], [2.0], [1.0], [0.25]]) - 3
    assert torch.allclose(four_bits([weight], 32, 8).dequantize(), weight, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0, 1e-42, 1e30])
def test_equal_weights_stay_themselves(value: float) -> None:
    weight = torch.full((3, 96), value)
    for found in (per_output([weight], 8).dequantize(), four_bits([weight], 32, 8).dequantize()):
        assert torch.allclose(found, weight, rtol=1e-5, atol=1e-37)


def test_an_outlier_costs_only_its_own_group() -> None:
    weight = gaussian(4, 256)
    weight[2, 70] = 1e4
    found = four_bits([weight], 64, 8).dequantize()
    assert relative_error(found[:, 128:], weight[:, 128:]) < 0.1
    assert relative_error(found[:2], weight[:2]) < 0.1
    assert found.isfinite().all()


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(37, 160).bfloat16()
    whole = (per_output([weight], 8), four_bits([weight], 64, 8))
    monkeypatch.setattr(rounding, "BLOCK", 320)
    pieces = (per_output([weight], 8), four_bits([weight], 64, 8))
    parts = (per_output([weight[:5], weight[5:]], 8), four_bits([weight[:31], weight[31:]], 64, 8))
    for a, b in (*zip(whole, pieces, strict=True), *zip(whole, parts, strict=True)):
        assert torch.equal(a.values, b.values) and torch.equal(a.scale, b.scale)
