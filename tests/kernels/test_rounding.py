"""Rounding while packing: the panels are those of rounding first, bit for bit, on every level."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.kernels.weights import QuantizedWeight, UnroundedWeight, concatenate
from pando.quant.rounding import four_bits, per_output, tree_sum
from tests.kernels.cases import LEVELS

try:
    from pando.kernels import _native
    from pando.kernels.cpu_linear import NativeLinear, Packer
except ImportError:
    pytest.skip("no compiled kernels", allow_module_level=True)

SHAPES = [(64, 64), (1, 4), (70, 200), (33, 1000), (130, 33), (128, 36), (6, 16), (4, 5), (66, 258)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packer(level: str) -> Packer:
    return Packer([name for name, _ in _native.levels()].index(level))


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Gaussian rows, some of them special."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    weight[rows // 2] = 0.0
    weight[rows - 1] = 0.25
    weight[0, 0] = 3.0
    return weight.to(dtype)


def rounded(parts: list[Tensor], bits: int, group: int) -> QuantizedWeight:
    return per_output(parts, 16) if bits == 8 else four_bits(parts, group, 8)


def bytes_of(packed: object) -> tuple[object, ...]:
    assert isinstance(packed, NativeLinear)
    parts = (packed.memory.panels, packed.memory.factors, packed.memory.bias)
    return packed.spec, *(None if p is None else bytes(p.contiguous().view(torch.uint8).numpy()) for p in parts)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_panels_as_rounding_first(shape: tuple[int, int], bits: int, dtype: torch.dtype, level: str) -> None:
    weight, pack = weights(*shape, dtype), packer(level)
    group = shape[1] if bits == 8 else 64
    bias = torch.arange(float(shape[0]))
    lazily = pack.pack_linear(UnroundedWeight((weight,), bits, group, 16 if bits == 8 else 8), bias)
    assert bytes_of(lazily) == bytes_of(pack.pack_linear(rounded([weight], bits, group), bias))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_parts_and_gates(bits: int, level: str) -> None:
    parts, pack = [weights(rows, 128, torch.bfloat16, rows) for rows in (40, 3, 85)], packer(level)
    group = 128 if bits == 8 else 32
    whole = UnroundedWeight(tuple(parts), bits, group, 16 if bits == 8 else 8)
    assert whole.shape == (128, 128)
    expected = pack.pack_linear(rounded(parts, bits, group), activation="silu")
    assert bytes_of(pack.pack_linear(whole, activation="silu")) == bytes_of(expected)
    one_by_one = concatenate([UnroundedWeight((p,), bits, group, whole.activation_bits) for p in parts])
    assert bytes_of(pack.pack_linear(one_by_one, activation="silu")) == bytes_of(expected)
    order = torch.arange(128).flip(0)
    turned = rounded([torch.cat(parts)[order]], bits, group)
    assert bytes_of(pack.pack_linear(whole.rows(order))) == bytes_of(pack.pack_linear(turned))


def test_rows_that_are_far_apart() -> None:
    weight, pack = weights(70, 256, torch.bfloat16), packer(LEVELS[-1])
    view = weight[:, :128]
    lazily = pack.pack_linear(UnroundedWeight((view,), 4, 64, 8))
    assert bytes_of(lazily) == bytes_of(pack.pack_linear(four_bits([view], 64, 8)))


def test_all_groups_alike_differ_in_layout_only() -> None:
    """Weights of zeros have no offsets; while rounding that is not known yet."""
    zeros, pack = torch.zeros(64, 128), packer(LEVELS[-1])
    x = torch.randn(3, 128)
    for weight in (four_bits([zeros], 64, 8), UnroundedWeight((zeros,), 4, 64, 8)):
        assert torch.equal(pack.pack_linear(weight)(x), torch.zeros(3, 64))


def test_tree_sum_has_one_order() -> None:
    x = torch.tensor([1e8, 1.0, -1e8, 1.0, 0.5])
    assert tree_sum(x).tolist() == [2.0]  # (1e8 + 0.5 - 1e8) + (1 + 1); from left to right it is 1.5
    assert tree_sum(torch.tensor([[2.0]])).tolist() == [[2.0]]
