"""The paged backend against plain attention, over scattered pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pando.attention.paged import PagedAttentionBackend
from pando.cache.pool import KVPool
from pando.cache.spec import CachePlan, FullAttention, SlidingWindow
from pando.forward import AttentionParams, ForwardBatch
from pando.kernels import op_table
from pando.kernels.ops import Rope

HEADS, KV_HEADS, DIM, V_DIM = 4, 2, 8, 6


def batch_of(lengths: list[int], page_size: int) -> ForwardBatch:
    """All tokens of rows of these lengths, pages dealt out from the end of the pool backwards."""
    free = list(range(sum(-(-n // page_size) for n in lengths)))
    pages = [[free.pop() for _ in range(-(-n // page_size))] for n in lengths]
    table = torch.zeros(len(lengths), max(map(len, pages)), dtype=torch.int32)
    for row, owned in enumerate(pages):
        table[row, : len(owned)] = torch.tensor(owned)
    where = [pages[r][t // page_size] * page_size + t % page_size for r, n in enumerate(lengths) for t in range(n)]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return ForwardBatch(
        input_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        out_loc=(torch.tensor(where),),
        cu_q_lens=cu.to(torch.int32),
        kv_lens=torch.tensor(lengths, dtype=torch.int32),
        page_table=(table,),
        logits_index=cu[1:] - 1,
        page_size=page_size,
        max_q_len=max(lengths),
        max_kv_len=max(lengths),
    )


def plain(q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
    """Attention of one row, head by head, in float64."""
    length = q.shape[0]
    behind = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = (behind < 0) | (behind >= (params.window or length + 1))
    out = torch.empty(length, HEADS, V_DIM, dtype=torch.float64)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = q[:, head].double() @ k[:, group].double().T * params.scale
        if params.softcap:
            scores = params.softcap * (scores / params.softcap).tanh()
        weights = scores.masked_fill(hidden, float("-inf")).exp()
        sink = params.sinks[head].double().exp() if params.sinks is not None else 0.0
        out[:, head] = weights @ v[:, group].double() / (weights.sum(-1, keepdim=True) + sink)
    return out


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.35),
        AttentionParams(0.35, window=3),
        AttentionParams(0.35, softcap=0.5),
        AttentionParams(0.35, window=2, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
    ids=["full", "window", "softcap", "window and sinks"],
)
def test_stored_keys_are_attended(params: AttentionParams, page_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 9, 1]
    total = sum(lengths)
    qkv = torch.randn(total, HEADS * DIM + KV_HEADS * (DIM + V_DIM), generator=generator)
    # Views into one fused projection, as the attention layer passes them.
    q, k, v = qkv.split((HEADS * DIM, KV_HEADS * DIM, KV_HEADS * V_DIM), dim=-1)
    q, k, v = q.view(total, HEADS, DIM), k.view(total, KV_HEADS, DIM), v.view(total, KV_HEADS, V_DIM)
    plan = CachePlan.of([FullAttention(KV_HEADS, DIM, V_DIM, "float32")] * 2)
    batch = batch_of(lengths, page_size)
    num_pages = sum(-(-n // page_size) for n in lengths)
    backend = PagedAttentionBackend(
        KVPool(plan, num_pages, page_size, "cpu", torch.float32), op_table("cpu", "reference")
    )
    backend.store(1, k, v, batch)
    out = backend.attend(1, q, params, batch)
    assert out.shape == (total, HEADS, V_DIM)
    assert float(backend.pool.k[0].abs().max()) == 0.0
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        torch.testing.assert_close(out[rows].double(), plain(q[rows], k[rows], v[rows], params), atol=1e-5, rtol=1e-5)
        start += length


def test_each_batch_is_planned_afresh() -> None:
    """Batches of the same shape one after the other, on one backend: the second must not use the first one's pages."""
    generator = torch.Generator().manual_seed(1)
    lengths, params = [40, 300], AttentionParams(0.35)
    plan = CachePlan.of([FullAttention(KV_HEADS, DIM, V_DIM, "float32")])
    backend = PagedAttentionBackend(KVPool(plan, 400, 4, "cpu", torch.float32), op_table("cpu"))
    for _ in range(2):
        batch = batch_of(lengths, 4)
        total = sum(lengths)
        q = torch.randn(total, HEADS, DIM, generator=generator)
        k, v = (torch.randn(total, KV_HEADS, dim, generator=generator) for dim in (DIM, V_DIM))
        backend.store(0, k, v, batch)
        out = backend.attend(0, q, params, batch)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            expected = plain(q[rows], k[rows], v[rows], params)
            torch.testing.assert_close(out[rows].double(), expected, atol=1e-5, rtol=1e-5)
            start += length
        lengths.reverse()


@pytest.mark.parametrize(("window", "sinks"), [(33, False), (33, True), (300, False)])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["reference", "auto", "deterministic"])
def test_pages_behind_a_window_are_not_read(
    kernels: str, dtype: torch.dtype, page_size: int, window: int, sinks: bool
) -> None:
    """Two groups of layers; what the window's table says of freed pages leads to pages that hold no numbers.

    The rows begin with the same pages of full attention, and their windows' stale entries are alike too.
    """
    generator = torch.Generator().manual_seed(2)
    lengths, counts, num_pages = [700, 701, 350, 40], [1, 1, 70, 40], 2200 // page_size
    name = str(dtype).removeprefix("torch.")
    plan = CachePlan.of([FullAttention(KV_HEADS, DIM, V_DIM, name), SlidingWindow(KV_HEADS, DIM, V_DIM, name, window)])
    pool = KVPool(plan, num_pages, page_size, "cpu", dtype, num_window_pages=num_pages // 2)
    assert pool.groups == (0, 1)
    same = kernels == "deterministic"
    backend = PagedAttentionBackend(pool, op_table("cpu", "auto" if same else kernels, deterministic=same))
    params = [AttentionParams(0.3), AttentionParams(0.3, window, sinks=torch.randn(HEADS) if sinks else None)]
    kv = [[torch.randn(n, KV_HEADS, dim, generator=generator).to(dtype) for dim in (DIM, V_DIM)] for n in lengths]
    shared = 320
    for k, v in kv[1:3]:
        k[:shared], v[:shared] = kv[0][0][:shared], kv[0][1][:shared]
    width = -(-max(lengths) // page_size)
    tables = torch.zeros(2, len(lengths), width, dtype=torch.int32)
    free = [torch.randperm(n, generator=generator).tolist() for n in pool.num_pages]
    stale = free[1].pop()
    for layer in range(2):
        for tensor in (pool.k[1], pool.v[1]):
            tensor[stale * page_size : (stale + 1) * page_size] = torch.nan
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            first = max(0, length - count + 1 - window) // page_size if layer else 0
            for page in range(-(-length // page_size)):
                if page < first:
                    tables[layer, row, page] = stale
                    continue
                joint = layer == 0 and 0 < row < 3 and (page + 1) * page_size <= shared
                tables[layer, row, page] = tables[0, 0, page] if joint else free[layer].pop()
                at, begin = int(tables[layer, row, page]) * page_size, page * page_size
                held = min(page_size, length - begin)
                for cache, values in zip((pool.k[layer], pool.v[layer]), kv[row], strict=True):
                    cache[at : at + held] = values[begin : begin + held]
    cu = torch.tensor([0, *counts]).cumsum(0)
    nowhere = torch.zeros(sum(counts), dtype=torch.int64)
    batch = ForwardBatch(
        nowhere, nowhere, (nowhere, nowhere), cu.int(), torch.tensor(lengths, dtype=torch.int32),
        (tables[0], tables[1]), cu[1:] - 1, page_size, max(counts), max(lengths),
    )  # fmt: skip
    whole = [torch.randn(n, HEADS, DIM, generator=generator).to(dtype) for n in lengths]
    q = torch.cat([of[-count:] for of, count in zip(whole, counts, strict=True)])
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.02, "rtol": 0.02}
    for layer in (0, 1, 0):
        out = backend.attend(layer, q, params[layer], batch).split(counts)
        for row, (found, count) in enumerate(zip(out, counts, strict=True)):
            expected = plain(whole[row], *kv[row], params[layer])[-count:]
            torch.testing.assert_close(found.double(), expected, **near)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_turned_keys_go_where_stored_ones_go(kernels: str) -> None:
    """In the layer's own group, and as the ops in turn leave them."""
    generator = torch.Generator().manual_seed(3)
    plan = CachePlan.of(
        [FullAttention(KV_HEADS, DIM, V_DIM, "float32"), SlidingWindow(KV_HEADS, DIM, V_DIM, "float32", 16)]
    )
    ops = op_table("cpu", kernels)
    pools = [KVPool(plan, 9, 4, "cpu", torch.float32, num_window_pages=9) for _ in range(2)]
    batch = batch_of([5, 9], 4)
    batch.out_loc = (batch.out_loc[0], batch.out_loc[0].flip(0) + 1)
    qkv = torch.randn(14, HEADS + 2 * KV_HEADS, DIM, generator=generator)
    angles, norms = torch.randn(9, DIM - 2, generator=generator), torch.rand(2, DIM, generator=generator)
    rope = Rope(batch.positions, angles, False, (norms[0], norms[1]), 1e-5)
    turned = ops.rms_norm(qkv[:, :HEADS].contiguous(), norms[0], 1e-5)
    keys = ops.rms_norm(qkv[:, HEADS:-KV_HEADS].contiguous(), norms[1], 1e-5)
    values = qkv[:, -KV_HEADS:, :V_DIM]
    ops.rope_(turned, keys, batch.positions, angles, False)
    PagedAttentionBackend(pools[0], ops).store(1, keys, values, batch)
    found = PagedAttentionBackend(pools[1], ops).rope_store(
        1, qkv[:, :HEADS], qkv[:, HEADS:-KV_HEADS], values, rope, batch
    )
    assert torch.equal(found, turned)
    for mine, expected in zip((*pools[1].k, *pools[1].v), (*pools[0].k, *pools[0].v), strict=True):
        assert torch.equal(mine, expected)
    assert pools[1].k[1].any() and not pools[1].k[0].any()
