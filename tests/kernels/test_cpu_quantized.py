"""Linear maps on packed quantised weights, on every level: values, epilogues, extremes, and what a row depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pando.kernels import cpu, reference
from pando.kernels.weights import QuantizedWeight
from tests.kernels.cases import DTYPES, LEVELS, TOLERANCE, close

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

if LEVELS:
    from pando.kernels.cpu_linear import NativeLinear, Packer

ROWS = (0, 1, 2, 3, 6, 7, 13, 64, 97)
SHAPES = ((1, 1), (3, 5), (64, 64), (70, 130), (65, 257), (200, 515), (129, 1000), (33, 4), (128, 2050))
"""(N, K): odd sizes, one panel and several, one group and many, more than one block of inputs."""

SUM_ERROR = 4e-7
"""Error of scaling and adding some dozens of exact integer sums, as a share of the sum of the magnitudes."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """group None: one scale per output. offset: none, symmetric (-8 * scale), zero (integer points) or any."""

    bits: int
    group: int | None
    offset: str = "none"
    activation_bits: int = 8

    def id(self) -> str:
        """Short name for test output."""
        return f"{self.bits}g{self.group or 'K'}-{self.offset}-x{self.activation_bits}"


SCHEMES = tuple(
    Scheme(bits, group, offset, activation_bits)
    for bits, group, offset in (
        (8, None, "none"),
        (8, None, "any"),
        (8, 32, "none"),
        (8, 64, "zero"),
        (4, 32, "symmetric"),
        (4, 128, "zero"),
        (4, 64, "any"),
        (4, 36, "symmetric"),
        (4, None, "symmetric"),
        (4, 20, "none"),
    )
    for activation_bits in (8, 16)
)
INT8, INT4 = SCHEMES[0], Scheme(4, 32, "symmetric")


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def packer(request: pytest.FixtureRequest) -> Packer:
    """A packer of each level this machine runs."""
    return Packer(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each test starts with one thread and leaves the number as it was."""
    before = cpu.num_threads()
    cpu.set_num_threads(1)
    yield
    cpu.set_num_threads(before)


def quantized(scheme: Scheme, n: int, k: int) -> QuantizedWeight:
    """A random weight whose scales float16 holds exactly."""
    random = torch.Generator().manual_seed(n * k)
    group = scheme.group or k
    groups = -(-k // group)
    scale = (torch.rand(n, groups, generator=random) + 0.1).half().float() * 2**-7
    if scheme.bits == 8:
        values = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    else:
        values = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    offset = {
        "none": None,
        "symmetric": -8 * scale,
        "zero": -torch.randint(0, 16, (n, groups), generator=random) * scale,
        "any": torch.randn(n, groups, generator=random) * scale,
    }[scheme.offset]
    return QuantizedWeight(values, scale, offset, scheme.bits, group, scheme.activation_bits)


def packed(packer: Packer, weight: QuantizedWeight, bias: Tensor | None = None, **options: object) -> NativeLinear:
    """`pack_linear` that may not fall back."""
    linear = packer.pack_linear(weight, bias, **options)  # type: ignore[arg-type]
    assert isinstance(linear, NativeLinear)
    return linear


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def largest_of_groups(x: Tensor, group: int) -> Tensor:
    """[..., K]: for each element the largest magnitude of its group."""
    k = x.shape[-1]
    padded = torch.nn.functional.pad(x.abs(), (0, -k % group)).unflatten(-1, (-1, group))
    return padded.amax(-1).repeat_interleave(group, -1)[..., :k]


def expected(weight: QuantizedWeight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far a result may be off."""
    wide, group = x.float(), weight.group_size
    w = weight.dequantize().double()
    rounding = torch.zeros_like(wide)
    if weight.activation_bits == 8:
        wide = reference.rounded_to_int8(wide, group)
    else:
        rounding = largest_of_groups(wide, group) / 65000
    limit = (SUM_ERROR * wide.abs() + rounding).double() @ (w.abs() + 16 * weight.scale.amax()).T
    if weight.offset is not None:  # one that is no integer is kept as a float16
        groups = torch.nn.functional.pad(wide.abs(), (0, -wide.shape[-1] % group)).unflatten(-1, (-1, group)).sum(-1)
        limit += 2**-11 * groups.double() @ (weight.offset.abs() + 8 * weight.scale).double().T
    return wide.double() @ w.T, limit + 1e-30


@pytest.mark.parametrize("scheme", SCHEMES, ids=Scheme.id)
def test_products(packer: Packer, scheme: Scheme) -> None:
    for i, (n, k) in enumerate(SHAPES):
        weight = quantized(scheme, n, k)
        linear = packed(packer, weight)
        for rows in ROWS[i % 2 :: 2]:
            x = normal(rows, k)
            value, limit = expected(weight, x)
            error = (linear(x).double() - value).abs()
            assert error.shape == (rows, n) and bool((error <= limit).all()), (n, k, rows, (error / limit).max())


@pytest.mark.parametrize("activation_bits", (8, 16))
def test_scales_of_any_float_are_kept_to_11_bits(packer: Packer, activation_bits: int) -> None:
    weight = quantized(Scheme(4, 32, "symmetric", activation_bits), 64, 256)
    scale = weight.scale * (1 + normal(64, 8).abs() * 1e-3) * torch.logspace(-18, 18, 64).unsqueeze(1)
    weight = QuantizedWeight(weight.values, scale, -8 * scale, 4, 32, activation_bits)
    x = normal(5, 256)
    value, _ = expected(weight, x)
    error = (packed(packer, weight)(x) - value).abs() / (x.abs().double() @ weight.dequantize().double().abs().T)
    assert error.max() < (2**-11 if activation_bits == 8 else 2**-11 + 2e-5)


def test_a_flat_group_is_its_offset(packer: Packer) -> None:
    """GGUF stores a group of equal weights with scale 0; a scale may also be lost beside its offset."""
    values = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    scale = torch.tensor([[0.0, 1.0], [1e-12, 0.5], [0.0, 0.0]])
    offset = torch.tensor([[2.0, -8.0], [-3.0, 0.0], [0.0, 0.0]])
    weight = QuantizedWeight(values, scale, offset, 4, 32, 8)
    x = normal(4, 64)
    torch.testing.assert_close(packed(packer, weight)(x), expected(weight, x)[0].float(), rtol=1e-5, atol=1e-5)


def test_activations_are_rounded_as_the_definition_says(packer: Packer) -> None:
    """An identity shows the rounded activations: bit for bit those of the reference, ties and tiny numbers included."""
    k = 96
    x = normal(40, k)
    x[0] = torch.arange(k) - 47.5
    x[0, 5] = 127.0  # scale 1: everything else is a tie
    x[1] = torch.arange(k) * 1e-40
    x[2] = 0.0
    x[3] = torch.arange(k) * 1e-37
    x[4] = normal(k) * 1e35
    x[5, 3] = 1e9
    weight = QuantizedWeight(torch.eye(k, dtype=torch.int8), torch.ones(k, 1), None, 8, k, 8)
    result = packed(packer, weight)(x)
    assert torch.equal(result, reference.rounded_to_int8(x, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", (None, *DTYPES), ids=str)
def test_dtypes_and_bias(packer: Packer, dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    for scheme in (INT8, INT4):
        weight, x = quantized(scheme, 70, 130), normal(5, 130).to(dtype)
        result = packed(packer, weight, normal(70), out_dtype=out_dtype)(x)
        assert result.dtype is (out_dtype or dtype)
        close(result, (expected(weight, x)[0] + normal(70)).to(result.dtype))


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("columns", (1, 32, 77))
def test_gated_activation(packer: Packer, kind: str, columns: int) -> None:
    for scheme in (INT8, INT4, Scheme(4, 32, "zero", 16)):
        weight, bias, x = quantized(scheme, 2 * columns, 100), normal(2 * columns), normal(9, 100)
        result = packed(packer, weight, bias, activation=kind)(x)
        value = expected(weight, x)[0].float() + bias
        torch.testing.assert_close(result, reference.gated_activation(value, kind), rtol=2e-4, atol=2e-4)


def test_adds_to_a_strided_residual(packer: Packer) -> None:
    for dtype in DTYPES:
        weight, x, wide = quantized(INT4, 70, 64), normal(5, 200).to(dtype)[:, 3:67], normal(5, 100).to(dtype)
        value = (wide[:, :70].double() + expected(weight, x)[0]).to(dtype)
        rest = wide[:, 70:].clone()
        packed(packer, weight).add_to(x, wide[:, :70])
        rtol, atol = TOLERANCE[dtype]
        torch.testing.assert_close(wide[:, :70], value, rtol=rtol, atol=atol)
        assert torch.equal(wide[:, 70:], rest)


@pytest.mark.parametrize("scheme", (*SCHEMES[::3], INT8, INT4), ids=Scheme.id)
def test_a_row_depends_on_itself_alone(packer: Packer, scheme: Scheme) -> None:
    """Bitwise, whatever the batch, the place in it, the number of threads, and what other rows hold."""
    linear, x = packed(packer, quantized(scheme, 290, 1030), normal(290)), normal(1100, 1030)
    whole = linear(x)
    for threads in (2, 3):
        cpu.set_num_threads(threads)
        assert torch.equal(linear(x), whole)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13, 36, 97, 200):
        assert torch.equal(linear(x[50 : 50 + rows]), whole[50 : 50 + rows]), rows
    x[51], x[53] = float("nan"), float("inf")
    others = [i for i in range(48, 60) if i not in (51, 53)]
    assert torch.equal(linear(x[48:60])[[i - 48 for i in others]], whole[others])


@pytest.mark.parametrize("activation_bits", (8, 16))
@pytest.mark.parametrize("scheme", (INT8, INT4), ids=Scheme.id)
def test_extreme_rows(packer: Packer, scheme: Scheme, activation_bits: int) -> None:
    weight = quantized(Scheme(scheme.bits, scheme.group, scheme.offset, activation_bits), 40, 160)
    x = normal(7, 160)
    x[0] = 0.0
    x[1, 7] = 1e30
    x[2] *= 1e-41
    x[3, 40] = float("inf")
    x[4, 40] = float("nan")
    x[5] *= 1e-20
    result = packed(packer, weight)(x)
    value, limit = expected(weight, x)
    assert bool((result[0] == 0).all())
    assert bool(result[3:5].isnan().all())
    for row in (1, 2, 5, 6):
        assert bool(((result[row] - value[row]).abs() <= limit[row] + 1e-38).all()), row


def test_packed_size(packer: Packer) -> None:
    """Bits per weight: the values, and 16 bits per group and for its offset if there is one."""
    for scheme, bits in (
        (INT8, 8.0),
        (Scheme(8, 32), 8.5),
        (INT4, 4.5),
        (Scheme(4, 128, "symmetric"), 4.125),
        (Scheme(4, 128, "zero"), 4.25),
    ):
        weight = quantized(scheme, 128, 1024)
        factors = 128 * 4
        assert packed(packer, weight).num_bytes - factors == bits / 8 * weight.values.numel()


def test_schemes_without_kernels_stay_with_the_reference(packer: Packer) -> None:
    for weight in (quantized(Scheme(4, 6, "symmetric"), 8, 60), quantized(Scheme(8, 30), 8, 60)):
        linear, x = packer.pack_linear(weight), normal(3, 60)
        assert isinstance(linear, reference.Linear)
        torch.testing.assert_close(linear(x), expected(weight, x)[0].float(), rtol=1e-4, atol=1e-4)


def test_longest_row(packer: Packer) -> None:
    """131,072 inputs of one scale just fit the integer sums; one more stays with the reference."""
    k = 1 << 17
    for values, x in ((127, 1.0), (-127, 1.0), (-127, -1.0)):
        weight = QuantizedWeight(torch.full((2, k), values, dtype=torch.int8), torch.ones(2, 1), None, 8, k, 8)
        torch.testing.assert_close(packed(packer, weight)(torch.full((1, k), x)), torch.full((1, 2), values * x * k))
    longer = QuantizedWeight(torch.ones(1, k + 4, dtype=torch.int8), torch.ones(1, 1), None, 8, k + 4, 8)
    assert isinstance(packer.pack_linear(longer), reference.Linear)
