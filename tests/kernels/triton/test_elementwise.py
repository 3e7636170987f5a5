"""Rotary embedding, stores to the pool and gated activations against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from pando.errors import ConfigError
from pando.kernels import reference
from pando.kernels.int8_rows import expand_rows
from pando.kernels.reference import REFERENCE
from pando.kernels.triton.table import table
from tests.kernels.cases import DTYPES, ROTARY, close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), ROTARY)
def test_rope_on_views_of_a_joint_projection(
    dim: int, rotary: int, interleaved: bool, dtype: torch.dtype, device: str
) -> None:
    cos_sin, positions = torch.randn(50, rotary, device=device), torch.tensor([49, 0, 7], device=device)
    joint = torch.randn(3, 7 * dim, device=device).to(dtype)
    other = joint.clone()
    for run, values in ((table().rope_, joint), (REFERENCE.rope_, other)):
        q, k, _ = values.split((4 * dim, 2 * dim, dim), dim=1)
        run(q.unflatten(1, (4, dim)), k.unflatten(1, (2, dim)), positions, cos_sin, interleaved)
    close(joint, other)
    assert torch.equal(joint[:, 6 * dim :], other[:, 6 * dim :])


def test_rope_of_no_tokens(device: str) -> None:
    q, k = torch.empty(0, 4, 8, device=device), torch.empty(0, 2, 8, device=device)
    table().rope_(q, k, torch.empty(0, dtype=torch.int64, device=device), torch.randn(9, 8, device=device), False)
    assert q.shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_kv_with_views_on_both_sides(dtype: torch.dtype, device: str) -> None:
    joint, pool = torch.randn(6, 9, 20, device=device).to(dtype), torch.zeros(2, 3, 40, 4, 24, device=device).to(dtype)
    k, v, where = joint[:, :4], joint[:, 4:8, :12], torch.tensor([39, 3, 0, 17, 5, 6], device=device)
    table().store_kv(k, v, pool[0, 1, ..., :20], pool[1, 1, ..., :12], where)
    assert torch.equal(pool[0, 1, where, :, :20], k) and torch.equal(pool[1, 1, where, :, :12], v)
    pool[0, 1, where, :, :20] = pool[1, 1, where, :, :12] = 0
    assert not pool.any()


def test_store_kv_converts_to_the_dtype_of_the_pool(device: str) -> None:
    k, v = torch.randn(2, 3, 2, 8, device=device)
    pool = torch.zeros(2, 5, 2, 8, device=device, dtype=torch.bfloat16)
    where = torch.tensor([4, 0, 2], device=device)
    table().store_kv(k, v, pool[0], pool[1], where)
    assert torch.equal(pool[:, where], torch.stack((k, v)).bfloat16())


@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 20, 5])
def test_store_kv_in_8_bits_gives_the_bits_of_the_reference(
    dim: int, dtype: torch.dtype, kept: torch.dtype, device: str
) -> None:
    k = (torch.randn(12, 3, dim, device=device) * torch.logspace(-40, 5, 12, device=device).view(12, 1, 1)).to(dtype)
    v = torch.randn(12, 3, dim - 1, device=device).to(dtype)
    v[1] = torch.arange(3 * (dim - 1), device=device).view(3, dim - 1) * 0.5  # ties
    v[2], v[3, 0, 0], v[4, 1, 1], v[5, 2, 0] = 0.0, math.nan, math.inf, -math.inf
    where = torch.randperm(20, device=device)[:12]
    more = 4 if kept is torch.int8 else 0
    pools = [[torch.zeros(20, 3, size + more, device=device).to(kept) for size in (dim, dim - 1)] for _ in range(2)]
    table().store_kv(k, v, *pools[0], where)
    REFERENCE.store_kv(k, v, *pools[1], where)
    for pool, expected in zip(*pools, strict=True):
        if kept is torch.int8:
            found, wanted = (expand_rows(x, torch.float32) for x in (pool, expected))
            sound = ~wanted.isnan()
            assert torch.equal(found.isnan(), ~sound) and torch.equal(pool[..., :-4][sound], expected[..., :-4][sound])
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        else:
            torch.testing.assert_close(pool.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_gated_activation(kind: str, dtype: torch.dtype, device: str) -> None:
    for rows, size in ((0, 8), (1, 1), (3, 37), (2, 1100)):
        view = (torch.randn(rows, 2 * size + 3, device=device) * 4).to(dtype)[:, : 2 * size]
        close(table().gated_activation(view, kind), REFERENCE.gated_activation(view, kind))


@pytest.mark.parametrize("value", [0.0, -0.0, 88.0, -100.0, -1e38, 1e-30, math.nan])
def test_gated_activation_at_the_edges(value: float, device: str) -> None:
    x = torch.tensor([[value, 1.0]], device=device)
    for kind in reference.ACTIVATIONS:
        out, expected = table().gated_activation(x, kind), REFERENCE.gated_activation(x, kind)
        torch.testing.assert_close(out, expected, equal_nan=True)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match="'swish'.*silu"):
        table().gated_activation(torch.ones(1, 2), "swish")
