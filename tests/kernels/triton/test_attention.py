"""Paged attention against the reference: the shape table, tree masks, plans, and sharing that changes no bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pando.kernels import reference
from pando.kernels.int8_rows import expand_rows, round_rows
from pando.kernels.reference import REFERENCE
from pando.kernels.triton import attention, attention_plan
from pando.kernels.triton.int8_cache import as_words
from tests.kernels.cases import ATTENTION_CASES, AttentionCase, AttentionInputs, attention_inputs, close

OPS = replace(REFERENCE, paged_attention=attention.paged_attention, attention_plan=attention_plan.Plan)

BFLOAT16_CASES = tuple(case for case in ATTENTION_CASES if sum(keys for _, keys in case.rows) < 200)[::5]
"""The interpreter is slow, and most of what differs by dtype is the products."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """In the interpreter a small GPU: programs without work take time, and those with several items are tried."""
    if device == "cpu":
        monkeypatch.setattr(attention, "num_sms", lambda _: 2)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Splits of 64 tokens, at most 8 of them: splits and their growth on rows that the interpreter can bear."""
    monkeypatch.setattr(attention_plan, "SPLIT", 64)
    monkeypatch.setattr(attention_plan, "MAX_SPLITS", 8)
    yield


@pytest.fixture
def products_by_row(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """In the interpreter products whose rows do not depend on their place, as a GPU's; those of numpy's library do."""
    if device == "cpu":
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(1, dtype=dtype))


def placed(inputs: AttentionInputs, device: str) -> AttentionInputs:
    """The inputs on a device."""
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.options.items()}
    q, k, v = inputs.q.to(device), inputs.k_cache.to(device), inputs.v_cache.to(device)
    table, starts, kv_lens = (x.to(device) for x in inputs.ragged)
    return AttentionInputs(q, k, v, (table, starts, kv_lens), options)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=AttentionCase.id)
def test_shape_table(case: AttentionCase, device: str) -> None:
    inputs = placed(attention_inputs(case), device)
    close(inputs.run(OPS), inputs.run(REFERENCE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BFLOAT16_CASES, ids=AttentionCase.id)
def test_half_precision(case: AttentionCase, dtype: torch.dtype, device: str) -> None:
    inputs = placed(attention_inputs(case, dtype), device)
    close(inputs.run(OPS), inputs.run(REFERENCE))


def batch_of(
    paths: list[list[int]],
    rows: list[tuple[int, int]],
    device: str,
    *,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: float | Tensor,
) -> AttentionInputs:
    """`paths[r]` are the pages of row r, which has (queries, keys) `rows[r]`; 4 heads of 16 dims on 2 KV heads."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.full((len(paths), max(map(len, paths)) + 1), 1 << 30, dtype=torch.int32)
    for row, path in enumerate(paths):
        table[row, : len(path)] = torch.tensor(path, dtype=torch.int32)
    starts = torch.tensor([0, *(queries for queries, _ in rows)]).cumsum(0).int()
    slots = (max(max(path, default=0) for path in paths) + 1) * page_size
    q = torch.randn(int(starts[-1]), 4, 16, generator=generator).to(dtype)
    k, v = (torch.randn(slots, 2, 16, generator=generator).to(dtype) for _ in range(2))
    kv_lens = torch.tensor([keys for _, keys in rows], dtype=torch.int32)
    chosen = {"page_size": page_size, "scale": 0.25, **options}
    return placed(AttentionInputs(q, k, v, (table, starts, kv_lens), chosen), device)


def apart(rows: list[tuple[int, int]], page_size: int = 16) -> list[list[int]]:
    """Pages of rows that share nothing."""
    paths, taken = [], 0
    for _, keys in rows:
        pages = -(-keys // page_size)
        paths.append(list(range(taken, taken + pages)))
        taken += pages
    return paths


def row_alone(batch: AttentionInputs, row: int) -> AttentionInputs:
    """One row as a call of its own."""
    table, starts, kv_lens = batch.ragged
    begin, end = int(starts[row]), int(starts[row + 1])
    ragged = (table[row : row + 1], torch.tensor([0, end - begin]).int().to(table.device), kv_lens[row : row + 1])
    return replace(batch, q=batch.q[begin:end], ragged=ragged)


def random_trie(seed: int, num_rows: int, page_size: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Rows that leave one another's path at random places, as requests below the nodes of a radix tree do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    paths: list[list[int]] = []
    rows: list[tuple[int, int]] = []
    taken = 0
    for _ in range(num_rows):
        queries = draw(0, 4) or draw(1, 12)
        keys = max(draw(1, 300), queries)
        path: list[int] = []
        if paths and draw(0, 4):
            path = paths[draw(0, len(paths))][: min(draw(0, 400), keys - queries) // page_size]
        own = -(-keys // page_size) - len(path)
        paths.append(path + list(range(taken, taken + own)))
        taken += own
        rows.append((queries, keys))
    order = torch.randperm(taken, generator=generator).tolist()
    return [[order[page] for page in path] for path in paths], rows


@pytest.mark.usefixtures("short_splits", "products_by_row")
@pytest.mark.parametrize(("page_size", "window"), [(1, 0), (16, 150)])
def test_a_result_is_bitwise_the_same_whether_or_not_rows_share(
    page_size: int, window: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, rows = random_trie(page_size, 6, page_size)
    batch = batch_of(paths, rows, device, page_size=page_size, window=window)
    shared = batch.run(OPS)
    close(shared, batch.run(REFERENCE))
    starts = batch.ragged[1].tolist()
    for row in (0, 5):
        if rows[row][0]:
            assert torch.equal(row_alone(batch, row).run(OPS), shared[starts[row] : starts[row + 1]])
    monkeypatch.setattr(attention, "SHARE", False)
    assert torch.equal(batch.run(OPS), shared)


def work_of(batch: AttentionInputs, *, item_tokens: int = 4, short: int = 4, share: bool = True) -> attention_plan.Work:
    """The plan of a batch."""
    table, starts, kv_lens = batch.ragged
    kind = attention_plan.Kind(
        int(batch.options["page_size"]), int(batch.options.get("window", 0)), 16, item_tokens, short, share
    )
    return attention_plan.make_work(kind, table, starts, kv_lens, batch.q.shape[0])


def items_of(work: attention_plan.Work, item_tokens: int = 4) -> set[tuple[int, ...]]:
    """Of each item: first key, end of keys, and its tokens."""
    count = int(work.counter)
    members = work.members[0].view(-1, item_tokens).tolist()
    items = work.items[:count].tolist()
    assert count <= work.num_items
    return {(item[1], item[2], *members[index][: item[5]]) for index, item in enumerate(items)}


@pytest.mark.usefixtures("short_splits")
def test_rows_share_the_splits_whose_pages_are_the_same(device: str) -> None:
    """Five rows of one query below 128 tokens; the last leaves after 64. One item holds four tokens."""
    root, rest = list(range(8)), list(range(8, 12))
    paths = [[*root, 20 + row] for row in range(4)] + [[*root[:4], *rest, 30]]
    batch = batch_of(paths, [(1, 140), (1, 130), (1, 129), (2, 140), (1, 129)], device)
    work = work_of(batch)
    own = {(128, 140, 0), (128, 130, 1), (128, 129, 2), (128, 140, 3, 4), (128, 129, 5)}
    assert (
        items_of(work) == {(0, 64, 0, 1, 2, 3), (0, 64, 4, 5), (64, 128, 0, 1, 2, 3), (64, 128, 4), (64, 128, 5)} | own
    )
    assert work.tokens.tolist() == [[0, 1, 2, 3, 4, 5], [3] * 6]
    assert len(items_of(work_of(batch, share=False))) == 3 * 5


@pytest.mark.usefixtures("short_splits")
def test_equal_last_pages_behind_different_ones_are_not_shared(device: str) -> None:
    batch = batch_of([[0, 1, 2, 3, 4], [5, 1, 2, 3, 6], [0, 1, 2, 3, 7]], [(1, 65)] * 3, device)
    assert items_of(work_of(batch)) == {(0, 64, 0, 2), (0, 64, 1), (64, 65, 0), (64, 65, 1), (64, 65, 2)}


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    ("rows", "window", "items"),
    [
        ([(1, 65), (1, 128)], 0, {(0, 64, 0, 1), (64, 65, 0), (64, 128, 1)}),
        ([(2, 65), (1, 65)], 0, {(0, 64, 0, 1), (0, 64, 2), (64, 65, 0, 1), (64, 65, 2)}),
        # Of the longer row the window cuts the first split.
        ([(1, 70), (1, 80)], 70, {(0, 64, 0), (10, 64, 1), (64, 70, 0), (64, 80, 1)}),
    ],
)
def test_own_tokens_and_cut_windows_are_not_shared(
    rows: list[tuple[int, int]], window: int, items: set[tuple[int, ...]], device: str
) -> None:
    path = list(range(8))
    assert items_of(work_of(batch_of([path, path], rows, device, window=window))) == items


@pytest.mark.usefixtures("short_splits")
def test_splits_grow_with_the_row_and_not_with_the_batch(device: str) -> None:
    rows = [(1, 512), (1, 513), (0, 2000), (9, 700)]
    work = work_of(batch_of(apart(rows), rows, device))
    sizes = {(item[0], item[1] - item[0]) for item in work.items[: int(work.counter), 1:3].tolist()}
    assert sizes == {(64 * i, 64) for i in range(8)} | {(128 * i, 128) for i in range(4)} | {(512, 1)}
    assert work.sums.tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 2, 2]]
    assert work.squares.tolist() == [0, 1, 2, 2, 83]


def random_tree(n: int, generator: torch.Generator) -> Tensor:
    """[n, n]: token i sees itself and the ancestors of a random tree."""
    mask = torch.eye(n, dtype=torch.bool)
    for token in range(1, n):
        parent = int(torch.randint(-1, token, (1,), generator=generator))
        if parent >= 0:
            mask[token] |= mask[parent]
    return mask


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"window": 30, "sinks": torch.tensor([1.0, -1, 0, 9])}])
def test_tree_mask(options: dict[str, float | Tensor], device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [(7, 7), (1, 200), (0, 40), (5, 131), (9, 100), (20, 70), (3, 66)]
    masks = torch.cat([random_tree(queries, generator).flatten() for queries, _ in rows])
    mask = masks.to(torch.uint8) if "window" in options else masks
    batch = batch_of(apart(rows), rows, device, tree_mask=mask, **options)
    close(batch.run(OPS), batch.run(REFERENCE))


@pytest.mark.usefixtures("short_splits")
def test_a_plan_serves_layers_of_several_kinds_and_the_next_step_after_a_reset(device: str) -> None:
    paths, rows = random_trie(7, 4, 16)
    batch = batch_of(paths, rows, device)
    plan = OPS.attention_plan()
    for window in (100, 0):
        planned = replace(batch, options={**batch.options, "window": window, "plan": plan})
        fresh = replace(batch, options={**batch.options, "window": window})
        assert torch.equal(planned.run(OPS), fresh.run(OPS))
    table, starts, kv_lens = (x.clone() for x in batch.ragged)
    batch.ragged[0].copy_(table.flip(0))
    batch.ragged[2].copy_(kv_lens.flip(0))
    batch.ragged[1][1:] = starts.diff().flip(0).cumsum(0)
    plan.reset()
    out = replace(batch, options={**batch.options, "plan": plan}).run(OPS)
    close(out, batch.run(REFERENCE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latent(dtype: torch.dtype, device: str) -> None:
    """One key head whose first dims are the values, as compressed caches have it: the values are not read again."""
    rows = [(1, 70), (2, 33), (11, 40)]
    batch = batch_of(apart(rows), rows, device, dtype=dtype)
    k = torch.randn(batch.k_cache.shape[0], 1, 48).to(device, dtype)
    batch = replace(batch, q=torch.randn(14, 20, 48).to(device, dtype), k_cache=k, v_cache=k[..., :32])
    assert attention._is_latent(batch.k_cache, batch.v_cache, 32)
    assert not attention._is_latent(batch.k_cache, batch.v_cache.clone(), 32)
    assert not attention._is_latent(batch.k_cache, k[..., 16:], 32)
    close(batch.run(OPS), batch.run(REFERENCE))
    close(batch.run(OPS), replace(batch, v_cache=batch.v_cache.clone()).run(OPS))


@pytest.mark.parametrize("rows", [[(1, 90)], [(20, 40)]], ids=str)
def test_extreme_values(rows: list[tuple[int, int]], device: str) -> None:
    """Huge and tiny queries, huge values: nothing overflows that the reference keeps finite."""
    for q_factor, v_factor in ((1e4, 1e30), (1e-30, 1e-30), (0.0, 1.0), (40.0, -1e4)):
        batch = batch_of(apart(rows), rows, device, dtype=torch.bfloat16)
        batch = replace(batch, q=(batch.q.float() * q_factor).bfloat16(), v_cache=(batch.v_cache * v_factor).bfloat16())
        actual, expected = batch.run(OPS).float(), batch.run(REFERENCE).float()
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=max(1e-2 * abs(v_factor), 2e-38))


def test_an_infinite_sink_hides_the_others_like_in_the_reference(device: str) -> None:
    rows = [(1, 20), (11, 30)]
    batch = batch_of(apart(rows), rows, device, sinks=torch.tensor([-math.inf, 500.0, 0.0, -500.0]))
    close(batch.run(OPS), batch.run(REFERENCE))


def test_no_tokens_at_all(device: str) -> None:
    batch = batch_of(apart([(1, 5)]), [(0, 5)], device)
    assert batch.run(OPS).shape == (0, 4, 16)


@pytest.mark.parametrize("dim", [1, 8, 16, 20, 24, 40, 64, 72, 80, 96, 112, 128, 192, 256, 320, 512, 576])
def test_parts_of_a_head_dim_hold_it_with_little_room_to_spare(dim: int) -> None:
    first, rest = attention.dim_parts(dim)
    assert first + rest >= dim and first + rest - dim < max(16, dim / 2)
    assert all(part in (0, 16, 32, 64, 128, 256, 512) for part in (first, rest)) and (rest == 0 or first <= dim)


@pytest.mark.parametrize(
    "shapes", [[(5, 9)], [(200, 200), (17, 30), (9, 9), (8, 8)], [(1, 3)] * 40, [(0, 3), (129, 130)]]
)
def test_the_grid_has_room_for_every_tile_and_item(shapes: list[tuple[int, int]], device: str) -> None:
    batch = batch_of(apart(shapes), shapes, device)
    work = work_of(batch, item_tokens=8, short=8)
    num_tokens, most = batch.q.shape[0], min(batch.q.shape[0] // 9, len(shapes))
    assert int(work.sums[0, -1]) <= num_tokens // 16 + most
    assert int(work.counter) <= work.num_items


EIGHT_BITS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INT8_CASES = tuple(case for case in ATTENTION_CASES if sum(keys for _, keys in case.rows) < 200)[::7]


def narrowed(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """A cache in 8 bits."""
    return round_rows(cache) if dtype is torch.int8 else reference.saturated(cache, dtype)


@pytest.mark.parametrize("gap", [0, 3], ids=["words", "bytes"])
@pytest.mark.parametrize("case", INT8_CASES, ids=AttentionCase.id)
def test_int8_rows(case: AttentionCase, gap: int, device: str) -> None:
    """Rows that begin at words of memory, and rows that do not."""
    inputs = placed(attention_inputs(case), device)
    for name in ("k_cache", "v_cache"):
        rows = round_rows(getattr(inputs, name))
        wide = torch.full((*rows.shape[:2], rows.shape[2] + gap), -1, dtype=torch.int8, device=device)
        wide[..., : rows.shape[2]] = rows
        setattr(inputs, name, wide[..., : rows.shape[2]])
    assert gap == 0 or as_words(inputs.k_cache).dtype is torch.int8
    close(inputs.run(OPS), inputs.run(REFERENCE))


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_cache_of_8_bits_is_a_cache_of_what_it_stands_for(kind: str, dtype: torch.dtype, device: str) -> None:
    """To the last bit where tiles are the same, which those of int8 rows are not, and about what the reference says."""
    rows = [(1, 70), (11, 40)]
    batch = batch_of(apart(rows), rows, device, dtype=dtype)
    k, v = (narrowed(cache, EIGHT_BITS[kind]) for cache in (batch.k_cache, batch.v_cache))
    small = replace(batch, k_cache=k, v_cache=v)
    stood_for = (expand_rows(x, dtype) if kind == "int8" else x.to(dtype) for x in (k, v))
    wide = replace(batch, **dict(zip(("k_cache", "v_cache"), stood_for, strict=True)))
    found, expected = small.run(OPS), wide.run(OPS)
    assert torch.equal(found, expected) or kind == "int8"
    close(found, expected)
    close(found, small.run(REFERENCE))


def test_a_decode_step_launches_nothing_for_long_rows(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    launched: list[int] = []
    attend_long = attention._attend_long

    def noted(call, tiling, work, ragged, sinks, out, short) -> None:  # type: ignore[no-untyped-def]
        launched.append(out.shape[0])
        attend_long(call, tiling, work, ragged, sinks, out, short)

    monkeypatch.setattr(attention, "_attend_long", noted)
    for rows in ([(1, 3 + row) for row in range(10)], [(1, 5)] * 8 + [(9, 12)]):
        batch = batch_of(apart(rows), rows, device)
        close(batch.run(OPS), batch.run(REFERENCE))
    assert launched == [17]
