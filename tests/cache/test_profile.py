"""Operations of each kind of layer against the matrix products it consists of."""

from __future__ import annotations

import pytest

from pando.cache import profile
from pando.cache.profile import FlopProfile, LayerFlops, num_pairs
from pando.cache.simulator.models import PRESETS, preset
from pando.errors import ConfigError


def gemm(m: int, k: int, n: int) -> int:
    """Operations of an [m, k] by [k, n] product."""
    return 2 * m * k * n


def cost(layer: LayerFlops, num_tokens: int) -> float:
    return FlopProfile.of([layer]).flops(num_tokens)


@pytest.mark.parametrize("window", [0, 3, 100])
def test_grouped_attention(window: int) -> None:
    hidden, heads, kv_heads, dim, count = 24, 6, 2, 5, 11
    expected = (
        gemm(count, hidden, heads * dim) + 2 * gemm(count, hidden, kv_heads * dim) + gemm(count, heads * dim, hidden)
    )
    for query in range(count):
        keys = query + 1 if not window else min(query + 1, window)
        expected += heads * (gemm(1, dim, keys) + gemm(1, keys, dim))
    assert cost(profile.attention(hidden, heads, kv_heads, dim, window=window), count) == expected


def test_an_output_gate_is_one_more_projection() -> None:
    plain, gated = (cost(profile.attention(24, 6, 2, 5, gated=g), 7) for g in (False, True))
    assert gated - plain == gemm(7, 24, 30)


@pytest.mark.parametrize("q_rank", [0, 7])
def test_latent_attention(q_rank: int) -> None:
    hidden, heads, rank, nope, rope, v_dim, count = 24, 3, 9, 5, 2, 4, 6
    query = gemm(count, hidden, q_rank) + gemm(count, q_rank, heads * (nope + rope))
    expected = query if q_rank else gemm(count, hidden, heads * (nope + rope))
    expected += gemm(count, hidden, rank + rope) + gemm(count, rank, heads * (nope + v_dim))
    expected += gemm(count, heads * v_dim, hidden)
    expected += sum(heads * (gemm(1, nope + rope, keys) + gemm(1, keys, v_dim)) for keys in range(1, count + 1))
    layer = profile.latent_attention(hidden, heads, q_rank=q_rank, rank=rank, nope_dim=nope, rope_dim=rope, v_dim=v_dim)
    assert cost(layer, count) == expected


def test_mlp_and_experts() -> None:
    assert cost(profile.mlp(24, 50), 3) == 2 * gemm(3, 24, 50) + gemm(3, 50, 24)
    assert cost(profile.mlp(24, 50, gated=False), 3) == gemm(3, 24, 50) + gemm(3, 50, 24)
    expected = gemm(3, 24, 16) + 4 * (2 * gemm(3, 24, 10) + gemm(3, 10, 24)) + 3 * gemm(3, 24, 12)
    assert cost(profile.moe(24, 16, 4, 10, shared=12), 3) == expected


def test_gated_delta() -> None:
    hidden, keys, values, key_dim, value_dim, width, count = 24, 2, 4, 5, 6, 4, 3
    rows = [keys * key_dim] * 2 + [values * value_dim] * 2 + [values] * 2
    expected = sum(gemm(count, hidden, row) for row in rows) + gemm(count, values * value_dim, hidden)
    expected += 2 * count * width * (2 * keys * key_dim + values * value_dim)
    per_head = key_dim * value_dim + 3 * gemm(1, key_dim, value_dim)  # decay; k^T S, outer product, q^T S
    layer = profile.gated_delta(
        hidden, key_heads=keys, value_heads=values, key_dim=key_dim, value_dim=value_dim, conv_width=width
    )
    assert cost(layer, count) == expected + count * values * per_head


def test_state_space() -> None:
    hidden, heads, dim, groups, state, width, count = 24, 3, 4, 1, 5, 4, 7
    inner, channels = heads * dim, heads * dim + 2 * groups * state
    expected = gemm(count, hidden, inner + channels + heads) + gemm(count, inner, hidden)
    expected += 2 * count * width * channels
    expected += count * heads * (dim * state + 2 * gemm(1, dim, state))  # decay; outer product, read
    layer = profile.state_space(hidden, heads=heads, head_dim=dim, groups=groups, state_dim=state, conv_width=width)
    assert cost(layer, count) == expected


@pytest.mark.parametrize("window", [0, 1, 5, 9])
def test_pairs_are_those_one_would_count(window: int) -> None:
    for count in range(12):
        seen = sum(1 for q in range(count) for k in range(q + 1) if not window or q - k < window)
        assert num_pairs(count, window) == seen
    assert num_pairs(12, causal=False) == 144


def test_the_paper_model_has_the_paper_numbers() -> None:
    model = preset("hybrid-7b")
    assert model.plan.bytes_per_token == 65_536
    assert model.plan.bytes_per_state == 26_787_840
    assert model.flops.flops(2048) == pytest.approx(2.70775e13, rel=1e-5)
    assert model.flops.flops(10_000) == pytest.approx(1.374257e14, rel=1e-6)


def test_presets_are_about_as_large_as_they_say() -> None:
    """Active parameters without embedding and head, in thousand millions."""
    sizes = {name: preset(name).flops.per_token / 2e9 for name in PRESETS}
    expected = {"hybrid-7b": 6.5, "qwen3-next": 3.3, "dense-8b": 7.0, "mla-16b": 2.2, "window-20b": 3.0}
    assert sizes == pytest.approx(expected, abs=0.1)


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="hybrid-7b, qwen3-next"):
        preset("hybrid-8b")
