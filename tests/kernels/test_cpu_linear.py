"""Packed linear maps and experts on every level: values, epilogues, layouts, and what a row's result may depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pando.errors import ConfigError
from pando.kernels import cpu, reference
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import DTYPES, LEVELS, TOLERANCE, close

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

if LEVELS:
    from pando.kernels import _native
    from pando.kernels.cpu_linear import (
        ALIGNMENT,
        CHUNK_BYTES,
        NativeExperts,
        NativeLinear,
        Packer,
        PanelMemory,
        limits,
    )

ROWS = (0, 1, 2, 3, 5, 6, 7, 13, 64, 97, 300)
SIZES = (1, 2, 17, 31, 64, 65, 130, 1000)
SHAPES = [(n, k) for i, n in enumerate(SIZES) for j, k in enumerate(SIZES) if (i + j) % 3 == 0 or min(n, k) == 1]
"""(N, K): every size in both places, a third of the pairs."""

SUM_ERROR = 2e-6
"""Error of a float32 sum of at most 1,000 products, as a share of the sum of their magnitudes.

bfloat16 products are exact in float32 on every level; vdpbf16ps rounds after each of them, as a multiply-add does.
"""


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


def packed(packer: Packer, weight: Tensor, bias: Tensor | None = None, **options: object) -> NativeLinear:
    """`pack_linear` that may not fall back."""
    linear = packer.pack_linear(weight, bias, **options)  # type: ignore[arg-type]
    assert isinstance(linear, NativeLinear)
    return linear


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_against_float64(packer: Packer, n: int, k: int, dtype: torch.dtype) -> None:
    weight, bias, x = normal(n, k, dtype=dtype), normal(n), normal(max(ROWS), k, dtype=dtype, seed=1)
    linear = packed(packer, weight, bias, out_dtype=torch.float32)
    expected = x.double() @ weight.double().t() + bias.double()
    allowed = SUM_ERROR * (x.double().abs() @ weight.double().abs().t() + bias.double().abs()) + 1e-37
    for rows in ROWS:
        out = linear(x[:rows])
        assert out.shape == (rows, n) and out.dtype is torch.float32
        assert bool(((out.double() - expected[:rows]).abs() <= allowed[:rows]).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, *reference.ACTIVATIONS])
def test_epilogues(packer: Packer, kind: str | None, dtype: torch.dtype) -> None:
    """Bias, activation and output dtype, on a last panel of every fill and two blocks of inputs."""
    for n, k in ((2, 3), (62, 300), (64, 64), (66, 31), (130, 200)):
        weight, bias, x = normal(n, k) / math.sqrt(k), normal(n), normal(19, k, seed=1)
        weight, x = weight.to(dtype), x.to(dtype)
        for out_dtype in DTYPES:
            out = packed(packer, weight, bias, activation=kind, out_dtype=out_dtype)(x)
            assert out.dtype is out_dtype
            wide = REFERENCE.pack_linear(weight.float(), bias, activation=kind)(x.float())
            close(out, wide.to(out_dtype))
    assert packed(packer, weight, activation=kind)(x).dtype is dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_another_dtype_are_converted(packer: Packer, dtype: torch.dtype) -> None:
    """On values that every dtype holds."""
    weight, x = normal(70, 45).bfloat16(), normal(9, 45, seed=1).bfloat16()
    weight, x = weight.clamp(-4, 4).mul(16).round() / 16, x.mul(4).round() / 4
    expected = x.double() @ weight.double().t()
    for kind in DTYPES:
        out = packed(packer, weight.to(kind), out_dtype=torch.float32)(x.to(dtype))
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-5)


def test_float32_rows_keep_their_precision_with_float32_weights(packer: Packer) -> None:
    weight = torch.tensor([[1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0**-20]])
    assert float(packed(packer, weight)(x)) == 1.0 + 2.0**-20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_to_rounds_once(packer: Packer, dtype: torch.dtype) -> None:
    weight, x, stream = normal(100, 96, dtype=dtype), normal(8, 96, dtype=dtype, seed=1), normal(8, 130, dtype=dtype)
    linear = packed(packer, weight)
    wide = packed(packer, weight, out_dtype=torch.float32)(x)
    expected = (stream[:, 7:107].float() + wide).to(dtype)
    untouched = stream.clone()
    linear.add_to(x, stream[:, 7:107])
    assert torch.equal(stream[:, 7:107], expected)
    assert torch.equal(stream[:, :7], untouched[:, :7]) and torch.equal(stream[:, 107:], untouched[:, 107:])
    with pytest.raises(ValueError, match="does not fit rows of 100 columns"):
        linear.add_to(x, stream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_weights_and_leading_dims(packer: Packer, dtype: torch.dtype) -> None:
    wide_weight, wide_x = normal(50, 90, dtype=dtype), normal(6, 100, dtype=dtype)
    weight, x = wide_weight[:, 3:80], wide_x[::2, 5:82]
    expected = packed(packer, weight.contiguous())(x.contiguous())
    assert torch.equal(packed(packer, weight)(x), expected)
    assert torch.equal(packed(packer, weight.t().contiguous().t())(x), expected)
    assert torch.equal(packed(packer, weight)(x.t().contiguous().t()), expected)
    linear = packed(packer, weight)
    assert torch.equal(linear(x.unsqueeze(1)), expected.unsqueeze(1)) and torch.equal(linear(x[0]), expected[0])
    assert linear(x[:0]).shape == (0, 50) and linear(x.new_empty(2, 0, 77)).shape == (2, 0, 50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "silu"])
def test_a_row_depends_neither_on_its_batch_nor_on_threads(
    packer: Packer, kind: str | None, dtype: torch.dtype
) -> None:
    weight, bias, x = normal(386, 701, dtype=dtype), normal(386), normal(300, 701, dtype=dtype, seed=1)
    linear = packed(packer, weight, bias, activation=kind)
    whole = linear(x)
    for threads in (2, 3, 16):
        cpu.set_num_threads(threads)
        assert torch.equal(linear(x), whole)
        for rows in (1, 2, 7, 48, 63, 64, 100):
            assert torch.equal(linear(x[:rows]), whole[:rows])
    for row in range(0, 300, 23):
        assert torch.equal(linear(x[row : row + 1]), whole[row : row + 1])
        assert torch.equal(linear(x[row : row + 5]), whole[row : row + 5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_row_stays_alone(packer: Packer, dtype: torch.dtype) -> None:
    """NaN and infinities in rows 1 and 4 of 8, and in the memory behind rows of an odd number of inputs."""
    for k in (64, 65):
        weight, wide = normal(70, k, dtype=dtype), normal(8, k + 3, dtype=dtype, seed=1)
        wide[:, k:] = math.nan
        x = wide[:, :k]
        linear = packed(packer, weight)
        clean = linear(x)
        assert bool(clean.isfinite().all())
        x[1], x[4, 3] = math.nan, math.inf
        out, good = linear(x), [0, 2, 3, 5, 6, 7]
        assert torch.equal(out[good], clean[good])
        assert bool(out[1].isnan().all()) and bool((~out[4].isfinite()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_tiny_and_zero_values(packer: Packer, dtype: torch.dtype) -> None:
    """The largest numbers pass, sums beyond them are infinite, products of the least ones are next to nothing."""
    large = torch.finfo(dtype).max
    weight = torch.zeros(3, 40, dtype=dtype)
    weight[0, 39], weight[1, :], weight[2, 0] = 1.0, 1.0, torch.finfo(dtype).smallest_normal
    x = torch.zeros(2, 40, dtype=dtype)
    x[0], x[1, 0] = large, torch.finfo(dtype).smallest_normal / 4
    out = packed(packer, weight)(x)
    assert float(out[0, 0]) == large and math.isinf(float(out[0, 1])) and float(out[1, 0]) == 0
    # A subnormal number is itself or, with bfloat16 multiplied by the processor, 0.
    assert 0 <= float(out[1, 1]) <= float(x[1, 0]) and 0 <= float(out[1, 2]) <= float(x[1, 0])
    assert not packed(packer, torch.zeros_like(weight))(x[1:]).any()


def test_every_weight_value_comes_back(packer: Packer) -> None:
    """A unit row copies a weight: all finite 16-bit values, subnormal ones aside where the processor drops them."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        values = values[: len(values) // 5 * 5].view(-1, 5)
        if dtype is torch.bfloat16:
            values = torch.where(values.abs() < torch.finfo(dtype).smallest_normal, 0.0, values).to(dtype)
        linear = packed(packer, values)
        assert torch.equal(linear(torch.eye(5, dtype=dtype)).t(), values)


def test_packed_bytes_and_memory(packer: Packer) -> None:
    weight = normal(100, 33)
    sizes = {dtype: packed(packer, weight.to(dtype)).num_bytes for dtype in DTYPES}
    assert sizes == {torch.float32: 128 * 33 * 4, torch.bfloat16: 128 * 34 * 2, torch.float16: 128 * 33 * 2}
    assert packed(packer, weight, normal(100)).num_bytes == 128 * 33 * 4 + 128 * 4
    gated = packed(packer, weight, activation="silu")
    assert gated.num_bytes == 128 * 33 * 4 and gated.out_features == 50 and gated.in_features == 33
    assert packed(packer, normal(66, 33), activation="silu").num_bytes == 128 * 33 * 4
    memory = PanelMemory()
    first, second = memory.take(100), memory.take(5000)
    assert first.data_ptr() % ALIGNMENT == second.data_ptr() % ALIGNMENT == 0
    assert second.data_ptr() - first.data_ptr() == ALIGNMENT
    assert len(memory.take(CHUNK_BYTES)) == CHUNK_BYTES and len(memory.take(CHUNK_BYTES // 2)) == CHUNK_BYTES // 2


def test_the_weight_is_not_needed_after_packing(packer: Packer) -> None:
    weight, x = normal(40, 30), normal(3, 30, seed=1)
    linear = packed(packer, weight, normal(40))
    expected = linear(x)
    weight.fill_(math.nan)
    assert torch.equal(linear(x), expected)


def test_what_is_refused_and_what_stays_with_the_reference(packer: Packer) -> None:
    linear = packed(packer, normal(8, 16))
    for wrong in (normal(2, 15), normal(2, 16).double(), normal(2, 16).to("meta")):
        with pytest.raises(ValueError, match="takes float rows of 16 inputs on the CPU"):
            linear(wrong)
    with pytest.raises(ConfigError, match="activation 'swish' is not known"):
        packer.pack_linear(normal(8, 16), activation="swish")
    with pytest.raises(ConfigError, match="do not divide evenly"):
        packer.pack_linear(normal(7, 16), activation="silu")
    double = packer.pack_linear(normal(8, 16).double())
    assert isinstance(double, reference.Linear)
    assert double(normal(2, 16).double()).dtype is torch.float64


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
@pytest.mark.parametrize("level", range(len(LEVELS)), ids=LEVELS)
def test_limits_count_what_all_threads_do(level: int, kind: int) -> None:
    done = _native.burn(level, kind, 10)
    assert done > 0 and _native.burn(level, kind, 20) == 2 * done
    cpu.set_num_threads(2)
    assert _native.burn(level, kind, 10) == 2 * done
    found = limits(level, kind, 1 << 16)
    assert found.flops > 0 and found.read_bytes > 0


# ---- experts ----


def expert_weights(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    gate_up = normal(experts, 2 * inner, hidden) / math.sqrt(hidden)
    down = normal(experts, hidden, inner, seed=1) / math.sqrt(inner)
    return list(gate_up.to(dtype)), list(down.to(dtype))


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Distinct experts per token; the last expert gets nothing."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_against_the_reference(packer: Packer, kind: str, biased: bool, dtype: torch.dtype) -> None:
    for tokens, experts, top_k, hidden, inner in ((1, 9, 8, 64, 32), (7, 5, 1, 65, 33), (150, 4, 2, 30, 70)):
        gate_up, down = expert_weights(experts, hidden, inner, dtype)
        biases = (normal(experts, 2 * inner), normal(experts, hidden)) if biased else ()
        x, (ids, weights) = normal(tokens, hidden, dtype=dtype, seed=2), routing(tokens, experts, top_k)
        native = packer.pack_experts(gate_up, down, kind, *biases)
        assert isinstance(native, NativeExperts)
        wide = REFERENCE.pack_experts([w.float() for w in gate_up], [w.float() for w in down], kind, *biases)
        expected = wide(x.float(), ids, weights)
        # What lies between the products is rounded to the dtype, too.
        rtol, atol = TOLERANCE[dtype]
        out = native(x, ids, weights)
        assert out.dtype is dtype
        torch.testing.assert_close(out.float(), expected, rtol=2 * rtol, atol=3 * atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_by_token_and_thread(packer: Packer, dtype: torch.dtype) -> None:
    gate_up, down = expert_weights(6, 100, 77, dtype)
    native = packer.pack_experts(gate_up, down, "silu")
    x, (ids, weights) = normal(130, 100, dtype=dtype, seed=2), routing(130, 6, 3)
    whole = native(x, ids, weights)
    for threads in (1, 2, 16):
        cpu.set_num_threads(threads)
        assert torch.equal(native(x, ids, weights), whole)
        for token in (0, 64, 129):
            one = slice(token, token + 1)
            assert torch.equal(native(x[one], ids[one], weights[one]), whole[one])
    assert native(x[:0], ids[:0], weights[:0]).shape == (0, 100)
    assert torch.equal(native(x.t().contiguous().t(), ids, weights.double()), whole)


def test_experts_that_do_not_fit(packer: Packer) -> None:
    gate_up, down = expert_weights(3, 8, 4, torch.float32)
    native = packer.pack_experts(gate_up, down, "silu")
    assert native.num_bytes == 3 * (64 * 8 + 64 * 4) * 4
    x, weights = normal(2, 8), torch.ones(2, 1)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match="topk_ids out of range"):
            native(x, torch.tensor([[0], [wrong]]), weights)
    with pytest.raises(ValueError, match="do not take"):
        native(normal(2, 9), torch.zeros(2, 1, dtype=torch.int64), weights)
    with pytest.raises(ValueError, match="2 tokens, ids"):
        native(x, torch.zeros(1, 1, dtype=torch.int64), weights)


def test_experts_of_several_shapes_run_one_by_one(packer: Packer) -> None:
    gate_up, down = expert_weights(2, 8, 4, torch.float32)
    odd_up, odd_down = expert_weights(1, 8, 6, torch.float32)
    x, ids, weights = normal(3, 8), torch.tensor([[0, 2], [1, 2], [0, 1]]), torch.rand(3, 2)
    mixed = packer.pack_experts([*gate_up, *odd_up], [*down, *odd_down], "silu")
    assert isinstance(mixed, reference.Experts)
    expected = REFERENCE.pack_experts([*gate_up, *odd_up], [*down, *odd_down], "silu")(x, ids, weights)
    close(mixed(x, ids, weights), expected)
