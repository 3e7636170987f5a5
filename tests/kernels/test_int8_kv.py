"""Keys and values in int8: rounding, storing and attending, against the reference over the shape table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pando.kernels import cpu
from pando.kernels.int8_rows import SCALE_BYTES, expand_rows, round_rows
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import ATTENTION_CASES, DTYPES, LEVELS, AttentionCase, attention_inputs, close
from tests.kernels.test_attention import batch_of, random_tree, random_trie

TABLES = {level: cpu.table(level) for level in LEVELS}
native = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> OpTable:
    """The native table of each level this machine runs."""
    return TABLES[request.param]


def with_gaps(rows: Tensor) -> Tensor:
    """The same rows [S, K, B] as a view of a wider tensor."""
    wide = torch.full((*rows.shape[:2], rows.shape[2] + 3), -1, dtype=rows.dtype)
    wide[..., : rows.shape[2]] = rows
    return wide[..., : rows.shape[2]]


def scale_of(rows: Tensor) -> Tensor:
    return rows[..., -SCALE_BYTES:].contiguous().view(torch.float32).squeeze(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64, 130])
def test_a_row_is_off_by_half_a_step_at_most(dim: int, dtype: torch.dtype) -> None:
    x = (torch.randn(40, dim) * torch.logspace(-3, 3, 40).unsqueeze(1)).to(dtype)
    rows = round_rows(x)
    assert rows.shape == (40, dim + 4) and rows.dtype is torch.int8
    scale = scale_of(rows)
    assert torch.equal(scale, x.float().abs().amax(-1) / 127)
    error = (expand_rows(rows, torch.float32) - x.float()).abs()
    assert bool((error <= scale.unsqueeze(1) * 0.5001).all())
    assert int(rows[:, :dim].abs().amax(-1).min()) == 127  # all of the range is used


def test_rows_of_zeros_tiny_rows_and_rows_that_are_not_finite() -> None:
    x = torch.zeros(5, 6)
    x[1] = 2.0**-110
    x[2, 3] = torch.inf
    x[3, 5] = torch.nan
    x[4] = 1e38
    found = expand_rows(round_rows(x), torch.float32)
    assert torch.equal(found[:2], torch.zeros(2, 6))
    assert found[2:4].isnan().all()
    torch.testing.assert_close(found[4], x[4], rtol=1e-6, atol=0.0)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 96), (5, 1), (20, 33)])
def test_storing_gives_the_bits_of_the_reference(ops: OpTable, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    spread = torch.logspace(-45, 4, 30).view(30, 1, 1)
    k = (torch.randn(30, 4, dim + 2, generator=generator) * spread).to(dtype)[:, :3, :dim]
    v = torch.randn(30, 3, v_dim, generator=generator).to(dtype)
    k[3, 0, 0], k[4, 1, -1], v[5, 2, 0] = torch.nan, -torch.inf, torch.inf
    v[6] = 0.0
    v[7] = torch.arange(3 * v_dim).view(3, v_dim) * 0.5  # ties
    where = torch.randperm(50, generator=generator)[:30]
    found = [with_gaps(torch.zeros(50, 3, size + 4, dtype=torch.int8)) for size in (dim, v_dim)]
    expected = [cache.clone() for cache in found]
    ops.store_kv(k, v, found[0], found[1], where)
    REFERENCE.store_kv(k, v, expected[0], expected[1], where)
    for cache, wanted, x in zip(found, expected, (k, v), strict=True):
        finite = x.float().isfinite().all(-1)
        at, other = cache[where], wanted[where]
        assert torch.equal(at[finite], other[finite])
        assert scale_of(at)[~finite].isnan().all() and scale_of(other)[~finite].isnan().all()
        rest = torch.ones(50, dtype=torch.bool).index_fill(0, where, False)
        assert not cache[rest].any()
    for wrong in (50, -1):
        with pytest.raises(ValueError, match="out_loc"):
            ops.store_kv(k[:1], v[:1], found[0], found[1], torch.tensor([wrong]))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=AttentionCase.id)
def test_attention_over_int8_rows(ops: OpTable, case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = attention_inputs(case, dtype)
    inputs.k_cache, inputs.v_cache = (with_gaps(round_rows(cache)) for cache in (inputs.k_cache, inputs.v_cache))
    close(inputs.run(ops), inputs.run(REFERENCE))


@native
@pytest.mark.parametrize("rows", [((1, 900),), ((200, 700),), ((1, 64), (5, 300), (1, 1))], ids=str)
def test_it_is_attention_over_the_rows_expanded(ops: OpTable, rows: tuple[tuple[int, int], ...]) -> None:
    """To the last bit what the same kernel makes of a bfloat16 cache that holds what the int8 rows stand for."""
    for kv_heads in (1, 4):
        inputs = attention_inputs(AttentionCase(rows=rows, kv_heads=kv_heads, head_dim=40), torch.bfloat16)
        caches = [round_rows(cache) for cache in (inputs.k_cache, inputs.v_cache)]
        exact = inputs.run(ops)
        inputs.k_cache, inputs.v_cache = caches
        found = inputs.run(ops)
        inputs.k_cache, inputs.v_cache = (expand_rows(cache, torch.bfloat16) for cache in caches)
        assert torch.equal(found, inputs.run(ops))
        loss = (found.float() - exact.float()).square().mean().sqrt() / exact.float().square().mean().sqrt()
        assert 0 < loss < 0.02


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_result_is_the_same_shared_apart_alone_and_with_more_threads(
    ops: OpTable, page_size: int, dtype: torch.dtype
) -> None:
    paths, rows = random_trie(5, 14, page_size)
    batch = batch_of(paths, rows, page_size=page_size, dtype=dtype)
    batch.k, batch.v = round_rows(batch.k), round_rows(batch.v)
    shared = batch.run(ops)
    close(shared, batch.run(REFERENCE))
    try:
        cpu.set_num_threads(2)
        assert torch.equal(batch.run(ops), shared)
        cpu.set_shared_prefix(False)
        assert torch.equal(batch.run(ops), shared)
    finally:
        cpu.set_num_threads(1)
        cpu.set_shared_prefix(True)
    for row, (queries, _) in enumerate(rows):
        if queries:
            assert torch.equal(batch.row(row).run(ops), shared[batch.starts[row] : batch.starts[row + 1]])


@native
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 300}, {"sinks": torch.tensor([1.0, -1, 0, 9])}])
def test_tree_mask(ops: OpTable, options: dict[str, float | Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [(7, 7), (1, 300), (0, 40), (5, 261), (40, 700), (3, 66)]
    pages = torch.tensor([0, *(-(-keys // 16) for _, keys in rows)]).cumsum(0).tolist()
    batch = batch_of([list(range(a, b)) for a, b in zip(pages, pages[1:], strict=False)], rows, **options)
    batch.k, batch.v = round_rows(batch.k), round_rows(batch.v)
    batch.tree_mask = torch.cat([random_tree(queries, generator).flatten() for queries, _ in rows])
    close(batch.run(ops), batch.run(REFERENCE))


@native
def test_a_page_outside_the_cache_raises(ops: OpTable) -> None:
    inputs = attention_inputs(replace(AttentionCase(), rows=((1, 40),)), torch.bfloat16)
    inputs.k_cache, inputs.v_cache = round_rows(inputs.k_cache), round_rows(inputs.v_cache)
    inputs.ragged[0][0, 1] = 99
    with pytest.raises(ValueError, match="page_table"):
        inputs.run(ops)
