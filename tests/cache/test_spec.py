"""Tests of `pando.cache.spec`: bytes by hand."""

from __future__ import annotations

import pytest

from pando.cache.spec import CachePlan, FullAttention, Latent, SlidingWindow, State


def test_a_token_takes_keys_and_values_of_every_kv_head() -> None:
    assert FullAttention(kv_heads=2, head_dim=64, v_dim=64, dtype="bfloat16").bytes_per_token == 2 * (64 + 64) * 2
    assert FullAttention(kv_heads=8, head_dim=128, v_dim=64, dtype="float32").bytes_per_token == 8 * 192 * 4
    assert SlidingWindow(kv_heads=1, head_dim=32, v_dim=32, dtype="int8", window=512).bytes_per_token == 64 + 8


def test_a_plan_adds_up_its_layers() -> None:
    full = FullAttention(kv_heads=2, head_dim=64, v_dim=64, dtype="bfloat16")
    window = SlidingWindow(kv_heads=2, head_dim=64, v_dim=64, dtype="float32", window=16)
    plan = CachePlan.of([full, window, full])
    assert plan.layers == (full, window, full)
    assert plan.bytes_per_token == 512 + 1024 + 512


def test_in_int8_each_head_has_a_scale_for_keys_and_one_for_values() -> None:
    kept = (Latent(rank=8, rope_dim=4, dtype="float32"), State((((2, 3), "float32"),)))
    plan = CachePlan.of([FullAttention(2, 64, 32, "bfloat16"), SlidingWindow(1, 16, 16, "bfloat16", 7), *kept])
    rounded = plan.in_int8()
    assert [layer.bytes_per_token for layer in rounded.layers] == [2 * (64 + 32 + 8), 32 + 8, 48, 0]
    assert rounded.layers[2:] == kept and rounded.in_int8() == rounded
    assert rounded.bytes_per_state == plan.bytes_per_state


def test_float8_keys_and_values_have_no_scales() -> None:
    plan = CachePlan.of([FullAttention(2, 64, 32, "bfloat16"), Latent(rank=8, rope_dim=4, dtype="bfloat16")])
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        assert [layer.bytes_per_token for layer in plan.kept_in(dtype).layers] == [2 * (64 + 32), 24]


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(KeyError, match="float12"):
        _ = FullAttention(kv_heads=1, head_dim=1, v_dim=1, dtype="float12").bytes_per_token
