"""Linear maps against the reference: all kinds of weights, odd sizes, both sides of every choice of kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.kernels.reference import ACTIVATIONS, REFERENCE
from pando.kernels.triton import linear
from pando.kernels.triton.launch import meta
from pando.kernels.triton.matrix import DENSE, Matrix, choose_tiles
from pando.kernels.triton.table import table
from pando.kernels.weights import QuantizedWeight, Weight
from pando.quant.rounding import per_output_float8
from tests.kernels.cases import TOLERANCE, close


def quantized(n: int, k: int, bits: int, group: int, offset: bool, activation_bits: int = 16) -> QuantizedWeight:
    """A random quantised weight whose outputs are about 1 for inputs of about 1; scales as float16 has them."""
    groups = -(-k // group)
    values = torch.randint(-127, 128, (n, k)).to(torch.int8) if bits == 8 else torch.randint(0, 16, (n, k)).byte()
    scale = ((torch.rand(n, groups) + 0.5) / k**0.5 / (73 if bits == 8 else 4.6)).half().float()
    shift = -(scale * torch.randint(0, 16, (n, groups))).half().float() if offset else None
    return QuantizedWeight(values, scale, shift, bits, group, activation_bits)


def moved(weight: Weight, device: str) -> Weight:
    """The weight on a device."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    assert isinstance(weight, QuantizedWeight)
    offset = None if weight.offset is None else weight.offset.to(device)
    return QuantizedWeight(
        weight.values.to(device),
        weight.scale.to(device),
        offset,
        weight.bits,
        weight.group_size,
        weight.activation_bits,
    )


def compare(weight: Weight, x: Tensor, device: str, **options: object) -> None:
    """The packed map of the table and of the reference agree on x.

    With an activation within twice the tolerance: one of the two rounds gate and up to 16 bits before it.
    """
    weight, x = moved(weight, device), x.to(device)
    expected = REFERENCE.pack_linear(weight, **options)(x)  # type: ignore[arg-type]
    out = table().pack_linear(weight, **options)(x)  # type: ignore[arg-type]
    assert out.shape == expected.shape and out.dtype == expected.dtype
    rtol, atol = (size * (2 if "activation" in options else 1) for size in TOLERANCE[x.dtype])
    torch.testing.assert_close(out.to(x.dtype), expected.to(x.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (40, 100), (65, 257)])
def test_plain_weights_few_rows(n: int, k: int, dtype: torch.dtype, device: str) -> None:
    weight = (torch.randn(n, k) / k**0.5).to(dtype)
    for rows in (0, 1, 16):
        compare(weight, torch.randn(rows, k).to(dtype), device)
    compare(weight, torch.randn(2, 3, k).to(dtype), device, bias=torch.randn(n, device=device).to(dtype))


def test_plain_weights_many_rows_and_float32(device: str) -> None:
    weight = torch.randn(48, 64) / 8
    compare(weight.bfloat16(), torch.randn(17, 64).bfloat16(), device, activation="silu")
    compare(weight, torch.randn(3, 64), device, activation="silu", bias=torch.randn(48, device=device))


def test_results_in_another_dtype(device: str) -> None:
    weight = (torch.randn(50, 64) / 8).bfloat16()
    for rows in (3, 20):
        compare(weight, torch.randn(rows, 64).bfloat16(), device, out_dtype=torch.float32)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activations_at_the_end(kind: str, device: str) -> None:
    weight, bias = (torch.randn(86, 96) / 9).bfloat16(), torch.randn(86, device=device).bfloat16()
    compare(weight, torch.randn(4, 96).bfloat16(), device, activation=kind, bias=bias)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_inputs_in_pieces(activation: str | None, device: str) -> None:
    """K is cut where outputs alone give too few blocks."""
    weight = (torch.randn(20, 1100) / 33).bfloat16()
    bias = torch.randn(20, device=device).bfloat16()
    matrix = table().pack_linear(weight).matrix  # type: ignore[attr-defined]
    assert linear.tiles_for(matrix, weight, 3, activation is not None).pieces > 1
    compare(weight, torch.randn(3, 1100).bfloat16(), device, activation=activation, bias=bias)


SCHEMES = [
    (8, 200, False),
    (8, 32, False),
    (8, 64, True),
    (8, 200, True),
    (4, 64, True),
    (4, 32, False),
    (4, 128, True),
    (4, 200, True),
    (4, 20, True),  # groups that no tile fits: expanded when packed
]


@pytest.mark.parametrize(("bits", "group", "offset"), SCHEMES)
def test_quantized_weights(bits: int, group: int, offset: bool, device: str) -> None:
    weight = quantized(35, 200, bits, group, offset)
    for rows in (3, 18):
        compare(weight, torch.randn(rows, 200).bfloat16(), device)
    compare(quantized(32, 256, bits, 256 if group == 200 else group, offset), torch.randn(1, 256).bfloat16(), device)


def test_quantized_weights_in_float16_and_float32(device: str) -> None:
    for dtype in (torch.float16, torch.float32):
        compare(quantized(33, 128, 4, 64, True), torch.randn(2, 128).to(dtype), device)
        compare(quantized(33, 128, 8, 128, False), torch.randn(2, 128).to(dtype), device)


def test_gated_quantized_weights(device: str) -> None:
    bias = torch.randn(70, device=device)
    for rows in (2, 33):
        weight = quantized(70, 130, 4, 64, True)
        compare(weight, torch.randn(rows, 130).bfloat16(), device, activation="silu", bias=bias)


def test_many_rows_expand_quantized_weights(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(linear, "UNPACKED_ROWS", 8)
    monkeypatch.setattr(linear, "EXPANDED", 3000)  # several pieces
    for bits, group, offset in ((8, 130, False), (4, 64, True), (4, 32, False), (8, 64, True)):
        weight = quantized(34, 130, bits, group, offset)
        compare(weight, torch.randn(9, 130).bfloat16(), device, activation="silu", bias=torch.randn(34, device=device))


def test_eight_bit_activations(device: str) -> None:
    weight = quantized(40, 200, 8, 200, False, activation_bits=8)
    x = torch.randn(19, 200) * torch.rand(19, 1) * 9
    x[3] = 0
    compare(weight, x.bfloat16(), device)
    compare(weight, x.bfloat16(), device, activation="silu")
    plain = quantized(40, 200, 8, 200, False)
    exact = QuantizedWeight(plain.values, plain.scale, None, 8, 200, 16)
    few = table().pack_linear(moved(QuantizedWeight(plain.values, plain.scale, None, 8, 200, 8), device))
    many = x[:4].bfloat16().to(device)
    close(few(many), REFERENCE.pack_linear(moved(exact, device))(many))  # few rows stay as they are


def test_packed_bytes(device: str) -> None:
    assert table().pack_linear(quantized(64, 256, 4, 64, True)).num_bytes == 64 * (128 + 2 * 4 * 2 + 4)
    assert table().pack_linear(torch.zeros(8, 16).bfloat16()).num_bytes == 256


def float8(n: int, k: int) -> QuantizedWeight:
    """A random weight in float8 with activations that may be rounded."""
    return per_output_float8([torch.randn(n, k) / k**0.5], 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_float8_weights_few_rows(dtype: torch.dtype, device: str) -> None:
    """Activations stay as they are, K is cut into pieces where it is long."""
    for n, k, activation in ((35, 200, None), (20, 1100, "silu")):
        weight = float8(n, k)
        assert table().pack_linear(weight).matrix.values.dtype is torch.float8_e4m3fn  # type: ignore[attr-defined]
        bias = torch.randn(n, device=device)
        compare(weight, torch.randn(3, k).to(dtype), device, activation=activation, bias=bias)


def test_float8_weights_many_rows(device: str) -> None:
    """Rows are rounded to float8 with a scale each: the product of those, exactly summed."""
    weight, x = float8(40, 200), torch.randn(19, 200) * torch.rand(19, 1) * 9
    x[3] = 0
    x = x.bfloat16()
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-38)
    rounded = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    out = table().pack_linear(moved(weight, device))(x.to(device)).cpu()
    close(out, (rounded @ weight.dequantize().T).bfloat16())
    exact = REFERENCE.pack_linear(weight)(x).float()
    assert 0 < float((out.float() - exact).norm() / exact.norm()) < 0.05


def test_float8_weights_become_bfloat16_where_there_is_no_float8(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("pando.kernels.triton.matrix.has_e4m3", lambda: False)
    packed = table().pack_linear(moved(float8(32, 64), device))
    assert packed.matrix.values.dtype is torch.bfloat16  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("n", "k", "gated", "blocks", "pieces", "stages"),
    [
        (6144, 4096, False, 192, 1, 5),
        (4096, 14336, False, 128, 1, 7),
        (28672, 4096, True, 224, 1, 3),
        (128256, 4096, False, 2004, 1, 3),
        (6144, 1024, True, 96, 1, 5),
        (1024, 2048, False, 32, 4, 4),
    ],
)
def test_one_row_keeps_a_gpu_reading(n: int, k: int, gated: bool, blocks: int, pieces: int, stages: int) -> None:
    """What docs/gpu.md says of 132 multiprocessors; K is cut only where most of them would be idle."""
    tiles = choose_tiles(Matrix(DENSE, k, meta(1, n, k)), 1, gated, 132)
    assert (-(-n // (2 if gated else 1) // tiles.outputs), tiles.pieces, tiles.stages) == (blocks, pieces, stages)
    read = tiles.outputs * tiles.inputs * 2 * (2 if gated else 1)
    assert blocks * pieces * (stages - 1) * read > 3.1e6 and stages * (read + 2 * 16 * tiles.inputs) <= 120 << 10
