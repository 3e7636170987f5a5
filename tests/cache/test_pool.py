"""The KV pool: shapes per layer, bytes, and contents that can not poison a padded read."""

from __future__ import annotations

import torch

from pando.cache.pool import HUGE_PAGE, KVPool
from pando.cache.spec import CachePlan, FullAttention, SlidingWindow

PLAN = CachePlan.of([FullAttention(2, 8, 4, "bfloat16"), SlidingWindow(1, 16, 16, "bfloat16", 5)])


def test_layers_have_their_own_shapes() -> None:
    pool = KVPool(PLAN, 7, 4, "cpu", torch.bfloat16)
    assert pool.num_slots == 28
    assert [tuple(k.shape) for k in pool.k] == [(28, 2, 8), (28, 1, 16)]
    assert [tuple(v.shape) for v in pool.v] == [(28, 2, 4), (28, 1, 16)]
    assert {t.dtype for t in (*pool.k, *pool.v)} == {torch.bfloat16}


def test_bytes_follow_the_plan() -> None:
    assert KVPool(PLAN, 7, 4, "cpu", torch.bfloat16).num_bytes == 28 * PLAN.bytes_per_token


def test_int8_rows_hold_their_scale() -> None:
    pool = KVPool(PLAN.in_int8(), 7, 4, "cpu", torch.bfloat16)
    assert [tuple(k.shape) for k in pool.k] == [(28, 2, 12), (28, 1, 20)]
    assert [tuple(v.shape) for v in pool.v] == [(28, 2, 8), (28, 1, 20)]
    assert {t.dtype for t in (*pool.k, *pool.v)} == {torch.int8}
    assert pool.num_bytes == 28 * PLAN.in_int8().bytes_per_token


def test_starts_zeroed() -> None:
    pool = KVPool(PLAN, 3, 1, "cpu", torch.float32)
    assert all(float(t.abs().max()) == 0.0 for t in (*pool.k, *pool.v))


def test_large_tensors_are_zero_from_end_to_end_and_start_at_a_huge_page() -> None:
    pool = KVPool(PLAN, 200_000, 1, "cpu", torch.float32)
    for tensor in (*pool.k, *pool.v):
        if tensor.nbytes > HUGE_PAGE:
            assert tensor.data_ptr() % HUGE_PAGE == 0
            assert not tensor[:: len(tensor) - 1].any()
            tensor[-1] = 1.0
            assert float(tensor.sum()) == tensor[-1].numel()
    assert any(tensor.nbytes > HUGE_PAGE for tensor in pool.k)
