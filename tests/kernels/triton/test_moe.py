"""Routed experts against the reference, and the sorting of their pairs by itself."""

from __future__ import annotations

import pytest
import torch

from pando.kernels.reference import REFERENCE
from pando.kernels.triton import moe, routing
from pando.kernels.triton.table import table
from pando.kernels.weights import Weight
from pando.quant.rounding import per_output_float8
from tests.kernels.cases import TOLERANCE


def check_routing(ids: torch.Tensor, experts: int, rows: int) -> None:
    """Every pair is in the list once, in order within its expert, and tiles cover the list."""
    found = routing.route(ids, experts, rows)
    flat = ids.flatten().tolist()
    expected = sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert found.pairs.tolist() == expected
    tiles = [tile for tile in found.tiles.tolist() if tile[0] >= 0]
    covered = []
    for expert, first, end in tiles:
        last = min(first + rows, end)
        assert first < last and {flat[expected[place]] for place in range(first, last)} == {expert}
        covered += range(first, last)
    assert covered == list(range(len(flat)))


@pytest.mark.parametrize(("tokens", "experts", "choices", "rows"), [(1, 8, 2, 16), (7, 5, 3, 16), (30, 128, 8, 16)])
def test_routing_of_few_pairs(tokens: int, experts: int, choices: int, rows: int, device: str) -> None:
    ids = torch.stack([torch.randperm(experts, device=device)[:choices] for _ in range(tokens)])
    check_routing(ids, experts, rows)
    check_routing(torch.zeros_like(ids), experts, rows)


def test_routing_of_many_pairs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(routing, "FEW_PAIRS", 4)
    monkeypatch.setattr(routing, "BLOCK", 32)
    for tokens, experts, rows in ((90, 6, 16), (33, 16, 64), (3, 3, 16)):
        check_routing(torch.randint(0, experts, (tokens, 2), device=device), experts, rows)


def experts_of(weights: list[Weight], other: list[Weight], x: torch.Tensor, choices: int, **options: object) -> None:
    """Both tables' experts agree on x; within twice the tolerance, as they round between the two products."""
    device, experts = x.device, len(weights)
    ids = torch.stack([torch.randperm(experts, device=device)[:choices] for _ in range(len(x))]).view(-1, choices)
    chances = torch.rand(len(x), choices, device=device)
    expected = REFERENCE.pack_experts(weights, other, "silu", **options)(x, ids, chances)  # type: ignore[arg-type]
    packed = table().pack_experts(weights, other, "silu", **options)  # type: ignore[arg-type]
    rtol, atol = (2 * size for size in TOLERANCE[x.dtype])
    torch.testing.assert_close(packed(x, ids, chances), expected, rtol=rtol, atol=atol)


def plain(experts: int, n: int, k: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[Weight]:
    return [(torch.randn(n, k, device=device) / k**0.5).to(dtype) for _ in range(experts)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 4, 2), (5, 8, 3), (40, 2, 1)])
def test_plain_experts(tokens: int, experts: int, choices: int, dtype: torch.dtype, device: str) -> None:
    width, inner = 72, 40
    x = torch.randn(tokens, width, device=device).to(dtype)
    experts_of(plain(experts, 2 * inner, width, device, dtype), plain(experts, width, inner, device, dtype), x, choices)


def test_experts_with_biases(device: str) -> None:
    options = {"gate_up_bias": torch.randn(4, 64, device=device), "down_bias": torch.randn(4, 48, device=device)}
    options = {name: bias.bfloat16() for name, bias in options.items()}
    x = torch.randn(6, 48, device=device).bfloat16()
    experts_of(plain(4, 64, 48, device), plain(4, 48, 32, device), x, 2, **options)


@pytest.mark.parametrize(("bits", "activation_bits", "tokens"), [(4, 8, 3), (8, 16, 3), (8, 8, 40)])
def test_quantized_experts(bits: int, activation_bits: int, tokens: int, device: str) -> None:
    from pando.quant.rounding import four_bits, per_output

    def rounded(weights: list[Weight]) -> list[Weight]:
        if bits == 4:
            # 16-bit activations: few rows are not rounded.
            return [four_bits([weight], 64, 16) for weight in weights]  # type: ignore[list-item]
        return [per_output([weight], activation_bits) for weight in weights]  # type: ignore[list-item]

    x = torch.randn(tokens, 128, device=device).bfloat16()
    experts_of(rounded(plain(2, 128, 128, device)), rounded(plain(2, 128, 64, device)), x, 1)


def test_float8_experts(device: str) -> None:
    """Few rows are not rounded; of many rows the reference is off by what float8 holds."""
    x = torch.randn(40, 128, device=device).bfloat16()
    up, down = ([per_output_float8([w], 8) for w in plain(2, n, k, device)] for n, k in ((128, 128), (128, 64)))  # type: ignore[list-item]
    experts_of([*up], [*down], x[:3], 1)
    ids, chances = torch.randint(0, 2, (40, 1), device=device), torch.rand(40, 1, device=device)
    expected = REFERENCE.pack_experts(up, down, "silu")(x, ids, chances).float()
    error = (table().pack_experts(up, down, "silu")(x, ids, chances).float() - expected).norm() / expected.norm()
    assert 0.005 < error < 0.06


def test_no_tokens(device: str) -> None:
    packed = table().pack_experts(plain(2, 8, 4, device), plain(2, 4, 4, device), "silu")
    nothing = torch.empty(0, 4, device=device).bfloat16()
    ids = torch.empty(0, 1, dtype=torch.int64, device=device)
    assert packed(nothing, ids, ids.float()).shape == (0, 4)
    assert packed.num_bytes == 2 * (8 * 4 + 4 * 4) * 2


def test_rows_of_the_list_are_combined_in_order(device: str) -> None:
    y, weights = torch.randn(6, 9, device=device), torch.rand(2, 3, device=device)
    out = torch.empty(2, 9, device=device)
    moe.combine(y, weights, out)
    torch.testing.assert_close(out, (y.view(2, 3, 9) * weights.unsqueeze(2)).sum(1))
