"""Attention beyond the shape table: shared prefixes, tree masks, plans, rounding, extreme values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pando.kernels import cpu
from pando.kernels.ops import OpTable
from pando.kernels.reference import REFERENCE
from tests.kernels.cases import LEVELS, AttentionCase, attention_inputs, close

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no compiled kernels: {cpu.LOAD_ERROR}")

TABLES = {level: cpu.table(level) for level in LEVELS}
PART = 256
"""ATTENTION_SPLIT of csrc/kernels.hpp: what is shared, is shared in multiples of this many tokens."""


@pytest.fixture(params=LEVELS)
def ops(request: pytest.FixtureRequest) -> OpTable:
    """The native table of each level this machine runs."""
    return TABLES[request.param]


@pytest.fixture
def apart() -> Iterator[None]:
    """Puts sharing back on after a test that turns it off."""
    yield
    cpu.set_shared_prefix(True)


@dataclass(slots=True)
class Batch:
    """Rows with page tables of their own choosing."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    starts: Tensor
    kv_lens: Tensor
    page_size: int
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None
    tree_mask: Tensor | None = None

    def run(self, ops: OpTable, plan: object = None) -> Tensor:
        """paged_attention of `ops`."""
        return ops.paged_attention(
            self.q,
            self.k,
            self.v,
            self.table,
            self.starts,
            self.kv_lens,
            page_size=self.page_size,
            scale=self.q.shape[2] ** -0.5,
            softcap=self.softcap,
            window=self.window,
            sinks=self.sinks,
            tree_mask=self.tree_mask,
            plan=plan,  # type: ignore[arg-type]
        )

    def row(self, row: int) -> Batch:
        """One row alone."""
        begin, end = int(self.starts[row]), int(self.starts[row + 1])
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        return Batch(
            self.q[begin:end],
            self.k,
            self.v,
            self.table[row : row + 1],
            starts,
            self.kv_lens[row : row + 1],
            self.page_size,
            self.softcap,
            self.window,
            self.sinks,
        )


def batch_of(
    paths: list[list[int]],
    rows: list[tuple[int, int]],
    *,
    page_size: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    v_dim: int = 24,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **options: float | Tensor,
) -> Batch:
    """`paths[r]` are the pages of row r, which has (queries, keys) `rows[r]`."""
    generator = torch.Generator().manual_seed(seed)
    pages = max(max(path, default=0) for path in paths) + 1
    table = torch.full((len(paths), max(map(len, paths)) + 1), 1 << 30, dtype=torch.int32)
    for row, path in enumerate(paths):
        table[row, : len(path)] = torch.tensor(path, dtype=torch.int32)
    starts = torch.tensor([0, *(queries for queries, _ in rows)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), heads, dim, generator=generator).to(dtype)
    k = torch.randn(pages * page_size, kv_heads, dim, generator=generator).to(dtype)
    v = torch.randn(pages * page_size, kv_heads, v_dim, generator=generator).to(dtype)
    kv_lens = torch.tensor([keys for _, keys in rows], dtype=torch.int32)
    return Batch(q, k, v, table, starts, kv_lens, page_size, **options)  # type: ignore[arg-type]


def random_trie(seed: int, num_rows: int, page_size: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Rows that leave one another's path at random places, as requests below the nodes of a radix tree do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    paths: list[list[int]] = []
    rows: list[tuple[int, int]] = []
    taken = 0
    for _ in range(num_rows):
        queries, keys = draw(0, 4) or draw(1, 40), draw(1, 1600)
        keys = max(keys, queries)
        need = -(-keys // page_size)
        path: list[int] = []
        if paths and draw(0, 4):
            # Pages that hold a row's own tokens are never shared.
            path = paths[draw(0, len(paths))][: min(draw(0, 1600), keys - queries) // page_size]
        own = need - len(path)
        paths.append(path + list(range(taken, taken + own)))
        taken += own
        rows.append((queries, keys))
    order = torch.randperm(taken, generator=generator).tolist()
    return [[order[page] for page in path] for path in paths], rows


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 3])
def test_a_result_is_bitwise_the_same_whether_or_not_rows_share(
    ops: OpTable, page_size: int, dtype: torch.dtype
) -> None:
    for seed in range(3):
        paths, rows = random_trie(seed, 14, page_size)
        sinks = torch.randn(4) if seed == 1 else None
        batch = batch_of(paths, rows, page_size=page_size, dtype=dtype, sinks=sinks, softcap=8.0 if seed == 2 else 0.0)  # type: ignore[arg-type]
        cpu.set_shared_prefix(True)
        shared = batch.run(ops)
        cpu.set_num_threads(2)
        assert torch.equal(batch.run(ops), shared)
        cpu.set_num_threads(1)
        cpu.set_shared_prefix(False)
        assert torch.equal(batch.run(ops), shared)
        for row, (queries, _) in enumerate(rows):
            if queries:
                assert torch.equal(batch.row(row).run(ops), shared[batch.starts[row] : batch.starts[row + 1]])
        close(shared, batch.run(REFERENCE))


@pytest.mark.usefixtures("apart")
def test_shared_pages_are_read_once_at_every_level_of_the_trie(ops: OpTable) -> None:
    """Forty rows below 512 tokens, ten of them below 512 more, which two share to the end; one row stands apart."""
    root, branch, leaf = range(32), range(32, 64), range(64, 80)
    paths = [[*root, 100 + row] for row in range(30)]
    paths += [[*root, *branch, 200 + row] for row in range(8)]
    paths += [[*root, *branch, *leaf, 300 + row] for row in range(2)]
    paths += [list(range(400, 433))]
    rows = [(1, 16 * len(path) - 5) for path in paths]
    batch = batch_of(paths, rows, heads=8, kv_heads=2)
    plan = cpu._native.AttentionPlan(False)
    out = batch.run(ops, plan)
    own = 31 * 11 + 16 * 32 + 8 * 11 + 2 * 11
    # 64 query rows of a KV head are 16 rows of this batch: the root is read for 16, 16 and 8 of them.
    assert plan.keys_read == 3 * 512 + 512 + 256 + own
    assert plan.keys_seen == sum(keys for _, keys in rows)
    cpu.set_shared_prefix(False)
    plan.reset()
    assert torch.equal(batch.run(ops, plan), out)
    assert plan.keys_read == plan.keys_seen


def test_equal_pages_after_different_ones_are_not_a_shared_prefix(ops: OpTable) -> None:
    paths = [[*range(10, 26), *range(40, 60)], [*range(60, 76), *range(40, 60)], [*range(10, 25), 99, *range(40, 60)]]
    batch = batch_of(paths, [(1, 16 * 36)] * 3)
    plan = cpu._native.AttentionPlan(False)
    close(batch.run(ops, plan), batch.run(REFERENCE))
    assert plan.keys_read == plan.keys_seen


def test_own_tokens_and_windows_are_not_shared(ops: OpTable) -> None:
    paths = [list(range(32)), list(range(32))]
    for rows, window, read in (
        ([(1, 512)] * 2, 0, 256 + 2 * 256),
        ([(1, 512)] * 2, 300, 2 * 300),
        ([(5, 260)] * 2, 0, 520),
    ):
        batch = batch_of(paths, rows, window=window)
        plan = cpu._native.AttentionPlan(False)
        close(batch.run(ops, plan), batch.run(REFERENCE))
        assert plan.keys_read == read


def test_one_plan_serves_layers_of_several_kinds_and_the_next_step_after_a_reset(ops: OpTable) -> None:
    paths, rows = random_trie(7, 9, 16)
    batch = batch_of(paths, rows)
    plan = ops.attention_plan()
    for window in (0, 300, 0, 20, 300, 7, 1, 0):
        batch.window = window
        assert torch.equal(batch.run(ops, plan), batch.run(ops))
    batch.window = 0
    table, kv_lens = batch.table.clone(), batch.kv_lens.clone()
    batch.table.copy_(table.flip(0))
    batch.kv_lens.copy_(kv_lens.flip(0))
    lens = batch.starts.diff().flip(0)
    batch.starts[1:] = lens.cumsum(0)
    plan.reset()
    out = batch.run(ops, plan)
    assert torch.equal(out, batch.run(ops))
    close(out, batch.run(REFERENCE))


def random_tree(n: int, generator: torch.Generator) -> Tensor:
    """[n, n]: token i sees itself and the ancestors of a random tree."""
    mask = torch.eye(n, dtype=torch.bool)
    for token in range(1, n):
        parent = int(torch.randint(-1, token, (1,), generator=generator))
        if parent >= 0:
            mask[token] |= mask[parent]
    return mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"window": 300}, {"sinks": torch.tensor([1.0, -1, 0, 9])}])
def test_tree_mask(ops: OpTable, options: dict[str, float | Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [(7, 7), (1, 300), (0, 40), (5, 261), (9, 600), (40, 700), (70, 90), (3, 66)]
    paths, taken = [], 0
    for _, keys in rows:
        pages = -(-keys // 16)
        paths.append(list(range(taken, taken + pages)))
        taken += pages
    batch = batch_of(paths, rows, dtype=dtype, **options)
    masks = [random_tree(queries, generator) for queries, _ in rows]
    for mask_dtype in (torch.bool, torch.uint8):
        batch.tree_mask = torch.cat([mask.flatten() for mask in masks]).to(mask_dtype)
        close(batch.run(ops), batch.run(REFERENCE))
    batch.tree_mask = torch.cat([torch.ones_like(mask).tril().flatten() for mask in masks])
    with_mask, batch.tree_mask = batch.run(ops), None
    close(with_mask, batch.run(ops))


def test_tree_mask_of_siblings_equals_separate_chains() -> None:
    """Two branches below one prefix, verified at once, are what two rows would be."""
    prefix, branch = list(range(19)), [19]
    batch = batch_of([prefix + branch], [(4, 300 + 4)], dtype=torch.float32)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.uint8)
    batch.tree_mask = mask.flatten()
    for table in (REFERENCE, *TABLES.values()):
        out = batch.run(table)
        for chain, queries in (([0, 1], slice(0, 2)), ([2, 3], slice(2, 4))):
            slots = [*range(300), *(300 + j for j in chain)]
            page = torch.tensor([slots], dtype=torch.int32)
            starts, kv_lens = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([302], dtype=torch.int32)
            alone = Batch(batch.q[queries], batch.k, batch.v, page, starts, kv_lens, 1)
            close(out[queries], alone.run(REFERENCE))


def test_a_tree_mask_that_is_too_short_raises(ops: OpTable) -> None:
    batch = batch_of([[0], [1]], [(3, 9), (2, 8)])
    batch.tree_mask = torch.ones(12, dtype=torch.bool)
    with pytest.raises(ValueError, match="tree_mask out of range"):
        batch.run(ops)


@pytest.mark.parametrize("rows", [((1, 700),), ((3, 90), (1, 5)), ((64, 200),), ((9, 9),)], ids=str)
def test_extreme_values(ops: OpTable, rows: tuple[tuple[int, int], ...]) -> None:
    """Huge, tiny and denormal queries and keys, huge values: nothing overflows that the reference keeps finite."""
    for dtype in (torch.bfloat16, torch.float32):
        for q_factor, v_factor in ((1e4, 1e30), (1e-30, 1e-30), (1e-39, 1.0), (0.0, 1e-39), (40.0, -1e4)):
            inputs = attention_inputs(AttentionCase(rows=rows), dtype)
            inputs.q = (inputs.q.float() * q_factor).to(dtype)
            inputs.v_cache = (inputs.v_cache.float() * v_factor).to(dtype)
            actual, expected = inputs.run(ops).float(), inputs.run(REFERENCE).float()
            # Some processors take denormal factors for 0; that is an error below the smallest normal number.
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=max(1e-2 * abs(v_factor), 2e-38))


def test_an_infinite_score_hides_the_others_like_in_the_reference(ops: OpTable) -> None:
    batch = batch_of([[0, 1], [2, 3]], [(1, 20), (9, 30)])
    batch.sinks = torch.tensor([-math.inf, 500.0, 0.0, -500.0])
    close(batch.run(ops), batch.run(REFERENCE))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention [H, N, D] over [H, L, D] in float64."""
    queries, keys = q.shape[1], k.shape[1]
    scores = q.double() @ k.double().transpose(1, 2) * q.shape[2] ** -0.5
    hidden = torch.arange(keys) > torch.arange(keys - queries, keys).unsqueeze(1)
    return torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v.double()


@pytest.mark.parametrize(("queries", "keys"), [(1, 900), (200, 200), (64, 1100), (4, 1500)])
def test_rounding_the_weights_to_bfloat16_costs_no_more_than_torch_itself_loses(queries: int, keys: int) -> None:
    """Error against float64, with torch's own bfloat16 attention as the yardstick."""
    heads, dim = 4, 64
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(queries, heads, dim, generator=generator) * 2).bfloat16()
    k, v = ((torch.randn(keys, heads, dim, generator=generator) + 0.3).bfloat16() for _ in range(2))
    wide_q, wide_k, wide_v = (x.transpose(0, 1) for x in (q, k, v))
    truth = exact(wide_q, wide_k, wide_v)
    seen = torch.arange(keys) <= torch.arange(keys - queries, keys).unsqueeze(1)
    torch_error = F.scaled_dot_product_attention(wide_q[None], wide_k[None], wide_v[None], attn_mask=seen)[0] - truth
    pages = [list(range(keys))]
    starts, kv_lens = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    batch = Batch(q, k, v, torch.tensor(pages, dtype=torch.int32), starts, kv_lens, 1)
    for table in TABLES.values():
        error = batch.run(table).transpose(0, 1).double() - truth
        assert float(error.square().mean()) <= 1.15 * float(torch_error.double().square().mean())
        assert float(error.abs().max()) <= 1.5 * float(torch_error.abs().max())
