"""Pairs (token, choice) of a mixture sorted by expert, and cut into tiles of rows of one expert, all on the device.

A stable counting sort: blocks of pairs are counted by expert, one program turns the counts into places, and each block
puts its pairs there. A decode step's few pairs take one program for all of it. Nothing waits for the device: the number
of tiles a step could need at most follows from shapes, and tiles that it does not need are marked with -1.

Legend: P pairs, E experts.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.matrix import Routing

FEW_PAIRS = 256
"""Pairs that one program sorts alone: it compares each with each."""

BLOCK = 512
"""Pairs of a program where there are more."""


@triton.jit
def _chosen(id_ptr, first, pairs, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """int32 [SIZE, EXPERTS]: 1 where a pair has chosen an expert."""
    pair = first + tl.arange(0, SIZE)
    expert = tl.load(id_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    return (expert[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _counts(id_ptr, first, pairs, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """[EXPERTS]: how many of SIZE pairs have chosen an expert; 16 at a time, as all would not fit the registers."""
    counts = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, SIZE, 16):
        counts += tl.sum(_chosen(id_ptr, first + begin, pairs, 16, EXPERTS), 0)
    return counts


@triton.jit
def _rank(id_ptr, first, begin, pairs, SIZE: tl.constexpr):
    """[16]: how many pairs between `first` and a pair have chosen its expert, for the 16 pairs from `begin` on."""
    pair = (begin + tl.arange(0, 16))[:, None]
    before = (first + tl.arange(0, SIZE))[None, :]
    row = tl.load(id_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    column = tl.load(id_ptr + before, mask=before < pairs, other=-2).to(tl.int32)
    return tl.sum(((row == column) & (before < pair)).to(tl.int32), 1)


@triton.jit
def _write_tiles(counts, starts, tile_ptr, num_tiles, ROWS: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr):
    """The table of tiles from the experts' counts [EXPERTS] and places in the list."""
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, 0)
    used = tl.sum(tiles, 0)
    for begin in range(0, num_tiles, SIZE):
        tile = begin + tl.arange(0, SIZE)
        mine = (tile[:, None] >= (ends - tiles)[None, :]) & (tile[:, None] < ends[None, :])
        expert = tl.sum(tl.where(mine, tl.arange(0, EXPERTS)[None, :], 0), 1)
        first = tl.sum(tl.where(mine, starts[None, :] + (tile[:, None] - (ends - tiles)[None, :]) * ROWS, 0), 1)
        end = tl.sum(tl.where(mine, (starts + counts)[None, :], 0), 1)
        inside = tile < num_tiles
        tl.store(tile_ptr + 3 * tile, tl.where(tile < used, expert, -1), mask=inside)
        tl.store(tile_ptr + 3 * tile + 1, first, mask=inside)
        tl.store(tile_ptr + 3 * tile + 2, end, mask=inside)


@triton.jit
def _route_few_kernel(
    id_ptr, tile_ptr, pair_ptr, pairs, num_tiles, ROWS: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr
):
    """All of it in one program."""
    counts = _counts(id_ptr, 0, pairs, SIZE, EXPERTS)
    starts = tl.cumsum(counts, 0) - counts
    for begin in range(0, SIZE, 16):
        pair = begin + tl.arange(0, 16)
        chosen = _chosen(id_ptr, begin, pairs, 16, EXPERTS)
        place = tl.sum(chosen * starts[None, :], 1) + _rank(id_ptr, 0, begin, pairs, SIZE)
        tl.store(pair_ptr + place, pair, mask=pair < pairs)
    _write_tiles(counts, starts, tile_ptr, num_tiles, ROWS, EXPERTS, 16)


@triton.jit
def _count_kernel(id_ptr, count_ptr, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    counts = _counts(id_ptr, block * BLOCK, pairs, BLOCK, EXPERTS)
    tl.store(count_ptr + block * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit
def _plan_kernel(
    count_ptr, tile_ptr, blocks, num_tiles, ROWS: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Each block's count of an expert becomes the place of the block's first pair of that expert."""
    block, expert = tl.arange(0, CHUNK)[:, None], tl.arange(0, EXPERTS)[None, :]
    counts = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, blocks, CHUNK):
        at = count_ptr + (begin + block) * EXPERTS + expert
        counts += tl.sum(tl.load(at, mask=begin + block < blocks, other=0), 0)
    starts = tl.cumsum(counts, 0) - counts
    place = starts
    for begin in range(0, blocks, CHUNK):
        at = count_ptr + (begin + block) * EXPERTS + expert
        here = tl.load(at, mask=begin + block < blocks, other=0)
        tl.store(at, place[None, :] + tl.cumsum(here, 0) - here, mask=begin + block < blocks)
        place += tl.sum(here, 0)
    _write_tiles(counts, starts, tile_ptr, num_tiles, ROWS, EXPERTS, 16)


@triton.jit
def _place_kernel(id_ptr, place_ptr, pair_ptr, pairs, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    for begin in range(block * BLOCK, block * BLOCK + BLOCK, 16):
        pair = begin + tl.arange(0, 16)
        inside = pair < pairs
        expert = tl.load(id_ptr + pair, mask=inside, other=0)
        first = tl.load(place_ptr + block * EXPERTS + expert, mask=inside, other=0)
        place = first + _rank(id_ptr, block * BLOCK, begin, pairs, BLOCK)
        tl.store(pair_ptr + place, pair, mask=inside)


def route(topk_ids: Tensor, experts: int, rows: int) -> Routing:
    """The choices [T, k] int64, each in 0 .. experts - 1, sorted by expert in tiles of up to `rows` rows.

    Pairs of one expert keep their order. The result gathers (see `Routing`).
    """
    pairs, device = topk_ids.numel(), topk_ids.device
    num_tiles = min(pairs, pairs // rows + min(pairs, experts))
    tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=device)
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    width = triton.next_power_of_2(experts)
    ids = topk_ids.contiguous()
    if pairs <= FEW_PAIRS:
        size = max(16, triton.next_power_of_2(pairs))
        _route_few_kernel[(1,)](ids, tiles, order, pairs, num_tiles, ROWS=rows, EXPERTS=width, SIZE=size, num_warps=8)
    else:
        blocks = triton.cdiv(pairs, BLOCK)
        counts = torch.empty(blocks, width, dtype=torch.int32, device=device)
        _count_kernel[(blocks,)](ids, counts, pairs, EXPERTS=width, BLOCK=BLOCK, num_warps=8)
        _plan_kernel[(1,)](
            counts, tiles, blocks, num_tiles, ROWS=rows, EXPERTS=width, CHUNK=max(1, 2048 // width), num_warps=8
        )
        _place_kernel[(blocks,)](ids, counts, order, pairs, EXPERTS=width, BLOCK=BLOCK, num_warps=8)
    return Routing(tiles, order, topk_ids.shape[1], gather=True)


COMPILE_CASES = tuple(
    CompileCase(f"{pairs}-of-{experts}", partial(route, meta(pairs // 8, 8, dtype=torch.int64), experts, 16))
    for pairs, experts in ((8, 128), (256, 128), (65536, 512))
)
