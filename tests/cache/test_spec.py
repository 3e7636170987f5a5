"""Tests of `pando.cache.spec`: bytes by hand."""

from __future__ import annotations

import pytest

from pando.cache.spec import CachePlan, FullAttention, SlidingWindow


def test_a_token_takes_keys_and_values_of_every_kv_head() -> None:
    assert FullAttention(kv_heads=2, head_dim=64, v_dim=64, dtype="bfloat16").bytes_per_token == 2 * (64 + 64) * 2
    assert FullAttention(kv_heads=8, head_dim=128, v_dim=64, dtype="float32").bytes_per_token == 8 * 192 * 4
    assert SlidingWindow(kv_heads=1, head_dim=32, v_dim=32, dtype="int8", window=512).bytes_per_token == 64


def test_a_plan_adds_up_its_layers() -> None:
    full = FullAttention(kv_heads=2, head_dim=64, v_dim=64, dtype="bfloat16")
    window = SlidingWindow(kv_heads=2, head_dim=64, v_dim=64, dtype="float32", window=16)
    plan = CachePlan.of([full, window, full])
    assert plan.layers == (full, window, full)
    assert plan.bytes_per_token == 512 + 1024 + 512


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(KeyError, match="float12"):
        _ = FullAttention(kv_heads=1, head_dim=1, v_dim=1, dtype="float12").bytes_per_token
