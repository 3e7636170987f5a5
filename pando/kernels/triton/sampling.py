"""`OpTable.sample` without sorting the vocabulary, and without waiting for the device.

A row's weights exp((logit - largest) / temperature) are counted in units of 2^-40 as 64-bit integers: sums are exact,
do not depend on their order, and prefix sums of pieces fit together. They differ from the reference's float64 by about
1e-7 of the mass, so a uniform number that close to a boundary between two tokens may draw its neighbour.

top_k, top_p and min_p keep a prefix of the tokens in descending order (lower id first on a tie). A token's place in
that order is one distinct 64-bit integer, so a filter is a threshold, found by bisection. Four kernels:

1. pieces of the vocabulary: best token, sum of weights, largest logit of every 64;
2. rows: a lower bound of the threshold. The k-th largest of the groups' largest logits is at most the k-th largest
   logit, and tokens whose groups' largest alone have a mass of p hold the nucleus;
3. pieces: mass, and the few tokens above the bound, in order of their ids;
4. rows: exact thresholds among those tokens, held in registers, and the draw. Flat distributions leave too many
   tokens above the bound: then each step of the bisection reads the row.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pando.core.sampling import GREEDY_TEMPERATURE
from pando.kernels.triton.launch import CompileCase, meta
from pando.kernels.triton.logits import ordered

PIECE = 4096
"""Logits of a program that handles a part of a row."""

GROUP = 64
"""Logits that share a largest one in the search for the bound."""

HELD = 2048
"""Tokens above the bound that the last kernel holds in registers."""

_LOWEST = tl.constexpr(-0x80000000)
_UNIT = tl.constexpr(1099511627776.0)  # 2^40
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_GREEDY = tl.constexpr(GREEDY_TEMPERATURE)


@triton.jit
def _number(key):
    """The float32 of an `ordered` key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, largest, temperature):
    """exp((x - largest) / temperature), 0 for what is no number."""
    weight = tl.exp((x - largest) / temperature)
    return tl.where((x == x) & (weight == weight), tl.minimum(weight, 1.0), 0.0)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def _target(seed, position, mass):
    """floor(u * mass) for the uniform number u of (seed, position), see `pando.kernels.reference`."""
    golden = tl.full((), _GOLDEN, tl.uint64)
    word = _mix(_mix(seed.to(tl.uint64) + golden) + position.to(tl.uint64) * golden)
    return tl.umulhi((word >> 11) << 11, mass.to(tl.uint64)).to(tl.int64)


@triton.jit
def _share(p, mass):
    """The least integer that is at least p * mass, for p in [0, 1); at least 1."""
    bits = (p * 4294967296.0).to(tl.int64).to(tl.uint64) << 32
    rest = bits * mass.to(tl.uint64)
    whole = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
    return tl.maximum(whole + (rest != 0).to(tl.int64), 1)


@triton.jit
def _piece_kernel(
    logits_ptr, heat_ptr, best_ptr, sum_ptr, group_ptr, vocab, pieces, PIECE: tl.constexpr, GROUP: tl.constexpr
):
    """Best token, sum of weights relative to it, and the groups' largest keys of a piece."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < vocab
    x = tl.load(logits_ptr + row * vocab + place, mask=inside, other=float("-inf"))
    key = tl.where(inside, ordered(x), _LOWEST)
    best = tl.max((key.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), 0)
    temperature = tl.load(heat_ptr + row)
    weight = _weight(x, _number((best >> 32).to(tl.int32)), tl.where(temperature < _GREEDY, 1.0, temperature))
    tl.store(best_ptr + row * pieces + piece, best)
    tl.store(sum_ptr + row * pieces + piece, tl.sum(weight, 0))
    COUNT: tl.constexpr = PIECE // GROUP
    groups = tl.max(tl.reshape(key, (COUNT, GROUP)), 1)
    tl.store(group_ptr + (row * pieces + piece) * COUNT + tl.arange(0, COUNT), groups)


@triton.jit
def _middle(low, high):
    """Between two integers without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _bound_kernel(
    best_ptr,
    sum_ptr,
    group_ptr,
    heat_ptr,
    k_ptr,
    p_ptr,
    min_p_ptr,
    row_best_ptr,
    bound_ptr,
    vocab,
    pieces,
    groups,
    PIECES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A row's best token, and a key that no kept token is below; the largest key where nothing is filtered."""
    row, piece, group = tl.program_id(0).to(tl.int64), tl.arange(0, PIECES), tl.arange(0, GROUPS)
    best_of = tl.load(best_ptr + row * pieces + piece, mask=piece < pieces, other=_LOWEST * 0x100000000)
    best = tl.max(best_of, 0)
    tl.store(row_best_ptr + row, best)
    heat, k, p, min_p = tl.load(heat_ptr + row), tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(min_p_ptr + row)
    bound = tl.full((), 0x7FFFFFFF, tl.int32)
    some_k = (k > 0) & (k < vocab)
    if (heat >= _GREEDY) & (some_k | (p < 1.0) | (min_p > 0.0)):
        largest = _number((best >> 32).to(tl.int32))
        shares = tl.load(sum_ptr + row * pieces + piece, mask=piece < pieces, other=0.0)
        mass = tl.sum(shares * _weight(_number((best_of >> 32).to(tl.int32)), largest, heat), 0)
        key = tl.load(group_ptr + row * groups + group, mask=group < groups, other=_LOWEST)
        weight = tl.where(group < groups, _weight(_number(key), largest, heat), 0.0)
        # top_p after top_k is of the mass that top_k leaves: all of that must be above the bound, so top_k's it is.
        joint = some_k & (p < 1.0)
        # A little more than p: the mass is rounded here, and the bound must not be too high.
        need = tl.where((p < 1.0) & (joint == 0), p * mass * 1.0001, float("inf"))
        count = tl.where(some_k, k, 0x7FFFFFFF)
        low, high = tl.full((), _LOWEST, tl.int32), tl.full((), 0x7FFFFFFF, tl.int32)
        for _ in range(32):
            middle = _middle(low, high)
            above = key >= middle
            enough = (tl.sum(above.to(tl.int32), 0) >= count) | (tl.sum(tl.where(above, weight, 0.0), 0) >= need)
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        worth = largest + heat * (tl.log(tl.maximum(min_p, 1e-30)) - 0.001)
        floor = tl.where((min_p > 0.0) & (joint == 0) & (worth == worth), ordered(worth), _LOWEST)
        bound = tl.maximum(low, tl.minimum(floor, (best >> 32).to(tl.int32)))
    tl.store(bound_ptr + row, bound)


@triton.jit
def _units(x, inside, best, heat):
    """Weights as integers, 0 where there is no token."""
    weight = _weight(x, _number((best >> 32).to(tl.int32)), heat)
    return tl.where(inside, (weight * _UNIT).to(tl.int64), 0)


@triton.jit
def _mass_kernel(
    logits_ptr, heat_ptr, row_best_ptr, bound_ptr, mass_ptr, count_ptr, held_ptr, vocab, pieces, PIECE: tl.constexpr
):
    """Mass of a piece, and its tokens above the bound one after the other."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat, best, bound = tl.load(heat_ptr + row), tl.load(row_best_ptr + row), tl.load(bound_ptr + row)
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < vocab
    x = tl.load(logits_ptr + row * vocab + place, mask=inside, other=float("-inf"))
    heat = tl.where(heat < _GREEDY, 1.0, heat)
    tl.store(mass_ptr + row * pieces + piece, tl.sum(_units(x, inside, best, heat), 0))
    if bound != 0x7FFFFFFF:
        above = (inside & (ordered(x) >= bound)).to(tl.int32)
        slot = tl.cumsum(above, 0) - above
        tl.store(held_ptr + (row * pieces + piece) * PIECE + slot, place, mask=above != 0)
        tl.store(count_ptr + row * pieces + piece, tl.sum(above, 0))
    else:
        tl.store(count_ptr + row * pieces + piece, 0)


@triton.jit
def _rank(x, place):
    """Distinct integers that order tokens as the filters do: by logit, then the lower id above."""
    return (ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def _above_in_row(logits_at, vocab, best, heat, threshold, PIECE: tl.constexpr):
    """(number, mass) of a row's tokens whose rank is at least the threshold."""
    count, mass = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    for begin in range(0, vocab, PIECE):
        place = begin + tl.arange(0, PIECE)
        inside = place < vocab
        x = tl.load(logits_at + place, mask=inside, other=float("-inf"))
        above = inside & (_rank(x, place) >= threshold)
        count += tl.sum(above.to(tl.int64), 0)
        mass += tl.sum(tl.where(above, _units(x, inside, best, heat), 0), 0)
    return count, mass


@triton.jit
def _search(
    ranks, units, low, best, need, logits_at, vocab, heat, HELD: tl.constexpr, MASS: tl.constexpr, PIECE: tl.constexpr
):
    """The largest threshold above which there are `need` tokens, or units of mass; `low` if there never are.

    HELD: among the given tokens; else among all of the row. Ends as soon as the interval holds one token.
    """
    high = best + 1
    fewer, more = tl.zeros((), tl.int64), tl.full((), 0x7FFFFFFFFFFF, tl.int64)
    while (low + 1 < high) & (more - fewer > 1):
        middle = _middle(low, high)
        if HELD:
            above = ranks >= middle
            count = tl.sum(above.to(tl.int64), 0)
            mass = tl.sum(tl.where(above, units, 0), 0)
        else:
            count, mass = _above_in_row(logits_at, vocab, best, heat, middle, PIECE)
        enough = (mass if MASS else count) >= need
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        more, fewer = tl.where(enough, count, more), tl.where(enough, fewer, count)
    return low


@triton.jit
def _thresholds(ranks, units, low, best, total, k, p, logits_at, vocab, heat, HELD: tl.constexpr, PIECE: tl.constexpr):
    """The least rank that top_k and top_p keep."""
    if (k > 0) & (k < vocab):
        need = k.to(tl.int64)
        low = _search(ranks, units, low, best, need, logits_at, vocab, heat, HELD, False, PIECE)
        if HELD:
            total = tl.sum(tl.where(ranks >= low, units, 0), 0)
        else:
            count, total = _above_in_row(logits_at, vocab, best, heat, low, PIECE)
    if p < 1.0:
        need = _share(p, total)
        low = _search(ranks, units, low, best, need, logits_at, vocab, heat, HELD, True, PIECE)
    return low


@triton.jit
def _drawn(kept, before, target):
    """[N] bool: the token (one at most) at which prefix sums, from `before` on, pass the target; their last sum."""
    ends = before + tl.cumsum(kept, 0)
    return (ends > target) & (ends - kept <= target), before + tl.sum(kept, 0)


@triton.jit
def _draw_in_row(logits_at, best, heat, low, min_p, first, last, before, target, PIECE: tl.constexpr):
    """The token drawn from those of logits first .. last - 1 with ranks of at least low, and the sum behind them."""
    token = tl.full((), -1, tl.int32)
    for begin in range(first, last, PIECE):
        place = begin + tl.arange(0, PIECE)
        inside = place < last
        x = tl.load(logits_at + place, mask=inside, other=float("-inf"))
        inside = inside & (_rank(x, place) >= low)
        inside = inside & (_weight(x, _number((best >> 32).to(tl.int32)), heat) >= min_p)
        hit, before = _drawn(_units(x, inside, best, heat), before, target)
        token = tl.maximum(token, tl.max(tl.where(hit, place, -1), 0))
    return token, before


@triton.jit
def _draw_held(
    logits_at, place, inside, best, heat, low, total, k, p, min_p, seed, position, vocab, PIECE: tl.constexpr
):
    """The token drawn by a filtered row whose tokens above the bound are at hand."""
    x = tl.load(logits_at + place, mask=inside, other=float("-inf"))
    ranks = tl.where(inside, _rank(x, place), -0x8000000000000000)
    units = _units(x, inside, best, heat)
    low = _thresholds(ranks, units, low, best, total, k, p, logits_at, vocab, heat, True, PIECE)
    inside = (ranks >= low) & (_weight(x, _number((best >> 32).to(tl.int32)), heat) >= min_p)
    kept = tl.where(inside, units, 0)
    hit, mass = _drawn(kept, tl.zeros((), tl.int64), _target(seed, position, tl.sum(kept, 0)))
    return tl.max(tl.where(hit, place, -1), 0)


@triton.jit
def _draw_filtered(logits_at, best, heat, low, total, k, p, min_p, seed, position, vocab, PIECE: tl.constexpr):
    """The token drawn by a filtered row of which too many tokens are above the bound: everything from memory."""
    none = tl.zeros((16,), tl.int64)
    low = _thresholds(none, none, low, best, total, k, p, logits_at, vocab, heat, False, PIECE)
    start, never = tl.zeros((), tl.int64), tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    token, kept = _draw_in_row(logits_at, best, heat, low, min_p, 0, vocab, start, never, PIECE)
    target = _target(seed, position, kept)
    token, kept = _draw_in_row(logits_at, best, heat, low, min_p, 0, vocab, start, target, PIECE)
    return token


@triton.jit
def _draw_kernel(
    logits_ptr,
    heat_ptr,
    k_ptr,
    p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    row_best_ptr,
    bound_ptr,
    mass_ptr,
    count_ptr,
    held_ptr,
    out_ptr,
    vocab,
    pieces,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    HELD: tl.constexpr,
):
    """A row's token."""
    row, piece = tl.program_id(0).to(tl.int64), tl.arange(0, PIECES)
    heat, best, bound = tl.load(heat_ptr + row), tl.load(row_best_ptr + row), tl.load(bound_ptr + row)
    logits_at = logits_ptr + row * vocab
    is_number = (best >> 32) != 0x7FFFFFFF
    top = tl.where(is_number, 0x7FFFFFFF - (best & 0x7FFFFFFF), 0).to(tl.int32)
    token = tl.full((), -1, tl.int32)
    if (heat >= _GREEDY) & is_number:
        masses = tl.load(mass_ptr + row * pieces + piece, mask=piece < pieces, other=0)
        total = tl.sum(masses, 0)
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
        if bound == 0x7FFFFFFF:
            ends = tl.cumsum(masses, 0)
            chosen = tl.sum((ends <= _target(seed, position, total)).to(tl.int32), 0)
            before = tl.sum(tl.where(piece < chosen, masses, 0), 0)
            first = chosen * PIECE
            last = tl.minimum(first + PIECE, vocab)
            low, target = tl.full((), -0x8000000000000000, tl.int64), _target(seed, position, total)
            token, total = _draw_in_row(logits_at, best, heat, low, 0.0, first, last, before, target, PIECE)
        else:
            k, p, min_p = tl.load(k_ptr + row), tl.load(p_ptr + row), tl.load(min_p_ptr + row)
            counts = tl.load(count_ptr + row * pieces + piece, mask=piece < pieces, other=0)
            low = bound.to(tl.int64) << 32
            if tl.sum(counts, 0) <= HELD:
                held_at, count_at = held_ptr + row * pieces * PIECE, count_ptr + row * pieces
                place, inside = _held(held_at, count_at, pieces, PIECE, HELD)
                token = _draw_held(
                    logits_at, place, inside, best, heat, low, total, k, p, min_p, seed, position, vocab, PIECE
                )
            else:
                token = _draw_filtered(logits_at, best, heat, low, total, k, p, min_p, seed, position, vocab, PIECE)
    tl.store(out_ptr + row, tl.where(token < 0, top, token).to(tl.int64))


@triton.jit
def _held(held_at, counts_at, pieces, PIECE: tl.constexpr, HELD: tl.constexpr):
    """Ids [HELD] of a row's tokens above the bound in order, and which of the places are taken."""
    index = tl.arange(0, HELD)
    at, start = tl.zeros((HELD,), tl.int32), tl.zeros((), tl.int32)
    for piece in range(pieces):
        at = tl.where(index >= start, piece * PIECE + index - start, at)
        start += tl.load(counts_at + piece)
    inside = index < start
    return tl.load(held_at + at, mask=inside, other=0), inside


def sample(
    logits_RV: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """`OpTable.sample`; a row whose largest logit is no number gets a token, too."""
    logits = logits_RV.contiguous()
    (rows, vocab), device = logits.shape, logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return out
    pieces = triton.cdiv(vocab, PIECE)
    best, mass = torch.empty(2, rows, pieces, dtype=torch.int64, device=device)
    row_best = torch.empty(rows, dtype=torch.int64, device=device)
    bound = torch.empty(rows, dtype=torch.int32, device=device)
    filters = (top_k, top_p, min_p)
    _find_bounds(logits, temperature, filters, best, row_best, bound)
    counts = torch.empty(rows, pieces, dtype=torch.int32, device=device)
    held = torch.empty(rows, pieces * PIECE, dtype=torch.int32, device=device)
    _mass_kernel[(rows, pieces)](
        logits, temperature, row_best, bound, mass, counts, held, vocab, pieces, PIECE=PIECE, num_warps=8
    )
    _draw_kernel[(rows,)](
        logits,
        temperature,
        *filters,
        seeds,
        positions,
        *(row_best, bound, mass, counts, held, out),
        vocab,
        pieces,
        PIECES=triton.next_power_of_2(pieces),
        PIECE=PIECE,
        HELD=HELD,
        num_warps=16,
    )
    return out


def _find_bounds(
    logits: Tensor,
    temperature: Tensor,
    filters: tuple[Tensor, Tensor, Tensor],
    best: Tensor,
    row_best: Tensor,
    bound: Tensor,
) -> None:
    """The first two kernels: best tokens of pieces [R, pieces] and rows [R], and the rows' bounds [R]."""
    (rows, vocab), (_, pieces), device = logits.shape, best.shape, logits.device
    groups = pieces * (PIECE // GROUP)
    sums = torch.empty(rows, pieces, dtype=torch.float32, device=device)
    group = torch.empty(rows, groups, dtype=torch.int32, device=device)
    _piece_kernel[(rows, pieces)](
        logits, temperature, best, sums, group, vocab, pieces, PIECE=PIECE, GROUP=GROUP, num_warps=4
    )
    _bound_kernel[(rows,)](
        best,
        sums,
        group,
        temperature,
        *filters,
        row_best,
        bound,
        vocab,
        pieces,
        groups,
        PIECES=triton.next_power_of_2(pieces),
        GROUPS=triton.next_power_of_2(groups),
        num_warps=8,
    )


def _case(vocab: int) -> CompileCase:
    floats, ints = meta(3, dtype=torch.float32), meta(3, dtype=torch.int64)
    arguments = (meta(3, vocab, dtype=torch.float32), floats, meta(3, dtype=torch.int32), floats, floats, ints, ints)
    return CompileCase(f"sample-{vocab}", partial(sample, *arguments))


COMPILE_CASES = (_case(151936), _case(32000))
